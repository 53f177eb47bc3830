"""Block jobs of a kvik-vmm that runs: real kvik-blks, and a tiny guest that writes when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blk_guest import BlkDriver
from disk_world import (
    Death,
    Killed,
    World,
    checked,
    daemons,
    disk,
    idle,
    image,
    kill,
    live_disk,
    raw,
    soon,
    take,
    told,
    tops,
    word,
    writes,
)
from guests import needs_kvm
from tiny_kernel import IDLE

from kvik.conf.devices.disk import Disk
from kvik.conf.enums import ConnectDomainEventBlockJobStatus as Status
from kvik.conf.enums import DomainBlockCommitFlags as Commit
from kvik.conf.enums import DomainBlockJobAbortFlags as Abort
from kvik.conf.enums import DomainSnapshotCreateFlags as Create
from kvik.conf.enums import DomainState
from kvik.errors import OperationFailed, OperationUnsupported
from kvik.hypervisor.kvik.disk_jobs import KvikDiskJobs
from kvik.hypervisor.layers import layers
from kvik.manager import block_jobs
from kvik.manager.checkpoints import create as checkpoints
from kvik.manager.domain import DomainObject
from kvik.manager.snapshots import create, delete
from kvik.manager.store import Store
from kvik.qmp.aio import QmpConnection

pytestmark = [pytest.mark.functional, needs_kvm]

MIB = 1 << 20
DELETE = Commit.DELETE
SLOW = 65536  # bytes a second


def chain(root: Path) -> list[Path]:
    """Images on each other, the top one first."""
    images = [image(root / "a.qcow2", first=b"base")]
    subprocess.run(["qemu-io", "-c", "write -q -P 7 4M 2M", str(images[0])], check=True)
    for name in ("middle", "top"):
        below = ("-b", str(images[0]), "-F", "qcow2")
        images.insert(0, image(root / f"{name}.qcow2", "qcow2", *below))
    subprocess.run(["qemu-io", "-c", "write -q -P 9 6M 1M", str(images[1])], check=True)
    return images


def holds_patterns(path: Path) -> None:
    """What `chain` wrote, beside the guest's."""
    said = subprocess.run(["qemu-io", "-c", "read -P 7 4M 2M", "-c", "read -P 9 6M 1M", str(path)],
                          check=True, capture_output=True, text=True).stdout  # fmt: skip
    assert "Pattern verification failed" not in said


def images_of(domain: DomainObject) -> list[str]:
    assert domain.run is not None
    (one,) = domain.run.live.devices.disks
    return [Path(layer.source.location or "").name for layer in layers(one)]


def told_of(world: World) -> list[int]:
    return [fields["status"] for kind, fields in world.events if kind == "block-job-2"]


async def over(world: World, *outcomes: int) -> None:
    """Until so many jobs have ended, and how."""
    await soon(lambda: len(told_of(world)) >= len(outcomes))
    assert told_of(world) == [*outcomes]


async def test_images_below_are_pulled_while_the_guest_writes(world: World) -> None:
    images = chain(world.root)
    domain = await world.start(writes(BlkDriver(5)), disk(images[0]))
    await told(world, b"up")
    await told(world, b"one")
    await block_jobs.pull(domain, "vda", str(images[2]), SLOW)
    await told(world, b"two")
    shown = await domain.block_job_info("vda")
    assert shown is not None and shown.bandwidth == SLOW and shown.end == 8 * MIB and shown.cur < shown.end
    await domain.block_job_speed("vda", 0, in_bytes=False)
    await over(world, Status.COMPLETED)
    assert images_of(domain) == ["top.qcow2", "a.qcow2"]
    images[1].unlink()
    await told(world, b"three")
    # a speed that never ends, and given up
    await block_jobs.pull(domain, "vda", None, 1)
    await domain.block_job_abort("vda", 0)
    await over(world, Status.COMPLETED, Status.CANCELED)
    assert images_of(domain) == ["top.qcow2", "a.qcow2"]
    # the next daemon takes it up
    await block_jobs.pull(domain, "vda", None, 1)
    domain = await world.next_manager()
    assert (shown := await domain.block_job_info("vda")) is not None and shown.bandwidth == 1
    await domain.block_job_speed("vda", 0, in_bytes=False)
    await over(world, Status.COMPLETED, Status.CANCELED, Status.COMPLETED)
    assert images_of(domain) == ["top.qcow2"]
    images[2].unlink()
    await told(world, b"four")
    await domain.destroy()
    checked(images[0])
    assert word(images[0]) == b"four"
    holds_patterns(images[0])
    await domain.start()
    assert images_of(domain) == ["top.qcow2"]


