"""Copies of the disks of a kvik-vmm that runs: real kvik-blks, and a tiny guest that writes when it is told to."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from blk_guest import BlkDriver
from disk_world import World, checked, daemons, disk, image, live_disk, raw, soon, take, told, tops, word, writes
from guests import needs_kvm
from test_disk_jobs import chain, images_of, over, ready
from tiny_kernel import IDLE

from kvik.conf.devices.disk import Disk
from kvik.conf.enums import ConnectDomainEventBlockJobStatus as Status
from kvik.conf.enums import DomainBlockCopyFlags as Copy
from kvik.conf.enums import DomainBlockJobAbortFlags as Abort
from kvik.errors import ConfigError, KvikError, MonitorError, OperationInvalid, OperationUnsupported
from kvik.hypervisor.kvik.disk_jobs import KvikDiskJobs
from kvik.manager import block_copy, block_jobs
from kvik.manager.checkpoints import create as checkpoints
from kvik.manager.domain import DomainObject

pytestmark = [pytest.mark.functional, needs_kvm]

SLOW = 65536  # bytes a second


def to(path: Path | str, form: str = "", type: str = "file") -> str:
    driver = f"<driver type='{form}'/>" if form else ""
    return f"<disk type='{type}'>{driver}<source {'file' if type == 'file' else 'dev'}='{path}'/></disk>"


async def copy(domain: DomainObject, xml: str, flags: int = 0, **params: int) -> None:
    await block_copy.copy(domain, "vda", xml, params, flags)


async def served_again(world: World, times: int = 1) -> None:
    await soon(lambda: world.log().count("kvik-blk of virtio-disk0 was started again") >= times)


@pytest.mark.parametrize("form", ["qcow2", "raw"])
async def test_the_disk_moves_to_another_image_while_the_guest_writes(world: World, form: str) -> None:
    images = chain(world.root)
    domain = await world.start(writes(BlkDriver(5)), disk(images[0], options=" cache='none'"))
    await told(world, b"up")
    await told(world, b"one")
    new = world.root / f"new.{form}"
    await copy(domain, to(new, form), bandwidth=SLOW)
    await told(world, b"two")
    assert (mirror := live_disk(domain).mirror) is not None and mirror.job == "copy" and not mirror.ready
    shown = await domain.block_job_info("vda")
    assert shown is not None and shown.cur < shown.end and shown.bandwidth == SLOW
    with pytest.raises(KvikError, match="not ready for pivot yet"):
        await domain.block_job_abort("vda", Abort.PIVOT)
    await domain.block_job_speed("vda", 0, in_bytes=False)
    await ready(domain)
    # the next daemon takes it up
    await world.managers[-1].close()
    domain = (await world.manager()).lookup_name("m")
    await told(world, b"three")
    await domain.block_job_abort("vda", Abort.PIVOT)
    await over(world, Status.READY, Status.COMPLETED)
    assert images_of(domain) == [new.name] and tops(domain) == [new.name]
    for path in images:
        path.unlink()
    # killed when it had changed over
    os.kill(daemons(domain)[0][0], signal.SIGKILL)
    await served_again(world)
    assert (await domain.stats())["block.0.capacity"] == 8 << 20
    await told(world, b"four")
    await domain.destroy()
    if form == "qcow2":
        checked(new)
    assert word(new) == b"four"
    said = subprocess.run(["qemu-io", "-f", form, "-c", "read -P 7 4M 2M", "-c", "read -P 9 6M 1M", str(new)],
                          check=True, capture_output=True, text=True).stdout  # fmt: skip
    assert "Pattern verification failed" not in said
    await domain.start()
    assert images_of(domain) == [new.name]


@pytest.mark.parametrize("reuse", [False, True], ids=["made", "reused"])
async def test_a_shallow_copy_rests_on_what_the_disk_rests_on(world: World, reuse: bool) -> None:
    images = chain(world.root)
    domain = await world.start(writes(BlkDriver(5)), disk(images[0]))
    await told(world, b"up")
    await told(world, b"one")
    new = world.root / "new.qcow2"
    if reuse:
        image(new, "qcow2", "-b", str(images[1]), "-F", "qcow2")
    await copy(domain, to(new, "qcow2"), Copy.SHALLOW | (Copy.REUSE_EXT if reuse else 0))
    await ready(domain)
    await told(world, b"two")
    await domain.block_job_abort("vda", Abort.PIVOT)
    assert images_of(domain) == ["new.qcow2", "middle.qcow2", "a.qcow2"]
    images[0].unlink()
    await told(world, b"three")
    # what lies below is known to the document: jobs and snapshots go on from here
    await take(domain, "s1")
    assert images_of(domain) == ["new.s1", "new.qcow2", "middle.qcow2", "a.qcow2"]
    await told(world, b"four")
    await domain.destroy()
    checked(new)
    assert word(new) == b"three" and word(world.root / "new.s1") == b"four"
    assert new.stat().st_blocks * 512 < 2 << 20


async def test_a_copy_that_is_ended_is_whole_as_of_then_and_one_that_is_given_up_leaves_nothing(world: World) -> None:
    images = chain(world.root)
    domain = await world.start(writes(BlkDriver(5)), disk(images[0]))
    await told(world, b"up")
    await told(world, b"one")
    new = world.root / "new.qcow2"
    await copy(domain, to(new), bandwidth=1)
    await told(world, b"two")
    await domain.block_job_abort("vda", 0)
    await over(world, Status.CANCELED)
    assert not new.exists() and images_of(domain) == [path.name for path in images]
    await copy(domain, to(new))
    await ready(domain)
    await told(world, b"three")
    await domain.block_job_abort("vda", 0)
    await over(world, Status.CANCELED, Status.READY, Status.COMPLETED)
    await told(world, b"four")
    assert images_of(domain) == [path.name for path in images] and tops(domain) == [images[0].name]
    checked(new)
    assert word(new) == b"three"
    await domain.destroy()
    checked(images[0])
    assert word(images[0]) == b"four"


async def test_a_killed_kvik_blk_loses_its_copy_and_nothing_else(world: World) -> None:
    images = chain(world.root)
    domain = await world.start(writes(BlkDriver(5)), disk(images[0]))
    await told(world, b"up")
    await told(world, b"one")
    new = world.root / "new.qcow2"
    for number, bandwidth in enumerate((1, 0), 1):
        await copy(domain, to(new), bandwidth=bandwidth)
        if not bandwidth:
            await ready(domain)
        await told(world, (b"two", b"three")[number - 1])
        os.kill(daemons(domain)[0][0], signal.SIGKILL)
        await served_again(world, number)
        await soon(lambda: domain.run is not None and not domain.run.block_jobs)
        assert not new.exists() and images_of(domain) == [path.name for path in images]
    await over(world, Status.FAILED, Status.READY, Status.FAILED)
    await told(world, b"four")
    await domain.destroy()
    checked(images[0])
    assert word(images[0]) == b"four"


@pytest.mark.parametrize("form", ["qcow2", "raw"])
@pytest.mark.parametrize("daemon", ["stays", "comes-back"])
async def test_a_kvik_blk_that_died_before_the_document_says_it_changed_over_goes_on_in_the_copy(
    world: World, form: str, daemon: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = chain(world.root)
    domain = await world.start(writes(BlkDriver(5)), disk(images[0]))
    await told(world, b"up")
    await told(world, b"one")
    new = world.root / f"new.{form}"
    await copy(domain, to(new, form))
    await ready(domain)
    original = KvikDiskJobs.chain
    killed = False

    async def chain_of(jobs: KvikDiskJobs, one: Disk) -> list[int]:
        nonlocal killed
        if not killed:
            killed = True
            await told(world, b"two")  # which is in the copy only
            if daemon == "stays":
                os.kill(daemons(domain)[0][0], signal.SIGKILL)
            else:  # as long as this daemon lives it hears nothing more
                raise OperationInvalid("this daemon is about to be killed")
        return await original(jobs, one)

    monkeypatch.setattr(KvikDiskJobs, "chain", chain_of)
    if daemon == "stays":
        await domain.block_job_abort("vda", Abort.PIVOT)
    else:
        with pytest.raises(OperationInvalid, match="about to be killed"):
            await domain.block_job_abort("vda", Abort.PIVOT)
        assert images_of(domain) == [path.name for path in images]
        pid = daemons(domain)[0][0]
        await world.managers[-1].close()
        os.kill(pid, signal.SIGKILL)
        domain = (await world.manager()).lookup_name("m")
        await soon(lambda: domain.run is not None and not domain.run.block_jobs)
    assert killed and images_of(domain) == tops(domain) == [new.name]
    assert word(images[0]) == b"one" and word(new) == b"two"
    await told(world, b"three")
    await domain.destroy()
    assert word(new) == b"three"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("form", ["qcow2", "raw"])
@pytest.mark.parametrize("served", [True, False], ids=["kvik-blk", "kvik-vmm"])
async def test_a_full_file_system_ends_the_copy_and_not_the_guest(
    world: World, small: Path, form: str, served: bool
) -> None:
    images = chain(world.root)
    if not served:
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(images[0]), str(world.root / "own.raw")], check=True)
        images = [world.root / "own.raw"]
    domain = await world.start(writes(BlkDriver(5)), disk(images[0], images[0].suffix[1:]))
    await told(world, b"up")
    await told(world, b"one")
    new = small / "new"
    await copy(domain, to(new, form))
    await told(world, b"two")
    await over(world, Status.FAILED)
    assert "No space left on device" in world.log()
    assert not new.exists() and images_of(domain) == [path.name for path in images]
    assert not [kind for kind, _ in world.events if kind == "io-error"]
    await told(world, b"three")
    await domain.destroy()
    assert word(images[0]) == b"three"


async def test_a_raw_disk_of_kvik_blks_moves_with_a_qcow2_image_and_back(world: World) -> None:
    old = raw(world.root / "old.raw")
    domain = await world.start(writes(BlkDriver(5)), disk(old, "raw", name="kvik-blk"))
    await told(world, b"up")
    await told(world, b"one")
    last = world.root / "last.raw"
    for new, said in ((world.root / "new.qcow2", b"two"), (last, b"three")):
        await copy(domain, to(new, new.suffix[1:]))
        await ready(domain)
        await told(world, said)
        await domain.block_job_abort("vda", Abort.PIVOT)
        assert images_of(domain) == tops(domain) == [new.name]
    await block_jobs.resize(domain, "vda", 16 << 20, to_capacity=False)
    assert last.stat().st_size == 16 << 20
    await told(world, b"four")
    await domain.destroy()
    assert word(old) == b"two" and word(last) == b"four"
    checked(world.root / "new.qcow2")


@pytest.mark.parametrize("cache", ["writeback", "none"])
async def test_a_disk_that_the_vmm_writes_itself_moves_and_stays_its_own(world: World, cache: str) -> None:
    old = raw(world.root / "old.raw")
    domain = await world.start(writes(BlkDriver(5)), disk(old, "raw", options=f" cache='{cache}'"))
    assert not daemons(domain)
    await told(world, b"up")
    await told(world, b"one")
    # given up, and ended
    new, last = world.root / "new.qcow2", world.root / "last.raw"
    await copy(domain, to(new, "qcow2"), bandwidth=1)
    with pytest.raises(KvikError, match="has a block job"):
        await take(domain, "s0")
    await domain.block_job_abort("vda", 0)
    await soon(lambda: not new.exists())
    await copy(domain, to(new, "qcow2"))
    await ready(domain)
    await domain.block_job_abort("vda", 0)
    assert word(new) == b"one" and images_of(domain) == [old.name]
    new.unlink()
    # with another daemon
    await copy(domain, to(new, "qcow2"))
    await ready(domain)
    await world.managers[-1].close()
    domain = (await world.manager()).lookup_name("m")
    await told(world, b"two")
    await domain.block_job_abort("vda", Abort.PIVOT)
    assert images_of(domain) == tops(domain) == [new.name] and not daemons(domain)
    old.unlink()
    assert (await domain.stats())["block.0.capacity"] == 8 << 20
    await copy(domain, to(last, "raw"))
    await ready(domain)
    await told(world, b"three")
    await domain.block_job_abort("vda", Abort.PIVOT)
    assert images_of(domain) == tops(domain) == [last.name]
    await block_jobs.resize(domain, "vda", 16 << 20, to_capacity=False)
    assert last.stat().st_size == 16 << 20
    await take(domain, "s1")
    await told(world, b"four")
    assert word(last) == b"three"
    await domain.destroy()
    checked(new)
    checked(world.root / "last.s1")
    assert word(world.root / "last.s1") == b"four" and word(new) == b"three"
    await domain.start()
    assert len(daemons(domain)) == 1 and images_of(domain) == ["last.s1", last.name]


async def test_checkpoints_come_along_with_the_disk(world: World) -> None:
    domain = await world.start(writes(BlkDriver(5)), disk(image(world.root / "a.qcow2")))
    await told(world, b"up")
    await checkpoints.create(domain, "<domaincheckpoint><name>c1</name></domaincheckpoint>", 0)
    await told(world, b"one")
    new = world.root / "new.qcow2"
    await copy(domain, to(new))
    await ready(domain)
    await told(world, b"two")
    await domain.block_job_abort("vda", Abort.PIVOT)
    assert domain.checkpoints.get("c1").image_of("vda") == str(new)
    assert domain.run is not None
    known = await domain.require_machine().backups.bitmaps(live_disk(domain))
    assert [bitmap.usable and bitmap.count > 0 for layer in known.values() for bitmap in layer.values()] == [True]
    await told(world, b"three")
    await domain.destroy()
    checked(new)


async def test_what_cannot_be_copied_is_refused_and_leaves_nothing(world: World) -> None:
    other = image(world.root / "other.qcow2")
    images = chain(world.root)
    domain = await world.start(IDLE, disk(images[0]) + disk(other, slot=6, dev="vdb", name="qemu-storage-daemon"))
    new = world.root / "new"
    with pytest.raises(OperationUnsupported, match="is served by qemu-storage-daemon"):
        await block_copy.copy(domain, "vdb", to(new, "qcow2"), {}, 0)
    small = image(world.root / "small.qcow2")
    subprocess.run(["qemu-img", "resize", "-q", "--shrink", str(small), "4M"], check=True)
    for given, flags, kind, words in (
        (to(new, "vmdk"), 0, KvikError, "vmdk"),
        (to(new, "raw"), Copy.SHALLOW, KvikError, "which format raw cannot"),
        (to(new), Copy.SYNCHRONOUS_WRITES, OperationUnsupported, "--synchronous-writes"),
        (to(small), Copy.REUSE_EXT, ConfigError, "never guessed"),
        (to(small, "qcow2"), Copy.REUSE_EXT, MonitorError, "has 4194304 bytes, and the disk 8388608"),
        (to(images[1], "qcow2"), Copy.REUSE_EXT, KvikError, "in use|is used"),
        ("<disk type='network'><driver type='raw'/><source protocol='nbd' name='x'><host name='h'/></source></disk>",
         Copy.REUSE_EXT, OperationUnsupported, "files and block devices of this host"),
    ):  # fmt: skip
        with pytest.raises(kind, match=words) as caught:
            await copy(domain, given, flags)
        assert domain.run is not None and not domain.run.block_jobs, caught.value
        assert not new.exists() and live_disk(domain).mirror is None
