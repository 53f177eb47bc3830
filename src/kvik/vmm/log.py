"""The machine's log: one structured line a message, on standard error, and never more than a guest may cause.

    2026-01-31T10:20:30.123Z warning kvik-vmm "a device failed" device=disk0 reason="bad descriptor"
    {"time": "2026-01-31T10:20:30.123Z", "level": "warning", "message": "a device failed", "device": "disk0", ...}

Values come from guests and clients: whatever is not a plain printable word is quoted, so that nobody forges a line.
On the start path: nothing heavy is imported.
"""

from __future__ import annotations

import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Log", "LogLimit"]

MAX_LINE = 4000  # bytes; below PIPE_BUF, so that lines of several threads do not mix in a pipe
MAX_KINDS = 256
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-./:+@%,")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def quoted(text: str) -> str:
    """`text` in double quotes, as JSON would have it: printable ASCII only."""
    parts = []
    for letter in text:
        code = ord(letter)
        if letter in _ESCAPES:
            parts.append(_ESCAPES[letter])
        elif 32 <= code < 127:
            parts.append(letter)
        elif code < 0x10000:
            parts.append(f"\\u{code:04x}")
        else:
            code -= 0x10000
            parts.append(f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}")
    return f'"{"".join(parts)}"'


def word(value: object) -> str:
    text = str(value)[:1000]
    return text if text and all(letter in _PLAIN for letter in text) else quoted(text)


def ready(fd: int) -> bool:
    """Whether a line can be written at once: a pipe whose reader stands still must not stop the machine."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(events & select.POLLOUT for _, events in poll.poll(0))


class Log:
    """Lines to descriptor `fd`; what cannot be written at once is lost."""

    def __init__(self, fd: int = 2, *, name: str = "kvik-vmm", json: bool = False) -> None:
        self.fd, self.name, self.json = fd, name, json

    def line(self, level: str, message: str, now: float, fields: dict[str, object]) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        when = f"{seconds}.{int(now * 1000) % 1000:03d}Z"
        if self.json:
            head: dict[str, object] = {"time": when, "level": level, "machine": self.name, "message": message}
            parts = [f"{quoted(key)}: {_json(value)}" for key, value in (head | fields).items()]
            text = "{" + ", ".join(parts) + "}"
            return text if len(text) < MAX_LINE else self.line(level, message[:300], now, {"truncated": True})
        text = f"{when} {level} {word(self.name)} {quoted(message[:2000])}"
        for key, value in fields.items():
            text += f" {key}={word(value)}"
        return text[: MAX_LINE - 1]

    def write(self, level: str, message: str, **fields: object) -> None:
        try:
            if ready(self.fd):
                os.write(self.fd, self.line(level, message, time.time(), fields).encode() + b"\n")
        except OSError:
            pass  # nobody listens: the machine goes on


def _json(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else quoted(str(value)[:1000])


class LogLimit:
    """In front of a `Log`: of each kind of message `burst` at once and `rate` a second; those left out are counted and
    the number is told with the next one. A kind is the level and the message, without its fields."""

    def __init__(
        self, log: Log, *, burst: int = 10, rate: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._burst, self._rate, self._clock = log, burst, rate, clock
        self._kinds: dict[tuple[str, str], list[float]] = {}  # kind -> [tokens, when, left out]

    def write(self, level: str, message: str, **fields: object) -> bool:
        """Whether it was written."""
        kind, now = (level, message), self._clock()
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            kind = (level, "")  # whoever makes up messages shares one budget
        state = self._kinds.setdefault(kind, [float(self._burst), now, 0])
        state[0] = min(self._burst, state[0] + (now - state[1]) * self._rate)
        state[1] = now
        if state[0] < 1:
            state[2] += 1
            return False
        state[0] -= 1
        if state[2]:
            fields["left_out"] = int(state[2])
            state[2] = 0
        self._log.write(level, message, **fields)
        return True
