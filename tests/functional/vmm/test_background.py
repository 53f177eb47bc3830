"""Snapshots with memory of a kvik-vmm whose guest goes on: it writes to memory and disk all the time, and what of that
memory is not of the same instant can be told."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import struct
import threading
from pathlib import Path

import disk_world
import pytest
from blk_guest import NOTIFY, T_IN, T_OUT, WRITE, BlkDriver, fill, poke, wait_key
from disk_world import Death, Killed, World, checked, daemons, disk, idle, image, soon, tops
from guests import needs_kvm
from tiny_kernel import COM1, say

from kvik.conf.enums import DomainSnapshotCreateFlags as Create
from kvik.conf.enums import DomainSnapshotRevertFlags as Revert
from kvik.conf.enums import DomainState
from kvik.errors import HostError, KvikError
from kvik.hypervisor.kvik import background
from kvik.hypervisor.kvik.machine import KvikMachine
from kvik.manager.domain import DomainObject
from kvik.manager.saved.image import Reader, Writer
from kvik.manager.snapshots import create, delete, revert
from kvik.manager.store import Store
from kvik.qmp.aio import QmpConnection
from kvik.vmm.state import stream

pytestmark = [pytest.mark.functional, needs_kvm]

# Rounds begun, what is written to the disk, what was seen of it, errors, and what came back: each in a piece of 2 MiB.
# The saver goes upwards: it comes to what the disk's process writes only behind much that is to be written out.
N, OUT, SEEN, ERRORS, BACK = 0x280_0000, 0x2A0_0000, 0x2C0_0000, 0x2E0_0000, 0xBA0_0000
DIRTY, PAGES = 0x300_0000, 2048
MUCH, BYTES = 0x500_0000, 0x600_0000
NEXT = 1


def le(value: int) -> bytes:
    return struct.pack("<I", value)


def request(driver: BlkDriver, kind: int, buffer: int) -> bytes:
    """One request about sector 16, and wait for it: the driver's index goes on for ever."""
    code = fill(driver.header, struct.pack("<IIQ", kind, 0, 16)) + poke(driver.status, 0xEE, 1)
    way = WRITE if kind == T_IN else 0
    for index, (address, size, flags) in enumerate(
        [(driver.header, 16, NEXT), (buffer, 512, way | NEXT), (driver.status, 1, WRITE)]
    ):
        code += fill(driver.desc + 16 * index, struct.pack("<QIHH", address, size, flags, index + 1))
    code += b"\x66\xff\x05" + le(driver.avail + 2) + poke(driver.bar + NOTIFY, 0, 2)
    # 1: pause; mov avail+2,%ax; cmp used+2,%ax; jne 1b
    return code + b"\xf3\x90\x66\xa1" + le(driver.avail + 2) + b"\x66\x3b\x05" + le(driver.used + 2) + b"\x75\xef"


