"""kvik img --object secret,...: passphrases, which go from a file or a word of the command into files in memory.

Only there are they found afterwards: in no error, and on no command line of a program that is run for them.
"""

from __future__ import annotations

import os

from kvik.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import ExitStack

__all__ = ["lend", "parse_secret"]

LONGEST = 1 << 20  # bytes of a passphrase with its encoding
KNOWN = ("id", "data", "file", "format", "keyid", "iv")


def parse_secret(text: str) -> tuple[dict[str, str], bytes]:
    """(what is no secret of a `secret` object, its value). `UsageError`, `InvalidSecret`; none of them has the value.

    `text` is `secret,id=NAME,file=PATH`, with `data=VALUE` instead of the file, or the same as a JSON object.
    """
    values = _json(text) if text.startswith("{") else _words(text)
    kind = values.pop("qom-type", "")
    if kind != "secret":
        raise UsageError(f"objects of type '{kind}' are of no use here", remedy="secret,id=NAME,file=FILE")
    for name in values:
        if name not in KNOWN:
            raise UsageError(f"Property 'secret.{name}' not found", remedy=f"known: {', '.join(KNOWN)}")
    if not values.get("id"):
        raise UsageError("Parameter 'id' is missing", remedy="secret,id=NAME,file=FILE")
    data, file = values.pop("data", None), values.pop("file", None)
    if (data is None) == (file is None):
        many = "'file' and 'data' are mutually exclusive" if data is not None else "Must provide 'file' or 'data'"
        raise UsageError(f"secret '{values['id']}': {many}")
    return values, _read(file) if file is not None else os.fsencode(data or "")


def _words(text: str) -> dict[str, str]:
    first, *others = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
    values = {"qom-type": first.removeprefix("qom-type=")}
    for word in others:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError("Expected '=' after a parameter of --object", remedy="secret,id=NAME,file=FILE")
        values[name] = value
    return values


def _json(text: str) -> dict[str, str]:
    import json

    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        # What it is said to be wrong with may be the secret.
        raise UsageError("--object is no JSON object of strings", remedy='{"qom-type": "secret", "id": "NAME", ...}')
    return found


def _read(path: str) -> bytes:
    """Also from a pipe: `file=/dev/fd/3`."""
    from kvik.errors import InvalidSecret

    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib costs 4 ms of start
            value = file.read(LONGEST + 1)
    except OSError as error:
        raise InvalidSecret(f"Unable to read {path}: {error.strerror}") from error
    if len(value) > LONGEST:
        raise InvalidSecret(f"{path} is longer than a secret can be ({LONGEST} bytes)")
    return value


def lend(texts: list[str], stack: ExitStack) -> tuple[list[str], list[int]]:
    """(qemu-img's words for the objects, descriptors of the files that they name), until `stack` is closed."""
    from kvik.host.secret_file import lent

    words: list[str] = []
    files: list[int] = []
    for text in texts:
        values, value = parse_secret(text)
        files.append(stack.enter_context(lent(value)))
        values["file"] = f"/proc/self/fd/{files[-1]}"
        words += ["--object", "secret," + ",".join(f"{k}={v.replace(',', ',,')}" for k, v in values.items())]
    return words, files
