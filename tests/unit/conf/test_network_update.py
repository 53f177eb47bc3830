"""net-update on documents, with libvirt's own implementation (virsh's test driver) as oracle."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvik.conf.enums import NetworkUpdateCommand as Command
from kvik.conf.enums import NetworkUpdateSection as Section
from kvik.conf.network import format_network
from kvik.conf.network_status import Helper, NetworkStatus, Origin, PortFloor, format_status, parse_status
from kvik.conf.network_update import update_network
from kvik.conf.network_validate import load_network
from kvik.errors import ConfigError, KvikError, OperationInvalid, OperationUnsupported

BASE = """<network>
  <name>oracle</name>
  <uuid>0d5b6e7e-3f0a-4b86-9f54-8f1f3d4f1c22</uuid>
  <forward dev='eth0' mode='nat'>
    <interface dev='eth0'/>
  </forward>
  <bridge name='virbr7' stp='on' delay='0'/>
  <mac address='52:54:00:17:3f:37'/>
  <dns>
    <txt name='motto' value='more light'/>
    <srv service='ldap' protocol='tcp' domain='example.com' target='a.example.com' port='389'/>
    <host ip='192.168.7.5'>
      <hostname>five</hostname>
      <hostname>cinq</hostname>
    </host>
  </dns>
  <ip address='192.168.7.1' netmask='255.255.255.0'>
    <dhcp>
      <range start='192.168.7.100' end='192.168.7.199'/>
      <host mac='52:54:00:00:00:01' name='one' ip='192.168.7.11'/>
      <host mac='52:54:00:00:00:02' name='two' ip='192.168.7.12'/>
    </dhcp>
  </ip>
  <ip family='ipv6' address='2001:db8:7::1' prefix='64'>
    <dhcp>
      <host name='six' ip='2001:db8:7::6'/>
    </dhcp>
  </ip>
  <portgroup name='first' default='yes'>
  </portgroup>
  <portgroup name='second'>
  </portgroup>
