"""The host's configuration in four formats: read as documents, changed for bridges, and back as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from kvik.conf.interface import (
    BridgeInterface,
    Interface,
    InterfaceMac,
    InterfaceStart,
    format_interface,
    parse_interface,
)
from kvik.errors import ConfigUnsupported, HostError
from kvik.network.interfaces.formats import Format, ifupdown, netplan, networkd, networkmanager, owner, usual
from kvik.network.interfaces.formats.tree import Tree, apply
from kvik.network.interfaces.formats.yaml import parse, write

MAC = "52:54:00:00:00:01"
NETPLAN = "/etc/netplan/50-cloud-init.yaml"
NM = "/etc/NetworkManager/system-connections/Wired.nmconnection"
NETWORKD = "/etc/systemd/network/20-wired.network"
IFUPDOWN = "/etc/network/interfaces"

STATIC: dict[Format, dict[str, str]] = {
    ifupdown: {
        IFUPDOWN: """\
# made by the installer
source /etc/network/interfaces.d/*

auto lo
iface lo inet loopback

auto eth0 eth1
iface eth0 inet static
    address 192.0.2.2
    netmask 255.255.255.0
    gateway 192.0.2.1
    dns-nameservers 192.0.2.53 \\
        192.0.2.54
    up ip route add 203.0.113.0/24 via 192.0.2.1 dev eth0
iface eth0 inet6 static
    address 2001:db8::2/64
    gateway 2001:db8::1
iface eth1 inet dhcp
""",
    },
    networkd: {
        NETWORKD: """\
[Match]
Name=eth0

[Network]
Address=192.0.2.2/24
Gateway=192.0.2.1
DNS=192.0.2.53
IPv6AcceptRA=no
VLAN=eth0.7

[Address]
Address=2001:db8::2/64

[Route]
Gateway=2001:db8::1
""",
        "/usr/lib/systemd/network/80-ethernet.network": "[Match]\nName=e*\n[Network]\nDHCP=yes\n",
    },
    networkmanager: {
        NM: """\
[connection]
id=Wired connection 1
uuid=6c1b8e1e-60d6-4fe0-9c1f-0a7a6c6a1b11
type=ethernet
interface-name=eth0

[ethernet]

[ipv4]
address1=192.0.2.2/24,192.0.2.1
dns=192.0.2.53;
method=manual

[ipv6]
addr-gen-mode=eui64
address1=2001:db8::2/64
gateway=2001:db8::1
method=manual
""",
    },
    netplan: {
        NETPLAN: """\
# from cloud-init
network:
  version: 2
  ethernets:
    eth0:
      addresses:
      - 192.0.2.2/24
      - "2001:db8::2/64"
      nameservers: {addresses: [192.0.2.53], search: [example.org]}
      routes:
      - to: default
        via: 192.0.2.1
      - to: "::/0"
        via: "2001:db8::1"
      wakeonlan: true
    eth1:
      dhcp4: on
""",
    },
}
DHCP: dict[Format, dict[str, str]] = {
    ifupdown: {IFUPDOWN: "allow-hotplug eth0\niface eth0 inet dhcp\niface eth0 inet6 auto\n"},
    networkd: {NETWORKD: "[Match]\nName=e*\n\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=yes\n"},
    networkmanager: {
        NM: "[connection]\nid=w\ntype=802-3-ethernet\ninterface-name=eth0\n[ipv4]\nmethod=auto\n[ipv6]\nmethod=auto\n"
    },
    netplan: {NETPLAN: "network:\n  ethernets:\n    eth0: {dhcp4: true, accept-ra: yes}\n"},
}
FORMATS: list[Format] = [ifupdown, networkd, networkmanager, netplan]
every = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.NAME)


def tree_of(files: Mapping[str, str]) -> Tree:
    return Tree(Path("/nonexistent"), {path: text.encode() for path, text in files.items()})


def after(tree: Tree, changes: Mapping[str, bytes | None]) -> Tree:
    return Tree(tree.root, {**tree.staged, **changes})


def wanted(*, stp: bool = False, delay: str = "0") -> Interface:
    ports = [Interface(type="ethernet", name="eth0")]
    document = Interface(type="bridge", name="br0", bridge=BridgeInterface(stp=stp, delay=delay, ports=ports))
    document.mac = InterfaceMac(address=MAC)
    document.start = InterfaceStart(mode="onboot")
    return document


def protocols(document: Interface | None) -> str:
    assert document is not None
    return format_interface(Interface(type="ethernet", name="x", protocols=document.protocols))


@every
def test_fixed_addresses_are_read(form: Format) -> None:
    document = form.describe(tree_of(STATIC[form]), "eth0")
    assert document is not None
    assert document.type == "ethernet"
    assert document.start is not None
    assert document.start.mode == "onboot"
    v4, v6 = document.protocol("ipv4"), document.protocol("ipv6")
    assert v4 is not None
    assert v6 is not None
    assert [ip.text for ip in v4.ips] == ["192.0.2.2/24"]
    assert [ip.text for ip in v6.ips] == ["2001:db8::2/64"]
    assert [route.gateway for route in (*v4.routes, *v6.routes)] == ["192.0.2.1", "2001:db8::1"]
    assert v4.dhcp is None


@every
def test_dynamic_addresses_are_read(form: Format) -> None:
    document = form.describe(tree_of(DHCP[form]), "eth0")
    assert document is not None
    v4, v6 = document.protocol("ipv4"), document.protocol("ipv6")
    assert v4 is not None
    assert v4.dhcp is not None
    assert v6 is not None
    assert v6.autoconf is not None


@every
def test_a_bridge_takes_all_that_the_interface_had(form: Format) -> None:
    for files in (STATIC[form], DHCP[form]):
        tree = tree_of(files)
        before = form.describe(tree, "eth0")
        now = after(tree, form.bridge(tree, "eth0", wanted()))
        bridge = form.describe(now, "br0")
        assert bridge is not None
        assert bridge.bridge is not None
        assert [port.name for port in bridge.bridge.ports] == ["eth0"]
        assert bridge.bridge.stp is False
        assert bridge.start is not None
        assert bridge.start.mode == "onboot"
        assert protocols(bridge) == protocols(before)
        port = form.describe(now, "eth0")
        assert port is None or port.protocols == []


@every
def test_what_documents_do_not_know_goes_along(form: Format) -> None:
    """Name servers, searched domains, commands: nobody may lose them by making a bridge."""
    tree = tree_of(STATIC[form])
    changes = form.bridge(tree, "eth0", wanted())
    about_bridge = "".join((text or b"").decode() for text in changes.values())
    assert "192.0.2.53" in about_bridge
    if form is ifupdown:
        assert "192.0.2.54" in about_bridge
        assert "dev br0" in about_bridge
        assert "# made by the installer" in about_bridge
        assert "auto br0 eth1" in about_bridge
    if form is networkd:
        assert "VLAN=eth0.7" in (changes["/etc/systemd/network/00-kvik-eth0.network"] or b"").decode()
        assert NETWORKD not in changes  # the original stays where it is
    if form is networkmanager:
        assert b"autoconnect=false" in (changes[NM] or b"")
    if form is netplan:
        assert "example.org" in about_bridge
        assert "wakeonlan: true" in about_bridge


@every
def test_a_bridge_that_is_dissolved_leaves_what_was(form: Format) -> None:
    for files in (STATIC[form], DHCP[form]):
        tree = tree_of(files)
        before = form.describe(tree, "eth0")
        now = after(tree, form.bridge(tree, "eth0", wanted()))
        back = after(now, form.unbridge(now, "br0", "eth0"))
        assert form.describe(back, "br0") is None
        assert protocols(form.describe(back, "eth0")) == protocols(before)


@every
def test_settings_that_the_bridge_got_meanwhile_go_back_with_it(form: Format) -> None:
    tree = tree_of(STATIC[form])
    now = after(tree, form.bridge(tree, "eth0", wanted()))
    for path, text in list(now.staged.items()):
        if text is not None and "br0" in text.decode() and path not in (NM,):
            now.staged[path] = text.replace(b"192.0.2.2", b"192.0.2.77")
    back = after(now, form.unbridge(now, "br0", "eth0"))
    assert "192.0.2.77" in protocols(form.describe(back, "eth0"))


@every
def test_stp_delay_and_mac_are_written(form: Format) -> None:
    tree = tree_of(STATIC[form])
    now = after(tree, form.bridge(tree, "eth0", wanted(stp=True, delay="4")))
    bridge = form.describe(now, "br0")
    assert bridge is not None
    assert bridge.bridge is not None
    assert (bridge.bridge.stp, bridge.bridge.delay) == (True, "4")
    assert MAC in "".join((text or b"").decode() for text in now.staged.values())


DOCUMENTS = {
    "static": """<interface type='ethernet' name='eth5'>
  <start mode='onboot'/>
  <mtu size='9000'/>
  <protocol family='ipv4'>
    <ip address='198.51.100.2' prefix='24'/>
    <route gateway='198.51.100.1'/>
  </protocol>
  <protocol family='ipv6'>
    <ip address='2001:db8:5::2' prefix='64'/>
    <route gateway='2001:db8:5::1'/>
  </protocol>
</interface>
""",
    "dhcp": """<interface type='ethernet' name='eth5'>
  <start mode='onboot'/>
  <protocol family='ipv4'>
    <dhcp/>
  </protocol>
</interface>
""",
    "bridge": """<interface type='bridge' name='br7'>
  <start mode='onboot'/>
  <protocol family='ipv4'>
    <ip address='198.51.100.2' prefix='24'/>
  </protocol>
  <bridge stp='off' delay='0'>
    <interface type='ethernet' name='eth6'/>
    <interface type='ethernet' name='eth7'/>
  </bridge>
</interface>
""",
}


@every
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_document_comes_back_as_it_was_defined(form: Format, kind: str) -> None:
    document = parse_interface(DOCUMENTS[kind])
    tree = tree_of(STATIC[form])
    now = after(tree, form.define(tree, document))
    found = form.describe(now, document.name)
    assert found is not None
    assert format_interface(found) == DOCUMENTS[kind]
    assert document.name in form.names(now)
    # Defining it again changes nothing; what was there before is as it was.
    again = after(now, form.define(now, document))
    assert protocols(form.describe(again, document.name)) == protocols(document)
    assert protocols(form.describe(again, "eth0")) == protocols(form.describe(tree, "eth0"))
    gone = after(now, form.undefine(now, document.name))
    assert document.name not in form.names(gone)
    assert not [path for path, text in gone.staged.items() if document.name.encode() in (text or b"")]
    if form is not networkd:  # there the distribution's own file speaks of every e*
        assert form.describe(gone, document.name) is None


@every
def test_a_bridge_that_is_defined_takes_the_addresses_from_its_ports(form: Format) -> None:
    """Else the host would have them twice after the next boot."""
    document = parse_interface(DOCUMENTS["bridge"].replace("eth6", "eth0"))
    tree = tree_of(STATIC[form])
    now = after(tree, form.define(tree, document))
    bridge, port = form.describe(now, "br7"), form.describe(now, "eth0")
    assert bridge is not None
    assert bridge.bridge is not None
    assert {one.name for one in bridge.bridge.ports} == {"eth0", "eth7"}
    assert port is None or port.protocols == []


def test_a_vlan_is_written_where_the_format_can() -> None:
    vlan = parse_interface(
        "<interface type='vlan' name='eth0.42'><start mode='onboot'/><protocol family='ipv4'><dhcp/></protocol>"
        "<vlan tag='42'><interface name='eth0'/></vlan></interface>"
    )
    for form in (ifupdown, networkmanager, netplan):
        tree = tree_of(STATIC[form])
        found = form.describe(after(tree, form.define(tree, vlan)), "eth0.42")
        assert found is not None
        assert found.vlan is not None
        assert (found.vlan.tag, found.vlan.base.name) == (42, "eth0"), form.NAME
    with pytest.raises(ConfigUnsupported, match="VLAN"):
        networkd.define(tree_of(STATIC[networkd]), vlan)


def test_bonds_are_refused_where_they_are_not_written() -> None:
    bond = parse_interface(
        "<interface type='bond' name='bond0'><bond mode='active-backup'><interface type='ethernet' name='eth1'/></bond>"
        "</interface>"
    )
    for form in (ifupdown, networkmanager):
        with pytest.raises(ConfigUnsupported, match="bonds"):
            form.define(tree_of(STATIC[form]), bond)


def test_the_format_that_defines_an_interface_owns_it() -> None:
    for form in FORMATS:
        assert owner(tree_of(STATIC[form]), "eth0") is form
        assert usual(tree_of(STATIC[form])) is form
    assert owner(tree_of({}), "eth0") is None
    assert usual(tree_of({})) is None
    both = tree_of({**STATIC[ifupdown], **DHCP[netplan]})
    assert owner(both, "eth1") is ifupdown
    assert owner(both, "eth0") is netplan


# ifupdown


def test_interfaces_in_sourced_files_are_found_and_changed_there() -> None:
    extra = "/etc/network/interfaces.d/lan"
    tree = tree_of({IFUPDOWN: "source /etc/network/interfaces.d/*\n", extra: "auto eth0\niface eth0 inet dhcp\n"})
    changes = ifupdown.bridge(tree, "eth0", wanted())
    assert set(changes) == {extra}
    assert (changes[extra] or b"").decode() == (
        "auto br0\niface eth0 inet manual\n\niface br0 inet dhcp\n"
        f"    bridge_ports eth0\n    bridge_stp off\n    bridge_fd 0\n    bridge_hw {MAC}\n"
    )


def test_sourcing_in_a_circle_ends() -> None:
    tree = tree_of({IFUPDOWN: "source /etc/network/interfaces\nsource-directory /etc/network\niface a inet dhcp\n"})
    assert ifupdown.names(tree) == ["a"]


# NetworkManager


def test_the_ports_own_profile_is_back_with_its_settings() -> None:
    tree = tree_of(STATIC[networkmanager])
    now = after(tree, networkmanager.bridge(tree, "eth0", wanted()))
    back = after(now, networkmanager.unbridge(now, "br0", "eth0"))
    files = {path: text for path, text in back.staged.items() if text is not None}
    assert set(files) == {NM}
    assert files[NM].decode().split() == STATIC[networkmanager][NM].split()


def test_a_profile_for_any_card_gives_its_settings_and_goes_on_serving_the_others() -> None:
    tree = tree_of({NM: "[connection]\nid=w\ntype=ethernet\n\n[ipv4]\nmethod=auto\ndns-search=example.org\n"})
    assert owner(tree, "eth0") is networkmanager
    changes = networkmanager.bridge(tree, "eth0", wanted())
    assert NM not in changes
    assert b"dns-search=example.org" in (changes[f"{networkmanager.DIRECTORY}/kvik-br0.nmconnection"] or b"")
    now = after(tree, changes)
    bridge = networkmanager.describe(now, "br0")
    assert bridge is not None
    assert bridge.protocols[0].dhcp is not None
    back = after(now, networkmanager.unbridge(now, "br0", "eth0"))
    assert [path for path, text in back.staged.items() if text is not None] == [NM]


# netplan


def test_interfaces_that_are_picked_by_a_match_keep_it() -> None:
    text = (
        "network:\n  ethernets:\n    lan:\n      match:\n        macaddress: 52:54:00:00:00:01\n"
        "      set-name: eth0\n      dhcp4: true\n      mtu: 1400\n"
    )
    tree = tree_of({NETPLAN: text})
    now = after(tree, netplan.bridge(tree, "eth0", wanted()))
    content = parse(now.read(NETPLAN) or "", NETPLAN)
    assert content == {
        "network": {
            "ethernets": {
                "lan": {
                    "match": {"macaddress": "52:54:00:00:00:01"},
                    "set-name": "eth0",
                    "mtu": "1400",
                    "dhcp4": "false",
                    "dhcp6": "false",
                }
            },
            "bridges": {
                "br0": {
                    "interfaces": ["lan"],
                    "macaddress": '"52:54:00:00:00:01"',
                    "parameters": {"stp": "false", "forward-delay": "0"},
                    "dhcp4": "true",
                    "mtu": "1400",
                }
            },
        }
    }


def test_addresses_that_several_files_add_up_all_go() -> None:
    tree = tree_of(
        {
            NETPLAN: "network:\n  ethernets:\n    eth0:\n      addresses: [192.0.2.2/24]\n",
            "/etc/netplan/60-more.yaml": "network: {ethernets: {eth0: {addresses: [192.0.2.3/24], wakeonlan: on}}}\n",
        }
    )
    now = after(tree, netplan.bridge(tree, "eth0", wanted()))
    bridge = netplan.describe(now, "br0")
    assert bridge is not None
    assert [ip.text for ip in bridge.protocols[0].ips] == ["192.0.2.2/24", "192.0.2.3/24"]
    port = netplan.describe(now, "eth0")
    assert port is not None
    assert not port.protocols
    assert "wakeonlan: on" in (now.read("/etc/netplan/60-more.yaml") or "")


@pytest.mark.parametrize(
    "text",
    [
        "a: &x 1\n", "a: *x\n", "a: !!str 1\n", "a: |\n  b\n", "a: >\n  b\n", "a: [1,\n  2]\n", "a: 1\na: 2\n",
        "a:\n\tb: 1\n", "a: 1\n---\nb: 2\n", "%YAML 1.2\n", "- a\n", "a: 'x\n", "a:\n  b: 1\n c: 2\n", "? a\n: b\n",
        "a: {b: 1\n", "{" * 50 + "}" * 50, "".join(" " * i + f"k{i}:\n" for i in range(40)) + " " * 40 + "x: 1\n",
    ],
)  # fmt: skip
def test_yaml_that_is_not_understood_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(ConfigUnsupported, match=r"line [0-9]+"):
        parse(text, "x.yaml")


def test_yaml_comes_back_as_it_was() -> None:
    text = """\
network:
  version: 2
  renderer: networkd
  ethernets:
    "odd name":
      addresses:
        - 192.0.2.2/24:
            label: "eth0:1"
        - 'it''s'
      empty: {}
      none: []
      nothing:
      url: http://example.org:80/#x
"""
    assert write(parse(text, "x")) == text
    assert parse("a: [1, 'b, c', {d: e}]  # f\n", "x") == {"a": ["1", "'b, c'", {"d": "e"}]}


# The files themselves


def test_the_first_original_is_kept_and_modes_stay(tmp_path: Path) -> None:
    root, keep = tmp_path / "root", tmp_path / "keep"
    place = root / "etc/netplan/a.yaml"
    place.parent.mkdir(parents=True)
    place.write_text("one")
    place.chmod(0o640)
    assert apply(root, {"/etc/netplan/a.yaml": b"two", "/etc/systemd/network/n": b"new"}, keep) == [
        str(keep / "etc/netplan/a.yaml")
    ]
    assert apply(root, {"/etc/netplan/a.yaml": b"three"}, keep) == []
    assert (keep / "etc/netplan/a.yaml").read_text() == "one"
    assert place.read_text() == "three"
    assert place.stat().st_mode & 0o777 == 0o640
    assert (root / "etc/systemd/network/n").stat().st_mode & 0o777 == 0o644  # networkd reads it as its own user
    apply(root, {"/etc/systemd/network/n": None}, keep)
    assert not (root / "etc/systemd/network/n").exists()


def test_new_files_that_may_hold_secrets_are_private(tmp_path: Path) -> None:
    for path in ("/etc/NetworkManager/system-connections/kvik-br0.nmconnection", "/etc/netplan/90-kvik.yaml"):
        apply(tmp_path, {path: b"x"}, tmp_path / "keep")
        assert (tmp_path / path[1:]).stat().st_mode & 0o777 == 0o600


def test_a_link_out_of_the_root_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    root = tmp_path / "root"
    (root / "etc/network").mkdir(parents=True)
    (root / "etc/network/interfaces").symlink_to(tmp_path / "secret")
    with pytest.raises(HostError, match="leads out"):
        Tree(root).read(IFUPDOWN)
