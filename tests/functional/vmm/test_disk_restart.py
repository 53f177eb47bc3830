"""A kvik-blk that dies under a running machine: another takes its place, and the guest sees nothing of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blk_guest import BlkDriver, say_memory, wait_key
from disk_world import (
    AGAIN,
    SECONDS,
    WORDS,
    World,
    checked,
    daemons,
    disk,
    idle,
    image,
    kill,
    live_disk,
    soon,
    take,
    told,
    tops,
    two,
    until_again,
    word,
    writes,
)
from guests import needs_kvm
from tiny_kernel import IDLE, say

from kvik.conf.enums import DomainState
from kvik.errors import KvikError
from kvik.hypervisor.kvik import back_ends
from kvik.hypervisor.sidecars import storage_daemon
from kvik.manager.domain import DomainObject
from kvik.qmp.aio import QmpConnection

pytestmark = [pytest.mark.functional, needs_kvm]


class Axe:
    """Kills a process before the command number `left` of a snapshot."""

    def __init__(self, left: int, pid: int) -> None:
        self.left, self.pid, self.fell = left, pid, False

    def commands(self, original: Callable[..., Any]) -> Callable[..., Any]:
        async def execute(connection: QmpConnection, command: str, *given: Any, **more: Any) -> Any:
            if not self.fell and (command in ("stop", "cont", "getfd") or command.startswith("x-kvik-overlay")):
                self.fell = not self.left
                self.left -= 1
                if self.fell:
                    os.kill(self.pid, signal.SIGKILL)
            return await original(connection, command, *given, **more)

        return execute


def io_errors(world: World) -> list[dict[str, Any]]:
    return [data for kind, data in world.events if kind == "io-error-reason"]


async def ask(domain: DomainObject, command: str) -> Any:
    machine: Any = domain.require_machine()
    return await machine.ask_storage(live_disk(domain), command)


async def test_a_guest_writes_on_whatever_is_killed(world: World) -> None:
    """Also after its chain was changed, and with the limits that were set since."""
    paths, code, xml = two(world)
    domain = await world.start(code, xml)
    await told(world, b"up")
    await kill(world, domain)
    await told(world, b"oneone")
    await kill(world, domain)
    await kill(world, domain)
    await take(domain, "s1")
    await told(world, b"twotwo")
    assert tops(domain) == ["a.s1", "b.s1"]
    await kill(world, domain)
    await told(world, b"threethree")
    assert [word(path) for path in paths] == [b"one", b"one"]
    assert (await ask(domain, "x-kvik-query-overlay"))["top"] == storage_daemon.top_node(live_disk(domain))
    await take(domain, "s2")
    await told(world, b"fourfour")
    assert not io_errors(world) and not await domain.disk_errors()
    assert "kvik-blk of virtio-disk0 was started again" in world.log()
    await domain.destroy()
    await idle(domain)
    for path in (*paths, *(world.root / f"{name}.{point}" for name in "ab" for point in ("s1", "s2"))):
        checked(path)
    assert [word(world.root / name) for name in tops(domain)] == [WORDS[3], WORDS[3]]
    assert not list((world.root / "state").rglob("*-redo"))


async def test_one_is_killed_at_each_command_of_a_snapshot(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All disks have their new images or none, and no word is lost."""
    monkeypatch.setattr(back_ends, "WITHIN", 0.0)
    paths = [image(world.root / "a.qcow2"), image(world.root / "b.qcow2")]
    code = writes(BlkDriver(5), BlkDriver(6), words=(b"x",) * 40)
    domain = await world.start(code, disk(paths[0]) + disk(paths[1], slot=6, dev="vdb"))
    await told(world, b"up")
    stands: list[bool] = []
    for number in range(24):
        before = world.log().count(AGAIN)
        axe = Axe(number, daemons(domain)[number % 2][0])
        with monkeypatch.context() as patch, contextlib.suppress(KvikError):
            patch.setattr(QmpConnection, "execute", axe.commands(QmpConnection.execute))
            await take(domain, f"n{number}")
        if axe.fell:
            await until_again(world, before)
        names = {Path(name).suffix for name in tops(domain)}
        assert len(names) == 1, number
        stands.append(names == {f".n{number}"})
        assert stands[-1] == (f"n{number}" in domain.snapshots.snapshots), number
        assert domain.state == DomainState.RUNNING and domain.snapshots.journal is None, number
        await told(world, b"xx")
        assert [word(world.root / name) for name in tops(domain)] == [b"x", b"x"]
        if not axe.fell:
            break
    else:
        pytest.fail("the snapshot never came to its end")
    assert not all(stands) and not io_errors(world)
    await domain.destroy()
    for name in tops(domain):
        checked(world.root / name)


