"""`<interface type='hostdev'>`: a PCI function is taken from the host at the machine's start and given back at its end,
in a sysfs of files; the kernel is not told of its MAC address and VLAN, what it would be told is looked at."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvik.conf.devices.interface import Interface
from kvik.conf.devices_xml import parse_device
from kvik.errors import OperationInvalid, ResourceBusy
from kvik.host import sriov
from kvik.manager import ports
from kvik.network.attachment import resolve
from kvik.network.taps import open_taps, release_taps
from unit.host.test_sriov import FUNCTIONS, FakeKernel

CARD = (
    "<interface type='hostdev'{}><source><address type='pci' domain='0' bus='1' slot='16' function='{}'/></source>"
    "<mac address='52:54:00:00:00:01'/><vlan><tag id='7'/></vlan><alias name='net0'/></interface>"
)


def card(more: str = " managed='yes'", function: int = 0) -> Interface:
    made = parse_device(CARD.format(more, function))[1]
    assert isinstance(made, Interface)
    return made


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    made = FakeKernel(tmp_path / "sys")
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio/vfio").touch()
    for address in FUNCTIONS:
        (made.root / "bus/pci/devices" / address / "iommu_group").mkdir()
    check, take, give = sriov.check_assignable, sriov.take, sriov.give_back
    monkeypatch.setattr(sriov, "_write", made.write)
    monkeypatch.setattr(sriov, "check_assignable", lambda at, **how: check(at, made.root, tmp_path / "vfio", **how))
    monkeypatch.setattr(sriov, "take", lambda address: take(address, made.root))
    monkeypatch.setattr(sriov, "give_back", lambda address: give(address, made.root))
    monkeypatch.setattr(sriov, "set_address", lambda link, address, mac, vlan: made.told.append((address, mac, vlan)))
    return made


def start(interface: Interface) -> dict[str, int]:
    attachment = resolve(interface, None)
    assert attachment is not None
    with ExitStack() as close:
        return open_taps([interface], close, {"net0": attachment})


def test_a_managed_one_is_taken_with_its_address_and_vlan_and_given_back(kernel: FakeKernel) -> None:
    address, interface = FUNCTIONS[0], card()
    assert start(interface) == {}  # QEMU opens it itself
    assert kernel.driver(address) == "vfio-pci"
    assert kernel.told == [(address, "52:54:00:00:00:01", 7)]
    release_taps([interface])
    assert kernel.driver(address) == "ixgbevf"


def test_one_that_is_not_managed_has_to_be_with_vfio_and_stays_there(kernel: FakeKernel) -> None:
    address, interface = FUNCTIONS[0], card("")
    with pytest.raises(OperationInvalid, match=f"{address} .*: ixgbevf has it, not vfio-pci; say managed='yes'"):
        start(interface)
    sriov.take(address)
    start(interface)
    release_taps([interface])
    assert kernel.driver(address) == "vfio-pci"


async def test_what_another_machine_has_is_refused_and_not_taken_from_it(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = card(), card()

    def machine(name: str, interface: Interface) -> Any:
        live = SimpleNamespace(devices=SimpleNamespace(interfaces=[interface]))
        return SimpleNamespace(name=name, run=SimpleNamespace(live=live, arriving=None))

    machines = [machine("one", first), machine("two", second)]

    async def run(function: Any, *rest: Any) -> Any:
        return function(*rest)

    manager = SimpleNamespace(domains=lambda: machines, networks=None, store=SimpleNamespace(run=run))
    for each in machines:
        each.manager = manager
        each.driver = SimpleNamespace(features=lambda: {ports.Feature.PASSTHROUGH})
    start(first)
    with pytest.raises(ResourceBusy, match=f"PCI device {FUNCTIONS[0]} is with machine 'one'; stop it"):
        ports.join(machines[1], [second])
    await ports.release(manager, machines[1], [second])
    assert kernel.driver(FUNCTIONS[0]) == "vfio-pci"
    machines.pop()
    await ports.release(manager, machines[0], [first])
    assert kernel.driver(FUNCTIONS[0]) == "ixgbevf"
