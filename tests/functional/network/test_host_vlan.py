"""VLANs of bridge ports: what is listed, and where frames really go. For the lab, where the kernel filters VLANs."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from kvik.errors import HostError
from kvik.host.bridge import Bridge, create_bridge, read_bridge, set_bridge
from kvik.host.bridge_vlan import add_vlan, delete_vlan, port_vlans
from kvik.host.neighbour import add_fdb, fdb
from kvik.host.netlink import Link, Netlink
from netns import in_namespace, until_ports_forward

EXPERIMENT = 0x88B5  # the protocol of our frames, IEEE 802 local experimental
GUEST = "02:00:00:00:00:07"


def a_filtering_bridge(netlink: Netlink, *names: str) -> tuple[Bridge, dict[str, Link]]:
    """A bridge whose new ports are in no VLAN; port "a" ends in "a1", and so on."""
    try:
        bridge = create_bridge(netlink, "br0", vlan_filtering=True, vlan_default_pvid=0, up=True)
    except HostError as error:
        assert error.errno == errno.EOPNOTSUPP
        pytest.skip(str(error))
    ports = {}
    for name in names:
        ports[name] = netlink.add_veth(name, f"{name}1", up=True)
        netlink.set_link(ports[name].index, master=bridge.index)
    until_ports_forward(netlink)
    return bridge, ports


def listed(netlink: Netlink, index: int) -> list[str]:
    return [str(vlan) for vlan in port_vlans(netlink, index)]


@in_namespace
def test_vlans_are_added_listed_by_range_and_deleted() -> None:
    with Netlink() as netlink:
        bridge, ports = a_filtering_bridge(netlink, "a", "t")
        access, trunk = ports["a"].index, ports["t"].index
        assert bridge.vlan_filtering and bridge.vlan_default_pvid == 0 and port_vlans(netlink) == []
        add_vlan(netlink, access, 10, pvid=True, untagged=True)
        add_vlan(netlink, trunk, 10, 20)
        add_vlan(netlink, bridge.index, 10, bridge=True)
        assert listed(netlink, access) == ["10 PVID untagged"]
        assert listed(netlink, trunk) == ["10-20"]
        assert listed(netlink, bridge.index) == ["10"]
        delete_vlan(netlink, trunk, 15)
        assert listed(netlink, trunk) == ["10-14", "16-20"]
        delete_vlan(netlink, trunk, 1, 18)
        assert listed(netlink, trunk) == ["19-20"]
        delete_vlan(netlink, bridge.index, 10, bridge=True)
        delete_vlan(netlink, access, 10)
        assert listed(netlink, access) == listed(netlink, bridge.index) == []
        add_vlan(netlink, trunk, 1, 4094)
        assert listed(netlink, trunk) == ["1-4094"]
        set_bridge(netlink, bridge.index, vlan_filtering=False)
        assert not read_bridge(netlink, "br0").vlan_filtering


@in_namespace
def test_a_new_port_is_in_the_default_pvid() -> None:
    with Netlink() as netlink:
        bridge, _ = a_filtering_bridge(netlink)
        set_bridge(netlink, bridge.index, vlan_default_pvid=7)
        port = netlink.add_veth("a", "a1", up=True)
        netlink.set_link(port.index, master=bridge.index)
        assert listed(netlink, port.index) == ["7 PVID untagged"]


class Ear:
    """Hears our frames at the end of a port, and the tags that they have there.

    It listens to every protocol: who asks for one alone gets frames whose tag the kernel has dropped already.
    """

    def __init__(self, interface: str) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        self.socket.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA: tags are not in the frame by now
        self.socket.bind((interface, 3))

    def next(self) -> int:
        while True:
            frame, extra, _, (_, _, kind, _, _) = self.socket.recvmsg(2000, 200)
            if kind == socket.PACKET_OUTGOING or frame[12:14] != struct.pack(">H", EXPERIMENT):
                continue
            status, _, _, _, _, tag, _ = struct.unpack("=IIIHHHH", extra[0][2])
            return int(tag) & 0xFFF if status & 0x10 else 0  # TP_STATUS_VLAN_VALID

    def vlan(self) -> int:
        """Of the next frame; 0: it has no tag."""
        self.socket.settimeout(10)
        return self.next()

    def hears_nothing(self) -> bool:
        self.socket.setblocking(False)
        try:
            self.next()
        except BlockingIOError:
            return True
        return False


def send(interface: str, tag: int = 0) -> None:
    frame = b"\xff" * 6 + bytes.fromhex(GUEST.replace(":", ""))
    frame += struct.pack(">HH", 0x8100, tag) if tag else b""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((interface, 0))
        sender.send(frame + struct.pack(">H", EXPERIMENT) + bytes(46))


@in_namespace
def test_frames_stay_in_their_vlan_and_have_tags_on_the_trunk() -> None:
    with Netlink() as netlink:
        bridge, ports = a_filtering_bridge(netlink, "a", "b", "c", "t")
        for name, vlan in (("a", 10), ("b", 10), ("c", 20)):
            add_vlan(netlink, ports[name].index, vlan, pvid=True, untagged=True)
        add_vlan(netlink, ports["t"].index, 10, 20)
        ears = {name: Ear(f"{name}1") for name in ports}
        send("a1")
        assert ears["b"].vlan() == 0  # another port of VLAN 10
        assert ears["t"].vlan() == 10  # the trunk, tagged
        assert ears["c"].hears_nothing()  # VLAN 20
        learned = [entry for entry in fdb(netlink, bridge=bridge.index) if entry.mac == GUEST]
        assert [(entry.index, entry.vlan) for entry in learned] == [(ports["a"].index, 10)]
        send("t1", tag=20)
        assert ears["c"].vlan() == 0
        assert ears["a"].hears_nothing() and ears["b"].hears_nothing()
        send("t1", tag=30)  # the trunk is not in that one
        send("t1")  # and has no PVID
        send("t1", tag=10)
        assert ears["a"].vlan() == 0 and ears["a"].hears_nothing()  # the last one alone
        assert ears["c"].hears_nothing()
        add_fdb(netlink, ports["c"].index, "02:00:00:00:00:08", vlan=20)
        assert [entry.vlan for entry in fdb(netlink) if entry.mac == "02:00:00:00:00:08"] == [20]
