"""What is written for the four kinds of configuration, read by the programs that read them at boot.

The one that brings up eth0 from the host's files brings up the bridge, after `kvik iface-bridge` and a reboot, with the
same addresses and routes; and eth0 again after `kvik iface-unbridge`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from functional.network.bridged_host import MAC, Host, until
from functional.network.real_tools import RealTools
from functional.network.test_public_bridge import LONG
from kvik.client.interface import Interfaces
from kvik.errors import OperationUnsupported
from kvik.host.process import find_program

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(find_program("ip") is None, reason="needs iproute2"),
]
FILES = {
    "ifupdown": {
        "/etc/network/interfaces": """\
source /etc/network/interfaces.d/*

auto lo
iface lo inet loopback

auto eth0
iface eth0 inet static
    address 192.0.2.2
    netmask 255.255.255.0
    gateway 192.0.2.1
    mtu 1400
    up ip route add 203.0.113.0/24 via 192.0.2.1 dev eth0 table 77
iface eth0 inet6 static
    address 2001:db8::2/64
    gateway 2001:db8::1
""",
    },
    "systemd-networkd": {
        "/etc/systemd/network/20-wired.network": """\
[Match]
Name=eth0

[Link]
MTUBytes=1400

[Network]
Address=192.0.2.2/24
Gateway=192.0.2.1
IPv6AcceptRA=no

[Address]
Address=2001:db8::2/64

[Route]
Gateway=2001:db8::1

[Route]
Destination=203.0.113.0/24
Gateway=192.0.2.1
Table=77
""",
    },
    "NetworkManager": {
        "/etc/NetworkManager/system-connections/Wired.nmconnection": """\
[connection]
id=Wired connection 1
uuid=6c1b8e1e-60d6-4fe0-9c1f-0a7a6c6a1b11
type=ethernet
interface-name=eth0

[ethernet]
mtu=1400

[ipv4]
address1=192.0.2.2/24,192.0.2.1
method=manual
route1=203.0.113.0/24,192.0.2.1
route1_options=table=77

[ipv6]
addr-gen-mode=eui64
address1=2001:db8::2/64
gateway=2001:db8::1
method=manual
""",
    },
    "netplan": {
        "/etc/netplan/50-cloud-init.yaml": """\
network:
  version: 2
  renderer: networkd
  ethernets:
    eth0:
      mtu: 1400
      accept-ra: false
      addresses:
      - 192.0.2.2/24
      - "2001:db8::2/64"
      routes:
      - to: default
        via: 192.0.2.1
      - to: "::/0"
        via: "2001:db8::1"
      - to: 203.0.113.0/24
        via: 192.0.2.1
        table: 77
""",
    },
}


DYNAMIC = {
    "systemd-networkd": {
        "/etc/systemd/network/20-wired.network": "[Match]\nName=eth0\n\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=no\n"
    },
    "NetworkManager": {
        "/etc/NetworkManager/system-connections/Wired.nmconnection": """\
[connection]
id=Wired
uuid=6c1b8e1e-60d6-4fe0-9c1f-0a7a6c6a1b11
type=ethernet
interface-name=eth0

[ipv4]
method=auto

[ipv6]
method=link-local
""",
    },
}


@contextmanager
def real_tools(kind: str, files: dict[str, str]) -> Iterator[RealTools]:
    host = Host(files)
    try:
        made = RealTools(host, kind)
        try:
            made.shut_down()
            for path in files:
                (host.root / path.lstrip("/")).chmod(0o600 if kind in ("NetworkManager", "netplan") else 0o644)
            yield made
        finally:
            made.close()
    finally:
        host.end()


@pytest.fixture(params=list(FILES))
def tools(request: pytest.FixtureRequest) -> Iterator[RealTools]:
    with real_tools(request.param, FILES[request.param]) as made:
        yield made


def has(host: Host, name: str) -> dict[str, list[str]]:
    """What an interface has, but for the metrics that NetworkManager gives by the kind of device."""
    until(lambda: "tentative" not in host.run(f"ip -6 addr show dev {name}"), "duplicate address detection is through")
    found = host.network(name)
    found["mtu"] = [host.run(f"cat /sys/class/net/{name}/mtu").strip()]
    return {key: sorted(re.sub(r" metric (100|425)\b", "", row) for row in rows) for key, rows in found.items()}


def bridge_settings(host: Host) -> list[str]:
    return [host.run(f"cat /sys/class/net/br0/bridge/{name}").strip() for name in ("stp_state", "forward_delay")]


def test_the_bridge_comes_up_at_boot_with_all_that_the_interface_had(tools: RealTools) -> None:
    host = tools.host
    tools.boot("eth0")
    before = has(host, "eth0")
    assert any("192.0.2.2/24" in row for row in before["addresses"]), tools.messages()
    assert any("2001:db8::2/64" in row for row in before["addresses"])
    assert any(row.startswith("default via 192.0.2.1") for row in before["routes"])
    assert any("table 77" in row for row in before["routes"])
    assert any(row.startswith("default via 2001:db8::1") for row in before["routes6"])
    assert (before["mac"], before["mtu"]) == ([MAC], ["1400"])
    tools.end_service()

    assert host.interfaces.bridge("eth0", "br0", seconds=LONG) == [f"the configuration is {tools.kind}'s"]
    host.interfaces.commit()
    assert has(host, "br0") == before
    settings = bridge_settings(host)

    tools.shut_down("br0")
    tools.boot("br0")
    assert has(host, "br0") == before, tools.messages()
    # NetworkManager leaves the delay alone where STP is off, for then it is of no effect.
    assert bridge_settings(host) == ["0", "1500" if tools.kind == "NetworkManager" else settings[1]]
    assert "state forwarding" in host.run("ip -d link show eth0")
    assert "master br0" in host.run("ip link show eth0")
    left = has(host, "eth0")
    assert (left["addresses"], left["routes"], left["routes6"]) == ([], [], [])
    tools.end_service()

    host.interfaces.unbridge("br0", seconds=LONG)
    host.interfaces.commit()
    assert has(host, "eth0") == before
    tools.shut_down("br0")
    tools.boot("eth0")
    assert has(host, "eth0") == before
    assert not host.exists("br0")


def dynamic(host: Host, name: str) -> str:
    """The interface's address by DHCP, or ""."""
    if not host.exists(name):
        return ""
    found = re.search(r"inet (192\.0\.2\.1\d\d)/24 .*dynamic", host.run(f"ip -4 -o addr show dev {name}"))
    return found[1] if found else ""


def networkd_says(tools: RealTools, name: str) -> str:
    rows = (row.split() for row in tools.run("networkctl --no-legend").splitlines())
    return next((row[4] for row in rows if row[1] == name), "")


def test_networkd_goes_on_with_the_lease_at_the_bridge_and_back_at_the_port() -> None:
    """It runs all the while. What it does not take over has its address only until the lease ends."""
    with real_tools("systemd-networkd", DYNAMIC["systemd-networkd"]) as tools:
        host, interfaces = tools.host, Interfaces(tools.serve())
        until(lambda: dynamic(host, "eth0"), "an address by DHCP")
        until(lambda: networkd_says(tools, "eth0") == "configured", "eth0 is configured")
        address = dynamic(host, "eth0")
        # Written only, networkd does not move what nobody could take back; nor does it when that is undone.
        interfaces.bridge("eth0", "br0", start=False)
        assert not host.exists("br0")
        interfaces.find("br0").undefine()
        assert dynamic(host, "eth0") == address
        interfaces.bridge("eth0", "br0", seconds=LONG)
        interfaces.commit()
        until(lambda: networkd_says(tools, "br0") == "configured", "br0 is configured")
        assert (dynamic(host, "br0"), dynamic(host, "eth0")) == (address, "")
        interfaces.unbridge("br0", seconds=LONG)
        interfaces.commit()
        # It may call it "configuring" for ever: it waits to see a link-local address come, and that is there already.
        until(lambda: f"{address} (DHCP4 via" in tools.run("networkctl status eth0"), "the lease is networkd's again")
        assert networkd_says(tools, "eth0") in ("configured", "configuring"), tools.messages()
        assert (dynamic(host, "br0"), dynamic(host, "eth0")) == ("", address), tools.messages()


def devices(tools: RealTools) -> set[str]:
    return set(tools.run("nmcli -t -f DEVICE,STATE,CONNECTION device").splitlines())


def test_networkmanager_goes_on_with_the_lease_at_the_bridge() -> None:
    with real_tools("NetworkManager", DYNAMIC["NetworkManager"]) as tools:
        host, interfaces = tools.host, Interfaces(tools.serve())
        until(lambda: dynamic(host, "eth0"), "an address by DHCP")
        address = dynamic(host, "eth0")
        interfaces.bridge("eth0", "br0", seconds=LONG)
        interfaces.commit()
        # It says that a bridge is up while that still asks for its address.
        ours = {"br0:connected:kvik-br0", "eth0:connected:kvik-eth0"}
        until(lambda: ours <= devices(tools), "both have NetworkManager's new profiles")
        shown = devices(tools)
        until(lambda: dynamic(host, "br0") == address, "the bridge has the address")
        assert dynamic(host, "eth0") == ""
        # It would put the port back at once.
        with pytest.raises(OperationUnsupported, match="would put eth0 back"):
            interfaces.unbridge("br0", seconds=LONG)
        assert dynamic(host, "br0") == address
        interfaces.unbridge("br0", start=False)  # written only: NetworkManager ends what it no longer has a profile of
        assert "kvik-br0" not in tools.run("ls /etc/NetworkManager/system-connections")
        assert devices(tools) == shown
        assert dynamic(host, "br0") == address


NAMED = """<network><name>lan</name><forward mode='nat'/><bridge name='virbr7' stp='off' delay='0'/><domain name='lab'/>
<dns><host ip='10.7.0.9'><hostname>web</hostname></host></dns><ip address='10.7.0.1' prefix='24'/></network>"""


def test_networkmanagers_dnsmasq_learns_the_names_of_machines_and_forgets_them() -> None:
    """It starts that anew when it is told to reload, which alone makes it read its directory."""
    # Without a server to ask it starts no dnsmasq; nobody is at this one.
    files = {path: text.replace("auto", "auto\ndns=192.0.2.53;") for path, text in DYNAMIC["NetworkManager"].items()}
    with real_tools("NetworkManager", files) as tools:
        tools.run("mkdir -p /etc/NetworkManager/dnsmasq.d /etc/NetworkManager/conf.d")
        text = "[main]\ndns=dnsmasq\nrc-manager=file\n"
        tools.run(f"sh -c 'echo \"{text}\" > /etc/NetworkManager/conf.d/dns.conf'")
        host = tools.host
        tools.serve()
        until(lambda: dynamic(host, "eth0"), "an address by DHCP")
        until(
            lambda: "127.0.0.1" in tools.run("sh -c 'cat /etc/resolv.conf || true'"),
            "the host asks NetworkManager's dnsmasq",
        )

        def kvik(words: str) -> str:
            command = f"env PYTHONPATH={host.environ['PYTHONPATH']} {sys.executable} -m kvik.cli.main"
            return tools.run(f"{command} -c kvik+unix:///system?socket={host.root}/real {words}")

        def found() -> str:
            ask = "RES_OPTIONS='timeout:1 attempts:1' getent ahostsv4 web.lab || true"
            return tools.run(f'sh -c "{ask}"').partition(" ")[0]

        document = host.root / "lan.xml"
        document.write_text(NAMED)
        kvik(f"net-create {document}")
        assert found() == ""
        assert "NetworkManager's dnsmasq" in kvik("dns enable")
        until(lambda: found() == "10.7.0.9", "the name is known")
        kvik("net-destroy lan")
        until(lambda: found() == "", "the network is gone, and so are its names")
        kvik(f"net-create {document}")
        until(lambda: found() == "10.7.0.9", "they are known again")
        kvik("dns disable")
        until(lambda: found() == "", "nothing of it is left")
        assert "kvik" not in tools.run("ls /etc/NetworkManager/dnsmasq.d")
        kvik("net-destroy lan")
