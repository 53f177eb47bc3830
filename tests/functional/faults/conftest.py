"""Every test here has a real daemon and real QEMU on a host directory of its own, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_harness import Host
from fault_harness import host as new_host

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64 (apt install qemu-system-x86)"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.functional)
            item.add_marker(needs_qemu)


@pytest.fixture
def host() -> Iterator[Host]:
    """A daemon that runs."""
    with new_host() as it:
        it.start()
        yield it


@pytest.fixture
def private_host() -> Iterator[Host]:
    """With mounts of its own; the daemon is not started yet."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    with new_host(private_mounts=True) as it:
        yield it
