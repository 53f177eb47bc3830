"""Network documents: parse, complete, format; libvirt's own schema and virsh's test driver as oracles."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from lxml import etree

from kvik.conf.codec import STRUCT, Element, plan_of
from kvik.conf.network import Network, complete_network, format_network, normal_mac, parse_network
from kvik.conf.network_addresses import ip_interface
from kvik.conf.network_validate import load_network, validate_network
from kvik.conf.tree import walk
from kvik.errors import ConfigError

CORPUS = sorted((Path(__file__).parents[2] / "data/network").glob("*.xml"))
SCHEMA = Path("/usr/share/libvirt/schemas/network.rng")
BEYOND_9_0 = ("kvik",)  # documents with what libvirt 9.0's schema does not know

corpus = pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)


@corpus
def test_a_document_survives_parse_and_format(path: Path) -> None:
    text = path.read_text()
    document = parse_network(text)
    again = format_network(document, connections=document.connections)
    assert parse_network(again) == document
    if path.stem not in BEYOND_9_0:  # their attributes stand in another order
        assert sorted(again.split()) == sorted(text.split())


@corpus
def test_a_document_of_libvirt_is_complete_and_valid(path: Path) -> None:
    document = parse_network(path.read_text())
    before = document.copy()
    complete_network(document)
    assert document == before
    validate_network(document)


def test_every_declared_field_is_exercised_by_some_document() -> None:
    used: set[tuple[type, str]] = set()
    models: set[type[Element]] = set()
    for path in CORPUS:
        for item, _ in walk(parse_network(path.read_text()), ""):
            models.add(type(item))
            for field in item.__struct_fields__:
                if getattr(item, field) not in (None, []):
                    used.add((type(item), field))
    here = {model for model in all_models(Network, set()) if model.__module__ == "kvik.conf.network"}
    missing = {f"{model.__name__}.{field}" for model in here for field in model.__struct_fields__} - {
        f"{model.__name__}.{field}" for model, field in used
    }
    assert sorted(name for name in missing if not name.endswith(".unknown")) == []
    assert here <= models


def all_models(model: type[Element], found: set[type[Element]]) -> set[type[Element]]:
    if model not in found:
        found.add(model)
        for child in plan_of(model).children.values():
            if child.kind == STRUCT:
                all_models(child.model, found)
    return found


@pytest.mark.skipif(not SCHEMA.is_file(), reason=f"libvirt's schema is not installed at {SCHEMA}")
@corpus
def test_what_is_written_is_what_libvirts_schema_allows(path: Path) -> None:
    if path.stem in BEYOND_9_0:
        pytest.skip("holds elements of later versions and our own")
    text = format_network(parse_network(path.read_text())).replace("file='pxelinux.0'", "file='/pxelinux.0'")
    grammar = etree.RelaxNG(etree.parse(str(SCHEMA)))
    assert grammar.validate(etree.fromstring(text)), [str(entry) for entry in grammar.error_log]


@pytest.mark.skipif(shutil.which("virsh") is None, reason="virsh is not installed")
@corpus
def test_a_definition_reads_as_virsh_writes_it(path: Path, tmp_path: Path) -> None:
    if path.stem in BEYOND_9_0:
        pytest.skip("holds elements of later versions and our own")
    # A name and UUID of its own: the test driver has a network `default`.
    document = load_network(path.read_text())
    document.name, document.uuid = "oracle", "0d5b6e7e-3f0a-4b86-9f54-8f1f3d4f1c22"
    document.connections = None
    source = tmp_path / "network.xml"
    source.write_text(format_network(document))
    done = subprocess.run(
        ["virsh", "-c", "test:///default", f"net-define {source}; net-dumpxml oracle"],
        capture_output=True, text=True, check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    theirs = done.stdout[done.stdout.index("<network") :].strip() + "\n"
    assert format_network(document, inactive=True) == theirs


def test_what_is_left_out_is_filled_in_once() -> None:
    xml = "<network><name>n</name><forward dev='eth0'/><ip address='10.0.0.1' prefix='24'/></network>"
    document = load_network(xml, taken_bridges={"virbr0", "virbr1", "virbr3"})
    assert document.uuid is not None
    assert document.mode == "nat"
    assert document.bridge is not None
    assert (document.bridge.name, document.bridge.stp, document.bridge.delay) == ("virbr2", True, 0)
    assert document.mac is not None
    assert document.mac.address.startswith("52:54:00:")
    text = format_network(document)
    assert "<forward dev='eth0' mode='nat'>\n    <interface dev='eth0'/>" in text
    complete_network(document, taken_bridges={"virbr2"})
    assert format_network(document) == text


def test_a_bridge_name_may_be_a_pattern() -> None:
    document = load_network("<network><name>n</name><bridge name='br%d'/></network>", {"br0"})
    assert document.bridge_name == "br1"


def test_no_bridge_is_made_up_for_networks_that_have_none_of_their_own() -> None:
    document = load_network("<network><name>n</name><forward mode='private' dev='eth0'/></network>")
    assert document.bridge is None
    assert document.mac is None
    assert document.is_macvtap


def test_connections_are_said_of_active_networks_only() -> None:
    document = load_network(CORPUS[0].read_text())
    assert format_network(document, connections=2).startswith("<network connections='2'>")
    assert "connections" not in format_network(document, connections=0)
    assert "connections" not in format_network(document, connections=2, inactive=True)
    assert document.connections is None


def test_macs_are_written_as_libvirt_does() -> None:
    assert normal_mac("52:54:0:AA:bb:C") == "52:54:00:aa:bb:0c"
    for bad in ("", "52:54:00:aa:bb", "52:54:00:aa:bb:cc:dd", "52-54-00-aa-bb-cc", "52:54:00:aa:bb:g0", "::::::"):
        with pytest.raises(ValueError, match="not a MAC"):
            normal_mac(bad)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("address='192.168.5.1' prefix='24'", "192.168.5.1/24"),
        ("address='192.168.5.1' netmask='255.255.255.128'", "192.168.5.1/25"),
        ("address='10.1.2.3'", "10.1.2.3/8"),
        ("address='172.16.2.3'", "172.16.2.3/16"),
        ("address='192.168.2.3'", "192.168.2.3/24"),
        ("address='2001:db8::1' family='ipv6'", "2001:db8::1/64"),
        ("address='10.0.0.0' prefix='31'", "10.0.0.0/31"),
    ],
)
def test_an_address_has_the_prefix_that_is_written_or_that_of_its_class(attributes: str, expected: str) -> None:
    document = load_network(f"<network><name>n</name><ip {attributes}/></network>")
    assert str(ip_interface(document.ips[0])) == expected


def test_a_portgroup_is_found_by_name_or_is_the_default() -> None:
    document = load_network((CORPUS[0].parent / "openvswitch.xml").read_text())
    group = document.portgroup("alice")
    assert group is not None and group.name == "alice"
    default = document.portgroup(None)
    assert default is not None and default.name == "bob"
    with pytest.raises(ConfigError, match="network ovs has no portgroup 'carol'; it has bob, alice"):
        document.portgroup("carol")


def test_what_is_unknown_is_kept_and_named() -> None:
    document = parse_network("<network future='1'><name>n</name><gadget a='b'/></network>")
    assert "future='1'" in format_network(document)
    assert '<gadget a="b"/>' in format_network(document)
    assert [line.partition(":")[0] for line in document.warnings()] == ["/network/@future", "/network/gadget"]


def test_an_unknown_wall_is_refused() -> None:
    with pytest.raises(ConfigError, match="isolation"):
        parse_network("<network><name>n</name><ip address='10.0.0.1' isolated='yes'/></network>")
