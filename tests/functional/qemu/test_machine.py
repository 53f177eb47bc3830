"""A real QEMU: its life cycle, devices that come and go, re-attachment, and everything that can go wrong at start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from kvik.conf.addresses import assign_addresses
from kvik.conf.aliases import assign_aliases
from kvik.conf.devices_xml import add_device, parse_device
from kvik.errors import (
    ConfigUnsupported,
    HostError,
    HypervisorError,
    InvalidArgument,
    KvikError,
    MonitorError,
    NoDevice,
    OperationInvalid,
    OperationTimeout,
    OperationUnsupported,
)
from kvik.hypervisor.driver import EventKind, HostVerdict
from kvik.hypervisor.qemu.driver import QemuDriver
from kvik.hypervisor.qemu.machine import QemuMachine
from kvik.paths import Paths

DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>64</memory>
  {maximum}
  <vcpu current='1'>2</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  {extra}
  <devices>
    <serial type='pty'/>
    {devices}
    <memballoon model='virtio'/>
  </devices>
</domain>"""
AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


def document(devices: str = "", name: str = "m", extra: str = "", maximum: str = "") -> str:
    return DOMAIN.format(devices=devices, name=name, extra=extra, maximum=maximum)


def disk(path: Path, target: str = "vda", bus: str = "virtio", kind: str = "qcow2", device: str = "disk") -> str:
    return (
        f"<disk type='file' device='{device}'><driver name='qemu' type='{kind}'/><source file='{path}'/>"
        f"<target dev='{target}' bus='{bus}'/></disk>"
    )


def placed(machine: QemuMachine, xml: str) -> Any:
    """A device with alias and address, as the manager hands it over."""
    _, device = parse_device(xml)
    add_device(machine.domain.devices, device)
    assign_addresses(machine.domain, grow=False)
    assign_aliases(machine.domain)
    return device


def image(path: Path, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "4M"], check=True)
    return path


def no_process_with(directory: Path) -> bool:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if str(directory).encode() in (entry / "environ").read_bytes():
                    return False
            except OSError:
                continue
    return True