async def test_a_killed_kvik_blk_loses_its_job_and_nothing_else(world: World) -> None:
    images = chain(world.root)
    domain = await world.start(writes(BlkDriver(5)), disk(images[0]))
    await told(world, b"up")
    await told(world, b"one")
    await block_jobs.pull(domain, "vda", None, SLOW)
    await told(world, b"two")
    await kill(world, domain)
    await told(world, b"three")
    await over(world, Status.FAILED)
    assert images_of(domain) == [path.name for path in images]
    assert domain.state == DomainState.RUNNING
    await block_jobs.pull(domain, "vda", None, 0)
    await over(world, Status.FAILED, Status.COMPLETED)
    assert images_of(domain) == ["top.qcow2"]
    await told(world, b"four")
    await domain.destroy()
    for path in images:
        checked(path)
    assert word(images[0]) == b"four"


async def test_a_snapshot_that_is_deleted_is_merged_up_while_the_guest_writes(world: World) -> None:
    domain = await world.start(writes(BlkDriver(5)), disk(image(world.root / "a.qcow2")))
    await told(world, b"up")
    await told(world, b"one")
    await take(domain, "s1")
    await told(world, b"two")
    await checkpoints.create(domain, "<domaincheckpoint><name>c1</name></domaincheckpoint>", 0)
    await take(domain, "s2")
    await told(world, b"three")
    await delete.delete(domain, "s2", 0)
    await idle(domain)
    await soon(lambda: not (world.root / "a.s1").exists())
    assert images_of(domain) == ["a.s2", "a.qcow2"] and tops(domain) == ["a.s2"]
    assert domain.checkpoints.get("c1").image_of("vda") == str(world.root / "a.s2")
    await told(world, b"four")
    await domain.destroy()
    checked(world.root / "a.s2")
    assert word(world.root / "a.s2") == b"four" and word(world.root / "a.qcow2") == b"one"


async def test_images_of_the_middle_are_merged_down_while_the_guest_writes(world: World) -> None:
    images = chain(world.root)
    domain = await world.start(writes(BlkDriver(5)), disk(images[0]))
    await told(world, b"up")
    await told(world, b"one")
    await block_jobs.commit(domain, "vda", None, str(images[1]), bandwidth=SLOW, flags=Commit.BANDWIDTH_BYTES)
    await told(world, b"two")
    assert (shown := await domain.block_job_info("vda")) is not None and shown.cur < shown.end == 8 * MIB
    await kill(world, domain)
    await over(world, Status.FAILED)
    assert images_of(domain) == [path.name for path in images]
    await told(world, b"three")
    await block_jobs.commit(domain, "vda", None, str(images[1]), bandwidth=1, flags=Commit.BANDWIDTH_BYTES | DELETE)
    domain = await world.next_manager()
    await domain.block_job_speed("vda", 0, in_bytes=False)
    await over(world, Status.FAILED, Status.COMPLETED)
    assert images_of(domain) == ["top.qcow2", "a.qcow2"] and not images[1].exists()
    await told(world, b"four")
    await domain.destroy()
    for path in (images[0], images[2]):
        checked(path)
    assert word(images[0]) == b"four"
    holds_patterns(images[2])


async def ready(domain: DomainObject) -> None:
    run = domain.run
    assert run is not None
    await soon(lambda: all(job.ready for job in run.block_jobs.values()))


async def test_the_guest_changes_over_to_the_image_that_its_own_goes_into(world: World) -> None:
    images = chain(world.root)
    domain = await world.start(writes(BlkDriver(5)), disk(images[0], options=" cache='none'"))
    await told(world, b"up")
    await told(world, b"one")
    await block_jobs.commit(domain, "vda", str(images[1]), None, flags=Commit.ACTIVE)
    await told(world, b"two")
    await ready(domain)
    # given up; then taken up by the next daemon
    await domain.block_job_abort("vda", 0)
    await over(world, Status.READY, Status.CANCELED)
    assert images_of(domain) == [path.name for path in images]
    await block_jobs.commit(domain, "vda", str(images[1]), None, flags=Commit.ACTIVE | DELETE)
    await ready(domain)
    domain = await world.next_manager()
    await told(world, b"three")
    await domain.block_job_abort("vda", Abort.PIVOT)
    assert images_of(domain) == ["middle.qcow2", "a.qcow2"] and tops(domain) == ["middle.qcow2"]
    await soon(lambda: not images[0].exists())
    # killed when it had changed over
    await kill(world, domain)
    await told(world, b"four")
    await domain.destroy()
    checked(images[1])
    assert word(images[1]) == b"four"
    await domain.start()
    assert images_of(domain) == ["middle.qcow2", "a.qcow2"]


