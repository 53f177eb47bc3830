"""Progress on standard error: a bar or a line redrawn in place on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time

from kvik.cli import term

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

BAR = 28  # cells
LEAST_BAR = 4
REDRAW = 0.05  # seconds between two drawings of the same line


def sized(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB" if count >= 1 << 20 else f"{count // 1024} KiB"


class Progress:
    """`line` prints for good; `transient` draws what the next call replaces; `bar` is both."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self.stream = stream
        self.quiet = quiet
        self.terminal = term.is_terminal(stream) and not quiet
        self._drawn = False
        self._last = 0.0
        self._labels: set[str] = set()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()

    def clear(self) -> None:
        if self._drawn:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self._drawn = False

    def line(self, text: str) -> None:
        if self.quiet:
            return
        self.clear()
        text = term.neutralise(text)
        if self.terminal:
            text = term.wrap(text, term.columns(self.stream) or 80, "  ")
        self.stream.write(text + "\n")
        self.stream.flush()

    def transient(self, text: str, *, always: bool = False) -> None:
        """Draw `text` in place; nothing where there is no terminal."""
        now = time.monotonic()
        if not self.terminal or (self._drawn and not always and now - self._last < REDRAW):
            return
        self._last = now
        limit = (term.columns(self.stream) or 80) - 1
        self.stream.write("\r" + term.clip(term.neutralise(text), limit) + "\x1b[K")
        self.stream.flush()
        self._drawn = True

    def bar(self, label: str, done: int, total: int, *, is_bytes: bool = False) -> None:
        """How far `label` is. Off a terminal: one line when it begins."""
        if not self.terminal:
            if label not in self._labels:
                self._labels.add(label)
                self.line(f"{label} ({sized(total)})" if is_bytes and total else label)
            return
        share = min(1.0, done / total) if total > 0 else 0.0
        figures = f" {sized(done)} of {sized(total)}" if is_bytes and total else ""
        widest = f"{label} [] 100%" + (f" {sized(total)} of {sized(total)}" if figures else "")
        text = f"{label} {self._cells(share, term.width(widest))}{share:4.0%}{figures}"
        if total > 0 and done >= total:
            if label not in self._labels:
                self._labels.add(label)
                self.line(text)
        else:
            self._labels.discard(label)
            self.transient(text)

    def _cells(self, share: float, others: int) -> str:
        """The bar itself, as long as the line has room beside `others` cells; none where that is little."""
        length = min(BAR, (term.columns(self.stream) or 80) - 1 - others)
        if length < LEAST_BAR:
            return ""
        filled = int(share * length)
        return f"[{'#' * filled}{'.' * (length - filled)}] "
