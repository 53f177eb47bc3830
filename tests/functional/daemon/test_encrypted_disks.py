"""Encrypted disks in real machines: what the guest writes, the host cannot read, and the passphrase is nowhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvik.client import secret, storage
from kvik.errors import KvikError

from .conftest import AGENT, CONSOLE
from .processes import qemu_of
from .test_changes import sees, shell

LIVE = 1
PASSPHRASE = b"open, sesame: 7c1f"
MARK = "the guest wrote this: 5be1"
DISK = (
    "<disk type='file' device='disk'><driver name='qemu' type='{kind}'/><source file='{path}'>{encryption}</source>"
    "{below}<target dev='{dev}' bus='virtio'/></disk>"
)


VOLUME_DISK = (
    "<disk type='volume' device='disk'><source pool='sealed' volume='v'>{encryption}</source>"
    "<target dev='vdc' bus='virtio'/></disk>"
)


def encryption(uuid: str) -> str:
    return f"<encryption format='luks'><secret type='passphrase' uuid='{uuid}'/></encryption>"


class Vault:
    def __init__(self, connection: Any, directory: Path, empty: Path) -> None:
        self.connection, self.directory, self.empty = connection, directory, empty

    def secret(self, value: bytes | None = PASSPHRASE, usage: str = "") -> str:
        made = secret.define_secret(self.connection, f"<secret ephemeral='yes' private='yes'>{usage}</secret>")
        if value is not None:
            made.set_value(value)
        return made.uuid

    def image(self, name: str, kind: str) -> Path:
        return Path(shutil.copy(self.empty / kind, self.directory / name))

    def plain(self, path: Path, kind: str) -> bytes:
        """What an image holds, decrypted by qemu-img."""
        out = self.directory / "plain"
        key = "key-secret=s" if kind == "luks" else "encrypt.key-secret=s"
        given = ["--object", f"secret,id=s,file={self.empty}/passphrase", "--image-opts"]
        source = f"driver={kind},{key},file.filename={path}"
        subprocess.run(["qemu-img", "convert", *given, source, "-O", "raw", str(out)], check=True)
        return out.read_bytes()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty image of each kind: making one takes qemu-img two seconds, whatever is asked for."""
    directory = tmp_path_factory.mktemp("empty")
    (directory / "passphrase").write_bytes(PASSPHRASE)
    for kind, options in (
        ("luks", "key-secret=s,iter-time=10"),
        ("qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
    ):
        given = ["--object", f"secret,id=s,file={directory}/passphrase", "-f", kind, "-o", options]
        for _ in range(20):  # on a busy host it may not be able to tell how fast that is
            done = subprocess.run(
                ["qemu-img", "create", "-q", *given, str(directory / kind), "4M"], capture_output=True, check=False
            )
            if b"accurate CPU usage" not in done.stderr:
                break
        assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def vault(kvikd: Any, tmp_path: Path, empty: Path) -> Vault:
    return Vault(kvikd.connection, tmp_path, empty)


def sealed_volume(kvikd: Any, vault: Vault, uuid: str) -> Path:
    """A volume that vol-create encrypts."""
    directory = vault.directory / "sealed"
    directory.mkdir()
    storage.create_pool(
        kvikd.connection, f"<pool type='dir'><name>sealed</name><target><path>{directory}</path></target></pool>"
    )
    document = vault.directory / "v.xml"
    document.write_text(
        f"<volume><name>v</name><capacity unit='MiB'>4</capacity><target>{encryption(uuid)}</target></volume>"
    )
    made = kvikd.virsh("vol-create", "sealed", str(document))
    assert made.returncode == 0, made.stderr
    shown = kvikd.kvik("vol-dumpxml", "--pool", "sealed", "v").stdout
    assert f"<secret type='passphrase' uuid='{uuid}'/>" in shown and "<capacity unit='bytes'>4194304<" in shown
    return directory / "v"


def test_what_the_guest_writes_is_no_plain_text_on_the_host(make: Any, kvikd: Any, vault: Vault) -> None:
    uuid = vault.secret()
    usage = "/my/volume"
    by_usage = vault.secret(usage=f"<usage type='volume'><volume>{usage}</volume></usage>")
    raw, base, top, plugged = (
        vault.image("raw.luks", "luks"),
        vault.image("base.qcow2", "qcow2"),
        vault.image("top.qcow2", "qcow2"),
        vault.image("plugged.luks", "luks"),
    )
    below = (
        f"<backingStore type='file'><format type='qcow2'/><source file='{base}'>{encryption(uuid)}</source>"
        "<backingStore/></backingStore>"
    )
    disks = DISK.format(kind="raw", path=raw, encryption=encryption(uuid), below="", dev="vda") + DISK.format(
        kind="qcow2",
        path=top,
        encryption=encryption(by_usage).replace(f"uuid='{by_usage}'", f"usage='{usage}'"),
        below=below,
        dev="vdb",
    )
    volume = sealed_volume(kvikd, vault, uuid)
    domain = make.ready("sealed", CONSOLE + AGENT + disks + VOLUME_DISK.format(encryption=encryption(uuid)))
    sees(domain, "cat /proc/partitions", "4096 vdc")
    shell(domain, f"echo '{MARK}' >/dev/vdc; sync")
    shell(domain, f"echo '{MARK}' >/dev/vda; echo '{MARK}' >/dev/vdb; sync")
    domain.attach_device(DISK.format(kind="raw", path=plugged, encryption=encryption(uuid), below="", dev="vdd"), LIVE)
    sees(domain, "cat /proc/partitions", "4096 vdd")
    shell(domain, f"echo '{MARK}' >/dev/vdd; sync")
    # The passphrase is in no command line, file descriptor, log or document.
    process = Path(f"/proc/{qemu_of(domain)}")
    assert PASSPHRASE not in (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
    for fd in (process / "fd").iterdir():
        if "memfd:kvik-secret" in os.readlink(fd):
            assert fd.read_bytes() == b""
    log = (kvikd.paths.domain_logs / "sealed.log").read_bytes() + (kvikd.root / "log").read_bytes()
    assert b"sealed" in log and PASSPHRASE not in log and PASSPHRASE.hex().encode() not in log
    assert PASSPHRASE.decode() not in domain.xml(1)
    kvikd.virsh("detach-disk", "sealed", "vdd", "--live")
    reply = kvikd.virsh("qemu-monitor-command", "sealed", '{"execute":"qom-list","arguments":{"path":"/objects"}}')
    assert "virtio-disk0-" in reply.stdout and "virtio-disk3" not in reply.stdout
    domain.destroy()
    for path in (raw, top, plugged, volume):
        assert MARK.encode() not in path.read_bytes()
    assert vault.plain(raw, "luks").startswith(MARK.encode())
    assert vault.plain(top, "qcow2").startswith(MARK.encode())
    assert vault.plain(plugged, "luks").startswith(MARK.encode())
    assert vault.plain(volume, "luks").startswith(MARK.encode())
    assert kvikd.kvik("pool-destroy", "sealed").returncode == 0


@pytest.mark.skipif(os.getuid() != 0 or not Path("/dev/loop-control").exists(), reason="needs root and loop devices")
def test_a_partition_that_is_encrypted(make: Any, kvikd: Any, vault: Vault) -> None:
    uuid, image = vault.secret(), vault.directory / "device"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    command = ["losetup", "--find", "--show", str(image)]
    device = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        form = ("--source-format", "gpt", "--target", "/dev")
        for words in (
            ("pool-define-as", "parts", "disk", "--source-dev", device, *form),
            ("pool-build", "parts"),
            ("pool-start", "parts"),
        ):
            done = kvikd.virsh(*words)
            assert done.returncode == 0, done.stderr
        name = f"{Path(device).name}p1"
        document = vault.directory / "v.xml"
        target = f"<target>{encryption(uuid)}</target>"
        document.write_text(f"<volume><name>{name}</name><capacity unit='MiB'>8</capacity>{target}</volume>")
        made = kvikd.virsh("vol-create", "parts", str(document))
        assert made.returncode == 0, made.stderr
        source = f"<source pool='parts' volume='{name}'>{encryption(uuid)}</source>"
        disk = f"<disk type='volume' device='disk'>{source}<target dev='vda' bus='virtio'/></disk>"
        domain = make.ready("parted", CONSOLE + AGENT + disk)
        shell(domain, f"echo '{MARK}' >/dev/vda; sync")
        assert shell(domain, "head -c 26 /dev/vda") == MARK
        assert "machine 'parted' is running from it" in kvikd.kvik("vol-wipe", name, "--pool", "parts").stderr
        domain.destroy()
        assert MARK.encode() not in image.read_bytes()
        for verb in ("vol-wipe", "vol-delete"):
            done = kvikd.kvik(verb, name, "--pool", "parts")
            assert done.returncode == 0, done.stderr
        assert kvikd.kvik("pool-destroy", "parts").returncode == 0
    finally:
        subprocess.run(["partx", "--delete", device], check=False, capture_output=True)
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_wrong_or_missing_secret_is_said_and_nothing_starts(make: Any, vault: Vault) -> None:
    raw, qcow2 = vault.image("a.luks", "luks"), vault.image("b.qcow2", "qcow2")
    plain = vault.directory / "plain.img"
    plain.write_bytes(bytes(1 << 20))
    bare = vault.directory / "bare.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(bare), "1M"], check=True)
    missing = "55806c7d-8e93-456f-829b-607d8c198300"
    good, ceph = vault.secret(), vault.secret(usage="<usage type='ceph'><name>c</name></usage>")
    cases = (
        (raw, "raw", encryption(vault.secret(b"wrong")), "Invalid password, cannot unlock any keyslot"),
        (raw, "raw", encryption(vault.secret(None)), "disk vda: secret .* does not have a value"),
        (raw, "raw", encryption(missing), f"disk vda: no secret with matching uuid '{missing}'"),
        (raw, "raw", encryption(ceph), "is of type 'ceph', expected 'volume'"),
        (raw, "raw", "<encryption format='luks'/>", "disk vda: LUKS needs one <secret"),
        (plain, "raw", encryption(good), "plain.img has no LUKS header"),
        (bare, "qcow2", encryption(good), "bare.qcow2 is not encrypted with LUKS"),
        (qcow2, "qcow2", "", "b.qcow2 is encrypted, and its document names no secret for it"),
    )
    for number, (path, kind, wrapped, why) in enumerate(cases):
        disk = DISK.format(kind=kind, path=path, encryption=wrapped, below="", dev="vda")
        domain = make(f"shut{number}", disk, kernel=False)
        with pytest.raises(KvikError, match=why):
            domain.start()
        assert not domain.is_active(), why
