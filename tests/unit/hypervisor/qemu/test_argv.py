"""What no golden shows: values that try to break out, refusals, and the figures that argv was tuned for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import ConfigUnsupported
from kvik.hypervisor.qemu.argv.build import build
from kvik.hypervisor.qemu.argv.options import Files, keyval, node_name
from kvik.hypervisor.qemu.argv.processor import parse_set

sys.path.insert(0, str(Path(__file__).parent))
from golden import DATA, capabilities, command_line, complete_domain


def document(name: str) -> str:
    return (DATA / f"{name}.xml").read_text()


def split_options(text: str) -> list[str]:
    """QemuOpts' own rule: a doubled comma is a comma, a single one ends a value (util/qemu-option.c)."""
    parts, current, position = [], "", 0
    while position < len(text):
        if text[position] == ",":
            if text[position + 1 : position + 2] == ",":
                current += ","
                position += 2
                continue
            parts.append(current)
            current = ""
        else:
            current += text[position]
        position += 1
    return [*parts, current]


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_no_value_breaks_out_of_its_option(value: str) -> None:
    assert split_options(keyval("", {"id": value, "end": True})) == [f"id={value}", "end=on"]


def test_a_nul_is_refused() -> None:
    with pytest.raises(ConfigUnsupported):
        keyval("", {"id": "a\0b"})


def test_hostile_paths_stay_inside_their_json() -> None:
    argv = command_line(document("escaping")).argv
    nodes = [json.loads(argv[place + 1]) for place, word in enumerate(argv) if word == "-blockdev"]
    assert nodes[0]["filename"] == '/images/a,readonly=on"}, {\\ \nx.raw'
    devices = [json.loads(argv[place + 1]) for place, word in enumerate(argv) if word == "-device"]
    assert [device["serial"] for device in devices if "serial" in device] == ['s",drive=evil']
    assert argv[argv.index("-append") + 1] == "a=b,c -device evil"
    (chardev,) = [word for word in argv if word.startswith("socket,id=charserial0")]
    assert split_options(chardev)[2] == "path=/run/a,server=off,id=evil.sock"


@pytest.mark.parametrize("vendor", ["KVM,+vmx,xxxx", "a=bbbbbbbbbb"])
def test_a_cpu_vendor_cannot_carry_features(vendor: str) -> None:
    with pytest.raises(ConfigUnsupported, match="CPU"):
        command_line(document("cpu-features").replace("KVIK; Hello.", vendor))


@pytest.mark.parametrize(
    ("name", "old", "new", "text"),
    [
        ("numa", "<topology sockets='2'", "<topology sockets='3'", "topology"),
        ("disk-network", "protocol='nfs'", "protocol='sheepdog'", "sheepdog"),
        ("disk-backing-chain", "<format type='raw'/>", "", "lacks source or format"),
        ("disk-virtio-options", "type='qcow2'", "type='hologram'", "hologram"),
        ("cpu-features", "Skylake-Client-v1", "Abacus", "Abacus"),
        ("bios-disk-q35", "<vcpu>1</vcpu>", "<vcpu>5000</vcpu>", "at most 288"),
        ("clock-timers", "start='1000000000'", "start='99999999999999'", "no date"),
        ("panic-vsock", "model='pvpanic'", "model='hyperv'", "hyperv"),
    ],
)
def test_what_qemu_cannot_do_is_refused(name: str, old: str, new: str, text: str) -> None:
    xml = document(name)
    assert old in xml
    with pytest.raises(ConfigUnsupported, match=text):
        command_line(xml.replace(old, new))


def test_direct_boot_without_boot_devices_uses_the_tiny_firmware() -> None:
    assert "qboot.rom" in command_line(document("kernel-q35")).argv
    assert "qboot.rom" in command_line(document("kernel-i440fx")).argv
    assert "qboot.rom" not in command_line(document("kernel-with-boot-devices")).argv
    assert "qboot.rom" not in command_line(document("bios-disk-q35")).argv
    # It would place the card's memory on top of the kernel.
    card = document("kernel-q35").replace("</devices>", "<video><model type='vga'/></video></devices>")
    assert "qboot.rom" not in command_line(card).argv


