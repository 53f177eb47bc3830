"""kvik img: how far a command is. With -p as qemu-img prints it, or as a bar on a terminal; on SIGUSR1 without."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from signal import SIGUSR1
    from signal import signal as set_handler
    from typing import Any

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments
else:
    from _signal import SIGUSR1  # signal takes longer to import
    from _signal import signal as set_handler

__all__ = ["ImageProgress"]

STEP = 1.0  # per cent that are told of


class ImageProgress:
    """Called with (bytes done, bytes in all), while it is entered."""

    def __init__(self, ctx: Context, arguments: Arguments, what: str) -> None:
        from kvik.cli import term
        from kvik.cli.progress import Progress

        self._ctx, self._what = ctx, what
        self.shown = arguments.flag("p") and not arguments.flag("q")
        self._bar = Progress(ctx.stderr) if self.shown and term.is_terminal(ctx.stdout) else None
        self._told = -STEP
        self._done = 0
        self._asked = False
        self._handler: Any = None

    def __enter__(self) -> ImageProgress:
        try:
            self._handler = set_handler(SIGUSR1, self._ask)
        except ValueError:  # not the main thread, which alone is told of signals
            self._handler = None
        if self.shown and self._bar is None:
            self._print(0.0)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._handler is not None:
            set_handler(SIGUSR1, self._handler)
        self.clear()
        if self.shown and self._bar is None:
            self._ctx.stdout.write("\n")

    def clear(self) -> None:
        """Makes room for a line that is to stand where the bar is."""
        if self._bar is not None:
            self._bar.clear()

    def __call__(self, done: int, total: int) -> None:
        done = self._done = max(done, self._done)  # holes are told before the data in front of them
        if self._bar is not None:
            self._bar.bar(self._what, done, total, is_bytes=True)
        share = min(100.0, done * 100 / total) if total > 0 else 100.0
        if self.shown and self._bar is None and (share > self._told + STEP or share >= 100 > self._told):
            self._print(share)
        if self._asked:
            self._asked = False
            self._ctx.stderr.write(f"    ({share:3.2f}/100%)\n")
            self._ctx.stderr.flush()

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def _print(self, share: float) -> None:
        self._told = share
        self._ctx.stdout.write(f"    ({share:3.2f}/100%)\r")
        self._ctx.stdout.flush()
