"""What goes to a terminal: width, colours, and text that cannot drive it.

Names, titles, addresses and file names come from guests, documents and other hosts. Printed raw, one of them could
move the cursor, recolour the screen or set the window's title; so every such string passes `neutralise` on its way out.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TextIO

COLOURS = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36", "dim": "2", "bold": "1"}

STATE_COLOURS = {
    "running": "green",
    "idle": "green",
    "paused": "yellow",
    "in shutdown": "yellow",
    "pmsuspended": "yellow",
    "crashed": "red",
    "shut off": "dim",
}


def neutralise(text: str, keep: str = "") -> str:
    """`text` with every character that is not printable shown as an escape (`\\x1b`), but for those in `keep`.

    `str.isprintable` is false for the C0 and C1 controls, for the format characters that reorder text (bidirectional
    overrides), for lone surrogates and for the separators other than the space.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode("ascii") for char in text
    )


def width(text: str) -> int:
    """Terminal cells that `text` takes: 2 for an East Asian wide character, 0 for a combining one."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def clip(text: str, cells: int) -> str:
    """`text`, or as much of it as fits in `cells` with an ellipsis at its end."""
    if width(text) <= cells:
        return text
    kept, used = [], 0
    for char in text:
        step = width(char)
        if used + step > cells - 1:
            break
        kept.append(char)
        used += step
    return "".join(kept) + "…"


def wrap(text: str, limit: int, indent: str = "") -> str:
    """`text` broken between words into lines of at most `limit` cells; the later ones begin with `indent`."""
    if width(text) <= limit or limit < 20:
        return text
    first, *words = text.lstrip(" ").split(" ")
    lines, line = [], " " * (len(text) - len(text.lstrip(" "))) + first
    for word in words:
        if line.strip() and width(line) + 1 + width(word) > limit:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}"
    return "\n".join([*lines, line])


def is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def columns(stream: TextIO) -> int | None:
    """The terminal's width in cells, or None if `stream` is no terminal."""
    if not is_terminal(stream):
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def wants_colour(stream: TextIO, environ: Mapping[str, str] | None = None) -> bool:
    """True on a capable terminal, unless NO_COLOR (https://no-color.org) is set to anything but the empty string."""
    environ = os.environ if environ is None else environ
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb" and is_terminal(stream)


def paint(text: str, colour: str | None) -> str:
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if colour and text else text