async def until(condition, timeout: float = 5.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


async def test_life_cycle(lab, place: Path) -> None:
    machine: QemuMachine = await lab.start(document())
    assert machine.accelerator == "tcg"
    assert await machine.state() == "running"
    await machine.pause()
    assert await machine.state() == "paused"
    await machine.resume()
    await machine.reset()
    await machine.powerdown()
    await machine.inject_nmi()
    assert (await machine.monitor("query-name"))["name"] == "m"
    assert "VM status" in await machine.human_monitor("info status")
    with pytest.raises(MonitorError):
        await machine.monitor("no-such-command")
    began = time.monotonic()
    await machine.quit()
    assert time.monotonic() - began < 0.5
    assert machine.process.code == 0
    await machine.quit()
    assert lab.kinds()[0] == "started"
    assert lab.kinds()[-1] == "ended"
    assert {"paused", "resumed", "reset", "shutdown"} <= set(lab.kinds())
    assert lab.events[-1].data["expected"]
    assert list(lab.directory.iterdir()) == []
    with pytest.raises(OperationInvalid, match="not running"):
        await machine.pause()


async def test_a_machine_can_start_paused(lab) -> None:
    machine = await lab.start(document(), paused=True)
    assert await machine.state() in ("prelaunch", "paused")
    assert "started" not in lab.kinds()
    await machine.resume()
    assert "started" in lab.kinds()


async def test_the_log_begins_with_time_and_command_line(lab) -> None:
    await lab.start(document())
    first, second = lab.log.splitlines()[:2]
    assert first[4] == "-"
    assert "starting up, QEMU" in first
    assert second.startswith("/") and "qemu" in second


async def test_the_live_document_knows_the_pty(lab) -> None:
    machine = await lab.start(document())
    (serial,) = machine.domain.devices.serials
    assert serial.source.path.startswith("/dev/pts/")
    fd = machine.open_console("serial0")
    assert os.isatty(fd)
    os.close(fd)
    with pytest.raises(NoDevice):
        machine.open_console("serial7")


async def test_consoles_on_sockets_open_and_open_again(lab) -> None:
    machine = await lab.start(document(AGENT))
    os.close(machine.open_console("channel0"))
    os.close(machine.open_console("channel0"))


async def test_vcpus_are_plugged(lab) -> None:
    machine = await lab.start(document())
    assert len(await machine.vcpus()) == 1
    await machine.set_vcpus(2)
    listed = await machine.vcpus()
    assert [item["id"] for item in listed] == [0, 1]
    assert all(Path(f"/proc/{machine.pid}/task/{item['thread']}").exists() for item in listed)
    with pytest.raises(OperationInvalid, match="1 to 2"):
        await machine.set_vcpus(3)


async def test_figures(lab, place: Path) -> None:
    machine = await lab.start(document(disk(image(place / "a.qcow2"))))
    figures = await machine.stats(frozenset())
    assert figures["cpu.time"] > 0
    assert figures["block.0.name"] == "vda"
    assert figures["block.0.capacity"] == 4 << 20
    assert figures["block.0.path"] == str(place / "a.qcow2")
    assert figures["vcpu.current"] == 1
    assert figures["balloon.current"] == 65536
    assert set(await machine.stats(frozenset({"cpu"}))) >= {"cpu.time", "cpu.user", "cpu.system"}


async def test_screenshot_and_keys(lab) -> None:
    machine = await lab.start(document("<graphics type='vnc' autoport='yes'/><video><model type='vga'/></video>"))
    assert machine.domain.devices.graphics[0].port >= 5900
    mime, data = await machine.screenshot(0)
    assert (mime, data[:4]) == ("image/png", b"\x89PNG")
    with pytest.raises(InvalidArgument):
        await machine.screenshot(1)
    await machine.send_key([29, 56, 111], 10)
    assert (await machine.monitor("query-fdsets")) is not None
    blind = QemuMachine.screenshot
    machine.domain.devices.videos.clear()
    with pytest.raises(OperationUnsupported, match="no video"):
        await blind(machine, 0)


async def test_a_disk_comes_and_goes(lab, place: Path) -> None:
    machine = await lab.start(document())
    base = image(place / "base.qcow2")
    top = image(place / "top.qcow2", "-b", str(base), "-F", "qcow2")
    device = placed(machine, disk(top, "vdb"))
    before = await machine.monitor("query-named-block-nodes", {"flat": True})
    await machine.attach_device(device, {})
    assert device.backing_store.source.file == str(base)
    nodes = {item["node-name"] for item in await machine.monitor("query-named-block-nodes", {"flat": True})}
    assert {"virtio-disk1-1-format", "virtio-disk1-2-format"} <= nodes
    await machine.detach_device(device)
    await machine.reset()  # no guest that could let go: a reset lets QEMU complete it
    await until(lambda: "device-removed" in lab.kinds())
    assert len(await machine.monitor("query-named-block-nodes", {"flat": True})) == len(before)
    sets = await machine.monitor("query-fdsets")
    assert not any("virtio-disk1" in json.dumps(item) for item in sets)


async def test_an_attachment_that_fails_leaves_nothing(lab, place: Path) -> None:
    machine = await lab.start(document(disk(image(place / "a.qcow2"))))
    device = placed(machine, disk(image(place / "b.qcow2"), "vdb"))
    device.address.bus = 0  # where nothing can be plugged
    nodes = await machine.monitor("query-named-block-nodes", {"flat": True})
    sets = await machine.monitor("query-fdsets")
    with pytest.raises(MonitorError):
        await machine.attach_device(device, {})
    assert len(await machine.monitor("query-named-block-nodes", {"flat": True})) == len(nodes)
    assert len(await machine.monitor("query-fdsets")) == len(sets)


@pytest.mark.parametrize(
    "xml",
    [
        "<interface type='user'><mac address='52:54:00:01:02:03'/><model type='virtio'/></interface>",
        "<rng model='virtio'><backend model='builtin'/></rng>",
        "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>",
        "<input type='tablet' bus='usb'/>",
        "<channel type='unix'><source mode='bind' path='PLACE/c.sock'/>"
        "<target type='virtio' name='org.example.0'/></channel>",
    ],
    ids=["interface", "rng", "dimm", "usb", "channel"],
)
async def test_devices_of_other_kinds_come(xml: str, lab, place: Path) -> None:
    machine = await lab.start(
        document(
            AGENT + "<controller type='usb' model='qemu-xhci'/>",
            extra="<cpu><numa><cell id='0' cpus='0-1' memory='65536'/></numa></cpu>",
            maximum="<maxMemory slots='2' unit='GiB'>1</maxMemory>",
        )
    )
    device = placed(machine, xml.replace("PLACE", str(place)))
    await machine.attach_device(device, {})
    assert f'"{device.alias.name}"' in json.dumps(await machine.monitor("qom-list", {"path": "/machine/peripheral"}))


async def test_a_medium_is_changed_and_ejected(lab, place: Path) -> None:
    for name in ("a.iso", "b.iso"):
        (place / name).write_bytes(bytes(1 << 20))
    machine = await lab.start(document(disk(place / "a.iso", "sda", "sata", "raw", "cdrom")))
    (old,) = machine.domain.devices.disks
    for index, name in enumerate(("b.iso", "a.iso"), 2):
        _, new = parse_device(disk(place / name, "sda", "sata", "raw", "cdrom"))
        await machine.update_device(old, new)
        blocks = await machine.monitor("query-block")
        assert [item["inserted"]["node-name"] for item in blocks] == [f"sata0-0-0-{index}-format"]
        old = new
    _, empty = parse_device("<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>")
    await machine.update_device(old, empty)
    assert "inserted" not in (await machine.monitor("query-block"))[0]
    _, missing = parse_device(disk(place / "none.iso", "sda", "sata", "raw", "cdrom"))
    with pytest.raises(HostError, match=r"none\.iso"):
        await machine.update_device(empty, missing)


async def test_a_link_is_cut_and_mended(lab) -> None:
    nic = "<interface type='user'><mac address='52:54:00:01:02:03'/><model type='virtio'/>{}</interface>"
    machine = await lab.start(document(nic.format("<link state='down'/>")))
    (old,) = machine.domain.devices.interfaces
    _, new = parse_device(nic.format(""))
    new.alias, new.address = old.alias, old.address  # as the manager completes it
    await machine.update_device(old, new)
    _, other = parse_device(nic.format("").replace("01:02:03", "01:02:04"))
    other.alias, other.address = old.alias, old.address
    with pytest.raises(OperationUnsupported, match="MAC address"):
        await machine.update_device(old, other)


# -- the daemon dies and comes back


async def test_reattached_machine_is_the_same_and_obeys(lab, driver, place: Path) -> None:
    machine = await lab.start(document(AGENT))
    handle = json.loads(json.dumps(machine.handle()))
    domain = machine.domain
    machine.detach()
    events = []
    again = await driver.attach(domain, lab.directory, handle, events.append)
    lab.machines.append(again)
    assert again.pid == machine.pid
    assert again.run_state == "running"
    assert again.domain.devices.serials[0].source.path.startswith("/dev/pts/")
    await again.pause()
    assert [event.kind for event in events if event.kind is not EventKind.MONITOR] == [EventKind.PAUSED]
    await again.quit()
    assert events[-1].kind is EventKind.ENDED
    assert await driver.attach(domain, lab.directory, handle, events.append) is None


async def test_another_process_with_the_pid_is_never_taken(lab, driver) -> None:
    domain = await lab.complete(document())
    handle = {"pid": os.getpid(), "start_time": 1, "boot": "x", "emulator": "", "version": 0}
    assert await driver.attach(domain, lab.place, handle, lambda event: None) is None
    with pytest.raises(KvikError):
        await driver.attach(domain, lab.place, {"pid": "1"}, lambda event: None)


async def test_a_stopped_qemu_is_attached_all_the_same(lab, driver) -> None:
    machine = await lab.start(document())
    handle = machine.handle()
    machine.detach()
    os.kill(machine.pid, signal.SIGSTOP)
    again = await driver.attach(machine.domain, lab.directory, handle, lab.events.append)
    lab.machines.append(again)
    with pytest.raises(HypervisorError, match="does not answer"):
        await again.pause()
    os.kill(machine.pid, signal.SIGCONT)
    async with asyncio.timeout(20):
        while True:
            try:
                assert await again.state() == "running"
                break
            except KvikError:
                await asyncio.sleep(0.05)
    await again.quit()


# -- bad luck


async def test_a_stopped_qemu_blocks_only_itself_and_is_destroyed(lab) -> None:
    stuck = await lab.start(document(name="stuck"))
    os.kill(stuck.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(stuck.state())
    await asyncio.sleep(0.05)
    assert (await stuck.stats(frozenset({"cpu"})))["cpu.time"] > 0
    with pytest.raises(OperationTimeout, match="did not answer query-status"):
        await waiting
    began = time.monotonic()
    await stuck.quit(0.1)
    assert time.monotonic() - began < 1
    assert stuck.process.code == -signal.SIGKILL
    assert lab.kinds()[-1] == "ended"


async def test_a_killed_qemu_says_so(lab) -> None:
    machine = await lab.start(document())
    os.kill(machine.pid, signal.SIGSEGV)
    await until(lambda: "ended" in lab.kinds())
    end = lab.events[-1]
    assert "SIGSEGV" in end.detail
    assert not end.data["expected"]
    assert list(lab.directory.iterdir()) == []


async def test_what_qemu_says_when_it_dies_at_start_is_the_error(lab) -> None:
    xml = document().replace(
        "<domain type='qemu'>", "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
    )
    xml = xml.replace(
        "</domain>",
        "<qemu:commandline><qemu:arg value='-device'/><qemu:arg value='no-such-device'/></qemu:commandline></domain>",
    )
    with pytest.raises(HypervisorError, match=r"exit code 1.*no-such-device"):
        await lab.start(xml)
    assert list(lab.directory.iterdir()) == []
    assert no_process_with(lab.directory)
    assert lab.kinds() == []


async def test_an_image_in_use_names_the_remedy(lab, place: Path) -> None:
    path = image(place / "a.qcow2")
    await lab.start(document(disk(path), name="first"))
    (place / "other").mkdir()
    lab.place, old = place / "other", lab.place
    with pytest.raises(HypervisorError, match=r"write.*lock.*another machine"):
        await lab.start(document(disk(path), name="second"))
    lab.place = old


@pytest.mark.parametrize(
    ("devices", "error", "text"),
    [
        ("<disk type='file'><driver type='raw'/><source file='/nonexistent/x'/><target dev='vda' bus='virtio'/></disk>",
         HostError, "/nonexistent/x"),
        ("<disk type='file'><driver type='raw'/><source file='/dev/null'/><target dev='vda' bus='virtio'/></disk>",
         InvalidArgument, "no regular file"),
        ("<disk type='file'><driver type='qcow2'/><source file='/etc/fstab'/><target dev='vda' bus='virtio'/></disk>",
         ConfigUnsupported, "not a qcow2"),
        ("<interface type='network'><source network='default'/><model type='virtio'/></interface>",
         ConfigUnsupported, "nobody provided its tap"),
    ],
    ids=["missing disk", "not a file", "not qcow2", "no tap"],
)  # fmt: skip
async def test_bad_documents_leave_nothing_behind(devices, error, text, lab) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(error, match=text):
        await lab.start(document(devices))
    assert list(lab.directory.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_before + 1  # asyncio's own
    assert no_process_with(lab.directory)


async def test_kvm_is_refused_where_it_cannot_be_used(place: Path, lab) -> None:
    lab.driver = QemuDriver(
        Paths.system(place / "r"), lambda: HostVerdict(False, "/dev/kvm only emulates", "enable nesting")
    )
    with pytest.raises(ConfigUnsupported, match=r"only emulates.*enable nesting.*type='qemu'"):
        await lab.start(document().replace("type='qemu'", "type='kvm'", 1))


async def test_starting_and_ending_many_times_leaks_no_descriptor(lab) -> None:
    await (await lab.start(document(AGENT))).quit()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        await (await lab.start(document(AGENT))).quit()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before  # fewer: the test's own, collected meanwhile


async def test_native_and_domain_capabilities(driver, lab) -> None:
    text = await driver.native(await lab.complete(document()))
    assert "-nodefaults" in text and "fd=" not in text
    xml = await driver.domain_capabilities("x86_64", "q35", "qemu", "")
    assert "<domainCapabilities>" in xml and "pc-q35" in xml
    with pytest.raises(ConfigUnsupported):
        await driver.domain_capabilities("x86_64", "q35", "kvm", "")
    assert await driver.version() > 6_000_000


VCPUS = """<vcpus>
  <vcpu id='0' enabled='yes' hotpluggable='no' order='1'/><vcpu id='1' enabled='no' hotpluggable='yes'/>
  <vcpu id='2' enabled='yes' hotpluggable='yes' order='3'/><vcpu id='3' enabled='yes' hotpluggable='yes' order='2'/>
</vcpus>"""


async def test_vcpus_told_one_by_one_are_there_and_can_go(lab: Any) -> None:
    xml = document(extra=VCPUS).replace("<vcpu current='1'>2</vcpu>", "<vcpu>4</vcpu>")
    machine = await lab.start(xml, paused=True)
    plugged = [str(item["qom"]).rsplit("/", 1)[-1] for item in await machine.vcpus()]
    assert len(plugged) == 3
    assert {name for name in plugged if name.startswith("vcpu")} == {"vcpu2-0-0", "vcpu3-0-0"}
    assert machine.domain.vcpu.current == 3
    await machine.set_vcpus(4)
    told = {entry.id: (entry.enabled, entry.order) for entry in machine.domain.vcpus.vcpus}
    assert told == {0: (True, 1), 1: (True, 4), 2: (True, 3), 3: (True, 2)}
    await machine.quit()
