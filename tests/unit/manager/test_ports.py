"""Where an interface goes: what it says itself, its portgroup and its network, put together."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kvik.conf.devices.interface import Interface
from kvik.conf.devices_xml import parse_device
from kvik.conf.network import Network
from kvik.conf.network_validate import load_network
from kvik.errors import ConfigError, ConfigUnsupported, NoNetwork, OperationInvalid
from kvik.network.attachment import Attachment, resolve
from kvik.network.taps import openvswitch_vlans

PLAIN = """<network><name>{}</name><forward mode='nat'/><bridge name='virbr7'/>{}
<ip address='10.7.0.1' prefix='24'/></network>"""
OVS = """<network><name>ovs</name><forward mode='bridge'/><bridge name='ovsbr0'/>
<vlan><tag id='9'/></vlan><virtualport type='openvswitch'/>
<portgroup name='five'><vlan><tag id='5'/></vlan><virtualport><parameters profileid='gold'/></virtualport>
<bandwidth><inbound average='100'/></bandwidth></portgroup></network>"""


@dataclass
class FakeNetwork:
    document: Network
    is_active: bool = True
    ports: dict[str, str] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.document.name


class FakeNetworks:
    def __init__(self, *documents: str) -> None:
        self.all = {network.name: network for network in (FakeNetwork(load_network(xml)) for xml in documents)}

    def lookup_name(self, name: str) -> FakeNetwork:
        if name not in self.all:
            raise NoNetwork(f"no network with name {name!r}")
        return self.all[name]


def card(inside: str, kind: str = "network") -> Interface:
    _, device = parse_device(f"<interface type='{kind}'>{inside}<alias name='net0'/></interface>")
    assert isinstance(device, Interface)
    return device


def goes(inside: str, *documents: str, kind: str = "network") -> Attachment:
    found = resolve(card(inside, kind), FakeNetworks(*documents))
    assert found is not None
    return found


def test_an_interface_goes_to_the_bridge_of_its_network_with_the_networks_settings() -> None:
    found = goes("<source network='n'/>", PLAIN.format("n", "<mtu size='1400'/><port isolated='yes'/>"))
    assert (found.kind, found.device, found.network, found.mtu, found.isolated) == ("bridge", "virbr7", "n", 1400, True)
    assert found.owns_bridge
    assert found.port_id != goes("<source network='n'/>", PLAIN.format("n", "")).port_id


def test_the_interface_goes_before_the_portgroup_and_that_before_the_network() -> None:
    network = goes("<source network='ovs'/>", OVS)
    group = goes("<source network='ovs' portgroup='five'/>", OVS)
    own = goes("<source network='ovs' portgroup='five'/><vlan><tag id='3'/></vlan>", OVS)
    assert [found.vlan.tags[0].id for found in (network, group, own) if found.vlan] == [9, 5, 3]
    assert group.kind == "openvswitch"
    assert group.virtualport is not None and group.virtualport.parameters is not None
    assert (group.virtualport.type, group.virtualport.parameters.profileid) == ("openvswitch", "gold")
    assert network.bandwidth is None
    assert group.bandwidth is not None and group.bandwidth.inbound is not None


def test_virtualports_that_disagree_are_refused() -> None:
    inside = "<source network='ovs' portgroup='five'/><virtualport><parameters profileid='lead'/></virtualport>"
    with pytest.raises(ConfigError, match="differ in profileid: lead, gold"):
        goes(inside, OVS)


def test_the_document_of_the_network_is_not_changed_by_what_an_interface_adds() -> None:
    networks = FakeNetworks(OVS)
    before = networks.lookup_name("ovs").document.copy()
    resolve(card("<source network='ovs' portgroup='five'/>"), networks)
    assert networks.lookup_name("ovs").document == before


def test_of_a_pool_the_least_used_interface_is_taken_and_passthrough_wants_one_alone() -> None:
    pool = "<network><name>p</name><forward mode='{}'><interface dev='e0' connections='{}'/><interface dev='e1' connections='1'/></forward></network>"  # noqa: E501
    found = goes("<source network='p'/>", pool.format("vepa", 2))
    assert (found.kind, found.device, found.mode) == ("macvtap", "e1", "vepa")
    assert goes("<source network='p'/>", pool.format("passthrough", 0)).device == "e0"
    with pytest.raises(OperationInvalid, match="no free interface: all 2"):
        goes("<source network='p'/>", pool.format("passthrough", 1))


def test_what_cannot_be_had_is_said() -> None:
    networks = FakeNetworks(PLAIN.format("n", "<mtu size='1400'/>"))
    networks.lookup_name("n").is_active = False
    for inside, error, words in (
        ("<source network='n'/>", OperationInvalid, "not active; start it: kvik net-start n"),
        ("<source network='other'/>", NoNetwork, "other"),
        ("", ConfigError, "names no network"),
    ):
        with pytest.raises(error, match=words):
            resolve(card(inside), networks)
    with pytest.raises(ConfigUnsupported, match="MTU of 9000 on network 'n', which has 1400"):
        goes("<source network='n'/><mtu size='9000'/>", PLAIN.format("n", "<mtu size='1400'/>"))


def test_of_a_pool_of_virtual_functions_the_first_free_one_is_taken() -> None:
    functions = "".join(
        f"<address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x{n}'/>" for n in (0, 2)
    )
    networks = FakeNetworks(
        f"<network><name>h</name><forward mode='hostdev' managed='yes'>{functions}</forward></network>"
    )
    taken = networks.lookup_name("h").devices
    found = resolve(card("<source network='h'/>"), networks)
    assert found is not None
    assert (found.kind, found.device, found.managed) == ("hostdev", "0000:01:10.0", True)
    taken["a"] = "0000:01:10.0"
    found = resolve(card("<source network='h'/>"), networks)
    assert found is not None and found.device == "0000:01:10.2"
    taken["b"] = "0000:01:10.2"
    with pytest.raises(OperationInvalid, match="no free virtual function: all 2 of its pool are in use"):
        resolve(card("<source network='h'/>"), networks)


def test_a_pci_function_may_be_named_without_a_network() -> None:
    address = "<source><address type='pci' domain='0x0000' bus='0x03' slot='0x10' function='0x2'/></source>"
    found = resolve(card(f"{address}<vlan><tag id='7'/></vlan>", "hostdev' managed='yes"), FakeNetworks())
    assert found is not None and found.vlan is not None
    assert (found.kind, found.device, found.managed, found.network) == ("hostdev", "0000:03:10.2", True, "")
    found = resolve(card(address, "hostdev"), FakeNetworks())
    assert found is not None and not found.managed
    with pytest.raises(ConfigUnsupported, match="names no PCI device"):
        resolve(card("<source dev='eth0'/>", "hostdev"), FakeNetworks())


def test_what_needs_nothing_of_the_host_goes_nowhere() -> None:
    assert resolve(card("", "user"), FakeNetworks()) is None
    assert resolve(card("<target dev='mine' managed='no'/>", "ethernet"), FakeNetworks()) is None
    assert goes("<target dev='mine'/>", kind="ethernet").kind == "none"
    assert goes("<source bridge='br0'/>", kind="bridge").device == "br0"


@pytest.mark.parametrize(
    ("vlan", "expected"),
    [
        ("", (None, None, [])),
        ("<vlan><tag id='5'/></vlan>", (None, 5, [])),
        ("<vlan trunk='yes'><tag id='5'/></vlan>", ("trunk", None, [5])),
        ("<vlan><tag id='5'/><tag id='6'/></vlan>", ("trunk", None, [5, 6])),
        ("<vlan trunk='yes'><tag id='5' nativeMode='untagged'/><tag id='6'/></vlan>", ("native-untagged", 5, [5, 6])),
        ("<vlan trunk='yes'><tag id='5'/><tag id='6' nativeMode='tagged'/></vlan>", ("native-tagged", 6, [5, 6])),
    ],
)
def test_vlans_of_a_port_of_open_vswitch(vlan: str, expected: tuple[str | None, int | None, list[int]]) -> None:
    assert openvswitch_vlans(card(vlan).vlan) == expected
