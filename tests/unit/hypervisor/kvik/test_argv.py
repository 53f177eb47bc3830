"""Documents and the command lines they become: tests/data/kvik/NAME.xml -> NAME.args.

`KVIK_UPDATE_GOLDENS=1 pytest tests/unit/hypervisor/kvik/test_argv.py` writes them anew; review the difference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvik.conf.aliases import assign_aliases
from kvik.conf.domain import Domain, format_domain, parse_domain
from kvik.conf.machine import MachineDefaults
from kvik.conf.postparse import postparse
from kvik.conf.validate import validate
from kvik.errors import ConfigError, ConfigUnsupported
from kvik.hypervisor.driver import HostVerdict
from kvik.hypervisor.kvik.argv import CommandLine, build
from kvik.hypervisor.kvik.driver import KvikDriver
from kvik.hypervisor.words import shell_text
from kvik.paths import Paths
from kvik.vmm.options import parse

DATA = Path(__file__).parents[3] / "data" / "kvik"
NAMES = sorted(path.stem for path in DATA.glob("*.xml"))
PASSED = {
    "passed-descriptors": {
        "monitor": 10, "disk:virtio-disk0:0": 11, "disk:virtio-disk1:0": 12, "kernel": 13, "initrd": 14,
        "net:net0:0": 15, "net:net0:1": 16, "vhost:net0:0": 17, "vhost:net0:1": 18, "passt:net1": 19,
        "chardev:console0": 20, "chardev:channel0": 21, "log:serial0": 22,
    },
    "firmware-passed": {"monitor": 10, "disk:virtio-disk0:0": 11, "loader": 12, "nvram": 13},
    "other-formats-passed": {
        "monitor": 10, "vublk:virtio-disk0": 11, "life:virtio-disk0": 12, "vublk:virtio-disk1": 13,
        "life:virtio-disk1": 14, "vublk:virtio-disk2": 15, "disk:virtio-disk3:0": 16, "kernel": 17,
    },
}  # fmt: skip


async def complete(xml: str) -> Domain:
    """As the manager does it at definition time, with nothing of this host and nothing random."""
    domain = parse_domain(xml)
    driver = KvikDriver(Paths.system(Path("/nowhere")), lambda: HostVerdict(True, "told so"))
    await driver.complete(domain)
    postparse(domain, MachineDefaults(random=bytes))
    validate(domain)
    return domain


async def command_line(xml: str, files: Mapping[str, int] | None = None) -> CommandLine:
    domain = await complete(xml)
    assign_aliases(domain)
    return build(domain, domain.devices.emulator or "", files, now=1_000_000_000)


async def test_an_interface_on_a_switch_is_a_stream() -> None:
    xml = (DATA / "passed-descriptors.xml").read_text()
    files = {name: fd for name, fd in PASSED["passed-descriptors"].items() if not name.startswith(("net:", "vhost:"))}
    argv = (await command_line(xml, {**files, "switch:net0": 77})).argv
    (net,) = [word for word in argv if word.startswith("stream,")]
    assert ",fds=77," in net
    assert "vhost" not in net


@pytest.mark.parametrize("name", NAMES)
async def test_document_becomes_this_command_line(name: str) -> None:
    line = await command_line((DATA / f"{name}.xml").read_text(), PASSED.get(name))
    made = shell_text(line.argv) + "\n"
    expected = DATA / f"{name}.args"
    if os.environ.get("KVIK_UPDATE_GOLDENS"):
        expected.write_text(made)
    assert made == expected.read_text()
    assert line.fds == tuple(sorted(PASSED.get(name, {}).values()))


@pytest.mark.parametrize("name", NAMES)
async def test_kvik_vmm_understands_every_option(name: str) -> None:
    config = parse((await command_line((DATA / f"{name}.xml").read_text(), PASSED.get(name))).argv[1:])
    domain = parse_domain((DATA / f"{name}.xml").read_text())
    assert config.name == domain.name and config.uuid == domain.uuid and config.paused
    plugged = sum(module.size for module in config.virtio_mem)
    assert config.memory.size + plugged == domain.memory * 1024
    given = sorted([*config.disks, *config.vhost_user_blk], key=lambda disk: disk.id)
    assert [disk.id for disk in given] == [f"virtio-disk{n}" for n in range(len(domain.devices.disks))]
    assert config.memory.shared or not config.vhost_user_blk
    assert [nic.mac for nic in config.nets] == [nic.mac and nic.mac.address for nic in domain.devices.interfaces]
    if name == "passed-descriptors":
        assert config.nets[0].fds == (15, 16) and config.nets[0].vhost_fds == (17, 18)
        assert config.disks[0].fd == 11 and config.boot.kernel_fd == 13 and config.qmp == ["fd=10"]
        assert config.serials[0].log == "fd=22" and config.channels[0].backend == "fd=21"


async def test_a_kernel_of_the_cache_is_mapped_and_no_other_file_is() -> None:
    domain = await complete((DATA / "passed-descriptors.xml").read_text())
    assign_aliases(domain)
    for cached in (False, True):
        line = build(domain, "", PASSED["passed-descriptors"], cached_kernel=cached)
        config = parse(line.argv[1:])
        assert config.boot.stable_kernel is cached
        assert not config.boot.stable


async def test_a_comma_in_a_value_is_doubled_and_text_is_one_word() -> None:
    argv = (await command_line((DATA / "usual.xml").read_text())).argv
    assert argv[argv.index("--append") + 1] == "console=ttyS0 root=/dev/vda,ro"
    assert argv[argv.index("--disk") + 1].startswith("path=/images/a,,b.raw,")


@pytest.mark.parametrize("name", NAMES)
async def test_what_completing_fixed_stays(name: str) -> None:
    """A definition that went through once means the same machine for ever: slots, MACs, machine type."""
    first = format_domain(await complete((DATA / f"{name}.xml").read_text()))
    assert format_domain(await complete(first)) == first


async def test_everything_sits_on_one_bus_and_nothing_is_added_that_is_not_virtio() -> None:
    domain = await complete((DATA / "usual.xml").read_text())
    devices = domain.devices
    assert domain.os.type.machine == "kvik-1"
    assert [(item.type, item.model) for item in devices.controllers] == [("pci", "pcie-root"), ("virtio-serial", None)]
    assert devices.inputs == devices.videos == devices.audios == []
    placed = [*devices.disks, *devices.interfaces, *devices.rngs, *devices.watchdogs, devices.memballoon]
    slots = [item.address.pci for item in placed if item is not None and item.address is not None]
    assert len(set(slots)) == len(placed)
    assert all(bus == 0 and 1 <= slot <= 31 and function == 0 for _, bus, slot, function in slots)


async def test_the_thirty_second_device_finds_no_slot() -> None:
    disks = "".join(
        f"<disk type='file'><source file='/images/{number}'/><target bus='virtio'/></disk>" for number in range(31)
    )
    head, tail = (DATA / "minimal.xml").read_text().split("</devices>")
    with pytest.raises(ConfigError, match="no free") as raised:  # the balloon has one slot
        await complete(f"{head}{disks}</devices>{tail}")
    assert "31 slots" in raised.value.remedy
    assert len((await complete(f"{head}{disks}<memballoon model='none'/></devices>{tail}")).devices.disks) == 31


async def test_what_is_left_out_is_fixed_by_the_definition() -> None:
    domain = await complete(
        "<domain type='kvm'><name>m</name><memory>65536</memory><os><type>hvm</type><kernel>/k</kernel></os>"
        "<devices><emulator>/opt/bin/kvik-vmm</emulator><interface type='user'/></devices></domain>"
    )
    assert (domain.os.type.arch, domain.os.type.machine) == ("x86_64", "kvik-1")
    assert domain.cpu is not None and domain.cpu.mode == "host-passthrough"
    nic = domain.devices.interfaces[0]
    assert nic.model is not None and nic.model.type == "virtio"
    assert nic.backend is not None and nic.backend.type == "passt"
    assert domain.devices.emulator == "/opt/bin/kvik-vmm"


async def test_a_nul_reaches_no_command_line() -> None:
    domain = await complete((DATA / "minimal.xml").read_text())
    assign_aliases(domain)
    domain.os.cmdline = "quiet\0evil"
    with pytest.raises(ConfigUnsupported, match="NUL"):
        build(domain, "/usr/bin/kvik-vmm")
