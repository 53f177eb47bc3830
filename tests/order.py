"""In which order tests run, and of which of them only few run at once."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
ORDER = ("unit", "functional", "interop", "security", "lab")  # the directories below tests/

HEAVY = ("tests/lab/",)  # the beginnings of the node ids of tests that keep a core busy from first to last
FEW = 2  # files of them that run at once: one a core


def directory(path: Path) -> str:
    """Of a test file below tests/: which of `ORDER`, or "" for one that lies elsewhere."""
    return path.relative_to(HERE).parts[0] if path.is_relative_to(HERE) else ""


def place(path: Path) -> int:
    """A mistake shows in the first seconds if it can; the lab boots only when all else is through."""
    name = directory(path)
    return ORDER.index(name) if name in ORDER else len(ORDER) - 1 if name else 0


def is_heavy(nodeid: str) -> bool:
    return nodeid.startswith(HEAVY)