async def test_limits_and_size_are_those_of_now(world: World) -> None:
    limits = "<iotune><total_iops_sec>70</total_iops_sec></iotune>"
    domain = await world.start(IDLE, disk(image(world.root / "a.qcow2"), more=limits))
    await domain.block_resize("vda", 16 << 20)
    await kill(world, domain)
    (told_,) = await ask(domain, "query-block")
    assert told_["inserted"]["iops"] == 70
    assert (await domain.stats())["block.0.capacity"] == 16 << 20


async def test_one_that_dies_again_and_again_is_given_up(world: World) -> None:
    driver = BlkDriver(5)
    code = wait_key() + driver.start() + driver.read(0) + say(b"read") + wait_key() + say(b"alive") + IDLE
    domain = await world.start(code, disk(image(world.root / "a.qcow2")))
    world.key()
    await world.said(b"read")
    for _ in range(back_ends.TRIES - 1):
        await kill(world, domain)
    assert not io_errors(world) and not await domain.disk_errors()
    os.kill(daemons(domain)[0][0], signal.SIGKILL)
    await soon(lambda: io_errors(world))
    (error,) = io_errors(world)
    assert error["dev_alias"] == "virtio-disk0"
    assert "kvik-blk of disk vda ended 5 times within 60 s, last: killed by" in error["reason"]
    assert list(await domain.disk_errors()) == ["vda"]
    world.key()
    await world.said(b"alive")


async def test_one_whose_image_has_gone_is_given_up_with_the_reason(world: World) -> None:
    path = image(world.root / "a.qcow2")
    domain = await world.start(IDLE, disk(path))
    path.rename(world.root / "elsewhere")
    os.kill(daemons(domain)[0][0], signal.SIGKILL)
    await soon(lambda: io_errors(world))
    (error,) = io_errors(world)
    assert str(path) in error["reason"] and "No such file" in error["reason"]
    assert domain.is_active


async def test_the_next_manager_sees_to_what_died_while_there_was_none(world: World) -> None:
    path = image(world.root / "a.qcow2")
    domain = await world.start(writes(BlkDriver(5)), disk(path))
    await told(world, b"up")
    await told(world, b"one")
    (known,) = daemons(domain)
    await world.managers[-1].close()
    os.kill(known[0], signal.SIGKILL)
    world.text = b""
    world.key()
    await asyncio.sleep(0.5)
    assert world.line is not None
    with pytest.raises(BlockingIOError):  # it waits for its disk
        world.line.recv(1)
    domain = (await world.manager()).lookup_name("m")
    await world.said(b"two.")
    await until_again(world, 0)
    (again,) = daemons(domain)
    # One that the manager had no time to note is found all the same
    status = next((world.root / "state").rglob("run/**/m.xml"))
    noted = status.read_bytes()
    await kill(world, domain)
    (third,) = daemons(domain)
    await world.managers[-1].close()
    status.write_bytes(noted)
    domain = (await world.manager()).lookup_name("m")
    await soon(lambda: daemons(domain) == [third])
    assert again != third
    await told(world, b"three")
    await domain.destroy()
    checked(path)
    assert word(path) == b"three"


async def test_one_that_does_not_answer_the_vmm_is_replaced(world: World) -> None:
    path = image(world.root / "a.qcow2")
    domain = await world.start(writes(BlkDriver(5)), disk(path))
    await told(world, b"up")
    (known,) = daemons(domain)
    os.kill(known[0], signal.SIGSTOP)
    world.key()
    await domain.require_machine().execute("stop", deadline=SECONDS)  # its rings are not given back in time
    await until_again(world, 0)
    assert known not in daemons(domain) and not io_errors(world)
    world.text = b""
    await domain.require_machine().execute("cont")
    await world.said(b"one.")
    await domain.destroy()
    checked(path)
    assert word(path) == b"one"


async def test_a_request_under_way_is_answered_once(world: World) -> None:
    """Stopped with a request that it has not seen, killed: the next one answers."""
    driver = BlkDriver(5)
    code = wait_key() + driver.start() + say(b"up") + wait_key() + driver.write(0, b"late") + say(b"written")
    code += driver.read(0) + say_memory(driver.data, 4) + say(b".") + IDLE
    path = image(world.root / "a.qcow2")
    domain = await world.start(code, disk(path))
    world.key()
    await world.said(b"up")
    os.kill(daemons(domain)[0][0], signal.SIGSTOP)
    world.key()
    await asyncio.sleep(0.2)
    assert b"written" not in world.text
    await kill(world, domain)
    await world.said(b"writtenlate.")
    await domain.suspend()  # the state of its rings is known
    await domain.resume()
    await domain.destroy()
    checked(path)
