"""Virtual functions, in a sysfs of files: what is found there, and what is written to take one and to give it back."""

from __future__ import annotations

import errno
import struct
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import HostError, OperationInvalid
from kvik.host import sriov
from kvik.host.netlink_attributes import attributes

PHYSICAL, FUNCTIONS = "0000:01:00.0", ("0000:01:10.0", "0000:01:10.2")


class FakeKernel:
    """A sysfs with a card of two functions; a write to it binds and unbinds, as the PCI bus does."""

    def __init__(self, root: Path) -> None:
        self.root, self.written = root, []
        self.told: list[tuple[Any, ...]] = []  # for tests that put more in the kernel's place
        self.vfio = True
        devices = root / "bus/pci/devices"
        for address in (PHYSICAL, *FUNCTIONS):
            (devices / address / "net").mkdir(parents=True)
            (devices / address / "driver_override").write_text("(null)\n")
        (devices / PHYSICAL / "net/enp1s0").mkdir()
        for number, address in enumerate(FUNCTIONS):
            (devices / PHYSICAL / f"virtfn{number}").symlink_to(devices / address)
            (devices / address / "physfn").symlink_to(devices / PHYSICAL)
            (devices / address / "net" / f"enp1s0v{number}").mkdir()
            self.bind(address, "ixgbevf")
        (root / "class/net/enp1s0").mkdir(parents=True)
        (root / "class/net/enp1s0/device").symlink_to(devices / PHYSICAL)
        (root / "class/net/lo").mkdir()

    def bind(self, address: str, driver: str) -> None:
        (self.root / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        (self.root / "bus/pci/devices" / address / "driver").symlink_to(self.root / "bus/pci/drivers" / driver)

    def write(self, path: Path, text: str) -> None:
        self.written.append((str(path.relative_to(self.root)), text))
        if path.name == "unbind":
            path.parent.unlink()
        elif path.name == "drivers_probe":
            override = (self.root / "bus/pci/devices" / text / "driver_override").read_text().strip()
            if override != "vfio-pci" or self.vfio:
                self.bind(text, override if override == "vfio-pci" else "ixgbevf")
        else:
            path.write_text(text)

    def driver(self, address: str) -> str:
        link = self.root / "bus/pci/devices" / address / "driver"
        return link.resolve().name if link.exists() else ""


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    made = FakeKernel(tmp_path)
    monkeypatch.setattr(sriov, "_write", made.write)
    return made


def test_functions_are_found_in_order_with_their_interfaces(kernel: FakeKernel) -> None:
    found = sriov.virtual_functions("enp1s0", kernel.root)
    assert found == [(0, FUNCTIONS[0], "enp1s0v0"), (1, FUNCTIONS[1], "enp1s0v1")]
    with pytest.raises(OperationInvalid, match="lo is no network interface of a PCI device"):
        sriov.virtual_functions("lo", kernel.root)
    for number in (0, 1):
        (kernel.root / "bus/pci/devices" / PHYSICAL / f"virtfn{number}").unlink()
    with pytest.raises(OperationInvalid, match=r"enp1s0 has no virtual functions; echo 4 >"):
        sriov.virtual_functions("enp1s0", kernel.root)


def test_a_function_is_taken_from_its_driver_and_given_back(kernel: FakeKernel) -> None:
    address = FUNCTIONS[0]
    sriov.take(address, kernel.root)
    assert kernel.driver(address) == "vfio-pci" and kernel.driver(FUNCTIONS[1]) == "ixgbevf"
    steps = len(kernel.written)
    sriov.take(address, kernel.root)
    assert len(kernel.written) == steps
    sriov.give_back(address, kernel.root)
    assert kernel.driver(address) == "ixgbevf"
    steps = len(kernel.written)
    sriov.give_back(address, kernel.root)  # the host's already: nothing is touched
    sriov.give_back("0000:77:00.0", kernel.root)
    sriov.give_back("../../etc", kernel.root)
    assert len(kernel.written) == steps


def test_a_function_that_vfio_does_not_take_is_its_drivers_again(kernel: FakeKernel) -> None:
    kernel.vfio = False
    with pytest.raises(HostError, match=r"vfio-pci did not take PCI device 0000:01:10.0; load the module"):
        sriov.take(FUNCTIONS[0], kernel.root)
    assert kernel.driver(FUNCTIONS[0]) == "ixgbevf"
    assert (kernel.root / "bus/pci/devices" / FUNCTIONS[0] / "driver_override").read_text() == "\n"


def test_what_a_host_lacks_to_give_a_device_away_is_said(kernel: FakeKernel, tmp_path: Path) -> None:
    with pytest.raises(OperationInvalid, match=r"no IOMMU at work; switch VT-d or AMD-Vi on"):
        sriov.check_assignable(FUNCTIONS[0], kernel.root, tmp_path / "vfio")
    (kernel.root / "bus/pci/devices" / FUNCTIONS[0] / "iommu_group").mkdir()
    with pytest.raises(OperationInvalid, match=r"there is no .*/vfio/vfio; load the module"):
        sriov.check_assignable(FUNCTIONS[0], kernel.root, tmp_path / "vfio")
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio/vfio").touch()
    sriov.check_assignable(FUNCTIONS[0], kernel.root, tmp_path / "vfio")
    with pytest.raises(OperationInvalid, match=r"no PCI device 0000:77:00.0"):
        sriov.check_assignable("0000:77:00.0", kernel.root, tmp_path / "vfio")


class RecordedNetlink:
    """Keeps what it was told; only `enp1s0` is there."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, bytes]] = []

    def link(self, name: str) -> object:
        assert name == "enp1s0"
        return type("Link", (), {"index": 7})()

    def change(self, action: str, kind: int, flags: int, payload: bytes) -> None:
        self.requests.append((kind, payload))


def test_a_function_gets_the_guests_address_and_vlan_from_the_card(kernel: FakeKernel) -> None:
    netlink = RecordedNetlink()
    sriov.set_address(netlink, FUNCTIONS[1], "52:54:00:00:00:01", vlan=9, sysfs=kernel.root)
    ((kind, payload),) = netlink.requests
    assert kind == 19  # RTM_SETLINK
    assert struct.unpack_from("=BxHi", payload) == (0, 0, 7)
    told = attributes(attributes(attributes(payload, 16)[22])[1])
    assert told[1][:10] == struct.pack("=I", 1) + bytes.fromhex("525400000001") and len(told[1]) == 36
    assert told[2] == struct.pack("=III", 1, 9, 0)
    with pytest.raises(HostError, match="is no virtual function") as caught:
        sriov.set_address(netlink, PHYSICAL, "52:54:00:00:00:01", sysfs=kernel.root)
    assert caught.value.errno == errno.ENODEV
