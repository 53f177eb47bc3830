"""Runs inside a lab: real servers and devices of one machine, and a pool on each. The arguments are the scenes to play;
none: all. Prints one JSON object, the outcome of every scene by its name: "" or the traceback.

Scenes are independent; one that fails leaves the others to run.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Literal

from kvik.conf.devices.disk import DiskSource
from kvik.errors import HostError, KvikError, OperationInvalid, OperationTimeout, ResourceBusy, StoragePoolBuilt
from kvik.host.process import find_program
from kvik.paths import Paths
from kvik.storage import encryption, recover, volumes
from kvik.storage.backend import Backend
from kvik.storage.mounts import mounted_at
from kvik.storage.pool import PoolObject
from kvik.storage.pools import Pools
from kvik.storage.resolve import resolve
from kvik.storage.types import find_sources

MIB = 1 << 20
DEADLINE = 170.0  # seconds of a scene; 2 to 16 on a quiet host
WORK = Path("/tmp/storage")
SEALED = (
    "<target><encryption format='luks'><secret type='passphrase' uuid='7c9e6679-7425-40de-944b-e07fc1f90ae7'/>"
    "</encryption></target>"
)
VOLUME = "<volume><name>{}</name><capacity>{}</capacity>{}</volume>"
TARGET = "iqn.2026-01.org.example:disks"
INITIATOR = "iqn.2026-01.org.example:me"
CONFIGFS = Path("/sys/kernel/config/target")
SECRET = b"twelve-or-more"
# Without version 3: its lock daemon would have a grace period of its own, 50 s, in which nobody gets locks.
NFSD = "rpc.nfsd --no-nfs-version 3 2; echo Y >/proc/fs/nfsd/v4_end_grace"


def sh(command: str, timeout: float = 60) -> str:
    done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def building(**flags: bool) -> Callable[[Backend], None]:
    def build(backend: Backend) -> None:
        backend.build(**flags)

    return build


async def refused(call: Awaitable[object], kind: type[KvikError], text: str) -> None:
    try:
        await call
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"not refused: {text}")


async def bytes_there_and_back(pools: Pools, pool: PoolObject, name: str) -> None:
    """Written through one descriptor, read through another; wiped, and gone."""
    async with volumes.open_bytes(pools, pool, name, 0, 0, writable=True) as opened:
        os.pwrite(opened.fd, b"there" * 100, MIB)
        os.fsync(opened.fd)
    async with volumes.open_bytes(pools, pool, name, 0, 0, writable=False) as opened:
        assert os.pread(opened.fd, 5, MIB) == b"there"
    await volumes.wipe(pools, pool, name, 0)
    async with volumes.open_bytes(pools, pool, name, 0, 0, writable=False) as opened:
        assert os.pread(opened.fd, 5, MIB) == bytes(5)


async def again(pools: Pools, pool: PoolObject) -> None:
    """The next daemon finds the pool active."""
    other = Pools(pools.paths)
    await other.open()
    assert other.lookup_name(pool.name).is_active, other.warnings
    assert sorted(other.lookup_name(pool.name).contents.volumes) == sorted(pool.contents.volumes)
    other.close()


GROUP = "<pool type='logical'><name>vg{}</name><source><device path='/dev/{}'/></source>{}</pool>"


async def logical(pools: Pools) -> None:
    pools.secret = lambda usage, which: b"a passphrase"
    pool = await pools.define(GROUP.format(1, "vda", ""))
    await refused(pool.start(), KvikError, "cannot find logical volume group name 'vg1'")
    sh("mkfs.ext4 -q -F /dev/vda")
    await refused(pool.build(building()), StoragePoolBuilt, "already contains ext4")
    await pool.build(building(overwrite=True))
    await pool.start()
    made = await volumes.create(pools, pool, VOLUME.format("one", 16 * MIB, ""))
    assert (made.path, made.size, made.allocated) == ("/dev/vg1/one", 16 * MIB, 16 * MIB), made
    assert made.source is not None and made.source.devices[0].path == "/dev/vda"
    assert pool.contents.allocation == 16 * MIB
    await bytes_there_and_back(pools, pool, "one")
    await volumes.resize(pools, pool, "one", 24 * MIB)
    assert pool.volume("one").size == 24 * MIB
    await volumes.resize(pools, pool, "one", 8 * MIB, shrink=True)
    await refused(volumes.create(pools, pool, VOLUME.format("one", MIB, "")), KvikError, "exists already")
    await refused(volumes.create(pools, pool, VOLUME.format("big", 1 << 40, "")), HostError, "insufficient free space")
    assert "big" not in sh("lvs --noheadings -o lv_name vg1")
    copy = await volumes.copy(pools, pool, VOLUME.format("two", 8 * MIB, ""), pool, "one")
    assert copy.size == 8 * MIB
    await volumes.create(
        pools, pool, VOLUME.format("snap", 8 * MIB, "<backingStore><path>/dev/vg1/one</path></backingStore>")
    )
    assert pool.volume("snap").backing_store is not None
    await refused(volumes.delete(pools, pool, "one"), OperationInvalid, "volume 'snap' of pool 'vg1' is based on it")
    found = resolve(pools, reference("vg1", "one"))
    assert (found.type, found.source.dev) == ("block", "/dev/vg1/one")
    sh("mkfs.ext4 -q -F /dev/vg1/two && mkdir -p /tmp/storage/m && mount /dev/vg1/two /tmp/storage/m")
    for call in (volumes.wipe(pools, pool, "two", 0), volumes.delete(pools, pool, "two")):
        await refused(call, ResourceBusy, "in use")
    await refused(pool.destroy(), ResourceBusy, "")
    assert pool.is_active
    sh("umount /tmp/storage/m")
    await again(pools, pool)
    await encrypted(pools, pool)
    assert "<name>vg1</name>" in find_sources("logical", None) and "/dev/vda" in find_sources("logical", None)
    await pool.destroy()
    assert not Path("/dev/vg1/one").exists()
    await refused(pool.delete(), OperationInvalid, "holds 3 volumes")
    await pool.start()
    for name in ("snap", "two", "one"):
        await volumes.delete(pools, pool, name)
    await pool.destroy()
    await pool.delete()
    assert "vg1" not in find_sources("logical", None)


async def encrypted(pools: Pools, pool: PoolObject) -> None:
    """A logical volume is made larger by its header, and is known again by that."""
    encryption.iteration_ms = 10  # of a passphrase that nobody guesses
    document = VOLUME.format("sealed", 6 * MIB, SEALED)
    made = await volumes.create(pools, pool, document)
    assert made.physical is not None and 6 * MIB <= made.size < made.physical.value == 8 * MIB, made
    assert Path(made.path).read_bytes()[:6] == b"LUKS\xba\xbe"
    await pool.refresh()
    seen = pool.volume("sealed")
    assert seen.size == made.size and seen.target is not None and seen.target.encryption is not None
    await volumes.resize(pools, pool, "sealed", 10 * MIB)
    assert 10 * MIB <= pool.volume("sealed").size < 12 * MIB
    await volumes.delete(pools, pool, "sealed")


async def thin_volumes(pools: Pools) -> None:
    thin = await pools.define(GROUP.format(2, "vdb", "<features><cow state='yes'/></features>"))
    await thin.build(building())
    await thin.start()
    size = 320 * MIB  # more than the group has; wiping reads all of it, which takes an emulated machine long
    big = await volumes.create(pools, thin, VOLUME.format("big", size, ""))
    assert (big.size, big.allocated) == (size, 0)
    await bytes_there_and_back(pools, thin, "big")
    assert thin.volume("big").allocated < 16 * MIB  # wiping took nothing for what was never written
    below = "<backingStore><path>/dev/vg2/big</path></backingStore>"
    snap = await volumes.create(pools, thin, VOLUME.format("snap", size, below))
    assert snap.size == size
    for name in ("snap", "big"):
        await volumes.delete(pools, thin, name)
    await thin.destroy()
    await thin.delete()


def reference(pool: str, volume: str, mode: Literal["direct"] | None = None) -> DiskSource:
    return DiskSource(pool=pool, volume=volume, mode=mode)


def nfs_server() -> None:
    sh(
        f"""
        mkfs.ext4 -q -F /dev/vda; mkdir -p /srv/export; mount /dev/vda /srv/export; mkdir /srv/export/pool
        chmod 777 /srv/export/pool
        mkdir -p /var/lib/nfs/v4recovery /var/lib/nfs/sm /run/rpcbind /run/sendsigs.omit.d
        touch /var/lib/nfs/etab /var/lib/nfs/rmtab
        mount -t nfsd nfsd /proc/fs/nfsd 2>/dev/null || true
        rpcbind -w
        exportfs -o rw,no_root_squash,insecure,no_subtree_check,fsid=0 '*:/srv/export'
        rpc.mountd
        # Of locks, after a restart: 90 s else (Documentation/filesystems/nfs/nfsd-admin-interfaces.rst)
        for each in lease grace; do echo 10 >/proc/fs/nfsd/nfsv4${{each}}time || true; done
        {NFSD}
        """
    )


async def nfs(pools: Pools) -> None:
    nfs_server()
    listed = find_sources("netfs", "<source><host name='127.0.0.1'/></source>")
    assert "<dir path='/srv/export'/>" in listed and "<format type='nfs'/>" in listed, listed
    xml = f"""<pool type='netfs'><name>nfs</name><source><host name='127.0.0.1'/><dir path='/pool'/>
    <format type='nfs'/><protocol ver='4.2'/></source><target><path>{WORK}/nfs</path></target></pool>"""
    pool = await pools.define(xml)
    await pool.build(building())
    await pool.start()
    made = await volumes.create(pools, pool, VOLUME.format("v", 2 * MIB, "<target><format type='qcow2'/></target>"))
    assert (made.format, made.size) == ("qcow2", 2 * MIB)
    await volumes.create(pools, pool, VOLUME.format("r", 2 * MIB, ""))
    await bytes_there_and_back(pools, pool, "r")
    assert pool.contents.shared == "nfs"
    await again(pools, pool)
    # the server goes: lists, and other pools, do not wait for it
    (WORK / "local").mkdir()
    local = await pools.create_xml(
        f"<pool type='dir'><name>local</name><target><path>{WORK}/local</path></target></pool>"
    )
    sh("rpc.nfsd 0")
    pools.patience, pools.glance = 2.0, 1.0
    await refused(pool.refresh(), OperationTimeout, "the source of storage pool 'nfs' does not answer")
    assert "its source does not answer" in pool.warnings
    started = time.monotonic()
    assert sorted(each.name for each in pool.volumes()) == ["r", "v"]
    await pool.look_again(pool.volume("v"))
    await refused(volumes.delete(pools, pool, "r"), OperationTimeout, "does not answer")
    await volumes.create(pools, local, VOLUME.format("w", MIB, ""))
    assert time.monotonic() - started < 50  # a hard mount waits for ever
    sh(NFSD)
    for _ in range(600):
        if "its source does not answer" not in pool.warnings:
            break
        await asyncio.sleep(0.1)
    pools.patience = pools.glance = 60.0
    await pool.refresh()
    assert not pool.warnings, pool.warnings
    await volumes.delete(pools, pool, "r")
    # it goes for good: the pool can still be given up
    sh("rpc.nfsd 0")
    pools.patience = 2.0
    await refused(pool.refresh(), OperationTimeout, "does not answer")
    pools.patience = 60.0
    await pool.destroy()
    assert not pool.is_active and mounted_at(f"{WORK}/nfs") is None
    await local.destroy()


def iscsi_target() -> None:
    """LIO by configfs, as its tools do it: two files as units, CHAP for our initiator."""
    sh("mount -t configfs configfs /sys/kernel/config 2>/dev/null || true")
    group = CONFIGFS / f"iscsi/{TARGET}/tpgt_1"
    for number in (0, 1):
        store = CONFIGFS / f"core/fileio_0/unit{number}"
        store.mkdir(parents=True)
        image = WORK / f"unit{number}.img"
        with image.open("wb") as file:
            file.truncate(32 * MIB)
        (store / "control").write_text(f"fd_dev_name={image},fd_dev_size={32 * MIB}")
        (store / "wwn/vpd_unit_serial").write_text(f"kvik-unit-{number}")
        (store / "enable").write_text("1")
    (group / "np/127.0.0.1:3260").mkdir(parents=True)
    for number in (0, 1):
        (group / f"lun/lun_{number}").mkdir(parents=True)
        os.symlink(CONFIGFS / f"core/fileio_0/unit{number}", group / f"lun/lun_{number}/unit")
    acl = group / f"acls/{INITIATOR}"
    acl.mkdir()
    for number in (0, 1):
        (acl / f"lun_{number}").mkdir()
        os.symlink(group / f"lun/lun_{number}", acl / f"lun_{number}/unit")
    (acl / "auth/userid").write_text("me")
    (acl / "auth/password").write_text(SECRET.decode())
    (group / "attrib/authentication").write_text("1")
    (group / "enable").write_text("1")
    sh(
        "mkdir -p /run/lock/iscsi /etc/iscsi; "
        "echo InitiatorName=iqn.2026-01.org.example:host >/etc/iscsi/initiatorname.iscsi"
    )
    sh("iscsid")


AUTH = "<auth type='chap' username='me'><secret usage='chap'/></auth>"
SAN = f"""<pool type='{{}}'><name>{{}}</name><source><host name='127.0.0.1'/><device path='{TARGET}'/>{AUTH}
<initiator><iqn name='{INITIATOR}'/></initiator></source><target><path>/dev/disk/by-path</path></target></pool>"""


async def iscsi(pools: Pools) -> None:
    iscsi_target()
    pools.secret = lambda usage, which: SECRET if which.usage == "chap" else b""
    listed = find_sources("iscsi", "<source><host name='127.0.0.1'/></source>")
    assert f"<device path='{TARGET}'/>" in listed, listed
    pool = await pools.define(SAN.format("iscsi", "san"))
    await pool.start()
    names = [each.name for each in pool.volumes()]
    assert names == ["unit:0:0:0", "unit:0:0:1"], (names, pool.warnings)
    first = pool.volume(names[0])
    assert (first.size, first.type) == (32 * MIB, "block") and (first.key or "").startswith("naa."), first
    await bytes_there_and_back(pools, pool, names[0])
    seen = sh("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' || true")
    assert SECRET.decode() not in seen
    direct = resolve(pools, reference("san", names[1], "direct"))
    assert (direct.type, direct.source.name) == ("network", f"{TARGET}/1")
    assert (resolve(pools, reference("san", names[1])).type) == "block"
    await again(pools, pool)
    # the target goes: said, and found again
    group = CONFIGFS / f"iscsi/{TARGET}/tpgt_1"
    (group / "enable").write_text("0")
    state = next(Path("/sys/class/iscsi_session").glob("session*/state"))
    for _ in range(300):
        if state.read_text().strip() != "LOGGED_IN":
            break
        await asyncio.sleep(0.1)
    await refused(pool.refresh(), HostError, f"the session with target {TARGET} is lost")
    assert any("is lost" in line for line in pool.warnings)
    (group / "enable").write_text("1")
    for _ in range(300):
        if state.read_text().strip() == "LOGGED_IN":
            break
        await asyncio.sleep(0.1)
    await pool.refresh()
    assert [each.name for each in pool.volumes()] == names and not pool.warnings
    await pool.destroy()
    assert not [*Path("/sys/class/iscsi_session").glob("session*")]
    left = [*Path("/etc/iscsi/nodes", TARGET).glob("*/*")]
    assert not left, left  # nor is the password anywhere
    pools.secret = lambda usage, which: b"wrong-password"
    await refused(pool.start(), HostError, "authorization failure")
    assert not pool.is_active and not [*Path("/etc/iscsi/nodes", TARGET).glob("*/*")]


async def scsi(pools: Pools) -> None:
    """The kernel's SCSI host of memory (scsi_debug), and maps of multipath made of two of its disks by hand."""
    Path("/sys/bus/pseudo/drivers/scsi_debug/max_luns").write_text("2")
    host = next(Path("/sys/bus/pseudo/drivers/scsi_debug/adapter0").glob("host*")).name
    pool = await pools.create_xml(
        f"<pool type='scsi'><name>hba</name><source><adapter name='scsi_{host}'/></source>"
        "<target><path>/dev/disk/by-path</path></target></pool>"
    )
    assert len(pool.volumes()) == 2, (pool.contents, pool.warnings)
    await bytes_there_and_back(pools, pool, pool.volumes()[0].name)
    disks = [each.path for each in pool.volumes()]
    table = f"0 16384 multipath 0 0 1 1 round-robin 0 2 1 {disks[0]} 1 {disks[1]} 1"
    sh(f"DM_DISABLE_UDEV=1 dmsetup create mpatha --uuid mpath-3600aa --table '{table}'")
    maps = await pools.create_xml(
        "<pool type='mpath'><name>maps</name><target><path>/dev/mapper</path></target></pool>"
    )
    assert [(each.path, each.size, each.key) for each in maps.volumes()] == [
        ("/dev/mapper/mpatha", 8 * MIB, "3600aa")
    ], maps.contents
    await maps.destroy()
    await pool.destroy()
    sh("DM_DISABLE_UDEV=1 dmsetup remove mpatha")


