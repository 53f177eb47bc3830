"""State on disk: whatever instant the daemon is killed at, the next one finds a whole state."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from guillotine import Guillotine, Killed, cut
from manager_bench import Bench, document, until

from kvik.conf.enums import DomainShutoffReason, DomainState
from kvik.errors import HostError, InvalidArgument, NoDomain
from kvik.host import process
from kvik.hypervisor.test.driver import Behaviour
from kvik.manager.manager import Manager
from kvik.manager.store import Status, Store, check_name
from kvik.paths import Paths

Operation = Callable[[Manager], Awaitable[Any]]


async def define_new(manager: Manager) -> None:
    await manager.define(document("b"))


async def redefine(manager: Manager) -> None:
    await manager.define(document("a", memory=524288))


async def rename(manager: Manager) -> None:
    await manager.lookup_name("a").rename("c")


async def undefine(manager: Manager) -> None:
    await manager.lookup_name("a").undefine()


async def autostart_off(manager: Manager) -> None:
    await manager.lookup_name("a").set_autostart(False)


async def start(manager: Manager) -> None:
    await manager.lookup_name("a").start()


async def start_and_destroy(manager: Manager) -> None:
    await manager.lookup_name("a").start()
    await manager.lookup_name("a").destroy()


async def transient(manager: Manager) -> None:
    await manager.create_xml(document("b"))


OPERATIONS = [define_new, redefine, rename, undefine, autostart_off, start, start_and_destroy, transient]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
async def test_killed_at_any_step_the_next_daemon_finds_a_whole_state(tmp_path: Path, operation: Operation) -> None:
    for steps in range(200):
        root = tmp_path / str(steps)
        bench = Bench(root)
        manager = await bench.open()
        domain = await manager.define(document("a"))
        await domain.set_autostart(True)
        fell = await cut(bench, steps, operation(manager))
        manager = await bench.open()
        try:
            check(bench, manager)
        except AssertionError as error:
            raise AssertionError(f"after {steps} steps of {operation.__name__}: {error}") from error
        finally:
            await manager.close()
        if not fell:
            assert steps > 0
            return
    pytest.fail("the operation never came to its end")


def check(bench: Bench, manager: Manager) -> None:
    paths = bench.paths
    files = {path.name for path in paths.domains.iterdir() if not path.is_dir()}
    links = {path.name for path in (paths.domains / "autostart").iterdir()}
    persistent = {f"{domain.name}.xml" for domain in manager.domains() if domain.persistent}
    assert files == persistent, "definitions on disk and in memory differ"
    assert links == {f"{domain.name}.xml" for domain in manager.domains() if domain.autostart}
    uuids = [domain.uuid for domain in manager.domains()]
    assert len(uuids) == len(set(uuids))
    for domain in manager.domains():
        assert domain.definition.name == domain.name
    # "a" was never lost but by undefining, and no machine is forgotten or left behind
    running = {domain.name for domain in manager.domains() if domain.is_active}
    assert running == set(bench.driver.machines), "running machines and known machines differ"
    status = {path.name for path in paths.status.iterdir() if path.is_file()}
    assert status == {f"{name}.xml" for name in running}
    assert len([path for path in paths.status.iterdir() if path.is_dir()]) == len(running)
    assert not [text for text in manager.warnings if "set aside" in text]


async def test_a_rename_killed_in_the_middle_keeps_the_machine_and_its_autostart(tmp_path: Path) -> None:
    names = set()
    for steps in range(12):
        bench = Bench(tmp_path / str(steps))
        manager = await bench.open()
        domain = await manager.define(document("a"))
        await domain.set_autostart(True)
        with pytest.MonkeyPatch.context() as patch:
            Guillotine(patch, steps)
            try:
                await domain.rename("c")
            except Killed:
                pass
            await bench.kill()
        manager = await bench.open()
        (survivor,) = manager.domains()
        assert survivor.autostart
        names.add(survivor.name)
        await manager.close()
    assert names == {"a", "c"}


@pytest.mark.parametrize(
    "name", ["", "a/b", "../x", "-rf", ".hidden", "a\nb", "a\0b", " a", "x" * 256, "\ud800", "a\u202eb"]
)
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "web-1", "Größe", "a b", "a.xml", "x" * 200])
def test_a_plain_name_is_taken(name: str) -> None:
    assert check_name(name) == name


async def test_documents_are_private_and_whole(bench: Bench) -> None:
    await bench.manager.define(document())
    path = bench.paths.domains / "a.xml"
    assert path.stat().st_mode & 0o777 == 0o600
    assert bench.paths.domains.stat().st_mode & 0o777 == 0o700
    assert path.read_text() == bench.manager.lookup_name("a").xml(1)


@pytest.mark.parametrize(
    "content",
    [b"", b"<domain", b"\xff\xfe", b"<network><name>a</name></network>", b"<domain type='test'/>", b"\0" * 4096],
)
async def test_a_corrupt_definition_is_set_aside_and_named(bench: Bench, content: bytes) -> None:
    await bench.manager.define(document("b"))
    (bench.paths.domains / "a.xml").write_bytes(content)
    manager = await bench.reopen()
    assert [domain.name for domain in manager.domains()] == ["b"]
    assert any("a.xml" in text for text in manager.warnings)
    assert (bench.paths.domains / "a.xml.corrupt-0").read_bytes() == content


async def test_a_fifo_or_link_in_place_of_a_definition_does_not_stop_the_daemon(bench: Bench) -> None:
    os.mkfifo(bench.paths.domains / "a.xml")
    (bench.paths.domains / "b.xml").symlink_to("/etc/shadow")
    manager = await bench.reopen()
    assert manager.domains() == []
    assert len(manager.warnings) == 2


async def test_a_copied_file_does_not_take_the_place_of_its_original(bench: Bench) -> None:
    await bench.manager.define(document("b"))
    (bench.paths.domains / "a.xml").write_bytes((bench.paths.domains / "b.xml").read_bytes())
    manager = await bench.reopen()
    assert [domain.name for domain in manager.domains()] == ["b"]
    assert any("same UUID" in text for text in manager.warnings)


async def test_a_definition_written_by_hand_without_uuid_is_completed_once(bench: Bench) -> None:
    (bench.paths.domains / "hand.xml").write_text(document("hand", uuid=None))
    manager = await bench.reopen()
    first = manager.lookup_name("hand").uuid
    manager = await bench.reopen()
    assert manager.lookup_name("hand").uuid == first


@pytest.mark.parametrize(
    "content", [b"", b"<domstatus/>", b"<domstatus state='running'><domain/></domstatus>", b"garbage"]
)
async def test_a_corrupt_status_is_set_aside(bench: Bench, content: bytes) -> None:
    await bench.manager.define(document())
    (bench.paths.status / "a.xml").write_bytes(content)
    manager = await bench.reopen()
    assert manager.lookup_name("a").state == DomainState.SHUTOFF
    assert any("a.xml" in text for text in manager.warnings)


async def test_a_status_that_names_a_foreign_directory_removes_nothing(bench: Bench, tmp_path: Path) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    precious = tmp_path / "precious"
    precious.mkdir()
    path = bench.paths.status / "a.xml"
    status = Status.from_xml(path.read_bytes())
    status.directory = str(precious)
    status.boot = "another"
    await bench.kill()
    path.write_bytes(status.to_xml())
    await bench.open()
    assert precious.exists()


async def test_a_reboot_of_the_host_leaves_machines_off_with_the_reason(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await bench.kill()
    path = bench.paths.status / "a.xml"
    status = Status.from_xml(path.read_bytes())
    status.boot = "an earlier boot"
    path.write_bytes(status.to_xml())
    bench.driver.machines.clear()
    manager = await bench.open()
    domain = manager.lookup_name("a")
    assert (domain.state, domain.id) == (DomainState.SHUTOFF, -1)
    assert "rebooted" in domain.reason_text
    assert list(bench.paths.status.iterdir()) == []
    await domain.start()


async def test_a_running_machine_is_found_again_as_it_was(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await domain.suspend()
    live = domain.xml()
    manager = await bench.reopen()
    again = manager.lookup_name("a")
    assert (again.state, again.id) == (DomainState.PAUSED, 1)
    assert again.xml() == live
    assert manager.lookup_id(1) is again
    await again.resume()
    await again.destroy()
    other = await manager.define(document("b"))
    await other.start()
    assert other.id == 2


async def test_the_status_that_was_asked_for_last_is_the_one_that_stays(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event's status on its way to disk does not take back what an operation says after it."""
    await bench.manager.define(document("a"))
    domain = bench.manager.lookup_name("a")
    await domain.start()
    assert domain.run is not None
    rename = os.rename

    def late(source: Any, target: Any) -> None:
        if "operation" not in Path(source).read_text():
            time.sleep(0.2)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    first = asyncio.create_task(domain.save_quietly())
    await asyncio.sleep(0.01)
    domain.run.unfinished = {"operation": "save"}
    await domain.save_status()
    await first
    (status,) = bench.manager.store.load().statuses
    assert status.unfinished == {"operation": "save"}


