"""Encrypted disks with images on top, merged and copied while the machine runs: never in plain text."""

from __future__ import annotations

import base64
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Kvikd, Make
from .test_block_jobs import images_of, ok
from .test_encrypted_disks import DISK, PASSPHRASE, Vault, empty, encryption, vault
from .test_snapshots_of_disks import BLOCK

__all__ = ["empty", "vault"]  # fixtures
# A daemon whose new images open at once: deriving a key takes seconds otherwise, at each start.
QUICK = (
    "import sys; from kvik.storage import encryption; from kvik.daemon.main import main; "
    "encryption.iteration_ms = 10; sys.exit(main(sys.argv[4:]))"
)


@pytest.fixture(scope="module")
def kvikd() -> Iterator[Kvikd]:
    daemon = Kvikd(sys.executable, "-c", QUICK)
    try:
        yield daemon
    finally:
        assert daemon.end() == 0
        shutil.rmtree(daemon.root, ignore_errors=True)


def io(kvikd: Kvikd, domain: Any, command: str) -> str:
    """What QEMU's log says of one command of qemu-io on the guest's disk."""
    log: Path = kvikd.paths.domain_logs / f"{domain.name}.log"
    before = log.stat().st_size
    qdev = "/machine/peripheral/virtio-disk0/virtio-backend"
    said = domain.monitor_command(f'qemu-io -d {qdev} "{command}"', hmp=True)
    assert not said, said
    return log.read_bytes()[before:].decode(errors="replace")


def writes(kvikd: Kvikd, domain: Any, letter: str, block: int = 0) -> None:
    io(kvikd, domain, f"write -P {ord(letter)} {block * BLOCK} {BLOCK}")
    io(kvikd, domain, "flush")


def shows(kvikd: Kvikd, domain: Any, letters: str) -> None:
    for block, letter in enumerate(letters):
        told = io(kvikd, domain, f"read -P {ord(letter)} {block * BLOCK} {BLOCK}")
        assert "read 65536" in told and "verification failed" not in told, (letters, block, told)


def test_what_comes_on_top_of_an_encrypted_disk_is_encrypted(kvikd: Kvikd, make: Make, vault: Vault) -> None:
    uuid = vault.secret()
    base = vault.image("base.luks", "luks")
    place = base.parent
    domain = make(
        "deep", DISK.format(kind="raw", path=base, encryption=encryption(uuid), below="", dev="vda"), kernel=False
    )
    domain.start()
    writes(kvikd, domain, "A")
    ok(kvikd, "snapshot-create-as", "deep", "s1", "--disk-only")
    writes(kvikd, domain, "B", block=1)
    assert images_of(kvikd, "deep") == images_of(kvikd, "deep", "--inactive") == ["base.s1", "base.luks"]
    for options in ((), ("--inactive",)):  # each image of the chain with its secret
        assert (
            len(re.findall(rf"<secret type='passphrase' uuid='{uuid}'/>", ok(kvikd, "dumpxml", "deep", *options))) == 2
        )
    domain.destroy()
    domain.start()
    shows(kvikd, domain, "AB")
    # Back into the base: it is encrypted as before, and so is a copy.
    ok(kvikd, "snapshot-delete", "deep", "s1")
    assert images_of(kvikd, "deep") == images_of(kvikd, "deep", "--inactive") == ["base.luks"]
    assert not (place / "base.s1").exists()
    shows(kvikd, domain, "AB")
    objects = ok(kvikd, "qemu-monitor-command", "deep", '{"execute":"qom-list","arguments":{"path":"/objects"}}')
    assert len(re.findall(r"virtio-disk0-\d+-luks", objects)) == 1
    assert "is encrypted" in kvikd.kvik("blockcopy", "deep", "vda", "--dest", str(place / "plain")).stderr
    copy = place / "copy.qcow2"
    source = f"<source file='{copy}'>{encryption(uuid)}</source>"
    (place / "to.xml").write_text(f"<disk type='file'><driver type='qcow2'/>{source}</disk>")
    ok(kvikd, "blockcopy", "deep", "vda", "--xml", str(place / "to.xml"), "--pivot")
    writes(kvikd, domain, "C", block=2)
    shows(kvikd, domain, "ABC")
    domain.destroy()
    assert vault.plain(base, "luks").startswith(b"A" * BLOCK + b"B" * BLOCK)
    assert vault.plain(copy, "qcow2").startswith(b"A" * BLOCK + b"B" * BLOCK + b"C" * BLOCK)
    for path in (base, copy):
        data = path.read_bytes()
        assert not any(letter * 512 in data for letter in (b"A", b"B", b"C")), path


def test_encrypted_images_are_merged_while_the_machine_is_off(kvikd: Kvikd, make: Make, vault: Vault) -> None:
    uuid = vault.secret()
    base = vault.image("off.qcow2", "qcow2")
    place = base.parent
    domain = make(
        "off", DISK.format(kind="qcow2", path=base, encryption=encryption(uuid), below="", dev="vda"), kernel=False
    )
    for block, name in enumerate(("s1", "s2")):
        domain.start()
        writes(kvikd, domain, "AB"[block], block=block)
        domain.destroy()
        ok(kvikd, "snapshot-create-as", "off", name)
    ok(kvikd, "snapshot-create-as", "off", "s3")
    ok(kvikd, "snapshot-revert", "off", "s2")  # a branch, on what s2 is kept in
    assert images_of(kvikd, "off", "--inactive") == ["off.s2-now", "off.s1", "off.qcow2"]
    # A secret that is not there: nothing is merged, and nothing is lost.
    assert "copy up to" in ok(kvikd, "snapshot-delete", "off", "s1", "--plan")
    ok(kvikd, "secret-set-value", uuid, "--base64", "d3Jvbmc=")
    done = kvikd.kvik("snapshot-delete", "off", "s1")
    assert done.returncode == 1 and "not all of its room could be given back" in done.stderr, done.stderr
    assert "wrong" not in done.stderr
    ok(kvikd, "secret-set-value", uuid, "--base64", base64.b64encode(PASSPHRASE).decode())
    ok(kvikd, "snapshot-delete", "off", "s3")
    assert sorted(path.name for path in place.glob("off.*")) == ["off.qcow2", "off.s2-now"]
    ok(kvikd, "snapshot-delete", "off", "s2")
    assert sorted(path.name for path in place.glob("off.*")) == ["off.qcow2"]
    assert images_of(kvikd, "off", "--inactive") == ["off.qcow2"]
    domain.start()
    shows(kvikd, domain, "AB")
    domain.destroy()
    data = base.read_bytes()
    assert not any(letter * 512 in data for letter in (b"A", b"B", b"C"))
