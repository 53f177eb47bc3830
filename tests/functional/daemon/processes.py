"""Which process is whose. Never by a machine's name: other tests that run now may have one of that name."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def qemu_of(domain: Any) -> int:
    """The process of a machine, by its UUID. `domain` may be of a connection that is gone."""
    mark = f"-uuid\0{domain.uuid}\0".encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and mark in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no QEMU for {domain.name}")
