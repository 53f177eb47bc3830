"""In which order tests run, and which of them run with no other test beside them."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
ORDER = ("unit", "functional", "interop", "security", "lab")  # the directories below tests/

ALONE = {  # the beginning of a test's node id -> why nothing may run beside it (tests/schedule.py)
    "tests/lab/": "emulates a host with both cores",
}


def directory(path: Path) -> str:
    """Of a test file below tests/: which of `ORDER`, or "" for one that lies elsewhere."""
    return path.relative_to(HERE).parts[0] if path.is_relative_to(HERE) else ""


def place(path: Path) -> int:
    """A mistake shows in the first seconds if it can; the lab boots only when all else is through."""
    name = directory(path)
    return ORDER.index(name) if name in ORDER else len(ORDER) - 1 if name else 0


def is_alone(nodeid: str) -> bool:
    return nodeid.startswith(tuple(ALONE))
