"""Files of /proc and /sys as text and numbers: one that is not there, or says nonsense, gives the default."""

from __future__ import annotations

from pathlib import Path

_LIMIT = 4 << 20  # bytes of any one file
_MAX_CPUS = 8192


def read_text(path: Path, limit: int = _LIMIT) -> str:
    """A file of /proc or /sys, bounded; empty if it is not there or may not be read."""
    try:
        with path.open("rb") as file:
            return file.read(limit).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def read_int(path: Path, default: int = 0) -> int:
    text = read_text(path, 64)
    try:
        return int(text)
    except ValueError:
        return default


def parse_cpu_list(text: str) -> list[int]:
    """The kernel's list format ("0-3,8,10-11"), ascending; rubbish and ids beyond 8191 are left out."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            continue
        low, high = int(first), int(last or first)
        cpus.update(range(low, min(high, _MAX_CPUS - 1) + 1))
    return sorted(cpus)
