"""What the host's interfaces have carried, from /proc/net/dev (proc_net(5)).

One read tells of all of them, in the network namespace of the calling thread, and waits for nobody: RTM_GETLINK waits
for whoever changes a link, 20 ms for each tap that goes; /sys/class/net shows the namespace in which it was mounted.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

__all__ = ["Counters", "interface_counters", "parse_counters"]

FRESH = 0.01  # seconds that a reading serves: statistics of many machines are asked for in one go
_PATH = "/proc/thread-self/net/dev"


class Counters(NamedTuple):
    """`rx`: received by the host's end."""

    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


class _Last(threading.local):
    """Of each thread, for each may be in another namespace."""

    time = 0.0
    lines: dict[bytes, bytes] | None = None


_last = _Last()


def interface_counters(name: str) -> Counters | None:
    """None if there is no interface of that name. Not older than `FRESH`."""
    now = time.monotonic()
    if _last.lines is None or now - _last.time > FRESH:
        _last.lines, _last.time = _read(), now
    return parse_counters(_last.lines.get(name.encode(), b""))


def _read() -> dict[bytes, bytes]:
    try:
        with open(_PATH, "rb") as file:  # noqa: PTH123 - polled
            rows = file.read().splitlines()[2:]
    except OSError:
        return {}
    lines = {}
    for row in rows:
        name, _, rest = row.partition(b":")  # no name has one (dev_valid_name)
        lines[name.strip()] = rest
    return lines


def parse_counters(row: bytes) -> Counters | None:
    """Sixteen numbers: bytes, packets, errors, dropped and four more of what was received, then as many sent."""
    try:
        numbers = [int(word) for word in row.split()]
    except ValueError:
        return None
    return Counters(*numbers[:4], *numbers[8:12]) if len(numbers) >= 16 else None
