"""Which network an interface is on, and who is asked for a machine's addresses."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from manager_bench import Bench, document

from kvik.conf.devices.interface import Interface, InterfaceSource
from kvik.errors import InvalidArgument, NoNetwork
from kvik.manager import addresses
from kvik.manager.addresses import network_of
from kvik.network.dnsmasq import LeaseEntry

MAC = "52:54:00:0a:0b:0c"
INTERFACES = "".join(
    f"<interface type='user'><mac address='{mac}'/></interface>" for mac in (MAC.upper(), MAC[:-1] + "d")
)


class Network(SimpleNamespace):
    read = 0

    def leases(self) -> list[LeaseEntry]:
        self.read += 1
        entry = LeaseEntry("virbr9", 0, "10.0.0.5", 24, MAC)
        other = LeaseEntry("virbr9", 0, "10.0.0.6", 24, "52:54:00:00:00:01")
        return [entry, other, LeaseEntry("virbr9", 0, "fd00::5", 64, MAC)]


class Networks:
    def __init__(self) -> None:
        self.on = Network(name="on", is_active=True, bridge_name="virbr9")
        self.off = Network(name="off", is_active=False, bridge_name="virbr8")

    def list(self) -> list[Any]:
        return [self.off, self.on]

    def lookup_name(self, name: str) -> Any:
        for network in self.list():
            if network.name == name:
                return network
        raise NoNetwork(f"no network {name}")


@pytest.mark.parametrize(
    ("kind", "source", "name"),
    [
        ("network", {"network": "on"}, "on"),
        ("network", {"network": "off"}, "off"),
        ("network", {"network": "none"}, None),
        ("bridge", {"bridge": "virbr9"}, "on"),
        ("bridge", {"bridge": "virbr8"}, None),  # its network is off: the bridge is somebody else's
        ("direct", {"dev": "eth0"}, None),
        ("user", None, None),
    ],
)
def test_an_interface_is_on_a_network_by_name_or_by_its_bridge(
    kind: Any, source: dict[str, str] | None, name: str | None
) -> None:
    interface = Interface(type=kind, source=InterfaceSource(**source) if source is not None else None)
    found = network_of(Networks(), interface)
    assert (found.name if found is not None else None) == name


async def test_what_is_heard_comes_before_what_the_host_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = await Bench(tmp_path).open()
    try:
        domain = await manager.create_xml(document(devices=INTERFACES))
        heard = ["10.0.0.7", "fd00::7", "10.0.0.5"]
        monkeypatch.setattr(manager.taps, "heard", lambda device: heard)
        answered = [
            SimpleNamespace(usable=True, mac=MAC, address=ip_address(text)) for text in ("10.0.0.5", "10.0.0.9")
        ]
        monkeypatch.setattr(addresses, "neighbours", lambda netlink: answered)
        first, second = await domain.interface_addresses(2)
        told = [(0, "10.0.0.7", 0), (1, "fd00::7", 0), (0, "10.0.0.5", 0)]
        assert (first.hwaddr, first.addresses) == (MAC, [*told, (0, "10.0.0.9", 0)])
        assert second.addresses == told
    finally:
        await manager.close()


async def test_leases_are_found_by_the_machines_own_macs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = await Bench(tmp_path).open()
    try:
        domain = await manager.create_xml(document(devices=INTERFACES))
        known = Networks()
        monkeypatch.setattr(addresses, "network_of", lambda networks, interface: known.on)
        (found,) = await domain.interface_addresses(0)
        assert (found.hwaddr, found.addresses) == (MAC, [(0, "10.0.0.5", 24), (1, "fd00::5", 64)])
        assert known.on.read == 1  # for both cards
        known.on.is_active = False
        assert await domain.interface_addresses(0) == []
        with pytest.raises(InvalidArgument):
            await domain.interface_addresses(9)
    finally:
        await manager.close()
