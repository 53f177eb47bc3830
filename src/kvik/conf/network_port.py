"""<networkport>: what one interface of a machine holds of a network, as libvirt writes it. Only written, never read.

https://libvirt.org/formatnetworkport.html
"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, UUID, YES_NO, Element, Text, YesNo
from kvik.conf.devices.common import Address
from kvik.conf.devices.interface import Bandwidth, Port, VirtualPort, Vlan
from kvik.conf.network import NetworkMac
from kvik.conf.xmlformat import format_element

__all__ = ["NetworkPort", "Plug", "PortOwner", "RxFilters", "format_network_port"]


class PortOwner(Element):
    """The machine."""

    name: Annotated[str, CHILD] = ""
    uuid: Annotated[str | None, CHILD, UUID] = None


class RxFilters(Element):
    trust_guest: Annotated[bool | None, YES_NO, "trustGuest"] = None


class Plug(Element):
    """network: a bridge of the network's own; bridge: one of the host; direct: macvtap on the device `dev`;
    hostdev-pci: a PCI function of the host."""

    type: Literal["network", "bridge", "direct", "hostdev-pci"]
    managed: YesNo = None
    bridge: str | None = None
    dev: str | None = None
    mode: str | None = None
    address: Address | None = None


class NetworkPort(Element):
    uuid: Annotated[str | None, CHILD, UUID] = None
    owner: PortOwner | None = None
    group: Text = None
    mac: NetworkMac | None = None
    virtualport: VirtualPort | None = None
    bandwidth: Bandwidth | None = None
    vlan: Vlan | None = None
    port: Port | None = None
    rxfilters: RxFilters | None = None
    plug: Plug | None = None


def format_network_port(port: NetworkPort) -> str:
    return format_element(port, "networkport")
