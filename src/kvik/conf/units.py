"""Sizes as documents write them: a number and a unit. https://libvirt.org/formatdomain.html#memory-allocation"""

from __future__ import annotations

# Single letters and the -iB forms are powers of 1024, the -B forms powers of 1000; letters in any case, as in libvirt.
_SCALE = {"": 1, "b": 1, "byte": 1, "bytes": 1}
for _power, _letter in enumerate("kmgtpe", 1):
    _SCALE[_letter] = _SCALE[_letter + "ib"] = 1024**_power
    _SCALE[_letter + "b"] = 1000**_power

MAX_KIB = (1 << 63) // 1024


def scale_of(unit: str) -> int:
    """Bytes in one `unit`; ValueError if it is none."""
    try:
        return _SCALE[unit.lower()]
    except KeyError:
        raise ValueError(f"unknown unit {unit!r}; known are b, KiB, MiB, GiB, TiB, PiB, EiB, KB, MB, ...") from None


def parse_kib(value: int, unit: str | None) -> int:
    """`value` of `unit` (KiB if None) in KiB, rounded up; ValueError above 2^63 bytes."""
    kib = value if unit is None or unit == "KiB" else -(-value * scale_of(unit) // 1024)
    if kib > MAX_KIB:
        raise ValueError(f"{value} {unit or 'KiB'} is more than 2^63 bytes")
    return kib


def parse_bytes(text: str) -> int:
    """'4096', '64K' or '10 GiB' in bytes; ValueError for anything else."""
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    if not digits.isdecimal():
        raise ValueError(f"{text!r} is not a size")
    value = int(digits) * scale_of(text.strip()[len(digits) :].strip())
    if value >> 63:
        raise ValueError(f"{text!r} is more than 2^63 bytes")
    return value
