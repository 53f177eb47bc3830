"""Wherever PCI devices are put, the machine can be built: buses exist, no circles, no two on one slot, and for good."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvik.conf.domain import Domain, format_domain, parse_domain
from kvik.conf.machine import MachineDefaults
from kvik.conf.pci import BUSES, ROOTS, pci_devices
from kvik.conf.postparse import postparse
from kvik.conf.validate import validate
from kvik.errors import ConfigError

DOCUMENT = (
    "<domain type='qemu'><name>m</name><memory>65536</memory>"
    "<os><type arch='x86_64' machine='{machine}'>hvm</type></os><devices>{devices}</devices></domain>"
)
EXPRESS_MODELS = sorted(set(BUSES) - set(ROOTS))
BRIDGES = st.lists(st.sampled_from(EXPRESS_MODELS), max_size=8)
CONVENTIONAL_BRIDGES = st.lists(st.sampled_from(["pci-bridge", "pci-expander-bus"]), max_size=4)
DEVICES = {
    "virtio-disk": "<disk type='file' device='disk'><source file='/d{n}'/><target dev='vd{l}' bus='virtio'/></disk>",
    "nic": "<interface type='user'><model type='virtio'/></interface>",
    "old-nic": "<interface type='user'><model type='rtl8139'/></interface>",
    "sound": "<sound model='ich6'/>",
    "rng": "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
    "scsi": "<controller type='scsi' model='virtio-scsi'/>",
    "uhci": "<controller type='usb' model='piix3-uhci'/>",
    "share": "<filesystem><source dir='/s{n}'/><target dir='t{n}'/></filesystem>",
    "input": "<input type='tablet' bus='virtio'/>",
    "vga": "<video><model type='vga'/></video>",
}
KINDS = st.lists(st.sampled_from(sorted(DEVICES)), max_size=12)
PARAMETERS = ("pc-q35-7.2", "pc-i440fx-7.2")


def elements(kinds: list[str], first: int = 0) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = []
    for number, kind in enumerate(kinds, first):
        made.append(DEVICES[kind].format(n=number, l=letters[number // 26] + letters[number % 26]))
    return "".join(made)


def bridges(models: list[str]) -> str:
    return "".join(f"<controller type='pci' model='{model}'/>" for model in models)


def places(domain: Domain) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    devices: list[Any] = [device for device, _ in pci_devices(domain.devices)]
    devices += [item for item in domain.devices.controllers if item.type == "pci" and item.model not in ROOTS]
    for device in devices:
        assert device.address is not None, device
        if device.address.type == "pci":
            found[id(device)] = device.address.pci
    return found


def check(domain: Domain) -> None:
    validate(domain)
    buses = {item.index: item for item in domain.devices.controllers if item.type == "pci"}
    assert len(buses) == sum(item.type == "pci" for item in domain.devices.controllers)
    found = list(places(domain).values())
    assert len(found) == len(set(found)), "two devices on one slot"
    for _, bus, _, _ in found:
        seen = set()
        while bus:
            assert bus in buses, f"bus {bus} does not exist"
            assert bus not in seen, f"bus {bus} is behind itself"
            seen.add(bus)
            address = buses[bus].address
            assert address is not None
            bus = address.bus or 0
    for item in buses.values():
        if item.model in ROOTS:
            continue
        upper = buses[item.address.bus or 0]
        needs, offers = BUSES[item.model or ""][3], BUSES[upper.model or ""][0]
        assert needs == offers, f"a {item.model} sits on a {upper.model}"


def complete(machine: str, devices: str) -> Domain | None:
    """None where no machine can be built of it, and that is said."""
    domain = parse_domain(DOCUMENT.format(machine=machine, devices=devices))
    try:
        postparse(domain, MachineDefaults(machine=machine))
    except ConfigError as error:
        assert "slot" in str(error) or "USB" in str(error)
        return None
    return domain


@pytest.mark.parametrize("machine", PARAMETERS)
@given(models=BRIDGES | CONVENTIONAL_BRIDGES, kinds=KINDS, later=KINDS)
@example(models=["pcie-switch-upstream-port", "pcie-switch-downstream-port"], kinds=[], later=[])
@example(models=["pcie-switch-downstream-port", "pcie-switch-upstream-port"], kinds=["nic"], later=["nic"])
@example(models=["pci-bridge", "pcie-to-pci-bridge", "dmi-to-pci-bridge"], kinds=["sound"], later=["sound"])
@settings(deadline=None, max_examples=60)
def test_any_set_of_controllers_and_devices_can_be_built(
    machine: str, models: list[str], kinds: list[str], later: list[str]
) -> None:
    domain = complete(machine, bridges(models) + elements(kinds))
    if domain is None:
        return
    check(domain)
    text = format_domain(domain)
    again = parse_domain(text)
    postparse(again, MachineDefaults(machine=machine))
    assert format_domain(again) == text  # what has a place is never moved
    for element in elements(later, len(kinds)).replace("><disk", ">\n<disk").split("\n"):
        text = text.replace("</devices>", element + "</devices>")
    more = parse_domain(text)
    kept = {mac: nic.address.pci for nic in again.devices.interfaces if (mac := nic.mac and nic.mac.address)}
    before = [item.address and item.address.pci for item in again.devices.controllers if item.type == "pci"]
    postparse(more, MachineDefaults(machine=machine))
    check(more)
    for nic in more.devices.interfaces:
        if nic.mac is not None and nic.mac.address in kept:
            assert nic.address is not None and nic.address.pci == kept[nic.mac.address]
    after = [item.address and item.address.pci for item in more.devices.controllers if item.type == "pci"]
    assert after[: len(before)] == before


def test_a_switch_hangs_on_a_port_of_the_root_and_not_on_itself() -> None:
    domain = complete("pc-q35-7.2", bridges(["pcie-switch-upstream-port", "pcie-switch-downstream-port"]))
    assert domain is not None
    check(domain)
    upstream = next(item for item in domain.devices.controllers if item.model == "pcie-switch-upstream-port")
    downstream = next(item for item in domain.devices.controllers if item.model == "pcie-switch-downstream-port")
    assert downstream.address is not None and downstream.address.bus == upstream.index
    assert upstream.address is not None
    port = next(item for item in domain.devices.controllers if item.index == upstream.address.bus)
    assert port.model == "pcie-root-port" or port.index == 0


def test_a_full_root_bus_has_a_bridge_before_it_is_too_late() -> None:
    domain = complete("pc-i440fx-7.2", elements(["nic"] * 27))
    assert domain is not None
    for number in range(27, 60):
        text = format_domain(domain).replace("</devices>", DEVICES["nic"] + "</devices>")
        domain = parse_domain(text)
        postparse(domain, MachineDefaults(machine="pc-i440fx-7.2"))
        check(domain)
        assert len(domain.devices.interfaces) == number + 1


@pytest.mark.parametrize(
    "controllers",
    [
        "<controller type='pci' index='1' model='pci-bridge'><address type='pci' bus='0x02' slot='0x01'/></controller>"
        "<controller type='pci' index='2' model='pci-bridge'><address type='pci' bus='0x01' slot='0x01'/></controller>",
        "<controller type='pci' index='1' model='pci-bridge'><address type='pci' bus='0x01' slot='0x01'/></controller>",
    ],
)
def test_a_circle_in_the_document_is_refused(controllers: str) -> None:
    domain = complete("pc-i440fx-7.2", controllers)
    assert domain is not None
    with pytest.raises(ConfigError, match="behind itself"):
        validate(domain)
