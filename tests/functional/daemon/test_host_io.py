"""How a real QEMU reads images where the document does not say: through io_uring, where this host has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvik.host import facilities, filesystem
from kvik.hypervisor.qemu.host_io import IORING_FEAT_NATIVE_WORKERS, LOCAL

from .conftest import Kvikd, Make
from .processes import qemu_of
from .test_block_jobs import disk, image, ok, place

__all__ = ["place"]
pytestmark = pytest.mark.root


def completed(domain: Any) -> int:
    """Requests that came back through the machine's io_urings, by what the kernel shows of their descriptors."""
    total = 0
    directory = Path(f"/proc/{qemu_of(domain)}")
    for entry in (directory / "fd").iterdir():
        try:
            if "io_uring" in str(entry.readlink()):
                told = (directory / "fdinfo" / entry.name).read_text()
                found = re.search(r"^CqTail:\s*(\d+)", told, re.M)
                total += int(found[1]) if found else 0
        except FileNotFoundError:
            continue
    return total


def test_images_are_read_through_io_uring_unless_the_document_says_otherwise(
    kvikd: Kvikd, make: Make, place: Path
) -> None:
    kernel = facilities.io_uring()
    if not kernel.value & IORING_FEAT_NATIVE_WORKERS:
        pytest.skip(f"this kernel's io_uring: {kernel.why or 'too old'}")
    first, second, third = (image(place / f"{name}.qcow2", "11") for name in ("first", "second", "third"))
    with first.open("rb") as file:
        if filesystem.type_name(file.fileno()) not in LOCAL:
            pytest.skip("temporary files lie on a file system that io_uring is not used on")
    domain = make("ring", disk(first).replace("type='qcow2'", "type='qcow2' io='threads'"), kernel=False)
    domain.start()
    assert completed(domain) == 0
    (place / "hot.xml").write_text(disk(second, "vdb"))
    ok(kvikd, "attach-device", "ring", str(place / "hot.xml"))
    after_plug = completed(domain)
    assert after_plug > 0
    ok(kvikd, "blockcopy", "ring", "vdb", "--dest", str(place / "copy.qcow2"), "--pivot", "--wait")
    after_copy = completed(domain)
    assert after_copy > after_plug + 1
    ok(kvikd, "snapshot-create-as", "ring", "one", "--disk-only", "--diskspec", "vda,snapshot=no")
    after_snapshot = completed(domain)
    assert after_snapshot > after_copy
    ok(kvikd, "snapshot-delete", "ring", "one")
    assert completed(domain) > after_snapshot
    ok(kvikd, "detach-disk", "ring", "vdb")
    # Not a word of it in the document: it is this host's matter.
    assert "io_uring" not in ok(kvikd, "dumpxml", "ring")
    domain.destroy()
    other = make("ring2", disk(third), kernel=False)
    other.start()
    assert completed(other) > 0
    ok(kvikd, "managedsave", "ring2")
    other.start()
    assert completed(other) > 0
