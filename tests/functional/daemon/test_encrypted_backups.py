"""Backups of encrypted disks: put together by qemu-img, and never in plain text on the host."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from kvik.client import checkpoint as client
from kvik.errors import KvikError

from .conftest import Kvikd, Make
from .test_backup import nothing_left, over, run, start_backup
from .test_block_jobs import images_of, ok
from .test_encrypted_chains import kvikd, writes
from .test_encrypted_disks import DISK, Vault, empty, encryption, vault
from .test_snapshots_of_disks import BLOCK

__all__ = ["empty", "kvikd", "vault"]  # fixtures


def test_backups_of_an_encrypted_disk_are_encrypted(kvikd: Kvikd, make: Make, vault: Vault) -> None:
    uuid = vault.secret()
    path = vault.image("kept.qcow2", "qcow2")
    place = path.parent
    domain = make(
        "kept", DISK.format(kind="qcow2", path=path, encryption=encryption(uuid), below="", dev="vda"), kernel=False
    )
    domain.start()
    writes(kvikd, domain, "A")

    def backup(disks: str, since: str = "", server: str = "", checkpoint: str = "") -> None:
        mode = " mode='pull'" if server else ""
        incremental = f"<incremental>{since}</incremental>" if since else ""
        xml = f"<domainbackup{mode}>{incremental}{server}<disks><disk name='vda'>{disks}</disk></disks></domainbackup>"
        start_backup(kvikd, "kept", xml, checkpoint)

    # With the disk's own secret, if nothing else is said; raw and qcow2; all and what changed.
    backup(f"<driver type='raw'/><target file='{place}/full'/>", checkpoint="one")
    assert over(kvikd, "kept") == "completed"
    writes(kvikd, domain, "B", block=1)
    other = vault.secret()  # with the same value, which `plain` knows
    backup(f"<target file='{place}/second'>{encryption(other)}</target>", "one")
    assert over(kvikd, "kept") == "completed"
    assert vault.plain(place / "full", "luks").startswith(b"A" * BLOCK)
    assert vault.plain(place / "second", "qcow2")[BLOCK:].startswith(b"B" * BLOCK)
    # Pulled: what the guest overwrites meanwhile is encrypted, too, and what is sent is sent to nobody in plain text.
    scratch = f"<scratch file='{place}/scratch'/>"
    with pytest.raises(KvikError, match="anybody who reaches port 10809"):
        backup(scratch, server="<server name='localhost'/>")
    backup(scratch, server=f"<server transport='unix' socket='{place}/nbd'/>")
    writes(kvikd, domain, "C", block=0)
    out = place / "pulled"
    source = f"nbd+unix:///vda?socket={place}/nbd"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", source, str(out)], check=True)
    assert out.read_bytes().startswith(b"A" * BLOCK + b"B" * BLOCK)
    assert b"A" * 512 not in (place / "scratch").read_bytes()
    domain.abort_job()
    nothing_left(kvikd, "kept", place / "nbd", place / "scratch")
    for name in ("full", "second", "kept.qcow2"):
        data = (place / name).read_bytes()
        assert not any(letter * 512 in data for letter in (b"A", b"B", b"C")), name
    assert "backup-vda-luks" not in ok(
        kvikd, "qemu-monitor-command", "kept", '{"execute":"qom-list","arguments":{"path":"/objects"}}'
    )
    # Snapshots that are taken and deleted while it is off: what changed is known on.
    domain.destroy()
    ok(kvikd, "snapshot-create-as", "kept", "s1")
    domain.start()
    writes(kvikd, domain, "D", block=3)
    client.create(domain, "<domaincheckpoint><name>two</name></domaincheckpoint>")
    writes(kvikd, domain, "E", block=4)
    for since, name in (("one", "third"), ("two", "fourth")):
        backup(f"<target file='{place}/{name}'/>", since)
        assert over(kvikd, "kept") == "completed"
    told = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", *key(vault, place / "fourth")))
    assert [(item["start"], item["length"]) for item in told if item["data"]] == [(4 * BLOCK, BLOCK)]
    wanted = vault.plain(place / "third", "qcow2")
    assert wanted.startswith(b"C" * BLOCK + b"B" * BLOCK) and wanted[3 * BLOCK :].startswith(
        b"D" * BLOCK + b"E" * BLOCK
    )
    domain.destroy()
    ok(kvikd, "snapshot-delete", "kept", "s1")
    assert images_of(kvikd, "kept", "--inactive") == ["kept.qcow2"]
    domain.start()
    backup(f"<target file='{place}/fifth'/>", "two")
    assert over(kvikd, "kept") == "completed"
    assert vault.plain(place / "fifth", "qcow2")[4 * BLOCK :].startswith(b"E" * BLOCK)
    # Without its secret nothing is begun.
    missing = vault.secret(None)
    with pytest.raises(KvikError, match="value"):
        backup(f"<target file='{place}/sixth'>{encryption(missing)}</target>")
    nothing_left(kvikd, "kept", place / "sixth")


def key(vault: Vault, path: Path) -> list[str]:
    """What qemu-img needs to open an encrypted qcow2 image."""
    source = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    return [source, "--object", f"secret,id=s,file={vault.empty}/passphrase"]
