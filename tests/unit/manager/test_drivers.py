"""Which driver runs a machine: the one that its <emulator> names, else the one of its domain type."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvik.errors import ConfigUnsupported
from kvik.hypervisor.test.driver import TestDriver
from kvik.manager.manager import Manager
from kvik.manager.node import Node
from kvik.paths import Paths

DOMAIN = (
    "<domain type='{type}'><name>{name}</name><memory>65536</memory><os><type>hvm</type></os>"
    "<devices>{emulator}</devices></domain>"
)


def document(name: str, emulator: str = "", type_: str = "kvm") -> str:
    return DOMAIN.format(name=name, type=type_, emulator=f"<emulator>{emulator}</emulator>" if emulator else "")


class Two:
    """A manager with two kinds of VMM."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.qemu, self.ours = TestDriver(), TestDriver()
        self.ours.name = "kvik-vmm"

    def manager(self) -> Manager:
        return Manager(Paths.system(self.root), {"qemu": self.qemu, "kvm": self.qemu, "kvik-vmm": self.ours})


@pytest.mark.parametrize(
    ("emulator", "ours"),
    [("", False), ("/usr/bin/qemu-system-x86_64", False), ("/opt/k/bin/kvik-vmm", True), ("/opt/kvik-vmm/qemu", False)],
)
async def test_the_last_part_of_the_emulators_path_chooses(tmp_path: Path, emulator: str, ours: bool) -> None:
    two = Two(tmp_path)
    manager = two.manager()
    await manager.open()
    domain = await manager.define(document("one", emulator))
    assert (domain.driver is two.ours) is ours
    await domain.start()
    assert ("one" in two.ours.machines) is ours and ("one" in two.qemu.machines) is not ours
    await domain.destroy()
    await manager.close()


async def test_a_running_machine_keeps_its_driver_when_its_definition_gets_another(tmp_path: Path) -> None:
    two = Two(tmp_path)
    manager = two.manager()
    await manager.open()
    domain = await manager.define(document("one", "/usr/bin/kvik-vmm"))
    await domain.start()
    again = document("one").replace("</name>", f"</name><uuid>{domain.uuid_text}</uuid>")
    assert await manager.define(again) is domain
    assert domain.driver is two.ours
    await domain.suspend()
    await domain.resume()
    await domain.destroy()
    if domain.cleaning:
        await asyncio.shield(domain.cleaning)
    assert domain.driver is two.qemu
    await domain.start()
    assert "one" in two.qemu.machines and "one" not in two.ours.machines
    await domain.destroy()
    await manager.close()


async def test_a_later_daemon_finds_each_machine_by_its_own_driver(tmp_path: Path) -> None:
    two = Two(tmp_path)
    manager = two.manager()
    await manager.open()
    for name, emulator in (("ours", "/usr/bin/kvik-vmm"), ("theirs", "")):
        await (await manager.define(document(name, emulator))).start()
    transient = await manager.create_xml(document("transient", "/usr/bin/kvik-vmm"))
    assert transient.driver is two.ours
    await manager.close()
    two.qemu.abandon()
    two.ours.abandon()
    later = two.manager()
    await later.open()
    for name, driver in (("ours", two.ours), ("theirs", two.qemu), ("transient", two.ours)):
        domain = later.lookup_name(name)
        assert domain.is_active and domain.driver is driver
        await domain.destroy()
        assert name not in driver.machines
    await later.close()


async def test_capabilities_are_those_of_the_emulator_that_is_named(tmp_path: Path) -> None:
    two = Two(tmp_path)
    node = Node(two.manager())

    async def ours(arch: str, machine: str, virttype: str, emulator: str) -> str:
        return f"ours {emulator}"

    two.ours.domain_capabilities = ours  # type: ignore[method-assign]  # to tell the two apart
    assert await node.domain_capabilities("", "", "", "/x/kvik-vmm") == "ours /x/kvik-vmm"
    assert await node.domain_capabilities("", "", "kvm", "kvik-vmm") == "ours kvik-vmm"
    assert (await node.domain_capabilities("", "", "kvm", "")).startswith("<domainCapabilities>")


async def test_an_unknown_type_is_no_emulators(tmp_path: Path) -> None:
    manager = Manager(Paths.system(tmp_path), {"kvik-vmm": TestDriver(), "kvm": TestDriver()})
    with pytest.raises(ConfigUnsupported, match="xen"):
        manager.driver_for("xen", "/usr/bin/xl")