async def smb(pools: Pools) -> None:
    conf = WORK / "smb.conf"
    (WORK / "share").mkdir()
    places = ("private dir", "lock directory", "state directory", "cache directory", "pid directory")
    lines = [
        "[global]", "server role = standalone server", "bind interfaces only = yes", "interfaces = lo",
        "smb ports = 445",
        *(f"{place} = {WORK}/smb" for place in places), f"ncalrpc dir = {WORK}/smb/ncalrpc",
        f"log file = {WORK}/smb/log",
        f"passdb backend = tdbsam:{WORK}/smb/passdb.tdb", "[share]", f"path = {WORK}/share", "read only = no", "",
    ]  # fmt: skip
    conf.write_text("\n".join(lines))
    (WORK / "smb").mkdir()
    sh(f"printf 'secret-word\\nsecret-word\\n' | smbpasswd -c {conf} -s -a root; smbd -s {conf} -D")
    pools.secret = lambda usage, which: b"secret-word" if which.usage == "share" else b""
    xml = f"""<pool type='netfs'><name>smb</name><source><host name='127.0.0.1'/><dir path='share'/>
    <format type='cifs'/><auth type='cifs' username='root'><secret usage='share'/></auth></source>
    <target><path>{WORK}/smbmnt</path></target></pool>"""
    pool = await pools.define(xml)
    await pool.build(building())
    for attempt in range(40):
        try:
            await pool.start()
            break
        except HostError:
            if attempt == 39:
                raise
            await asyncio.sleep(0.25)
    found = mounted_at(f"{WORK}/smbmnt")
    assert found is not None and found.type == "cifs"
    assert (
        "nobrl" in Path("/proc/self/mounts").read_text() and "secret-word" not in Path("/proc/self/mounts").read_text()
    )
    await volumes.create(pools, pool, VOLUME.format("v", 2 * MIB, ""))
    await bytes_there_and_back(pools, pool, "v")
    assert pool.contents.shared == "cifs"
    await pool.destroy()