def busy(driver: BlkDriver) -> bytes:
    """Round after round: N goes up, is written to the disk and read back, and every page of DIRTY goes up by one. What
    is not as the guest left it counts as an error. A key is answered by the number of these."""
    error = b"\xff\x05" + le(ERRORS)
    code = b"\xff\x05" + le(N) + b"\xa1" + le(N) + b"\xa3" + le(OUT)
    code += request(driver, T_OUT, OUT) + request(driver, T_IN, BACK)
    code += b"\xa1" + le(BACK) + b"\xa3" + le(SEEN) + b"\x3b\x05" + le(N) + b"\x74\x06" + error
    code += b"\xbe" + le(DIRTY) + b"\xb9" + le(PAGES) + b"\x39\x1e\x74\x06" + error
    code += bytes.fromhex("ff06 81c600100000 49 75eb 43".replace(" ", ""))
    answer = b"\x66\xba" + struct.pack("<H", COM1) + b"\xec\xa0" + le(ERRORS) + b"\x04\x30\xee"
    code += b"\x66\xba" + struct.pack("<H", COM1 + 5) + b"\xec\xa8\x01\x74" + bytes([len(answer)]) + answer
    # mov $MUCH,%edi; mov $BYTES/4096,%ecx; 1: incl (%edi); add $4096,%edi; dec %ecx; jnz 1b
    much = b"\xbf" + le(MUCH) + b"\xb9" + le(BYTES // 4096) + bytes.fromhex("ff07 81c700100000 49 75f5")
    begin = wait_key() + much + driver.start() + say(b"up.") + b"\x31\xdb"
    return begin + code + b"\xe9" + struct.pack("<i", -len(code) - 5)


def words(path: Path) -> dict[int, int]:
    """The first word of each page that a memory's file has."""
    reader = Reader(str(path))
    data = b"".join(iter(lambda: reader.read(1 << 20), b""))
    reader.close()
    found, at = {}, 32
    while at < len(data):
        kind, size, address = stream.parse(data[at : at + 16])
        at += 16
        if kind == stream.PAGES:
            assert not size % 4096 and address // stream.CHUNK == (address + size - 1) // stream.CHUNK
            for page in range(0, size, 4096):
                assert address + page not in found
                (found[address + page],) = struct.unpack_from("<I", data, at + page)
        at += size
    return found


def of_one_instant(path: Path) -> int:
    """The round that the guest was in."""
    found = words(path)
    pages = [found.get(DIRTY + 4096 * page, 0) for page in range(PAGES)]
    assert pages == sorted(pages, reverse=True) and pages[0] - pages[-1] <= 1
    assert not found.get(ERRORS, 0)
    number = found[N]
    assert number - pages[0] in (0, 1)
    seen = [found.get(at, 0) for at in (OUT, BACK, SEEN)]
    assert seen == sorted(seen, reverse=True) and {*seen} <= {number - 1, number}, (number, seen)
    return number


async def told(world: World) -> bytes:
    """The guest's errors, when it was asked."""
    world.text = b""
    world.key()
    await world.said(b"0")
    return world.text


async def take(domain: DomainObject, name: str, flags: int) -> float:
    """Milliseconds that the guest stood still."""
    await create.create(domain, f"<domainsnapshot><name>{name}</name></domainsnapshot>", flags)
    taken = domain.snapshots.snapshots[name].taken
    assert taken is not None and taken.pause is not None
    assert taken.stood is None, taken.stood
    return taken.pause / 1000


def memory_of(domain: DomainObject, name: str) -> Path:
    taken = domain.snapshots.snapshots[name].taken
    assert taken is not None and taken.memory is not None
    return Path(taken.memory)


@pytest.fixture(autouse=True)
def larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disk_world.DOMAIN", disk_world.DOMAIN.replace(">32<", ">192<"))


async def started(world: World, kind: str) -> DomainObject:
    path = world.root / f"a.{kind}"
    if kind == "raw":
        path.write_bytes(bytes(8 << 20))
    else:
        image(path)
    domain = await world.start(busy(BlkDriver(5)), disk(path, kind))
    await rounds_begin(world)
    return domain


async def rounds_begin(world: World) -> None:
    world.key()
    await world.said(b"up.")
    await told(world)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_a_guest_that_writes_all_the_time_goes_on(world: World, kind: str) -> None:
    """A raw disk is kvik-vmm's own, and its memory private; a qcow2 one is a kvik-blk's, which has mapped it too."""
    domain = await started(world, kind)
    held = {}
    for name, flags in (("still", 0), ("live0", Create.LIVE), ("live1", Create.LIVE)):
        held[name] = await take(domain, name, flags)
        assert domain.state == DomainState.RUNNING and await told(world) == b"0"
    print(f"{kind}: milliseconds that the guest stood still:", held)
    rounds = [of_one_instant(memory_of(domain, name)) for name in held]
    assert rounds == sorted(set(rounds)) and tops(domain) == ["a.live1"]
    for _ in range(2):
        await revert.revert(domain, "live0", 0)
        world.connect()
        assert await told(world) == b"0"
    # Frozen while it is: what is restored is the file, nothing that was written later.
    await revert.revert(domain, "live1", Revert.PAUSED)
    await create.create(domain, "<domainsnapshot><name>again</name></domainsnapshot>", Create.LIVE)
    assert of_one_instant(memory_of(domain, "again")) == rounds[2]


class Held:
    """Memory's file: what comes behind its first part waits until it is let go, or fails."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go, self.reached, self.error = threading.Event(), threading.Event(), False
        original = Writer.write

        def write(writer: Writer, data: memoryview) -> None:
            if writer.size > 4 << 20:
                self.reached.set()
                assert self.go.wait(60)
                if self.error:
                    raise HostError("cannot write: No space left on device", errno=errno.ENOSPC)
            original(writer, data)

        patch.setattr(Writer, "write", write)


async def behind_the_instant(domain: DomainObject, held: Held, taking: asyncio.Task[float]) -> None:
    """Its disks have changed over, and the documents say so."""
    await soon(lambda: held.reached.is_set() or taking.done())
    assert not taking.done(), taking.exception()
    await soon(lambda: domain.snapshots.journal is not None and domain.snapshots.journal.phase == "prepare")


def savers(domain: DomainObject) -> list[int]:
    """Processes that save this machine's memory: its own log is what they have for their errors."""
    assert domain.run is not None
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            log = (place / "fd/2").readlink()
            if b"/vmm/saver/" in (place / "cmdline").read_bytes() and log.name == f"{domain.name}.log":
                found.append(int(place.name))
    return found


async def test_what_fails_amid_it_leaves_the_machine_as_it_was(world: World) -> None:
    domain = await started(world, "qcow2")
    machine = domain.require_machine()
    assert isinstance(machine, KvikMachine)

    async def no_space(held: Held) -> None:
        held.error = True

    async def cancelled(held: Held) -> None:
        assert domain.jobs.current is not None and domain.jobs.current.cancel is not None
        domain.jobs.current.cancel()

    async def saver_killed(held: Held) -> None:
        (pid,) = savers(domain)
        os.kill(pid, signal.SIGKILL)

    async def back_end_killed(held: Held) -> None:
        os.kill(daemons(domain)[0][0], signal.SIGKILL)

    async def given_up_by_the_vmm(held: Held) -> None:
        await machine.execute("x-kvik-background-cancel")

    for number, fail in enumerate((no_space, cancelled, saver_killed, back_end_killed, given_up_by_the_vmm)):
        with pytest.MonkeyPatch.context() as patch:
            held = Held(patch)
            taking = asyncio.create_task(take(domain, f"s{number}", Create.LIVE))
            await behind_the_instant(domain, held, taking)
            assert await told(world) == b"0" and tops(domain) == [f"a.s{number}"]
            await fail(held)
            held.go.set()
            with pytest.raises(KvikError) as refused:
                await taking
            print(fail.__name__, "->", refused.value)
        assert domain.state == DomainState.RUNNING and await told(world) == b"0", fail
        await idle(domain)
        # Its disk had a new image already: that is merged into the one below, as when a snapshot is deleted.
        await soon(lambda: not list(world.root.glob("a.s*")))
        await idle(domain)
        assert tops(domain) == ["a.qcow2"]
        assert not domain.snapshots.snapshots and domain.snapshots.journal is None and not savers(domain)
        assert not list(world.root.rglob("*.mem")) and not list(world.root.rglob("*.saving"))
        assert await told(world) == b"0"
    await take(domain, "whole", Create.LIVE)
    of_one_instant(memory_of(domain, "whole"))
    # The VMM's own death: the machine is off, and nothing of that snapshot is left.
    with pytest.MonkeyPatch.context() as patch:
        held = Held(patch)
        taking = asyncio.create_task(take(domain, "last", Create.LIVE))
        await behind_the_instant(domain, held, taking)
        os.kill(machine.pid, signal.SIGKILL)
        held.go.set()
        with pytest.raises(KvikError):
            await taking
    await soon(lambda: domain.state == DomainState.SHUTOFF)
    await idle(domain)
    await soon(lambda: len(list(world.root.glob("a.[lw]*"))) == 1)  # the two are merged, one way or the other
    assert list(domain.snapshots.snapshots) == ["whole"]
    await idle(domain)
    for name in ("a.qcow2", *tops(domain)):
        checked(world.root / name)
    await revert.revert(domain, "whole", 0)
    world.connect()
    assert await told(world) == b"0"


async def test_the_daemon_is_killed_at_each_command(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot is whole or was never heard of, the guest goes on, and nobody waits for a saver that is gone."""
    domain = await started(world, "qcow2")
    whole: list[bool] = []
    for number in range(40):
        death = Death(number)
        with monkeypatch.context() as patch:
            patch.setattr(QmpConnection, "execute", death.commands(QmpConnection.execute))
            patch.setattr(Store, "run", death.files(Store.run))
            try:
                await create.create(domain, f"<domainsnapshot><name>n{number}</name></domainsnapshot>", Create.LIVE)
            except (Killed, KvikError):
                assert death.came
            domain.require_machine().detach()
            await asyncio.sleep(0)
        domain.manager.store.close()
        world.managers.pop()
        domain = (await world.manager()).lookup_name("m")
        await idle(domain)
        assert domain.state == DomainState.RUNNING and domain.snapshots.journal is None, number
        whole.append(f"n{number}" in domain.snapshots.snapshots)
        if whole[-1]:
            of_one_instant(memory_of(domain, f"n{number}"))
        else:
            await soon(lambda: not list(world.root.rglob(f"*.n{number}")))  # noqa: B023 - it is waited for here
            assert not list(world.root.rglob(f"n{number}.mem")) and not list(world.root.rglob("*.saving"))
        await idle(domain)
        assert not savers(domain) and await told(world) == b"0", number
        if not death.came:
            break
    else:
        pytest.fail("the snapshot never came to its end")
    assert whole[-1] and not all(whole)
    await domain.destroy()
    for name in tops(domain):
        checked(world.root / name)


async def test_a_machine_that_cannot_says_why_it_stands_still(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = await started(world, "qcow2")
    with monkeypatch.context() as patch:
        patch.setattr(background, "_DEVICE", "/dev/nothing-of-that-name")
        await create.create(domain, "<domainsnapshot><name>one</name></domainsnapshot>", Create.LIVE)
    taken = domain.snapshots.snapshots["one"].taken
    why = "/dev/nothing-of-that-name cannot be opened: No such file or directory; it came with Linux 6.1"
    assert taken is not None and taken.stood and taken.stood.startswith(why)
    assert taken.pause and "stands still for its snapshot" in world.log() and not savers(domain)
    of_one_instant(memory_of(domain, "one"))
    # A disk that qemu-storage-daemon serves: that writes to memory without asking anybody.
    await domain.destroy()
    more = image(world.root / "b.qcow2")
    await idle(domain)
    await delete.delete(domain, "one", 0)
    domain = await world.start(
        busy(BlkDriver(5)), disk(world.root / "a.qcow2") + disk(more, slot=6, dev="vdb", name="qemu-storage-daemon")
    )
    await rounds_begin(world)
    xml = "<domainsnapshot><name>two</name><disks><disk name='vdb' snapshot='no'/></disks></domainsnapshot>"
    await create.create(domain, xml, Create.LIVE)
    taken = domain.snapshots.snapshots["two"].taken
    assert taken is not None and taken.stood and "virtio-disk1 (vhost-user-blk) maps memory by itself" in taken.stood
    of_one_instant(memory_of(domain, "two"))
