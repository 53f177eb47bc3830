"""Real side processes beside a real QEMU: swtpm, virtiofsd and passt are started, found again, and gone with it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import ConfigError, ConfigUnsupported, HypervisorError, MissingPackages
from kvik.host.process import find, find_program
from kvik.hypervisor.driver import EventKind
from kvik.hypervisor.qemu.driver import QemuDriver
from kvik.hypervisor.qemu.machine import QemuMachine
from kvik.hypervisor.sidecars import group, virtiofsd

sys.path.insert(0, str(Path(__file__).parent))
from test_machine import document, placed

needs_swtpm = pytest.mark.skipif(find_program("swtpm") is None, reason="needs swtpm (apt install swtpm swtpm-tools)")
needs_passt = pytest.mark.skipif(find_program("passt") is None, reason="needs passt (apt install passt)")
needs_virtiofsd = pytest.mark.skipif(
    not any(os.access(path, os.X_OK) for path in virtiofsd._PLACES) and find_program("virtiofsd") is None,
    reason="needs virtiofsd (apt install virtiofsd, or qemu-system-common)",
)
UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
SHARED = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"


def share(directory: Path) -> str:
    return (
        f"<filesystem type='mount'><driver type='virtiofs'/><source dir='{directory}'/><target dir='tag'/></filesystem>"
    )


def passt(forward: str = "") -> str:
    return f"<interface type='user'><backend type='passt'/>{forward}<model type='virtio'/></interface>"


def with_uuid(devices: str, extra: str = "") -> str:
    return document(devices, extra=f"<uuid>{UUID}</uuid>{extra}")


def processes(machine: QemuMachine) -> list[tuple[int, int]]:
    return [(item["pid"], item["start_time"]) for item in machine.handle()["sidecars"]]


def alive(known: list[tuple[int, int]]) -> list[int]:
    found = []
    for pid, start in known:
        handle = find(pid, start)
        if handle is not None:
            found.append(pid)
            handle.close()
    return found


async def all_gone(known: list[tuple[int, int]], seconds: float = 5.0) -> bool:
    end = asyncio.get_running_loop().time() + seconds
    while alive(known):
        if asyncio.get_running_loop().time() > end:
            return False
        await asyncio.sleep(0.02)
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def shared_directory(place: Path) -> Iterator[Path]:
    directory = place / "shared, with a comma"
    directory.mkdir()
    yield directory


@needs_swtpm
async def test_a_tpm_is_made_once_kept_and_forgotten(driver: QemuDriver, lab: Any, place: Path) -> None:
    state = place / "root/var/lib/kvik/qemu/swtpm" / UUID / "tpm2"
    machine = await lab.start(with_uuid(TPM))
    assert [item["kind"] for item in machine.handle()["sidecars"]] == ["swtpm"]
    assert stat.S_IMODE(state.stat().st_mode) == 0o700 == stat.S_IMODE(state.parent.stat().st_mode)
    permanent = state / "tpm2-00.permall"
    inode = state.stat().st_ino
    assert permanent.stat().st_size > 0
    assert (await machine.monitor("query-tpm"))[0]["options"]["type"] == "emulator"
    known = processes(machine)
    await machine.quit()
    assert not alive(known)  # at once: the next run needs the state's lock
    domain = machine.domain
    machine = await lab.start(with_uuid(TPM))
    assert state.stat().st_ino == inode
    await machine.quit()
    await driver.forget(domain, keep_tpm=True)
    assert permanent.exists()
    domain.devices.tpms[0].backend.persistent_state = True
    await driver.forget(domain)
    assert permanent.exists()
    await driver.forget(domain, keep_tpm=False)
    assert not state.parent.exists()
    await driver.forget(domain)  # nothing there: no error


@needs_swtpm
async def test_a_half_made_tpm_is_never_used(lab: Any, place: Path) -> None:
    home = place / "root/var/lib/kvik/qemu/swtpm" / UUID
    (home / ".tpm2.new").mkdir(parents=True)
    (home / ".tpm2.new/tpm2-00.permall").write_bytes(b"half")
    machine = await lab.start(with_uuid(TPM), paused=True)
    await machine.quit()
    assert [path.name for path in home.iterdir()] == ["tpm2"]


@needs_virtiofsd
async def test_a_directory_is_shared(lab: Any, shared_directory: Path) -> None:
    machine = await lab.start(document(share(shared_directory), extra=SHARED))
    known = processes(machine)
    assert len(known) == 1 == len(alive(known))
    assert not list(lab.directory.glob("fs*"))  # nobody else can connect
    await machine.quit()
    assert not alive(known)


@needs_virtiofsd
async def test_virtiofs_needs_shared_memory_and_a_directory(lab: Any, shared_directory: Path, place: Path) -> None:
    with pytest.raises(ConfigUnsupported, match="share") as failure:
        await lab.start(document(share(shared_directory)))
    assert "memfd" in failure.value.remedy
    with pytest.raises(ConfigError, match="does not exist"):
        await lab.start(document(share(place / "nowhere"), extra=SHARED))
    assert not list(lab.directory.iterdir())


@needs_passt
async def test_passt_forwards_a_port(lab: Any) -> None:
    port = free_port()
    forward = f"<portForward proto='tcp' address='127.0.0.1'><range start='{port}' to='22'/></portForward>"
    machine = await lab.start(document(passt(forward)))
    with socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
    known = processes(machine)
    await machine.quit()
    assert not alive(known)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=2)


async def test_passt_is_not_plugged_into_a_running_machine(lab: Any) -> None:
    machine = await lab.start(document())
    with pytest.raises(ConfigUnsupported, match="already runs"):
        await machine.attach_device(placed(machine, passt()), {})
    await machine.quit()


@needs_passt
async def test_a_port_that_is_taken_is_the_error(lab: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        forward = f"<portForward proto='tcp' address='127.0.0.1'><range start='{port}'/></portForward>"
        with pytest.raises(HypervisorError, match=f"(?s)passt of net0 ended.*{port}"):
            await lab.start(document(passt(forward)))
    assert not list(lab.directory.iterdir())


async def test_plain_user_networking_forwards_a_port(lab: Any) -> None:
    port = free_port()
    forward = f"<portForward proto='tcp' address='127.0.0.1'><range start='{port}' to='22'/></portForward>"
    machine = await lab.start(document(f"<interface type='user'>{forward}<model type='virtio'/></interface>"))
    with socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
    assert machine.handle()["sidecars"] == []
    await machine.quit()


@needs_swtpm
@needs_virtiofsd
@needs_passt
@pytest.mark.parametrize("how", ["kill", "quit"])
async def test_all_are_gone_when_qemu_is_gone(lab: Any, shared_directory: Path, how: str) -> None:
    machine = await lab.start(with_uuid(TPM + share(shared_directory) + passt(), SHARED))
    known = processes(machine)
    assert len(known) == 3 == len(alive(known))
    if how == "kill":
        machine.process.kill()
    else:
        await machine.quit()
    assert await all_gone(known)
    async with asyncio.timeout(5):
        while "ended" not in lab.kinds():
            await asyncio.sleep(0.02)
    assert "sidecar-ended" not in lab.kinds()  # they went with it: nothing to tell


@needs_swtpm
@needs_virtiofsd
async def test_they_end_with_qemu_even_without_a_daemon(lab: Any, shared_directory: Path) -> None:
    machine = await lab.start(with_uuid(TPM + share(shared_directory), SHARED))
    known = processes(machine)
    pid = machine.pid
    machine.detach()
    assert len(alive(known)) == 2
    os.kill(pid, signal.SIGKILL)
    assert await all_gone(known)


@needs_swtpm
async def test_a_restarted_daemon_finds_them_again(driver: QemuDriver, lab: Any) -> None:
    machine = await lab.start(with_uuid(TPM))
    handle, known = machine.handle(), processes(machine)
    machine.detach()
    again = await driver.attach(machine.domain, lab.directory, handle, lab.events.append)
    assert again is not None
    lab.machines.append(again)
    assert again.handle()["sidecars"] == handle["sidecars"]
    await again.quit()
    assert not alive(known)


@needs_swtpm
async def test_what_a_machine_that_is_gone_left_is_ended(driver: QemuDriver, lab: Any) -> None:
    """QEMU died while no daemon ran, and a side process clings on (here: it is stopped)."""
    machine = await lab.start(with_uuid(TPM))
    handle, known = machine.handle(), processes(machine)
    os.kill(known[0][0], signal.SIGSTOP)
    machine.detach()
    os.kill(machine.pid, signal.SIGKILL)
    await asyncio.sleep(0.1)
    assert alive(known)
    assert await driver.attach(machine.domain, lab.directory, handle, lab.events.append) is None
    assert not alive(known)


@needs_swtpm
@pytest.mark.parametrize("daemon", ["there", "away"])
async def test_one_that_dies_while_the_machine_runs_is_told(driver: QemuDriver, lab: Any, daemon: str) -> None:
    machine = await lab.start(with_uuid(TPM))
    handle, known = machine.handle(), processes(machine)
    if daemon == "away":
        machine.detach()
    os.kill(known[0][0], signal.SIGKILL)
    if daemon == "away":
        assert await all_gone(known)
        machine = await driver.attach(machine.domain, lab.directory, handle, lab.events.append)
        assert machine is not None
        lab.machines.append(machine)
    async with asyncio.timeout(5):
        while EventKind.SIDECAR_ENDED not in [event.kind for event in lab.events]:
            await asyncio.sleep(0.02)
    told = next(event for event in lab.events if event.kind is EventKind.SIDECAR_ENDED)
    assert told.detail.startswith("swtpm of tpm0 ended")
    assert machine.process.alive
    await machine.quit()


@needs_swtpm
async def test_a_tpm_that_dies_at_start_gives_its_own_reason(lab: Any, place: Path) -> None:
    state = place / "root/var/lib/kvik/qemu/swtpm" / UUID / "tpm2"
    state.mkdir(parents=True, mode=0o700)
    (state / "tpm2-00.permall").write_bytes(b"not a TPM's state")
    with pytest.raises(HypervisorError, match="Invalid magic"):
        await lab.start(with_uuid(TPM))
    assert not list(lab.directory.iterdir())


async def test_one_that_dies_at_start_gives_its_own_reason(lab: Any, shared_directory: Path, place: Path) -> None:
    fake = place / "virtiofsd"
    fake.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'the moon is in the wrong phase' >&2\nexit 3\n")
    fake.chmod(0o700)
    xml = share(shared_directory).replace("<source", f"<binary path='{fake}'/><source")
    with pytest.raises(HypervisorError, match=r"virtiofsd of fs0 ended while .* \(exit code 3\): the moon is in the"):
        await lab.start(document(xml, extra=SHARED))
    assert not list(lab.directory.iterdir())


@needs_swtpm
async def test_qemus_own_reason_is_not_hidden_by_theirs(lab: Any) -> None:
    broken = "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><qemu:arg value='-no-such-option'/></qemu:commandline>"  # noqa: E501
    with pytest.raises(HypervisorError, match=r"QEMU ended.*no-such-option"):
        await lab.start(with_uuid(TPM, broken))


async def test_a_missing_tool_names_its_package(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "find_program", lambda name, path="": None)
    for devices, package in ((TPM, "swtpm"), (passt(), "passt")):
        with pytest.raises(MissingPackages) as failure:
            await lab.start(with_uuid(devices))
        assert failure.value.packages == (package,)
        assert package in failure.value.remedy