async def test_a_transient_machine_is_found_again_too(bench: Bench) -> None:
    await bench.manager.create_xml(document())
    manager = await bench.reopen()
    domain = manager.lookup_name("a")
    assert domain.is_active and not domain.persistent
    await domain.destroy()
    with pytest.raises(NoDomain):
        manager.lookup_name("a")


async def test_what_happened_while_the_daemon_was_away_is_caught_up(bench: Bench) -> None:
    for name in ("a", "b", "c"):
        await (await bench.manager.define(document(name))).start()
    await bench.kill()
    bench.driver.machines["a"].guest_poweroff()
    bench.driver.machines["b"].die("killed")
    manager = await bench.open()
    a, b, c = (manager.lookup_name(name) for name in "abc")
    await until(lambda: a.state == DomainState.SHUTOFF)
    assert a.reason == DomainShutoffReason.SHUTDOWN
    assert (b.state, b.reason) == (DomainState.SHUTOFF, DomainShutoffReason.DAEMON)
    assert "while the daemon was away" in b.reason_text
    await until(lambda: c.ready)


async def test_a_machine_whose_start_was_never_confirmed_is_ended(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    status = domain.status()
    await bench.kill()
    status.starting = True
    status.handle, status.pid = {}, 0
    (bench.paths.status / "a.xml").write_bytes(status.to_xml())
    manager = await bench.open()
    assert bench.driver.machines == {}
    assert manager.lookup_name("a").state == DomainState.SHUTOFF
    assert "starting" in manager.lookup_name("a").reason_text
    assert list(bench.paths.status.iterdir()) == []


async def test_autostart_happens_once_per_boot(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        await (await bench.manager.define(document(name))).set_autostart(True)
    bench.driver.behaviours["b"] = Behaviour(fail_start="no disk")
    manager = await bench.reopen()
    assert bench.driver.starts == {}, "set within this boot, it starts with the next"
    await bench.kill()
    monkeypatch.setattr(Store.__init__, "__defaults__", (lambda: "the next boot",))
    manager = await bench.open()
    assert bench.driver.starts == {"a": 1, "b": 1}
    assert any("no disk" in text for text in manager.warnings)
    await manager.lookup_name("a").destroy()
    await bench.reopen()
    assert bench.driver.starts == {"a": 1, "b": 1}


async def test_a_state_directory_that_refuses_writes_changes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = await bench.manager.define(document("a"))
    before = domain.xml()

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for operation in (
            bench.manager.define(document("a", memory=999424)),
            bench.manager.define(document("b")),
            domain.rename("c"),
            domain.set_vcpus(1, 2),
        ):
            with pytest.raises(HostError, match="No space left"):
                await operation
    assert [machine.name for machine in bench.manager.domains()] == ["a"]
    assert domain.xml() == before
    assert [path.name for path in bench.paths.domains.glob("*.xml")] == ["a.xml"]
    check(bench, bench.manager)


async def test_a_machine_whose_status_cannot_be_written_does_not_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = await bench.manager.define(document("a"))
    save = bench.manager.store.save_status
    calls = []

    async def second_fails(status: Status) -> None:
        calls.append(status)
        if len(calls) == 2:
            raise HostError("cannot write: No space left on device", errno=28)
        await save(status)

    monkeypatch.setattr(bench.manager.store, "save_status", second_fails)
    with pytest.raises(HostError):
        await domain.start()
    assert bench.driver.machines == {}
    assert (domain.state, domain.id) == (DomainState.SHUTOFF, -1)
    await until(lambda: not list(bench.paths.status.iterdir()))


def test_a_state_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("a file where a directory should be")
    with pytest.raises(HostError, match="etc/kvik"):
        Store(Paths.system(tmp_path)).load()


async def test_stages_reached_before_the_daemon_was_away_are_known_after(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(has_agent=False)
    domain = await bench.manager.define(document())
    await domain.start()
    await until(lambda: "first output" in (bench.paths.status / "a.xml").read_text())
    again = (await bench.reopen()).lookup_name("a")
    assert [stage.name for stage in again.stages if stage.state == "done"] == [
        "defined", "vmm started", "guest running", "first output",
    ]  # fmt: skip


async def test_a_process_left_behind_by_an_interrupted_start_is_ended(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    status = domain.status()
    await bench.kill()
    bench.driver.machines.clear()
    status.starting = True
    (bench.paths.status / "a.xml").write_bytes(status.to_xml())
    # A process that calls itself QEMU and was started for this runtime directory, and one for another.
    orphan, other = _pretend(status.directory), _pretend("/elsewhere")
    try:
        await until(lambda: _argv0(orphan.pid) == "qemu-test" and _argv0(other.pid) == "qemu-test")
        await bench.open()
        await until(lambda: not orphan.alive)
        assert other.alive
    finally:
        for handle in (orphan, other):
            handle.kill()
            handle.close()


def _pretend(home: str) -> process.ProcessHandle:
    return process.spawn(["/bin/bash", "-c", "exec -a qemu-test sleep 60"], env={"HOME": home, "PATH": "/usr/bin:/bin"})


def _argv0(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