SCENES = {
    "logical": logical, "thin": thin_volumes, "nfs": nfs, "iscsi": iscsi, "scsi": scsi,
    "smb": smb,
}  # fmt: skip


# What belongs together runs one after the other, the rest beside it: much of it is waiting.
GROUPS = (("logical", "thin"), ("nfs",), ("iscsi",), ("scsi",), ("smb",))


async def play(names: Sequence[str]) -> dict[str, str]:
    outcome = {}
    for name in names:
        pools = Pools(Paths.system(WORK / f"root-{name}"))
        pools.patience = pools.glance = recover.WAIT = 60.0  # of an emulated machine
        await pools.open()
        started = time.monotonic()
        try:
            async with asyncio.timeout(DEADLINE):
                await SCENES[name](pools)
            outcome[name] = ""
        except BaseException:
            outcome[name] = traceback.format_exc()
        spent = f"{time.monotonic() - started:.1f} s, {sum(os.times()[:4]):.1f} s of processor by now"
        print(f"{name}: {spent} {outcome[name]}", file=sys.stderr, flush=True)
        pools.close()
    return outcome


def beside(number: int, names: Sequence[str]) -> int:
    """In a process of its own, with all that is imported already: its pid."""
    pid = os.fork()
    if not pid:
        try:
            (WORK / f"outcome{number}").write_text(json.dumps(asyncio.run(play(names))))
        finally:
            os._exit(0)  # threads that wait for a dead server are not waited for
    return pid


def main(wanted: Sequence[str]) -> None:
    groups = [found for group in GROUPS if (found := [name for name in group if name in wanted or not wanted])]
    for pid in [beside(number, group) for number, group in enumerate(groups)]:
        os.waitpid(pid, 0)
    outcome: dict[str, str] = {}
    for number, group in enumerate(groups):
        place = WORK / f"outcome{number}"
        outcome |= json.loads(place.read_text()) if place.exists() else dict.fromkeys(group, "ended without a word")
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    WORK.mkdir()
    assert find_program("lvs"), "lvm2"
    main(sys.argv[1:])
