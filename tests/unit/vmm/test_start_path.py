"""What a starting machine does not import (docs/adr/0011-vmm-start.md)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kvik

SOURCE = str(Path(kvik.__file__).parents[1])

BANNED = {
    "dataclasses",
    "typing",
    "threading",
    "json",
    "msgspec",
    "logging",
    "argparse",
    "asyncio",
    "inspect",
    "pathlib",
}

START = """
import kvik.vmm.build, kvik.vmm.main, kvik.vmm.options, kvik.vmm.parts, kvik.vmm.trace
import kvik.vmm.devices.serial, kvik.vmm.backends.char, kvik.vmm.backends.block, kvik.vmm.backends.tap
import kvik.vmm.virtio.blk, kvik.vmm.virtio.net, kvik.vmm.virtio.console, kvik.vmm.virtio.rng, kvik.vmm.virtio.balloon
import kvik.vmm.virtio.transport, kvik.vmm.boot, kvik.vmm.cpu.state
import sys
print(*sys.modules)
"""


def test_the_start_path_imports_nothing_costly() -> None:
    bare = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, check=True)
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, check=True)
    assert not (set(done.stdout.decode().split()) - set(bare.stdout.decode().split())) & BANNED


RESTORE = "import sys, kvik.vmm.main, kvik.vmm.options, kvik.vmm.confinement, kvik.vmm.state.snapshot"
MONITOR = """
import kvik.vmm.monitor.server, kvik.vmm.monitor.commands
from kvik.vmm import confinement
confinement.import_all(confinement.LATE + confinement.LATE_CONTROL)
"""


def imported(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys\nsys.path.append({SOURCE!r})\n{code}\nprint(*sys.modules)"],
        capture_output=True,
        check=True,
    )
    return set(done.stdout.decode().split())


def test_a_machine_is_restored_without_anything_costly() -> None:
    assert not imported(RESTORE) & (BANNED | {"re", "enum", "socket", "shutil", "zlib", "contextlib"})


def test_a_confined_machine_has_nothing_costly_to_import_before_its_monitor_answers() -> None:
    assert not imported(MONITOR) & (BANNED - {"json"} | {"shutil", "ipaddress", "hashlib", "datetime"})


def test_a_machine_without_a_trace_does_without_collections() -> None:
    code = START.replace(", kvik.vmm.trace", "")
    assert "collections" not in imported(code)
