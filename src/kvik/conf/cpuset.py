"""Sets of small numbers as documents write them: `0-3,^2,7`. https://libvirt.org/formatdomain.html#cpu-allocation"""

from __future__ import annotations

from collections.abc import Iterable

MAX = 16384


def parse_cpuset(text: str) -> frozenset[int]:
    """ValueError for anything but numbers, ranges and exclusions below 16384."""
    members: set[int] = set()
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.removeprefix("^").partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and part.startswith("^")):
            raise ValueError(f"{text!r} is not a set such as '0-3,^2'")
        low = int(first)
        high = int(last) if dash else low
        if not low <= high < MAX:
            raise ValueError(f"{part!r} in {text!r} is not a range below {MAX}")
        if part.startswith("^"):
            members.discard(low)
        else:
            members.update(range(low, high + 1))
    return frozenset(members)


def format_cpuset(members: Iterable[int]) -> str:
    ranges: list[list[int]] = []
    for number in sorted(set(members)):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
