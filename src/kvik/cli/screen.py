"""A terminal used as a picture: plain escape sequences, keys one by one, everything as it was afterwards."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TextIO

ENTER = "\x1b[?1049h\x1b[?25l"  # the alternate screen, no cursor
LEAVE = "\x1b[?25h\x1b[?1049l"


class Screen:
    def __init__(self, stdin: TextIO, stdout: TextIO) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self._before: list[Any] = []

    def __enter__(self) -> Screen:
        import termios
        import tty

        fd = self.stdin.fileno()
        self._before = termios.tcgetattr(fd)
        tty.setcbreak(fd)
        self.stdout.write(ENTER)
        self.stdout.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        import termios

        termios.tcsetattr(self.stdin.fileno(), termios.TCSADRAIN, self._before)
        self.stdout.write(LEAVE)
        self.stdout.flush()

    def wait(self, seconds: float) -> str:
        """The key pressed within `seconds`, or an empty string. End of input is Ctrl-D."""
        import select

        fd = self.stdin.fileno()
        if not select.select([fd], [], [], seconds)[0]:
            return ""
        return os.read(fd, 1).decode("latin-1") or "\x04"

    def draw(self, text: str) -> None:
        """Replace the picture; lines below the last row are not shown."""
        try:
            rows = os.get_terminal_size(self.stdout.fileno()).lines or 24
        except OSError:
            rows = 24
        lines = text.splitlines()[: rows - 1]
        self.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self.stdout.flush()