def test_option_roms_are_left_out_of_what_nobody_boots_from() -> None:
    assert '"romfile":""' in " ".join(command_line(document("kernel-q35")).argv)
    assert '"romfile"' not in " ".join(command_line(document("kernel-with-boot-devices")).argv)


def test_every_line_is_confined_and_without_defaults() -> None:
    for path in DATA.glob("*.xml"):
        argv = command_line(path.read_text()).argv
        assert argv.count("-sandbox") == 1
        assert {"-nodefaults", "-no-user-config"} <= set(argv)


def test_node_names_fit_and_differ() -> None:
    names = {
        node_name(alias, layer, "format") for alias in ("ua-" + "x" * 60, "ua-" + "x" * 61) for layer in range(201)
    }
    assert len(names) == 402
    assert max(map(len, names)) <= 31


def test_hot_plugged_descriptors_are_called_by_name() -> None:
    files = Files({"net:net0:0": 5, "net:net0:1": 6}, {})
    assert files.numbered("net:net0") == ["net-net0-0", "net-net0-1"]
    assert Files({"net:net0:0": 5}).numbered("net:net0") == ["5"]


def test_sets_of_numbers() -> None:
    assert parse_set("0-3,^2,8") == {0, 1, 3, 8}
    for bad in ("", "a", "1-", "3-x", "0-99999999999"):
        with pytest.raises(ConfigUnsupported):
            parse_set(bad)


@pytest.mark.parametrize(
    ("clock", "base"),
    [
        ("<clock offset='variable' adjustment='-3600' basis='utc'/>", "1970-01-01T23:00:00"),
        ("<clock offset='utc' adjustment='3600'/>", "1970-01-02T01:00:00"),
        ("<clock offset='utc' adjustment='reset'/>", "utc"),
        ("<clock offset='timezone' timezone='Europe/Oslo'/>", "localtime"),
    ],
)
def test_the_clock_counts_from_now(clock: str, base: str) -> None:
    known = capabilities()
    xml = (
        "<domain type='qemu'><name>c</name><memory>65536</memory><os><type arch='x86_64' machine='q35'>hvm</type></os>"
        f"{clock}<devices/></domain>"
    )
    line = build(complete_domain(xml, known), known, now=86400.0)
    assert line.argv[line.argv.index("-rtc") + 1] == f"base={base}"
    assert line.env == ({"TZ": "Europe/Oslo"} if "timezone" in clock else {})


def test_on_a_switch_qemu_listens_so_that_another_one_can_connect() -> None:
    domain = complete_domain(document("interface-tap"), capabilities())
    (alias,) = [item.alias.name for item in domain.devices.interfaces if item.type == "network" and item.alias]
    argv = command_line(document("interface-tap"), {f"switch:{alias}": 77}).argv
    netdevs = [json.loads(argv[place + 1]) for place, word in enumerate(argv) if word == "-netdev"]
    (netdev,) = [item for item in netdevs if item["id"] == f"host{alias}"]
    assert netdev == {"type": "stream", "addr": {"type": "fd", "str": "77"}, "server": True, "id": f"host{alias}"}


def test_an_interface_of_a_pool_of_pci_functions_is_the_function() -> None:
    given = (
        "<interface type='network'><source network='vfs' portid='8f49b9c4-0b3a-4f64-8a4f-0d8e6e1b7a50'>"
        "<address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x2'/></source>"
        "<mac address='52:54:00:00:00:01'/></interface></devices>"
    )
    argv = command_line(document("clock-timers").replace("</devices>", given)).argv
    devices = [json.loads(argv[place + 1]) for place, word in enumerate(argv) if word == "-device"]
    (function,) = [device for device in devices if device["driver"] == "vfio-pci"]
    assert function["host"] == "0000:01:10.2"
    assert not any("netdev" in device for device in devices)
