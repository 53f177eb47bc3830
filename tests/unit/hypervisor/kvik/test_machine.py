"""Machines of the kvik driver under a manager, their VMM played by `fake_vmm.py`: what is asked of it, and when."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import kvik
from kvik.conf.enums import DomainSnapshotCreateFlags as Create
from kvik.conf.enums import DomainState
from kvik.errors import ConfigUnsupported, HypervisorError, MonitorError, OperationTimeout, OperationUnsupported
from kvik.host.process import read_stat
from kvik.hypervisor import launch
from kvik.hypervisor.driver import HostVerdict
from kvik.hypervisor.kvik.driver import KvikDriver
from kvik.hypervisor.kvik.machine import KvikMachine, own_aliases
from kvik.hypervisor.test.driver import TestDriver
from kvik.manager.domain import DomainObject
from kvik.manager.manager import Manager
from kvik.manager.snapshots import create
from kvik.paths import Paths

FAKE = Path(__file__).with_name("fake_vmm.py")
DOMAIN = """<domain type='kvm'><name>m</name><memory unit='MiB'>128</memory><vcpu>2</vcpu>
<os><type machine='kvik'>hvm</type><kernel>{root}/kernel</kernel><cmdline>{cmdline}</cmdline></os>
<devices><emulator>{root}/kvik-vmm</emulator>
<disk type='file'><driver name='qemu' type='raw'/><source file='{root}/a.raw'/><target dev='vda'/></disk>
<serial type='pty'/>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
</devices></domain>"""
DISK = "<disk type='file'><driver type='raw'/><source file='{0}'/><target dev='vdb'/><serial>{1}</serial></disk>"


class World:
    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("kernel", "a.raw", "b.raw"):
            (root / name).write_bytes(bytes(512))
        emulator = root / "kvik-vmm"
        source = Path(kvik.__file__).parents[1]
        emulator.write_text(f'#!/bin/sh\nPYTHONPATH="{source}" exec {sys.executable} {FAKE} "$@"\n')
        emulator.chmod(0o755)
        self.managers: list[Manager] = []

    async def manager(self) -> Manager:
        paths = Paths.system(self.root / "state")
        ours = KvikDriver(paths, lambda: HostVerdict(True, "told so"))
        manager = Manager(paths, {"qemu": TestDriver(), "kvik-vmm": ours})
        self.managers.append(manager)
        await manager.open()
        return manager

    def document(self, cmdline: str = "quiet") -> str:
        return DOMAIN.format(root=self.root, cmdline=cmdline)

    async def started(self) -> tuple[Manager, DomainObject]:
        manager = await self.manager()
        domain = await manager.define(self.document())
        await domain.start()
        return manager, domain

    def commands(self, domain: DomainObject) -> list[tuple[str, dict[str, Any], int]]:
        assert domain.run is not None
        lines = (domain.run.directory / "commands").read_text().splitlines()
        return [(name, arguments, fds) for name, arguments, fds in map(json.loads, lines)]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World(Path(tempfile.mkdtemp(prefix="kv-")))  # not tmp_path: a socket's path has few bytes
    yield made
    last = made.managers[-1]
    for domain in last.domains():
        if domain.is_active:
            await domain.destroy()
    await last.close()
    shutil.rmtree(made.root)


async def soon(condition: Any) -> None:
    async with asyncio.timeout(5.0):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_life_of_a_machine(world: World) -> None:
    _, domain = await world.started()
    assert domain.state == DomainState.RUNNING and domain.accelerator == "kvm"
    assert domain.console_path == "/dev/pts/99"
    assert [name for name, _, _ in world.commands(domain)][-1] == "cont"
    await domain.suspend()
    await domain.resume()
    await domain.reset()
    assert [name for name, _, _ in world.commands(domain)][-3:] == ["stop", "cont", "system_reset"]
    figures = await domain.stats()
    assert figures["block.0.rd.reqs"] == 3 and figures["vcpu.current"] == 2 and int(figures["cpu.time"]) > 0
    assert json.loads(await domain.monitor_command('{"execute": "query-status"}'))["return"]["status"] == "running"
    await domain.shutdown(1)
    await soon(lambda: not domain.is_active)
    assert domain.state == DomainState.SHUTOFF


async def test_everything_it_needs_is_passed_open_and_no_path_of_an_image_is_told(world: World) -> None:
    _, domain = await world.started()
    argv = Path(f"/proc/{domain.pid}/cmdline").read_bytes().decode().split("\0")
    disk = argv[argv.index("--disk") + 1]
    number = disk.split(",")[0].removeprefix("fd=")
    assert os.readlink(f"/proc/{domain.pid}/fd/{number}") == str(world.root / "a.raw")
    assert str(world.root / "a.raw") not in argv
    environment = Path(f"/proc/{domain.pid}/environ").read_bytes().decode()
    assert domain.run is not None and f"HOME={domain.run.directory}\0" in environment


async def test_a_disk_comes_and_goes(world: World) -> None:
    _, domain = await world.started()
    await domain.attach_device(DISK.format(world.root / "b.raw", "two"))
    said = world.commands(domain)
    names = [name for name, _, _ in said]
    assert names[-3:] == ["add-fd", "blockdev-add", "device_add"]
    assert said[-3][2] == 1  # a descriptor went along
    node, device = said[-2][1], said[-1][1]
    assert node["file"] == {"driver": "file", "filename": "/dev/fdset/0"}
    assert device["drive"] == node["node-name"] and device["driver"] == "virtio-blk-pci" and device["addr"] == "0x4"
    await domain.detach_device(DISK.format(world.root / "b.raw", "two"))
    assert domain.live is not None and [disk.target.dev for disk in domain.live.devices.disks] == ["vda"]
    assert [name for name, _, _ in world.commands(domain)][-4:] == [
        "device_del", "blockdev-del", "query-fdsets", "remove-fd",
    ]  # fmt: skip


async def test_a_disk_that_is_refused_leaves_nothing(world: World) -> None:
    _, domain = await world.started()
    with pytest.raises(MonitorError, match=r"b\.raw: .*no room for it"):
        await domain.attach_device(DISK.format(world.root / "b.raw", "refuse"))
    names = [name for name, _, _ in world.commands(domain)]
    assert names[-2:] == ["blockdev-del", "remove-fd"]
    assert domain.live is not None and len(domain.live.devices.disks) == 1


async def test_what_it_has_not_is_said(world: World) -> None:
    _, domain = await world.started()
    for ask in (domain.screenshot(), domain.send_key(0, 0, [30])):
        with pytest.raises(OperationUnsupported, match="neither screen nor keyboard"):
            await ask
    with pytest.raises(OperationUnsupported, match="plug a channel into running machine m: the ports of its console"):
        await domain.attach_device("<channel type='unix'><target type='virtio' name='org.x'/></channel>")
    with pytest.raises(OperationUnsupported, match="plug a watchdog into running machine m"):
        await domain.attach_device("<watchdog model='i6300esb' action='reset'/>")


async def test_an_rng_comes_and_goes(world: World) -> None:
    _, domain = await world.started()
    xml = "<rng model='virtio'><rate bytes='1024' period='500'/><backend model='random'>/dev/urandom</backend></rng>"
    await domain.attach_device(xml)
    (_, backend, _), (_, device, _) = world.commands(domain)[-2:]
    assert backend == {"qom-type": "rng-builtin", "id": "backrng0"} and device["rng"] == "backrng0"
    assert (device["max-bytes"], device["period"]) == (1024, 500)
    await domain.detach_device(xml)
    assert [name for name, _, _ in world.commands(domain)][-2:] == ["device_del", "object-del"]


async def test_what_a_running_disk_or_interface_can_become(world: World) -> None:
    _, domain = await world.started()
    image = "<disk type='file'><driver type='raw'/><source file='{0}'/><target dev='vda'/>{1}</disk>"
    mine = world.root / "a.raw"
    await domain.update_device(image.format(mine, "<iotune><total_iops_sec>7</total_iops_sec></iotune>"), 1)
    assert world.commands(domain)[-1][1]["iops"] == 7
    await domain.update_device(image.format(mine, ""), 1)
    assert world.commands(domain)[-1][1]["iops"] == 0
    with pytest.raises(OperationUnsupported, match="image of disk vda cannot change"):
        await domain.update_device(image.format(world.root / "b.raw", ""), 1)
    with pytest.raises(ConfigUnsupported, match="limits reads and writes together"):
        await domain.update_device(image.format(mine, "<iotune><read_iops_sec>7</read_iops_sec></iotune>"), 1)


async def test_cpu_models_are_asked_of_the_vmm_and_host_model_becomes_one(world: World) -> None:
    manager = await world.manager()
    with pytest.raises(ConfigUnsupported, match="no CPU model 'core2duo'") as caught:
        await manager.define(world.document().replace("<vcpu>", "<cpu><model>core2duo</model></cpu><vcpu>"))
    assert "x86-64-v2, EPYC;" in caught.value.remedy
    domain = await manager.define(world.document().replace("<vcpu>", "<cpu mode='host-model'/><vcpu>"))
    await domain.start()
    argv = Path(f"/proc/{domain.pid}/cmdline").read_bytes().decode().split("\0")
    assert argv[argv.index("--cpu") + 1] == "EPYC"
    assert domain.live is not None and domain.live.cpu is not None and domain.live.cpu.model is not None
    assert (domain.live.cpu.mode, domain.live.cpu.model.value) == ("custom", "EPYC")
    assert "host-model" in domain.xml(2)  # the definition means each host's own
    told = await manager.driver_for("kvm", "kvik-vmm").domain_capabilities("", "", "", str(world.root / "kvik-vmm"))
    assert "<model fallback='forbid'>EPYC</model>" in told and "<model usable='no' vendor='unknown'>Nehalem<" in told


async def test_a_later_daemon_finds_it_again(world: World) -> None:
    manager, domain = await world.started()
    pid = domain.pid
    await manager.close()
    again = (await world.manager()).lookup_name("m")
    assert again.is_active and again.pid == pid and again.state == DomainState.RUNNING
    await again.suspend()
    assert again.state == DomainState.PAUSED
    await again.destroy()
    stat = read_stat(pid)
    assert stat is None or stat.ended


async def test_a_vmm_that_gives_up_is_quoted(world: World) -> None:
    manager = await world.manager()
    domain = await manager.define(world.document("die"))
    with pytest.raises(HypervisorError, match=r"kvik-vmm ended .*exit code 1.*the kernel is no kernel"):
        await domain.start()
    assert not domain.is_active and list((world.root / "state/run/kvik/qemu").glob("*.xml")) == []


async def test_a_vmm_that_is_silent_is_given_up_and_ended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "START_DEADLINE", 0.5)
    manager = await world.manager()
    domain = await manager.define(world.document("silent"))
    with pytest.raises(OperationTimeout, match="within"):
        await domain.start()
    needle = str(world.root / "kvik-vmm").encode()
    running = [Path(f"/proc/{entry}/cmdline") for entry in os.listdir("/proc") if entry.isdecimal()]
    assert not any(needle in path.read_bytes() for path in running if path.exists())


async def test_a_vmm_of_an_older_kvik_takes_no_new_image_while_it_runs(world: World) -> None:
    manager = await world.manager()
    domain = await manager.define(world.document("old"))
    await domain.start()
    document = "<domainsnapshot><name>s1</name></domainsnapshot>"
    with pytest.raises(OperationUnsupported, match="older kvik") as refused:
        await create.create(domain, document, Create.DISK_ONLY)
    assert "start it again" in refused.value.remedy
    assert domain.state == DomainState.RUNNING and domain.snapshots.journal is None
    assert not list(world.root.glob("*.s1")) and domain.config.parse().devices.disks[0].source is not None
    assert "stop" not in [name for name, _, _ in world.commands(domain)]


async def test_the_next_daemon_knows_which_disks_are_the_vmms_own(world: World) -> None:
    """Also one that came later; and of a machine whose status does not tell, it is those that are raw."""
    manager, domain = await world.started()
    await domain.attach_device(DISK.format(world.root / "b.raw", "x"))
    assert domain.require_machine().handle()["own_disks"] == ["virtio-disk0", "virtio-disk1"]
    await manager.close()
    domain = (await world.manager()).lookup_name("m")
    machine = domain.require_machine()
    assert isinstance(machine, KvikMachine) and machine.own_disks == {"virtio-disk0", "virtio-disk1"}
    assert own_aliases(domain.run.live) == machine.own_disks if domain.run is not None else False
    await domain.detach_device(DISK.format(world.root / "b.raw", "x"))
    await soon(lambda: machine.own_disks == {"virtio-disk0"})