</network>
"""

# command, section, XML; what both do with each is compared
CASES = {
    "host-add": ("add", "ip-dhcp-host", "<host mac='52:54:00:00:00:03' name='three' ip='192.168.7.13'/>"),
    "host-add-first": ("add-first", "ip-dhcp-host", "<host mac='52:54:00:00:00:03' ip='192.168.7.13'/>"),
    "host-add-same-mac": ("add", "ip-dhcp-host", "<host mac='52:54:0:0:0:2' name='three' ip='192.168.7.13'/>"),
    "host-add-same-name": ("add", "ip-dhcp-host", "<host mac='52:54:00:00:00:03' name='two' ip='192.168.7.13'/>"),
    "host-add-same-ip": ("add", "ip-dhcp-host", "<host mac='52:54:00:00:00:03' name='three' ip='192.168.7.12'/>"),
    "host-modify": ("modify", "ip-dhcp-host", "<host mac='52:54:00:00:00:02' name='zwei' ip='192.168.7.22'/>"),
    "host-modify-none": ("modify", "ip-dhcp-host", "<host mac='52:54:00:00:00:09' name='nine' ip='192.168.7.29'/>"),
    "host-delete-by-mac": ("delete", "ip-dhcp-host", "<host mac='52:54:00:00:00:01'/>"),
    "host-delete-by-ip": ("delete", "ip-dhcp-host", "<host ip='192.168.7.12'/>"),
    "host-delete-by-name": ("delete", "ip-dhcp-host", "<host name='one'/>"),
    "host-delete-half-wrong": ("delete", "ip-dhcp-host", "<host mac='52:54:00:00:00:01' ip='192.168.7.12'/>"),
    "range-add": ("add", "ip-dhcp-range", "<range start='192.168.7.50' end='192.168.7.60'/>"),
    "range-add-again": ("add", "ip-dhcp-range", "<range start='192.168.7.100' end='192.168.7.199'/>"),
    "range-delete": ("delete", "ip-dhcp-range", "<range start='192.168.7.100' end='192.168.7.199'/>"),
    "range-delete-none": ("delete", "ip-dhcp-range", "<range start='192.168.7.100' end='192.168.7.198'/>"),
    "range-modify": ("modify", "ip-dhcp-range", "<range start='192.168.7.100' end='192.168.7.198'/>"),
    "range-outside": ("add", "ip-dhcp-range", "<range start='192.168.8.50' end='192.168.8.60'/>"),
    "portgroup-add": ("add", "portgroup", "<portgroup name='third'><vlan><tag id='4'/></vlan></portgroup>"),
    "portgroup-add-again": ("add", "portgroup", "<portgroup name='first'/>"),
    "portgroup-second-default": ("add", "portgroup", "<portgroup name='third' default='yes'/>"),
    "portgroup-modify": ("modify", "portgroup", "<portgroup name='second' trustGuestRxFilters='yes'/>"),
    "portgroup-delete": ("delete", "portgroup", "<portgroup name='first'/>"),
    "portgroup-delete-none": ("delete", "portgroup", "<portgroup name='third'/>"),
    "dns-host-add": ("add", "dns-host", "<host ip='192.168.7.9'><hostname>nine</hostname></host>"),
    "dns-host-add-name-again": ("add", "dns-host", "<host ip='192.168.7.9'><hostname>five</hostname></host>"),
    "dns-host-add-ip-again": ("add", "dns-host", "<host ip='192.168.7.5'><hostname>nine</hostname></host>"),
    "dns-host-delete": ("delete", "dns-host", "<host ip='192.168.7.5'/>"),
    "dns-host-delete-by-name": ("delete", "dns-host", "<host><hostname>cinq</hostname></host>"),
    "dns-host-delete-half-wrong": ("delete", "dns-host", "<host ip='192.168.7.5'><hostname>nine</hostname></host>"),
    "dns-host-delete-wrong-ip": ("delete", "dns-host", "<host ip='192.168.7.6'><hostname>five</hostname></host>"),
    "dns-host-delete-none": ("delete", "dns-host", "<host ip='192.168.7.9'/>"),
    "dns-host-modify": ("modify", "dns-host", "<host ip='192.168.7.5'><hostname>x</hostname></host>"),
    "dns-txt-add": ("add", "dns-txt", "<txt name='other' value='x'/>"),
    "dns-txt-add-again": ("add", "dns-txt", "<txt name='motto' value='x'/>"),
    "dns-txt-delete": ("delete", "dns-txt", "<txt name='motto'/>"),
    "dns-txt-modify": ("modify", "dns-txt", "<txt name='motto' value='x'/>"),
    "dns-srv-add": ("add", "dns-srv", "<srv service='sip' protocol='udp' target='b.example.com' port='5060'/>"),
    "dns-srv-delete": ("delete", "dns-srv", "<srv service='ldap' protocol='tcp'/>"),
    "dns-srv-delete-none": ("delete", "dns-srv", "<srv service='sip' protocol='tcp'/>"),
    "wrong-element": ("add", "dns-srv", "<txt name='other' value='x'/>"),
    "interface-modify": ("modify", "forward-interface", "<interface dev='eth0'/>"),
    "interface-delete": ("delete", "forward-interface", "<interface dev='eth0'/>"),
    "interface-delete-none": ("delete", "forward-interface", "<interface dev='eth9'/>"),
    "interface-add-again": ("add", "forward-interface", "<interface dev='eth0'/>"),
    "bridge": ("modify", "bridge", "<bridge name='x'/>"),
    "domain": ("modify", "domain", "<domain name='x'/>"),
    "ip": ("add", "ip", "<ip address='10.0.0.1' prefix='24'/>"),
    "forward": ("modify", "forward", "<forward mode='route'/>"),
}
COMMANDS = {
    "add": Command.ADD_LAST,
    "add-first": Command.ADD_FIRST,
    "delete": Command.DELETE,
    "modify": Command.MODIFY,
}


def ours(command: str, section: str, xml: str, index: int = -1) -> str:
    """The document after an update; a refused one changes nothing."""
    document = load_network(BASE)
    try:
        update_network(document, COMMANDS[command], getattr(Section, section.upper().replace("-", "_")), index, xml)
    except KvikError:
        assert format_network(document) == BASE
    return format_network(document)


@pytest.mark.skipif(shutil.which("virsh") is None, reason="virsh is not installed")
@pytest.mark.parametrize("case", CASES)
def test_an_update_does_what_libvirt_does(case: str, tmp_path: Path) -> None:
    command, section, xml = CASES[case]
    base, part = tmp_path / "base.xml", tmp_path / "part.xml"
    base.write_text(BASE)
    part.write_text(xml)
    script = f"net-define {base}; net-update oracle {command} {section} {part} --config; echo done; net-dumpxml oracle"
    done = subprocess.run(
        ["virsh", "-c", "test:///default", script],
        capture_output=True, text=True, check=False, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert "defined from" in done.stdout, done.stderr
    theirs = done.stdout[done.stdout.index("<network") :].strip() + "\n"
    if "error:" in done.stderr:
        assert theirs == BASE
    assert ours(command, section, xml) == theirs, done.stderr


@pytest.mark.parametrize(
    ("section", "xml", "reason"),
    [
        ("ip-dhcp-host", "<host mac='52:54:00:00:00:03' name='three' ip='192.168.8.13'/>", "not the address of a host"),
        ("ip-dhcp-host", "<host mac='52:54:00:00:00:03' name='three' ip='192.168.7.1'/>", "the network's own address"),
        ("ip-dhcp-range", "<range start='192.168.7.190' end='192.168.7.220'/>", "overlaps another range"),
        ("ip-dhcp-range", "<range start='192.168.7.190' end='192.168.8.10'/>", "outside of 192.168.7.0/24"),
        ("portgroup", "<portgroup name='third' default='yes'/>", "cannot both be the default"),
        ("dns-txt", "<txt name='x' value='a&#10;b'/>", "control character"),
    ],
)
def test_an_update_that_makes_no_sense_is_refused_and_nothing_changes(section: str, xml: str, reason: str) -> None:
    document = load_network(BASE)
    number = getattr(Section, section.upper().replace("-", "_"))
    with pytest.raises(ConfigError, match=reason):
        update_network(document, Command.ADD_LAST, number, -1, xml)
    assert format_network(document) == BASE


def test_the_parent_index_chooses_the_ip() -> None:
    xml = "<host name='seven' ip='2001:db8:7::7'/>"
    assert ours("add", "ip-dhcp-host", xml, 1).count("seven") == 1
    for index, error in ((-1, ConfigError), (2, OperationInvalid)):
        with pytest.raises(error):
            update_network(load_network(BASE), Command.ADD_LAST, Section.IP_DHCP_HOST, index, xml)


def test_a_range_and_a_host_make_the_dhcp_section_they_need() -> None:
    document = load_network("<network><name>n</name><ip address='10.0.0.1' prefix='24'/></network>")
    update_network(document, Command.ADD_LAST, Section.IP_DHCP_RANGE, -1, "<range start='10.0.0.5' end='10.0.0.9'/>")
    update_network(document, Command.ADD_LAST, Section.DNS_TXT, -1, "<txt name='a' value='b'/>")
    text = format_network(document)
    assert "<range start='10.0.0.5' end='10.0.0.9'/>" in text
    assert "<txt name='a' value='b'/>" in text


def test_an_interface_in_use_stays() -> None:
    document = load_network(BASE.replace("<interface dev='eth0'/>", "<interface dev='eth0' connections='2'/>"))
    with pytest.raises(OperationInvalid, match="2 interfaces use"):
        update_network(document, Command.DELETE, Section.FORWARD_INTERFACE, -1, "<interface dev='eth0'/>")


def test_sections_and_commands_that_cannot_be_are_named() -> None:
    with pytest.raises(OperationUnsupported, match="section bridge of network oracle"):
        update_network(load_network(BASE), Command.MODIFY, Section.BRIDGE, -1, "<bridge name='x'/>")
    with pytest.raises(OperationUnsupported, match="section 99"):
        update_network(load_network(BASE), Command.MODIFY, 99, -1, "<x/>")
    with pytest.raises(OperationUnsupported, match="command 9"):
        update_network(load_network(BASE), 9, Section.DNS_TXT, -1, "<txt name='x'/>")


def test_a_status_survives_the_disk() -> None:
    status = NetworkStatus(network=load_network(BASE), helpers=[Helper(name="dnsmasq", pid=77, started=12345)])
    data = format_status(status)
    assert data.startswith(b"<networkstatus xmlns:kvik='urn:kvik:1'>\n  <class_id bitmap='0-2'/>\n  <floor sum='0'/>\n")
    assert parse_status(data) == status
    assert format_network(parse_status(data).document) == BASE
    # Several things of ours in it, as an active network has them.
    status.origin = Origin(state="active", boot="8f49b9c4-0b3a-4f64-8a4f-0d8e6e1b7a50", persistent=True)
    status.port_floors = [
        PortFloor(port=f"8f49b9c4-0b3a-4f64-8a4f-0d8e6e1b7a5{n}", mac="52:54:00:00:00:01", number=n, floor=100)
        for n in (3, 4)
    ]
    assert parse_status(format_status(status)) == status


def test_libvirts_own_status_is_read() -> None:
    status = parse_status(
        b"<networkstatus>\n  <class_id bitmap='0-4'/>\n  <floor sum='700'/>\n  <taint flag='hook-script'/>\n"
        + BASE.encode()
        + b"</networkstatus>"
    )
    assert status.classes == {0, 1, 2, 3, 4}
    assert status.floor is not None and status.floor.sum == 700


def test_traffic_classes_are_handed_out_and_taken_back() -> None:
    status = NetworkStatus(network=load_network(BASE))
    assert [status.take_class() for _ in range(3)] == [3, 4, 5]
    status.free_class(4)
    status.free_class(1)  # reserved
    assert status.classes == {0, 1, 2, 3, 5}
    assert status.take_class() == 4
    status.add_floor(500)
    status.add_floor(-200)
    assert b"<floor sum='300'/>" in format_status(status)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<network/>",
        b"<networkstatus/>",
        b"<networkstatus><class_id bitmap='x'/><network><name>n</name></network></networkstatus>",
        b"<networkstatus><class_id bitmap='0-99999999'/><network><name>n</name></network></networkstatus>",
    ],
)
def test_a_damaged_status_is_a_config_error(data: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_status(data)
