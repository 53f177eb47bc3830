"""Documents and the command lines they become: tests/data/qemu/NAME.xml -> NAME.args.

`KVIK_UPDATE_GOLDENS=1 pytest tests/unit/hypervisor/qemu/test_golden.py` writes them anew; review the difference.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from golden import DATA, command_line, golden_text

PASSED = {
    "passed-descriptors": {
        "monitor": 10, "disk:virtio-disk0:0": 11, "kernel": 12, "initrd": 13, "net:net0:0": 14, "net:net0:1": 15,
        "vhost:net0:0": 16, "vhost:net0:1": 17, "chardev:serial0": 18, "chardev:channel0": 19, "log:serial0": 20,
    }
}  # fmt: skip
NAMES = sorted(path.stem for path in DATA.glob("*.xml"))


@pytest.mark.parametrize("name", NAMES)
def test_document_becomes_this_command_line(name: str) -> None:
    made = golden_text((DATA / f"{name}.xml").read_text(), PASSED.get(name))
    expected = DATA / f"{name}.args"
    if os.environ.get("KVIK_UPDATE_GOLDENS"):
        expected.write_text(made)
    assert made == expected.read_text()


def test_there_are_goldens_for_every_family() -> None:
    assert len(NAMES) >= 50
    assert {path.stem for path in DATA.glob("*.args")} == set(NAMES)


def test_the_same_document_gives_the_same_words() -> None:
    xml = (DATA / "disk-network.xml").read_text()
    assert golden_text(xml) == golden_text(xml)


def test_descriptors_are_inherited_under_their_numbers() -> None:
    line = command_line((DATA / "passed-descriptors.xml").read_text(), PASSED["passed-descriptors"])
    assert line.fds == tuple(range(10, 21))