async def test_a_kvik_blk_that_died_before_the_document_says_it_changed_over_goes_on_in_the_base(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = chain(world.root)
    domain = await world.start(writes(BlkDriver(5)), disk(images[0]))
    await told(world, b"up")
    await told(world, b"one")
    await block_jobs.commit(domain, "vda", str(images[1]), None, flags=Commit.ACTIVE)
    await ready(domain)
    original = KvikDiskJobs.chain
    killed = False

    async def chain_of(jobs: KvikDiskJobs, one: Disk) -> list[int]:
        nonlocal killed
        if not killed:
            killed = True
            await told(world, b"two")  # which is in the base only
            os.kill(daemons(domain)[0][0], signal.SIGKILL)
        return await original(jobs, one)

    monkeypatch.setattr(KvikDiskJobs, "chain", chain_of)
    await domain.block_job_abort("vda", Abort.PIVOT)
    assert killed and images_of(domain) == ["middle.qcow2", "a.qcow2"]
    assert word(images[0]) == b"one" and word(images[1]) == b"two"
    await told(world, b"three")
    await domain.destroy()
    assert word(images[1]) == b"three"


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("served", [True, False], ids=["kvik-blk", "kvik-vmm"])
async def test_the_guest_changes_over_to_a_raw_image(world: World, served: bool, cache: str) -> None:
    """Which is the usual disk, with a snapshot for a while: kvik-vmm's own until the machine is started anew."""
    base = raw(world.root / "a.raw")
    xml = disk(base, "raw", options=f" cache='{cache}'", **({"name": "kvik-blk"} if served else {}))
    domain = await world.start(writes(BlkDriver(5)), xml)
    assert len(daemons(domain)) == served
    await told(world, b"up")
    for name, said in (("s1", b"one"), ("s2", b"two")):
        await told(world, said)
        xml = f"<domainsnapshot><name>{name}</name></domainsnapshot>"
        await create.create(domain, xml, Create.DISK_ONLY | Create.NO_METADATA)
    assert images_of(domain) == ["a.s2", "a.s1", "a.raw"]
    # the middle
    await block_jobs.commit(domain, "vda", None, str(world.root / "a.s1"))
    await over(world, Status.COMPLETED)
    assert images_of(domain) == ["a.s2", "a.raw"] and word(base) == b"two"
    # the top
    await block_jobs.commit(domain, "vda", None, None, flags=Commit.ACTIVE)
    await ready(domain)
    await world.managers[-1].close()
    domain = (await world.manager()).lookup_name("m")
    await told(world, b"three")
    await domain.block_job_abort("vda", Abort.PIVOT)
    assert images_of(domain) == ["a.raw"] == tops(domain)
    (world.root / "a.s2").unlink()
    if served:
        os.kill(daemons(domain)[0][0], signal.SIGKILL)
        await soon(lambda: "kvik-blk of virtio-disk0 was started again" in world.log())
    await told(world, b"four")
    await domain.destroy()
    assert word(base) == b"four"
    await domain.start()
    assert images_of(domain) == ["a.raw"]


@pytest.mark.parametrize("served", [True, False], ids=["kvik-blk", "kvik-vmm"])
async def test_the_snapshot_of_a_raw_disk_that_is_deleted_is_merged_down_while_the_guest_writes(
    world: World, served: bool
) -> None:
    base = raw(world.root / "a.raw")
    domain = await world.start(writes(BlkDriver(5)), disk(base, "raw", **({"name": "kvik-blk"} if served else {})))
    await told(world, b"up")
    await told(world, b"one")
    await take(domain, "s1")
    await told(world, b"two")
    await delete.delete(domain, "s1", 0)
    await idle(domain)
    await soon(lambda: not (world.root / "a.s1").exists())
    assert images_of(domain) == ["a.raw"] == tops(domain) and domain.state == DomainState.RUNNING
    await take(domain, "s2")
    await told(world, b"three")
    assert word(base) == b"two"
    await domain.destroy()
    assert word(world.root / "a.s2") == b"three"


class Died(Death):
    """At a command, or before anything of the manager's own is written."""

    def files(self, original: Callable[..., Any]) -> Callable[..., Any]:
        async def run(store: Store, *given: Any, **more: Any) -> Any:
            self.came = self.came or self.left <= 0
            if self.came:
                raise Killed
            self.left -= 1
            return await original(store, *given, **more)

        return run


async def pivot_and_die(world: World, domain: DomainObject, death: Died, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(QmpConnection, "execute", death.commands(QmpConnection.execute))
        patch.setattr(Store, "run", death.files(Store.run))
        ending = asyncio.ensure_future(domain.block_job_abort("vda", Abort.PIVOT))
        await soon(lambda: death.came or ending.done())
        if not death.came:
            await soon(lambda: death.came or (domain.run is not None and not domain.run.block_jobs))
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        await world.bury(domain)


async def killed(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX":
                await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("power", "copies"), [(False, False), (True, False), (False, True)], ids=["machine", "power", "machine-copy"]
)
async def test_daemon_and_machine_die_while_it_changes_over(
    world: World, monkeypatch: pytest.MonkeyPatch, power: bool, copies: bool
) -> None:
    """Whatever the order, it goes on with what its guest wrote last; after a loss of power alone it may have to ask."""
    sure: list[bool] = []
    for step in range(40):
        place = world.root / str(step)
        place.mkdir()
        own = copies and not step % 2  # a disk that kvik-vmm writes itself
        images = chain(place) if not own else [raw(place / "a.raw"), place / "copy.raw"]
        domain = await world.start(writes(BlkDriver(5)), disk(images[0], "raw" if own else "qcow2"))
        await told(world, b"up")
        await told(world, b"one")
        if not copies:
            await block_jobs.commit(domain, "vda", str(images[1]), None, flags=Commit.ACTIVE)
        else:
            images[1] = place / f"copy{images[0].suffix}"
            await domain.block_copy("vda", f"<disk type='file'><source file='{images[1]}'/></disk>", {})
        await ready(domain)
        assert domain.run is not None
        processes = [domain.run.pid, *(pid for pid, _ in daemons(domain))]
        status = domain.manager.store.status
        death = Died(step)
        await pivot_and_die(world, domain, death, monkeypatch)
        await told(world, b"two")
        await killed(processes)
        if power:
            shutil.rmtree(status)
        domain = (await world.manager()).lookup_name("m")
        try:
            await domain.start()
            sure.append(True)
        except OperationFailed as error:
            assert "cannot be known" in str(error) and str(images[0]) in str(error) and str(images[1]) in str(error)
            sure.append(False)
            new = word(images[1]) == b"two"
            assert new or word(images[0]) == b"two"
            await domain.block_job_abort("vda", Abort.PIVOT if new else 0)
            await domain.start()
        (top,) = tops(domain)
        assert word(place / top) == b"two", (step, death.came)
        await domain.destroy()
        if not own:
            checked(place / top)
        if not death.came:
            break
    else:
        pytest.fail("it never came to its end")
    assert len(sure) > 8 and sure[-1] and all(sure) is not power


async def test_the_only_snapshot_that_is_deleted_is_merged_down_while_the_guest_writes(world: World) -> None:
    domain = await world.start(writes(BlkDriver(5)), disk(image(world.root / "a.qcow2")))
    await told(world, b"up")
    await checkpoints.create(domain, "<domaincheckpoint><name>c1</name></domaincheckpoint>", 0)
    await told(world, b"one")
    await take(domain, "s1")
    await told(world, b"two")
    await delete.delete(domain, "s1", 0)
    await idle(domain)
    await soon(lambda: not (world.root / "a.s1").exists())
    assert images_of(domain) == ["a.qcow2"] and tops(domain) == ["a.qcow2"]
    known = await domain.require_machine().backups.bitmaps(live_disk(domain))
    assert [bitmap.usable and bitmap.count > 0 for layer in known.values() for bitmap in layer.values()] == [True]
    await told(world, b"three")
    await domain.destroy()
    checked(world.root / "a.qcow2")
    assert word(world.root / "a.qcow2") == b"three"


async def test_disks_that_others_serve_and_jobs_that_are_not_there_are_refused_by_name(world: World) -> None:
    below = image(world.root / "below.qcow2")
    paths = [image(world.root / f"{one}.qcow2", "qcow2", "-b", str(below), "-F", "qcow2") for one in "ab"]
    domain = await world.start(IDLE, disk(paths[0]) + disk(paths[1], slot=6, dev="vdb", name="qemu-storage-daemon"))
    with pytest.raises(OperationUnsupported, match=r"vdb .* is served by qemu-storage-daemon"):
        await block_jobs.pull(domain, "vdb", None, 0)
    assert domain.run is not None and not domain.run.block_jobs
