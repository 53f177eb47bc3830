"""Changing a machine: devices, vCPUs, memory, metadata; live, in the definition, or both. Disks that others use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from manager_bench import Bench, document

from kvik.conf.devices_xml import format_device
from kvik.errors import (
    AlreadyExists,
    ConfigError,
    HostError,
    InvalidArgument,
    NoDevice,
    NoMetadata,
    OperationInvalid,
    OperationUnsupported,
    ResourceBusy,
)
from kvik.hypervisor.driver import EventKind, Feature
from kvik.hypervisor.test.driver import Behaviour
from kvik.manager import devices
from kvik.manager.storage import volumes

LIVE, CONFIG, BOTH, MAXIMUM = 1, 2, 3, 4
NIC = "<interface type='user'><mac address='52:54:00:00:00:09'/><model type='virtio'/></interface>"
URI = "http://example.org/xmlns"


def disk(path: Path, dev: str = "vda", extra: str = "") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/>"
        f"<target dev='{dev}' bus='virtio'/>{extra}</disk>"
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\0" * 512)
    return path


# devices


async def test_a_device_attached_live_has_alias_and_address_and_goes_with_the_run(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await domain.attach_device(NIC, LIVE)
    live = domain.xml()
    assert "52:54:00:00:00:09" in live and "52:54:00:00:00:09" not in domain.xml(2)
    (added,) = [event.fields["dev_alias"] for event in bench.events if event.kind == "device-added"]
    assert f"<alias name='{added}'/>" in live
    await domain.destroy()
    await domain.start()
    assert "52:54:00:00:00:09" not in domain.xml()


async def test_attached_to_both_it_is_the_same_device_with_the_same_place(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await domain.attach_device("<interface type='user'><model type='virtio'/></interface>", BOTH)
    assert domain.live
    (live,) = domain.live.devices.interfaces
    (config,) = domain.definition.devices.interfaces
    assert live.mac == config.mac and live.address == config.address
    assert (await bench.reopen()).lookup_name("a").definition.devices.interfaces[0].mac == config.mac


async def test_detaching_waits_for_the_guest_and_tells(bench: Bench) -> None:
    domain = await bench.manager.define(document(devices=NIC))
    await domain.start()
    await domain.detach_device(NIC, BOTH)
    assert "52:54:00:00:00:09" not in domain.xml() and "52:54:00:00:00:09" not in domain.xml(2)
    assert "device-removed" in bench.kinds()


async def test_what_the_live_document_says_of_a_device_detaches_it_from_the_definition_too(
    bench: Bench, image: Path
) -> None:
    """As virsh does it: the element with the alias, which the definition does not have."""
    domain = await bench.manager.define(document(devices=NIC + disk(image)))
    for flags in (BOTH, CONFIG):
        await domain.start()
        assert domain.live
        for device in (domain.live.devices.interfaces[0], domain.live.devices.disks[0]):
            assert device.alias and device.alias.name
            await domain.detach_device(format_device(device), flags)
        assert not domain.definition.devices.interfaces and not domain.definition.devices.disks
        await domain.destroy()
        await domain.attach_device(NIC, CONFIG)
        await domain.attach_device(disk(image), CONFIG)


async def test_what_only_the_run_has_goes_from_it_by_its_alias(bench: Bench, image: Path) -> None:
    domain = await bench.manager.define(document(devices=NIC))
    await domain.start()
    await domain.attach_device(disk(image), LIVE)
    assert domain.live
    xml = format_device(domain.live.devices.disks[0])
    await domain.detach_device(xml, BOTH)
    assert not domain.live.devices.disks and domain.definition.devices.interfaces
    with pytest.raises(NoDevice):
        await domain.detach_device(xml, CONFIG)


async def test_an_interface_with_its_live_alias_changes_in_both(bench: Bench) -> None:
    domain = await bench.manager.define(document(devices=NIC))
    await domain.start()
    assert domain.live
    down = format_device(domain.live.devices.interfaces[0]).replace("</interface>", "<link state='down'/></interface>")
    await domain.update_device(down, BOTH)
    for found in (domain.live, domain.definition):
        link = found.devices.interfaces[0].link
        assert link is not None and link.state == "down"
    assert domain.definition.devices.interfaces[0].alias is None


async def test_a_guest_that_does_not_let_go_keeps_the_device(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "REMOVAL_WAIT", 0.02)
    bench.driver.behaviours["a"] = Behaviour(refuses_unplug=True)
    domain = await bench.manager.define(document(devices=NIC))
    await domain.start()
    await domain.detach_device(NIC, LIVE)
    assert "52:54:00:00:00:09" in domain.xml()
    assert domain.live and domain.live.devices.interfaces[0].alias
    alias = domain.live.devices.interfaces[0].alias.name
    bench.driver.machines["a"].tell(EventKind.DEVICE_REMOVED, alias)  # later, after all
    assert "52:54:00:00:00:09" not in domain.xml()


async def test_detaching_by_alias_and_what_is_not_there(bench: Bench) -> None:
    domain = await bench.manager.define(document(devices=NIC))
    await domain.start()
    with pytest.raises(NoDevice, match="no device with alias 'net7'"):
        await domain.detach_device_alias("net7", LIVE)
    with pytest.raises(NoDevice, match="52:54:00:00:00:10"):
        await domain.detach_device(NIC.replace("09", "10"), LIVE)
    assert domain.live and domain.live.devices.interfaces[0].alias
    await domain.detach_device_alias(domain.live.devices.interfaces[0].alias.name, LIVE)
    assert domain.live.devices.interfaces == []


async def test_the_same_device_twice_is_refused(bench: Bench, image: Path) -> None:
    domain = await bench.manager.define(document(devices=NIC + disk(image)))
    for xml in (NIC, disk(image)):
        with pytest.raises(AlreadyExists):
            await domain.attach_device(xml, CONFIG)


async def test_a_change_of_media_is_live_and_kept(bench: Bench, tmp_path: Path) -> None:
    cd = "<disk type='file' device='cdrom'><source file='{}'/><target dev='sda' bus='sata'/><readonly/></disk>"
    one, two = tmp_path / "1.iso", tmp_path / "2.iso"
    for path in (one, two):
        path.write_bytes(b"iso")
    domain = await bench.manager.define(document(devices=cd.format(one)))
    await domain.start()
    await domain.update_device(cd.format(two), BOTH)
    assert str(two) in domain.xml() and str(two) in domain.xml(2)
    assert "update-device" in bench.driver.machines["a"].commands
    with pytest.raises(HostError, match=r"3\.iso"):
        await domain.update_device(cd.format(tmp_path / "3.iso"), LIVE)


async def test_a_vmm_without_hotplug_says_so_before_anything_changes(bench: Bench) -> None:
    bench.driver.without.add(Feature.DEVICE_HOTPLUG)
    domain = await bench.manager.define(document())
    await domain.start()
    with pytest.raises(OperationUnsupported):
        await domain.attach_device(NIC, BOTH)
    assert "52:54:00:00:00:09" not in domain.xml(2)


# disks


async def test_a_disk_in_use_is_refused_naming_the_other_machine(bench: Bench, image: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.img"
    os.link(image, link)
    one = await bench.manager.define(document("a", devices=disk(image)))
    two = await bench.manager.define(document("b", devices=disk(link)))
    await one.start()
    with pytest.raises(ResourceBusy, match=r"link\.img is in use by machine 'a'"):
        await two.start()
    three = await bench.manager.define(document("c"))
    await three.start()
    with pytest.raises(ResourceBusy, match="'a'"):
        await three.attach_device(disk(image), LIVE)
    await one.destroy()
    await two.start()
    manager = await bench.reopen()
    with pytest.raises(ResourceBusy, match="'b'"):
        await manager.lookup_name("a").start()


async def test_no_machine_starts_from_a_volume_that_is_being_changed(bench: Bench, tmp_path: Path) -> None:
    pools = bench.manager.pools
    pool = await pools.create_xml(
        f"<pool type='dir'><name>p</name><target><path>{tmp_path}/p</path></target></pool>", lambda pool: pool.build()
    )
    made = await volumes.create(pools, pool, "<volume><name>v</name><capacity>4096</capacity></volume>")
    one = await bench.manager.define(document("a", devices=disk(Path(made.path))))
    two = await bench.manager.define(document("b"))
    await two.start()
    async with volumes.open_bytes(pools, pool, "v", 0, 0, writable=True):
        for forbidden in (one.start(), two.attach_device(disk(Path(made.path)), LIVE)):
            with pytest.raises(ResourceBusy, match="volume 'v' of storage pool 'p': it is being written to"):
                await forbidden
    async with volumes.open_bytes(pools, pool, "v", 0, 0, writable=False):
        await one.start()  # who only reads is in nobody's way
    with pytest.raises(ResourceBusy, match="machine 'a' is running from it"):
        await volumes.wipe(pools, pool, "v", 0)
    with pytest.raises(ResourceBusy, match="machine 'a' is running from it"):
        await volumes.copy(pools, pool, "<volume><name>w</name></volume>", pool, "v")
    await one.destroy()
    await volumes.wipe(pools, pool, "v", 0)


@pytest.mark.parametrize("extra", ["<shareable/>", "<readonly/>"])
async def test_a_disk_that_may_be_shared_is_shared(bench: Bench, image: Path, extra: str) -> None:
    for name in ("a", "b"):
        await (await bench.manager.define(document(name, devices=disk(image, extra=extra)))).start()


async def test_a_missing_disk_or_kernel_is_named_before_anything_is_started(bench: Bench, tmp_path: Path) -> None:
    one = await bench.manager.define(document("a", devices=disk(tmp_path / "none.img")))
    two = await bench.manager.define(document("b").replace("</os>", "<kernel>/none/vmlinuz</kernel></os>"))
    with pytest.raises(HostError, match=r"none\.img: No such file"):
        await one.start()
    with pytest.raises(HostError, match=r"kernel of machine 'b': /none/vmlinuz"):
        await two.start()
    assert bench.driver.starts == {}
    assert list(bench.paths.status.iterdir()) == []


# vCPUs and memory


async def test_vcpus_live_config_and_maximum(bench: Bench) -> None:
    domain = await bench.manager.define(document(vcpus=4))
    await domain.set_vcpus(2, CONFIG)
    assert (domain.vcpu_count(CONFIG), domain.vcpu_count(CONFIG | MAXIMUM)) == (2, 4)
    await domain.start()
    await domain.set_vcpus(3, LIVE)
    assert (domain.vcpu_count(LIVE), domain.vcpu_count(CONFIG), domain.info().vcpus) == (3, 2, 3)
    await domain.set_vcpus(4, BOTH)
    assert (domain.vcpu_count(LIVE), domain.vcpu_count(CONFIG)) == (4, 4)
    for count, flags in ((5, LIVE), (5, CONFIG), (0, CONFIG), (2**31, CONFIG), (8, LIVE | MAXIMUM)):
        with pytest.raises(InvalidArgument):
            await domain.set_vcpus(count, flags)
    await domain.set_vcpus(8, CONFIG | MAXIMUM)
    assert domain.definition.vcpu and domain.definition.vcpu.value == 8


async def test_what_the_driver_refuses_is_not_kept(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    with pytest.raises(ConfigError, match="vCPUs"):
        await domain.set_vcpus(1000, CONFIG | MAXIMUM)
    assert domain.vcpu_count(CONFIG | MAXIMUM) == 2


async def test_memory_live_config_and_maximum(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await domain.set_memory(131072, BOTH)
    assert domain.info().mem_kib == 131072
    assert domain.definition.current_memory == 131072
    assert [event.fields for event in bench.events if event.kind == "balloon-change"] == [{"actual": 131072}]
    for kib, flags in ((10**9, LIVE), (0, LIVE), (2**60, CONFIG), (524288, LIVE | MAXIMUM)):
        with pytest.raises(InvalidArgument):
            await domain.set_memory(kib, flags)
    await domain.set_memory(524288, CONFIG | MAXIMUM)
    assert domain.definition.memory == 524288


async def test_live_of_a_machine_that_is_off_and_config_of_a_transient_are_refused(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    transient = await bench.manager.create_xml(document("b"))
    for change in (domain.set_vcpus(1, LIVE), domain.attach_device(NIC, BOTH), transient.set_memory(131072, CONFIG)):
        with pytest.raises(OperationInvalid):
            await change


# metadata


async def test_title_description_and_element_live_and_config(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await domain.set_metadata(1, "the title", flags=BOTH)
    await domain.set_metadata(0, "two\nlines", flags=CONFIG)
    await domain.set_metadata(2, "<app v='1'><name>web</name></app>", "my", URI, BOTH)
    assert (domain.title, domain.metadata(1, None, CONFIG)) == ("the title", "the title")
    assert domain.metadata(0, None, CONFIG) == "two\nlines"
    assert domain.metadata(2, URI, LIVE) == '<app v="1"><name>web</name></app>'
    assert f'xmlns:my="{URI}"' in domain.xml(2) and "<my:name>" in domain.xml(2)
    with pytest.raises(NoMetadata):
        domain.metadata(0, None, LIVE)
    assert [event.fields["type"] for event in bench.events if event.kind == "metadata-change"] == [1, 0, 2]


async def test_metadata_is_replaced_and_removed(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    for text in ("<one/>", "<two/>"):
        await domain.set_metadata(2, text, "my", URI)
    assert domain.metadata(2, URI) == "<two/>"
    await domain.set_metadata(2, None, None, URI)
    with pytest.raises(NoMetadata):
        domain.metadata(2, URI)


@pytest.mark.parametrize(
    ("type_", "text", "key", "uri"),
    [
        (1, "two\nlines", None, None),
        (2, "<open>", "my", URI),
        (2, "<a/><b/>", "my", URI),
        (2, "<a/>", None, URI),
        (2, "<a/>", "my", None),
        (2, "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/shadow'>]><a>&x;</a>", "my", URI),
        (2, "<a/>", "bad prefix", URI),
        (9, "x", None, None),
    ],
)
async def test_bad_metadata_is_refused(bench: Bench, type_: int, text: str, key: str | None, uri: str | None) -> None:
    domain = await bench.manager.define(document())
    before = domain.xml()
    with pytest.raises(InvalidArgument):
        await domain.set_metadata(type_, text, key, uri)
    assert domain.xml() == before


async def test_figures_move_and_groups_choose(bench: Bench) -> None:
    domain = await bench.manager.define(document(devices=NIC))
    off = await domain.stats()
    assert off["state.state"] == 5 and off["vcpu.maximum"] == 2
    await domain.start()
    assert set(await domain.stats(frozenset({"state"}))) == {"state.state", "state.reason"}
    figures = await domain.stats(frozenset({"interface"}))
    assert figures["net.count"] == 1 and all(key.startswith("net.") for key in figures)
    assert int((await domain.stats(frozenset({"cpu-total"})))["cpu.time"]) > 0
    assert domain.info().cpu_time_ns > 0
    assert (await domain.memory_stats())[6] == 262144


async def test_a_disk_attached_live_is_in_use_until_it_is_detached(bench: Bench, image: Path) -> None:
    one = await bench.manager.define(document("a"))
    two = await bench.manager.define(document("b", devices=disk(image)))
    await one.start()
    await one.attach_device(disk(image), LIVE)
    with pytest.raises(ResourceBusy, match="'a'"):
        await two.start()
    await one.detach_device(disk(image), LIVE)
    await two.start()
