"""The person's editor on a private temporary file."""

from __future__ import annotations

import os
import tempfile

from kvik.errors import HostError, OperationFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

BOUND = 10 << 20  # bytes that are read back


def command(environ: Mapping[str, str] = os.environ) -> list[str]:
    """`$VISUAL`, else `$EDITOR`, else vi. A shell sees it only if it is more than words, as virsh and git do it."""
    text = environ.get("VISUAL") or environ.get("EDITOR") or "vi"
    if all(char.isalnum() or char in "-_/.,:= \t+@" for char in text):
        return text.split()
    return ["/bin/sh", "-c", f'{text} "$1"', "editor"]


class TextFile:
    """A text in a file of its own, mode 0600, that an editor can be opened on more than once."""

    def __init__(self, text: str, suffix: str) -> None:
        descriptor, self.path = tempfile.mkstemp(prefix="kvik", suffix=suffix)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)

    def __enter__(self) -> TextFile:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            os.unlink(self.path)  # noqa: PTH108
        except OSError:
            pass

    def edit(self) -> None:
        """Run the editor until it ends; `OperationFailed` if it did not end well."""
        argv = [*command(), self.path]
        try:
            # The terminal is the editor's while it runs: no pipes, our own descriptors, and so not host.process.
            code = os.spawnvp(os.P_WAIT, argv[0], argv)
        except OSError as error:
            raise HostError(f"failed to run the editor '{argv[0]}': {error.strerror}") from error
        if code == 127:
            raise OperationFailed(
                f"the editor '{argv[0]}' was not found", remedy="set EDITOR to one that is installed, such as nano"
            )
        if code:
            how = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            raise OperationFailed(f"{argv[0]}: the editor {how}; nothing was changed")

    def read(self) -> str:
        with open(self.path, encoding="utf-8") as file:  # noqa: PTH123
            text = file.read(BOUND + 1)
        if len(text) > BOUND:
            raise OperationFailed(f"the edited text is larger than {BOUND >> 20} MiB")
        return text
