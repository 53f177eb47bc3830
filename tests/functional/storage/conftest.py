"""Pools on loop devices of this host: mounts and devices of a test go with it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from kvik.host.process import find_program
from kvik.paths import Paths
from kvik.storage.pools import Pools

LoopDevices = Callable[[int], str]


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[LoopDevices]:
    """`loop(size)`: a new, empty block device."""
    if os.getuid() != 0 or not Path("/dev/loop-control").exists() or find_program("losetup") is None:
        pytest.skip("needs root and loop devices")
    made: list[str] = []

    def make(size: int) -> str:
        image = tmp_path / f"loop{len(made)}.img"
        with image.open("wb") as file:
            file.truncate(size)
        done = subprocess.run(
            ["losetup", "--find", "--show", image], capture_output=True, text=True, check=True, timeout=30
        )
        made.append(done.stdout.strip())
        return made[-1]

    yield make
    for mounted in [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()][::-1]:
        if mounted.startswith(f"{tmp_path}/"):
            subprocess.run(["umount", mounted], check=False, timeout=30)
    for device in made:
        subprocess.run(["wipefs", "--all", "--force", "--quiet", device], check=False, timeout=30)
        subprocess.run(["partx", "--delete", device], check=False, timeout=30, capture_output=True)
        subprocess.run(["losetup", "--detach", device], check=False, timeout=30)


@pytest.fixture
async def pools(tmp_path: Path) -> AsyncIterator[Pools]:
    made = Pools(Paths.system(tmp_path / "root"))
    await made.open()
    yield made
    made.close()
