"""Saved machines: what is kept, what is refused, and a daemon killed at every change to a file."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from guillotine import cut
from manager_bench import Bench, document, until
from snapshot_bench import disk_xml, machine, take

from kvik.conf.domain import parse_domain
from kvik.conf.enums import DomainCreateFlags, DomainState, DomainUndefineFlags
from kvik.errors import ConfigUnsupported, InvalidArgument, KvikError, NotFound, OperationFailed, OperationInvalid
from kvik.hypervisor.test.behaviour import Behaviour
from kvik.manager.domain import DomainObject
from kvik.manager.saved import image
from kvik.manager.saved import machine as saved
from kvik.manager.snapshots import create, revert

MEMORY = bytes(range(256)) * 64


async def running(bench: Bench, name: str = "a", **more: str) -> DomainObject:
    domain = await bench.manager.define(document(name, **more))
    await domain.start()
    bench.driver.machines[name].memory = MEMORY
    return domain


def memory(bench: Bench, name: str = "a") -> bytes:
    return bench.driver.machines[name].memory


def state(domain: DomainObject) -> tuple[int, int]:
    return domain.state, domain.reason


async def test_saved_and_restored_with_its_memory(bench: Bench, tmp_path: Path) -> None:
    domain, path = await running(bench), tmp_path / "saved"
    bench.events.clear()
    await saved.save(domain, str(path), None, 0)
    assert state(domain) == (DomainState.SHUTOFF, 5) and path.stat().st_mode & 0o777 == 0o600
    assert bench.lifecycle() == [(3, 0), (5, 4)]  # suspended, stopped: saved
    assert not bench.driver.machines
    bench.events.clear()
    await saved.restore(bench.manager, str(path), None, 0)
    assert memory(bench) == MEMORY and state(domain) == (DomainState.RUNNING, 3) and path.exists()
    assert bench.lifecycle() == [(2, 2)]  # started: restored
    with pytest.raises(OperationInvalid, match="already running"):
        await saved.restore(bench.manager, str(path), None, 0)


@pytest.mark.parametrize(
    "case",
    [
        *((False, 0, 0, True), (True, 0, 0, False), (False, 4, 0, False), (True, 2, 0, True), (False, 4, 2, True)),
        *((True, 2, 4, False), (False, 1, 1, True)),
    ],
    ids=str,
)
async def test_whether_it_runs_then(bench: Bench, tmp_path: Path, case: tuple[bool, int, int, bool]) -> None:
    paused, at_save, at_restore, runs = case
    domain = await running(bench)
    if paused:
        await domain.suspend()
    await saved.save(domain, str(tmp_path / "s"), None, at_save)
    await saved.restore(bench.manager, str(tmp_path / "s"), None, at_restore)
    assert domain.state == (DomainState.RUNNING if runs else DomainState.PAUSED)
    assert await bench.driver.machines["a"].state() == ("running" if runs else "paused")


async def test_a_transient_machine_comes_back_from_its_file_alone(bench: Bench, tmp_path: Path) -> None:
    domain = await bench.manager.create_xml(document("b"))
    with pytest.raises(OperationInvalid, match="transient"):
        await saved.managed_save(domain, 0)
    await saved.save(domain, str(tmp_path / "s"), None, 0)
    assert not bench.manager.domains()
    await saved.restore(bench.manager, str(tmp_path / "s"), None, 0)
    assert bench.manager.lookup_name("b").is_active and not bench.manager.lookup_name("b").persistent


async def test_a_managed_save_is_used_by_the_next_start_and_by_no_other(bench: Bench) -> None:
    domain = await running(bench)
    await saved.managed_save(domain, 0)
    path = saved.managed_path(bench.manager, "a")
    assert domain.has_managed_save and path.exists() and path.parent.stat().st_mode & 0o777 == 0o700
    await bench.reopen()
    domain = bench.manager.lookup_name("a")
    assert domain.has_managed_save
    for refused in (
        lambda: bench.manager.undefine(domain, 0),
        lambda: bench.manager.create_xml(document()),
        lambda: create.create(domain, "<domainsnapshot/>", 0),
        lambda: revert.revert(domain, "s1", 0),
    ):
        with pytest.raises(OperationInvalid, match="managed save"):
            await refused()
    await domain.rename("other")  # it is no other machine for that
    await bench.reopen()
    domain = bench.manager.lookup_name("other")
    assert domain.has_managed_save and not path.exists()
    path = saved.managed_path(bench.manager, "other")
    await domain.start()
    assert memory(bench, "other") == MEMORY and not domain.has_managed_save and not path.exists()
    assert state(domain) == (DomainState.RUNNING, 3)


async def test_a_managed_save_is_given_up_when_that_is_asked_for(bench: Bench) -> None:
    domain = await running(bench)
    path = saved.managed_path(bench.manager, "a")
    await saved.managed_save(domain, 0)
    await saved.remove_managed(domain)
    assert not path.exists()
    with pytest.raises(OperationInvalid, match="no managed save"):
        await saved.remove_managed(domain)
    with pytest.raises(NotFound, match="no managed save"):
        saved.require_managed(domain)
    await domain.start()
    await saved.managed_save(domain, 0)
    await domain.start(flags=DomainCreateFlags.START_FORCE_BOOT)
    assert memory(bench) == b"booted" and not path.exists()
    await saved.managed_save(domain, 0)
    await bench.manager.undefine(domain, DomainUndefineFlags.MANAGED_SAVE)
    assert not path.exists() and not bench.manager.domains()


async def test_a_start_that_fails_leaves_the_managed_save(bench: Bench) -> None:
    domain = await running(bench)
    await saved.managed_save(domain, 0)
    bench.driver.behaviours["a"] = Behaviour(fail_start="no memory")
    with pytest.raises(KvikError, match="no memory"):
        await domain.start()
    assert domain.has_managed_save
    del bench.driver.behaviours["a"]
    await domain.start()
    assert memory(bench) == MEMORY


async def test_a_vmm_that_cannot_send_its_state_goes_on(bench: Bench, tmp_path: Path) -> None:
    bench.driver.behaviours["a"] = Behaviour(refuses_save="State blocked by non-migratable device")
    domain = await running(bench)
    with pytest.raises(KvikError, match="non-migratable"):
        await saved.save(domain, str(tmp_path / "s"), None, 0)
    assert await bench.driver.machines["a"].state() == "running" and domain.state == DomainState.RUNNING
    assert not (tmp_path / "s").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
async def test_no_room_for_it_and_it_goes_on_as_before(
    bench: Bench, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain, path = await running(bench), tmp_path / "s"
    path.write_bytes(b"what was there")
    left, real = 3, os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(number, os.strerror(number))
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(KvikError, match=os.strerror(number)):
            await saved.save(domain, str(path), None, 0)
    assert path.read_bytes() == b"what was there" and not list(tmp_path.glob(".*saving"))
    assert domain.state == DomainState.RUNNING and memory(bench) == MEMORY
    await saved.save(domain, str(path), None, 0)


async def test_its_job_is_seen_and_can_be_given_up(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = await running(bench)
    half, go = asyncio.Event(), asyncio.Event()
    real = type(bench.driver.machines["a"]).save_state

    async def slow(machine, target):  # type: ignore[no-untyped-def]  # as the one it stands for
        target.total = 100
        target.size = 40
        half.set()
        await go.wait()
        await real(machine, target)

    monkeypatch.setattr(type(bench.driver.machines["a"]), "save_state", slow)
    saving = asyncio.create_task(saved.save(domain, str(tmp_path / "s"), None, 0))
    await half.wait()
    job = domain.job_info()
    assert (job["operation"], job["done"], job["total"], job["name"]) == (2, 40, 100, "save")
    assert domain.jobs.current is not None and domain.jobs.current.cancel is not None
    domain.jobs.current.cancel()
    go.set()
    with pytest.raises(OperationFailed, match="cancelled"):
        await saving
    assert domain.state == DomainState.RUNNING and not (tmp_path / "s").exists()


# The document


async def test_its_document_can_be_shown_and_changed_where_no_guest_sees_it(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "x.raw").write_bytes(bytes(4096))
    (tmp_path / "y.raw").write_bytes(bytes(4096))
    domain = await running(bench, devices=disk_xml(tmp_path / "x.raw", format="raw"))
    path = str(tmp_path / "s")
    await saved.save(domain, path, None, 0)
    text = await saved.show_document(path, secure=True)
    assert "x.raw" in text and "<alias" not in text and str(bench.paths.status) not in text
    await saved.define_document(path, text.replace("x.raw", "y.raw"), 4)
    assert "y.raw" in await saved.show_document(path, secure=False) and not image.look(path).running
    for change, where in (
        (("<name>a<", "<name>b<"), "name"),
        (("262144", "262143"), "/domain/memory"),
        (("'vda'", "'vdb'"), "/domain/devices"),
        (("<serial type='pty'>", "<serial type='null'>"), ""),
    ):
        assert change[0] in text
        if where:
            with pytest.raises(ConfigUnsupported, match=where):
                await saved.define_document(path, text.replace(*change), 0)
        else:
            await saved.define_document(path, text.replace(*change), 0)
    await saved.restore(bench.manager, path, None, 2)
    assert memory(bench) == MEMORY


def test_what_a_run_was_given_by_the_host_is_asked_for_anew() -> None:
    nic = "<interface type='{}'><mac address='52:54:00:00:00:0{}'/><source {}/>{}<model type='virtio'/></interface>"
    defined = nic.format("network", 1, "network='lan'", "") + nic.format("bridge", 2, "bridge='br0'", "")
    port = "portid='00000000-0000-4000-8000-00000000000a' bridge='virbr7'"
    given = (
        nic.format("network", 1, f"network='lan' {port}", "<target dev='vnet3'/>")
        + nic.format("bridge", 2, "bridge='br0'", "<target dev='vnet4'/>")
        + nic.format("network", 3, f"network='lan' {port}", "<target dev='vnet5'/>")  # plugged while it ran
    )
    config, live = (parse_domain(document(devices=devices)) for devices in (defined, given))
    text = saved.saved_document(live, None, config)
    assert "vnet" not in text and "virbr7" not in text and "portid" not in text
    assert text.count("network='lan'") == 2 and "bridge='br0'" in text


async def test_no_snapshot_is_written_to_by_a_machine_that_was_saved_before_it(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    await domain.start()
    await saved.save(domain, str(tmp_path / "s"), None, 0)
    await take(domain, "s1")
    with pytest.raises(OperationInvalid, match="keeps snapshot 's1'"):
        await saved.restore(bench.manager, str(tmp_path / "s"), None, 0)


# Files that came from anywhere


@pytest.fixture
async def file(bench: Bench, tmp_path: Path) -> Path:
    domain = await running(bench)
    await saved.save(domain, str(tmp_path / "s"), None, 0)
    return tmp_path / "s"


@pytest.mark.parametrize("at", [0, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 100, 4096, 4100, -1, -5000])
async def test_a_changed_byte_is_found_wherever_it_is(bench: Bench, file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x55
    file.write_bytes(data)
    with pytest.raises(OperationFailed, match=r"damaged|no saved machine|version"):
        await saved.restore(bench.manager, str(file), None, 0)
    assert not bench.manager.lookup_name("a").is_active


@pytest.mark.parametrize("length", [0, 1, 100, 511, 512, 4096, 5000, -1])
async def test_a_file_that_was_cut_off_is_refused(bench: Bench, file: Path, length: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:length])
    with pytest.raises(OperationFailed):
        await saved.restore(bench.manager, str(file), None, 0)


async def test_figures_that_cannot_be_are_refused_before_anything_is_read(file: Path) -> None:
    facts = image.look(str(file))
    for changed in (
        facts._replace(document=(4096, 1 << 40, 0)),
        facts._replace(document=(0, 10, 0)),
        facts._replace(stream=(1 << 60, 1 << 60, 0)),
        facts._replace(stream=((1 << 64) - 1, 1 << 50, 0)),
    ):
        with file.open("r+b") as target:
            target.write(changed.pack())
        with pytest.raises(OperationFailed, match="damaged"):
            image.look(str(file))


async def test_what_is_no_saved_machine_is_named_as_such(bench: Bench, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "libvirt").write_bytes(b"LibvirtQemudSave" + struct.pack("<I", 2).ljust(600, b"\0"))
    for name, said in (("fifo", "no regular file"), ("libvirt", "by libvirt"), ("nothing", "No such file")):
        with pytest.raises(KvikError, match=said):
            await saved.restore(bench.manager, str(tmp_path / name), None, 0)
    domain = await running(bench)
    for name, said in (("fifo", "no regular file"), ("nowhere/s", "No such file")):
        with pytest.raises(KvikError, match=said):
            await saved.save(domain, str(tmp_path / name), None, 0)
    for path in ("relative", ""):
        with pytest.raises(InvalidArgument):
            await saved.save(domain, path, None, 0)
    for flags in (6, 16):
        with pytest.raises(InvalidArgument):
            await saved.save(domain, str(tmp_path / "s"), None, flags)
    assert domain.state == DomainState.RUNNING


# Killed at every change to a file

Operation = Callable[[DomainObject, Path], Awaitable[None]]


async def save(domain: DomainObject, path: Path) -> None:
    await saved.save(domain, str(path), None, 0)


async def managed(domain: DomainObject, path: Path) -> None:
    await saved.managed_save(domain, 0)


async def start(domain: DomainObject, path: Path) -> None:
    await domain.start()


async def restore(domain: DomainObject, path: Path) -> None:
    await saved.restore(domain.manager, str(path), None, 0)


@pytest.mark.parametrize(("operation", "stride"), [(save, 2), (managed, 5), (start, 2), (restore, 3)])
async def test_killed_at_any_change_to_a_file_neither_machine_nor_file_is_lost(
    tmp_path: Path, operation: Operation, stride: int
) -> None:
    for steps in range(0, 1000, stride):
        where = tmp_path / str(steps)
        bench = Bench(where)
        await bench.open()
        domain, path = await running(bench), where / "file"
        if operation is start:
            await saved.managed_save(domain, 0)
        if operation is restore:
            await saved.save(domain, str(path), None, 0)
        fell = await cut(bench, steps, operation(domain, path))
        manager = await bench.open()
        try:
            domain = manager.lookup_name("a")
            said = f"after {steps} steps of {operation.__name__}"
            kept = path if operation in (save, restore) else saved.managed_path(manager, "a")
            if domain.is_active:
                await until(lambda domain=domain: domain.state == DomainState.RUNNING)
                assert memory(bench) == MEMORY, said
                assert operation is restore or not kept.exists(), said
            else:
                assert not bench.driver.machines and kept.exists(), said
                if operation in (save, restore):
                    await saved.restore(manager, str(kept), None, 0)
                else:
                    assert domain.has_managed_save, said
                    await domain.start()
                assert memory(bench) == MEMORY, said
            assert not list(kept.parent.glob(".*saving")), said
        finally:
            await manager.close()
        shutil.rmtree(where)
        if not fell:
            assert steps > 3
            return
    pytest.fail("the operation never came to its end")
