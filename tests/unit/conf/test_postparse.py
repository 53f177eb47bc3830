"""What a bare document becomes, compared with golden files, and that it then stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvik.conf.addresses import assign_addresses, target_index, target_name
from kvik.conf.aliases import assign_aliases
from kvik.conf.devices.disk import Disk
from kvik.conf.devices.interface import Interface
from kvik.conf.devices_xml import add_device, guest_devices, parse_device
from kvik.conf.domain import Domain, format_domain
from kvik.conf.machine import MachineDefaults
from kvik.conf.prepare import load_domain
from kvik.errors import ConfigError

DATA = Path(__file__).parents[2] / "data/conf"
GOLDEN = DATA / "postparse"
BARE = ["q35-min", "pc-min", "q35-full", "pc-full", "gfx", "direct-kernel", "installed-windows", "reference"]


def defaults() -> MachineDefaults:
    return MachineDefaults(
        machines={"q35": "pc-q35-7.2", "pc": "pc-i440fx-7.2"},
        emulator="/usr/bin/qemu-system-x86_64",
        random=lambda count: bytes(range(count)),
    )


def load(name: str) -> Domain:
    return load_domain((DATA / f"{name}.xml").read_bytes(), defaults())


@pytest.mark.parametrize("name", BARE)
def test_a_bare_document_becomes_its_golden_file(name: str) -> None:
    text = format_domain(load(name))
    golden = GOLDEN / f"{name}.xml"
    if os.environ.get("KVIK_UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", BARE)
def test_a_complete_document_does_not_change_again(name: str) -> None:
    text = format_domain(load(name))
    assert format_domain(load_domain(text, defaults())) == text


@pytest.mark.parametrize("name", BARE)
def test_no_two_devices_share_an_alias_except_the_first_console(name: str) -> None:
    domain = load(name)
    assign_aliases(domain)
    names = [item.alias.name for path, item in guest_devices(domain.devices) if item.alias and "console" not in path]
    assert len(names) == len(set(names))
    assert all(item.alias is not None for _, item in guest_devices(domain.devices))


def test_uuid_and_mac_come_from_the_given_source() -> None:
    xml = "<domain type='qemu'><name>n</name><memory>1024</memory><os><type>hvm</type></os>{}</domain>"
    domain = load_domain(xml.format("<devices><interface type='user'/></devices>"), defaults())
    assert domain.uuid == "00010203-0405-4607-8809-0a0b0c0d0e0f"
    mac = domain.devices.interfaces[0].mac
    assert mac is not None
    assert mac.address == "52:54:00:00:01:02"


def test_removing_a_device_moves_no_other() -> None:
    domain = load("q35-full")
    before = {id(item): format(item.address) for _, item in guest_devices(domain.devices) if item.address}
    domain.devices.interfaces.pop(0)
    domain.devices.rngs.clear()
    again = load_domain(format_domain(domain), defaults())
    kept = [format(item.address) for _, item in guest_devices(again.devices) if item.address]
    assert set(kept) <= set(before.values())


def test_a_device_plugged_into_a_running_machine_takes_a_spare_root_port_and_then_there_is_none() -> None:
    domain = load("direct-kernel")
    buses = set()
    for number in range(2):
        _, device = parse_device(
            f"<disk><source file='/srv/{number}'/><target dev='vd{'ab'[number]}' bus='virtio'/></disk>"
        )
        assert isinstance(device, Disk)
        add_device(domain.devices, device)
        assign_addresses(domain, grow=False)
        assert device.address is not None
        buses.add(device.address.bus)
        assign_aliases(domain)
        assert device.alias is not None and device.alias.name == f"virtio-disk{number}"
    assert len(buses) == 2
    _, third = parse_device(
        "<interface type='user'><mac address='52:54:00:00:00:09'/><model type='virtio'/></interface>"
    )
    assert isinstance(third, Interface)
    add_device(domain.devices, third)
    with pytest.raises(ConfigError, match="no free express PCI slot"):
        assign_addresses(domain, grow=False)
    assign_addresses(domain, grow=True)
    assert third.address is not None


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_a_hundred_network_cards_find_room(machine: str) -> None:
    cards = "".join(
        f"<interface type='user'><mac address='52:54:00:00:00:{number:02x}'/><model type='virtio'/></interface>"
        for number in range(100)
    )
    xml = (
        f"<domain type='qemu'><name>n</name><memory>1024</memory><os><type machine='{machine}'>hvm</type></os>"
        f"<devices>{cards}</devices></domain>"
    )
    text = format_domain(load_domain(xml, defaults()))
    assert format_domain(load_domain(text, defaults())) == text


def test_microvm_has_no_pci() -> None:
    xml = (
        "<domain type='qemu'><name>n</name><memory>1024</memory><os><type machine='microvm'>hvm</type></os>"
        "<devices><rng model='virtio'><backend model='builtin'/></rng></devices></domain>"
    )
    domain = load_domain(xml, defaults())
    assert not domain.devices.controllers
    assert domain.devices.rngs[0].address is not None
    assert domain.devices.rngs[0].address.type == "virtio-mmio"


def test_target_names_count_like_spreadsheet_columns() -> None:
    assert [target_name("virtio", number) for number in (0, 25, 26, 701, 702)] == [
        "vda",
        "vdz",
        "vdaa",
        "vdzz",
        "vdaaa",
    ]
    assert all(target_index(target_name("sata", number)) == number for number in range(2000))
    assert all(target_index(target_name("nvme", number)) == number for number in range(600))
    assert [target_name("nvme", number) for number in (0, 1, 256)] == ["nvme0n1", "nvme0n2", "nvme1n1"]
    assert [target_index(name) for name in ("nvme0n0", "nvme0n257", "nvme", "nvme0")] == [None] * 4


def test_a_console_becomes_the_first_serial_line() -> None:
    xml = (
        "<domain type='qemu'><name>n</name><memory>1024</memory><os><type>hvm</type></os>"
        "<devices><console type='file'><source path='/srv/log'/></console></devices></domain>"
    )
    devices = load_domain(xml, defaults()).devices
    assert len(devices.serials) == len(devices.consoles) == 1
    assert devices.serials[0].source is not None
    assert devices.serials[0].source.path == "/srv/log"
    assert devices.serials[0].target is not None
    assert devices.serials[0].target.type == "isa-serial"
