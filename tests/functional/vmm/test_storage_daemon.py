"""Disks of qcow2 and of other formats under the manager: real kvik-blks and qemu-storage-daemons, and guests of a few
hundred bytes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from blk_guest import BlkDriver, say_memory, wait_key
from disk_world import World, checked, content, daemons, disk, image, soon
from guests import needs_kvm
from tiny_kernel import IDLE, POWER_OFF, say

from kvik.errors import HypervisorError, KvikError, MissingPackages, OperationUnsupported
from kvik.host.process import find, find_program
from kvik.hypervisor.sidecars import storage_daemon
from kvik.vmm.sandbox import landlock

pytestmark = [
    needs_kvm,
    pytest.mark.skipif(
        not (find_program("qemu-storage-daemon") and find_program("qemu-io")),
        reason="needs qemu-storage-daemon and qemu-io (apt install qemu-system-common qemu-utils)",
    ),
]
PROGRAMS = pytest.mark.parametrize("name", ["qemu", "qemu-storage-daemon"])  # ours, and QEMU's


def alive(known: list[tuple[int, int]]) -> int:
    count = 0
    for pid, start in known:
        handle = find(pid, start)
        if handle is not None:
            count += handle.alive
            handle.close()
    return count


def copies(driver: BlkDriver, end: bytes = IDLE) -> bytes:
    """Waits for a key, says the first bytes of the disk, writes and flushes sector 16, says both statuses."""
    code = wait_key() + driver.start() + driver.read(0) + say_memory(driver.data, 8)
    code += driver.write(16, b"by the guest") + say_memory(driver.status, 1)
    return code + driver.flush() + say_memory(driver.status, 1) + say(b"done") + end


@PROGRAMS
async def test_a_guest_on_a_chain_of_qcow2_images(world: World, name: str) -> None:
    base = image(world.root / "base.qcow2", first=b"the base")
    before = base.read_bytes()
    top = image(world.root / "top.qcow2", "qcow2", "-b", str(base), "-F", "qcow2")
    domain = await world.start(copies(BlkDriver(5), POWER_OFF + IDLE), disk(top, name=name))
    known = daemons(domain)
    assert alive(known) == 1
    comm = Path(f"/proc/{known[0][0]}/comm").read_text().strip()
    assert comm == ("kvik-blk" if name == "qemu" else "qemu-storage-da")
    argv = Path(f"/proc/{domain.pid}/cmdline").read_bytes().decode().split("\0")
    assert "shared=on" in argv[argv.index("--memory") + 1]
    # The VMM has no image open, and its daemon no right to open another file.
    opened = {os.readlink(item) for item in Path(f"/proc/{domain.pid}/fd").iterdir()}
    assert not any(".qcow2" in item for item in opened)
    status = Path(f"/proc/{known[0][0]}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    if name == "qemu":  # the other one must open its images
        assert "Seccomp:\t2" in status
        assert all(f"{kind}:\t0000000000000000" in status for kind in ("CapEff", "CapPrm", "CapBnd"))
        assert os.stat(f"/proc/{known[0][0]}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
    figures = await domain.stats()
    assert figures["block.0.capacity"] == 8 << 20 and figures["block.0.physical"] > 0
    assert ("block.0.rd.reqs" in figures) is (name == "qemu")  # the other one counts none
    world.key()
    await world.said(b"the base\0\0done")
    await soon(lambda: not domain.is_active)
    await soon(lambda: not alive(known))
    checked(top)
    assert content(top)[16 * 512 :].startswith(b"by the guest")
    assert base.read_bytes() == before
    assert not list((world.root / "state").rglob("*-storage.sock"))


@pytest.mark.parametrize("format_", ["vmdk", "vdi", "vpc", "vhdx", "qed", "raw"])
async def test_other_formats_and_raw_on_request(world: World, format_: str) -> None:
    path = image(world.root / f"disk.{format_}", format_, first=b"a header")
    name = "qemu-storage-daemon" if format_ == "raw" else "qemu"
    domain = await world.start(copies(BlkDriver(5), POWER_OFF + IDLE), disk(path, format_, name=name))
    assert alive(daemons(domain)) == 1
    if format_ == "raw":  # locked as QEMU would
        refused = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 512", path], capture_output=True, check=False)
        assert b"lock" in refused.stderr
    world.key()
    await world.said(b"a header\0\0done")
    await soon(lambda: not domain.is_active)
    assert content(path, format_)[16 * 512 :].startswith(b"by the guest")


@PROGRAMS
async def test_a_read_only_disk_stays_as_it_is(world: World, name: str) -> None:
    path = image(world.root / "disk.qcow2", first=b"a header")
    before = path.read_bytes()
    await world.start(
        copies(BlkDriver(5)), disk(path, name=name, more="<readonly/>", options=" cache='none' discard='unmap'")
    )
    world.key()
    await world.said(b"a header\1\0done")  # VIRTIO_BLK_S_IOERR
    assert path.read_bytes() == before


async def test_a_killed_daemon_is_the_disks_end_and_not_the_machines(world: World) -> None:
    """QEMU's: what it had of a qcow2 image's tables in memory is gone. Ours comes again: test_disk_restart.py."""
    path = image(world.root / "disk.qcow2", first=b"a header")
    driver = BlkDriver(5)
    code = copies(driver, b"") + wait_key() + driver.ask_and_go_on(0) + say(b"alive") + IDLE
    domain = await world.start(code, disk(path, name="qemu-storage-daemon"))
    known = daemons(domain)
    world.key()
    await world.said(b"done")
    assert not await domain.disk_errors()
    os.kill(known[0][0], signal.SIGKILL)
    await soon(lambda: any(kind == "io-error" for kind, _ in world.events))
    told = next(data for kind, data in world.events if kind == "io-error")
    assert (told["src_path"], told["dev_alias"]) == (str(path), "virtio-disk0")
    assert list(await domain.disk_errors()) == ["vda"]
    await soon(lambda: "qemu-storage-daemon of virtio-disk0 ended: killed" in world.log() or "SIGKILL" in world.log())
    world.key()
    await world.said(b"alive")
    assert domain.is_active
    assert (await domain.stats())["block.0.name"] == "vda"
    checked(path)
    assert content(path)[16 * 512 :].startswith(b"by the guest")  # it was flushed


async def test_the_manager_may_end_and_the_vmm_may_be_killed(world: World) -> None:
    path = image(world.root / "disk.qcow2", first=b"a header")
    domain = await world.start(copies(BlkDriver(5)), disk(path))
    known = daemons(domain)
    await world.managers[-1].close()
    assert alive(known) == 1
    manager = await world.manager()
    domain = manager.lookup_name("m")
    assert daemons(domain) == known
    world.key()
    await world.said(b"a header\0\0done")
    assert (await domain.stats())["block.0.capacity"] == 8 << 20
    os.kill(domain.pid, signal.SIGKILL)
    await soon(lambda: not alive(known))
    checked(path)
    assert content(path)[16 * 512 :].startswith(b"by the guest")


async def test_a_daemon_ends_with_its_vmm_when_no_manager_is_there(world: World) -> None:
    domain = await world.start(IDLE, disk(image(world.root / "disk.qcow2")))
    known, pid = daemons(domain), domain.pid
    await world.managers[-1].close()
    world.managers.append(world.managers[-1])
    os.kill(pid, signal.SIGKILL)
    await soon(lambda: not alive(known))
    await world.manager()


async def test_plugged_in_and_out_of_a_running_machine(world: World) -> None:
    path = image(world.root / "disk.qcow2", first=b"a header")
    second = image(world.root / "second.qcow2", first=b"a second")
    driver = BlkDriver(6)
    again = BlkDriver(6)
    code = copies(driver, b"") + driver.eject_when_asked() + say(b"gone") + copies(again)
    domain = await world.start(code, disk(path))
    xml = disk(second, slot=6, dev="vdb")
    await domain.attach_device(xml)
    known = daemons(domain)
    assert alive(known) == 2
    assert (await domain.stats())["block.1.capacity"] == 8 << 20
    assert "starting kvik-blk for virtio-disk1" in world.log()
    world.key()
    await world.said(b"a second\0\0done")
    with pytest.raises(KvikError):  # one image, one writer
        await domain.attach_device(disk(second, slot=7, dev="vdc"))
    assert daemons(domain) == known
    await domain.detach_device(xml)
    await world.said(b"gone")
    await soon(lambda: alive(known) == 1)
    checked(second)
    assert content(second)[16 * 512 :].startswith(b"by the guest")
    assert "virtio-disk1 ended" not in world.log()  # as it should
    await domain.attach_device(disk(second, slot=6, dev="vdb", more="<readonly/>"))
    world.text = b""
    world.key()
    await world.said(b"a second\1\0done")
    await domain.destroy()
    await soon(lambda: not alive(known))
    assert not list((world.root / "state").rglob("*-storage.sock"))


async def test_private_memory_refuses_such_a_disk_later(world: World) -> None:
    domain = await world.start(IDLE)
    with pytest.raises(KvikError, match="shared") as refused:
        await domain.attach_device(disk(image(world.root / "disk.qcow2")))
    assert "memfd" in refused.value.remedy
    assert not daemons(domain)


async def test_limits_while_it_runs(world: World) -> None:
    tune = "<iotune><total_iops_sec>100</total_iops_sec></iotune>"
    theirs = disk(image(world.root / "theirs.qcow2"), slot=6, dev="vdb", more=tune, name="qemu-storage-daemon")
    domain = await world.start(IDLE, disk(image(world.root / "disk.qcow2"), more=tune) + theirs)
    machine: Any = domain.require_machine()
    live = machine.domain.devices.disks[0]
    assert (await machine.ask_storage(live, "query-block"))[0]["inserted"]["iops"] == 100
    live.iotune.total_iops_sec = 50
    await machine.update_device(live, live)
    assert (await machine.ask_storage(live, "query-block"))[0]["inserted"]["iops"] == 50
    live = machine.domain.devices.disks[1]
    asked = {"path": "/objects/virtio-disk1-limits", "property": "limits"}
    assert (await machine.ask_storage(live, "qom-get", asked))["iops-total"] == 100
    live.iotune.total_iops_sec = 50
    await machine.update_device(live, live)
    assert (await machine.ask_storage(live, "qom-get", asked))["iops-total"] == 50


async def test_a_disk_that_somebody_else_serves(world: World) -> None:
    path = image(world.root / "disk.qcow2", first=b"a header")
    place = world.root / "their.sock"
    theirs = subprocess.Popen(
        [
            *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={path}"),
            *("--blockdev", "driver=qcow2,node-name=q,file=f"),
            *("--export", f"type=vhost-user-blk,id=e,node-name=q,writable=on,addr.type=unix,addr.path={place}"),
        ]
    )
    try:
        await soon(place.exists)
        xml = (
            f"<disk type='vhostuser'><source type='unix' path='{place}'/><target dev='vda' bus='virtio'/>"
            "<address type='pci' slot='5'/></disk>"
        )
        domain = await world.start(copies(BlkDriver(5)), xml)
        assert not daemons(domain)
        world.key()
        await world.said(b"a header\0\0done")
    finally:
        theirs.kill()
        theirs.wait()


async def test_what_cannot_be_opened_is_the_daemons_own_words(world: World) -> None:
    path = world.root / "disk.vdi"
    path.write_bytes(os.urandom(1 << 20))
    with pytest.raises(HypervisorError, match="VDI") as refused:
        await world.start(IDLE, disk(path, "vdi"))
    assert "qemu-img check" in refused.value.remedy
    busy = image(world.root / "busy.qcow2")
    holder = subprocess.Popen(["qemu-io", "-f", "qcow2", str(busy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.read(8)  # its prompt: the image is open
        for number, name in enumerate(("qemu", "qemu-storage-daemon")):
            with pytest.raises(
                HypervisorError, match=r"busy\.qcow2.* another process|another process.*busy"
            ) as refused:
                await world.start(IDLE, disk(busy, ("qcow2", "raw")[number], name=name))
            assert "fuser" in refused.value.remedy
    finally:
        holder.communicate(b"quit\n")


async def test_without_the_daemon_the_package_and_another_way_are_named(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_daemon, "KIND", "qemu-storage-daemon-that-is-not")
    with pytest.raises(MissingPackages) as missing:
        await world.start(IDLE, disk(image(world.root / "disk.vdi", "vdi"), "vdi"))
    assert "qemu-img convert -f vdi -O raw" in missing.value.remedy
    await world.start(IDLE, disk(image(world.root / "disk.qcow2")))  # which needs none of QEMU's programs


async def test_resized_while_it_runs(world: World) -> None:
    ours, theirs = image(world.root / "disk.qcow2"), image(world.root / "theirs.qcow2")
    xml = disk(ours) + disk(theirs, slot=6, dev="vdb", name="qemu-storage-daemon")
    domain = await world.start(IDLE, xml)
    machine: Any = domain.require_machine()
    await domain.block_resize("vda", 24 << 20)
    with pytest.raises(OperationUnsupported, match="vdb"):
        await domain.block_resize("vdb", 24 << 20)
    nodes = await machine.execute("query-named-block-nodes")
    assert [item["image"]["virtual-size"] for item in nodes] == [24 << 20, 8 << 20]  # what the guest is told
    await domain.destroy()
    checked(ours)
    assert (len(content(ours)), len(content(theirs))) == (24 << 20, 8 << 20)


async def test_an_error_of_the_image_is_told(world: World) -> None:
    """An entry that leads to a table of the image: reading is an error, the machine goes on."""
    path = image(world.root / "disk.qcow2", first=b"a header")
    with path.open("r+b") as file:  # the first L2 entry: a compressed cluster far behind the file's end
        file.seek(40)
        l1 = int.from_bytes(file.read(8), "big")
        file.seek(l1)
        l2 = int.from_bytes(file.read(8), "big") & 0x00FF_FFFF_FFFF_FE00
        file.seek(l2)
        file.write((1 << 62 | 1 << 40).to_bytes(8, "big"))
    driver = BlkDriver(5)
    code = wait_key() + driver.start() + driver.read(0) + say_memory(driver.status, 1) + say(b"done") + IDLE
    domain = await world.start(code, disk(path))
    world.key()
    await world.said(b"\1done")  # VIRTIO_BLK_S_IOERR
    await soon(lambda: any(kind == "io-error" for kind, _ in world.events))
    told = next(data for kind, data in world.events if kind == "io-error")
    assert (told["src_path"], told["dev_alias"]) == (str(path), "virtio-disk0")
    await soon(lambda: "outside the file" in world.log())
    assert domain.is_active


@pytest.mark.skipif(not landlock.abi(), reason="needs a kernel with Landlock")
async def test_a_daemon_opens_nothing_but_its_images(world: World) -> None:
    """What a hostile image could have it open, were it taken over: nothing that was not passed."""
    other = image(world.root / "other.qcow2")
    domain = await world.start(IDLE, disk(image(world.root / "disk.qcow2"), name="qemu-storage-daemon"))
    machine: Any = domain.require_machine()
    live = machine.domain.devices.disks[0]
    for path in (other, "/etc/passwd"):
        with pytest.raises(KvikError, match="Permission denied"):
            await machine.ask_storage(
                live, "blockdev-add", {"driver": "file", "node-name": "x", "filename": str(path), "read-only": True}
            )
