"""Lines, messages and doorbells, without a machine below."""

from __future__ import annotations

import os
from typing import Any

import pytest

from kvik.errors import OperationFailed
from kvik.kvm import routing
from kvik.vmm import interrupts as module
from kvik.vmm.interrupts import Doorbells, Interrupts


class FakeVm:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.routes: list[Any] = []

    def irq_line(self, gsi: int, level: bool) -> None:
        self.calls.append(("line", gsi, level))

    def signal_msi(self, address: int, data: int) -> None:
        self.calls.append(("msi", address, data))

    def irqfd(self, fd: int, gsi: int, deassign: bool = False) -> None:
        self.calls.append(("irqfd", gsi, deassign))

    def set_gsi_routing(self, routes: list[Any]) -> None:
        self.routes = routes

    def ioeventfd(self, fd: int, address: int, size: int, **options: Any) -> None:
        self.calls.append(("ioeventfd", address, options.get("deassign", False)))


@pytest.fixture
def vm() -> FakeVm:
    return FakeVm()


@pytest.fixture
def interrupts(vm: FakeVm) -> Interrupts:
    return Interrupts(vm)  # type: ignore[arg-type]  # quacks like one


def test_a_shared_pin_is_up_while_any_device_holds_it(vm: FakeVm, interrupts: Interrupts) -> None:
    one, two = interrupts.line(9), interrupts.line(9)
    one.set(True)
    two.set(True)
    two.set(True)
    one.set(False)
    assert interrupts.level(9)
    two.set(False)
    assert vm.calls == [("line", 9, True), ("line", 9, False)]


def test_levels_are_told_again_after_a_restore(vm: FakeVm, interrupts: Interrupts) -> None:
    interrupts.line(4).set(True)
    interrupts.line(5).pulse()
    vm.calls.clear()
    interrupts.redrive()
    assert sorted(vm.calls) == [("line", 4, True), ("line", 5, False)]


def test_a_message_needs_no_route_until_somebody_wants_a_descriptor(vm: FakeVm, interrupts: Interrupts) -> None:
    route = interrupts.msi()
    route.update(0xFEE00000, 0x31)
    route.signal()
    assert vm.calls == [("msi", 0xFEE00000, 0x31)] and vm.routes == []
    fd = route.fd()
    assert fd == route.fd() and ("irqfd", 24, False) in vm.calls
    assert vm.routes[: len(routing.default_routes())] == routing.default_routes()  # the chips' pins stay
    assert vm.routes[-1] == routing.MsiRoute(24, 0xFEE00000, 0x31)
    route.signal()
    assert os.eventfd_read(fd) == 1
    route.update(0xFEE00000, 0x32)
    assert vm.routes[-1].data == 0x32
    route.close()
    assert vm.routes == routing.default_routes() and vm.calls[-1] == ("irqfd", 24, True)


def test_what_is_signalled_while_masked_comes_when_unmasked(vm: FakeVm, interrupts: Interrupts) -> None:
    route = interrupts.msi()
    route.update(1, 2)
    route.mask()
    route.signal()
    route.signal()
    assert vm.calls == []
    route.unmask()
    assert vm.calls == [("msi", 1, 2)]
    fd = route.fd()
    route.mask()
    os.eventfd_write(fd, 1)  # somebody else, who knows nothing of masks
    route.unmask()
    assert vm.calls[-2:] == [("irqfd", 24, True), ("irqfd", 24, False)]  # bound again: KVM sends what is in it
    route.close()


def test_numbers_of_routes_are_used_again_and_bounded(interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROUTES", 27)
    routes = [interrupts.msi() for _ in range(3)]
    for route in routes:
        route.fd()
    assert [route.gsi for route in routes] == [24, 25, 26]
    with pytest.raises(OperationFailed, match="interrupt routes"):
        interrupts.msi().fd()
    routes[1].close()
    other = interrupts.msi()
    other.fd()
    assert other.gsi == 25
    for route in (routes[0], routes[2], other):
        route.close()


def test_doorbells_are_taken_down_as_they_were_put_up(vm: FakeVm) -> None:
    bells = Doorbells(vm)
    bells.add(0x1000, 2, 5)
    bells.remove(0x1000, 2)
    bells.remove(0x1000, 2)
    assert vm.calls == [("ioeventfd", 0x1000, False), ("ioeventfd", 0x1000, True)]


def test_a_message_that_is_sent_often_gets_an_irqfd(vm: FakeVm, interrupts: Interrupts) -> None:
    route = interrupts.msi()
    route.update(0xFEE00000, 7)
    for _ in range(module.OFTEN):
        route.signal()
    assert vm.calls == [("msi", 0xFEE00000, 7)] * module.OFTEN + [("irqfd", route.gsi, False)]
    route.signal()
    assert vm.calls[-1] == ("irqfd", route.gsi, False)
    assert os.eventfd_read(route.fd()) == 1
    route.update(0xFEE00000, 8)
    assert vm.routes[-1].data == 8
    route.close()
