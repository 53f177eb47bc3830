"""<interface>: https://libvirt.org/formatdomain.html#network-interfaces"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, UUID, YES_NO, Element, OnOff, YesNo
from kvik.conf.devices.common import Address, BootableDevice, Reconnect, VirtioOptions

InterfaceType = Literal[
    "user", "ethernet", "vhostuser", "server", "client", "mcast", "udp", "network", "bridge", "internal", "direct",
    "hostdev", "vdpa", "null", "vds",
]  # fmt: skip


class Mac(Element):
    address: str
    type: Literal["generated", "static"] | None = None
    check: YesNo = None


class LocalEndpoint(Element):
    address: str | None = None
    port: int | None = None


class InterfaceSource(Element):
    """`network` and `portgroup`; `bridge`; `dev` and `mode` (direct, hostdev, passt, vdpa); `type`, `path`, `mode`
    (vhostuser); `address` and `port` (server, client, mcast, udp); `name` (internal)."""

    network: str | None = None
    portgroup: str | None = None
    portid: Annotated[str | None, UUID] = None
    bridge: str | None = None
    dev: str | None = None
    mode: Literal["vepa", "private", "bridge", "passthrough", "server", "client"] | None = None
    type: Literal["unix"] | None = None
    path: str | None = None
    name: str | None = None
    address: str | None = None
    port: int | None = None
    managed: YesNo = None
    local: LocalEndpoint | None = None
    reconnect: Reconnect | None = None
    host_address: Annotated[Address | None, "address"] = None
    ips: Annotated[list[Ip], "ip"] = []
    routes: Annotated[list[Route], "route"] = []


class Ip(Element):
    address: str
    family: Literal["ipv4", "ipv6"] | None = None
    prefix: int | None = None
    peer: str | None = None


class Route(Element):
    family: Literal["ipv4", "ipv6"] | None = None
    address: str | None = None
    netmask: str | None = None
    prefix: int | None = None
    gateway: str | None = None
    metric: int | None = None


class Backend(Element):
    """`type` passt: user-mode networking by passt. `tap` and `vhost` name other device nodes."""

    type: Literal["default", "passt", "vhostuser"] | None = None
    tap: str | None = None
    vhost: str | None = None
    log_file: Annotated[str | None, "logFile"] = None
    hostname: str | None = None
    fqdn: str | None = None


class PortRange(Element):
    start: int
    end: int | None = None
    to: int | None = None
    exclude: YesNo = None


class PortForward(Element):
    """Host ports that passt hands to the guest."""

    proto: Literal["tcp", "udp"]
    address: str | None = None
    dev: str | None = None
    ranges: Annotated[list[PortRange], "range"] = []


class InterfaceModel(Element):
    type: str


class HostOffload(Element):
    csum: OnOff = None
    gso: OnOff = None
    tso4: OnOff = None
    tso6: OnOff = None
    ecn: OnOff = None
    ufo: OnOff = None
    mrg_rxbuf: OnOff = None


class GuestOffload(Element):
    csum: OnOff = None
    tso4: OnOff = None
    tso6: OnOff = None
    ecn: OnOff = None
    ufo: OnOff = None


class InterfaceDriver(VirtioOptions):
    name: Literal["vhost", "qemu", "vfio", "kvm", "xen"] | None = None
    txmode: Literal["iothread", "timer"] | None = None
    ioeventfd: OnOff = None
    event_idx: OnOff = None
    queues: int | None = None
    rx_queue_size: int | None = None
    tx_queue_size: int | None = None
    rss: OnOff = None
    rss_hash_report: OnOff = None
    host: HostOffload | None = None
    guest: GuestOffload | None = None


class InterfaceTarget(Element):
    dev: str | None = None
    managed: YesNo = None


class GuestDevice(Element):
    dev: str | None = None
    actual: str | None = None


class VirtualPortParameters(Element):
    managerid: int | None = None
    typeid: int | None = None
    typeidversion: int | None = None
    instanceid: Annotated[str | None, UUID] = None
    interfaceid: Annotated[str | None, UUID] = None
    profileid: str | None = None


class VirtualPort(Element):
    type: Literal["none", "802.1Qbg", "802.1Qbh", "openvswitch", "midonet"] | None = None
    parameters: VirtualPortParameters | None = None


class VlanTag(Element):
    id: int
    native_mode: Annotated[Literal["tagged", "untagged"] | None, "nativeMode"] = None


class Vlan(Element):
    __xml_strict__ = True  # a VLAN is a wall

    trunk: YesNo = None
    tags: Annotated[list[VlanTag], "tag"] = []


class Rate(Element):
    """KiB a second; burst in KiB."""

    average: int | None = None
    peak: int | None = None
    floor: int | None = None
    burst: int | None = None


class Bandwidth(Element):
    inbound: Rate | None = None
    outbound: Rate | None = None


class Link(Element):
    state: Literal["up", "down"]


class Mtu(Element):
    size: int


class Coalesce(Element):
    rx: CoalesceRx | None = None


class CoalesceRx(Element):
    frames: Frames | None = None


class Frames(Element):
    max: int


class FilterParameter(Element):
    __xml_strict__ = True

    name: str
    value: str


class FilterRef(Element):
    """A network filter by name: what the guest may send and receive."""

    __xml_strict__ = True

    filter: str
    parameters: Annotated[list[FilterParameter], "parameter"] = []


class Port(Element):
    """isolated: no traffic to other isolated ports of the same bridge."""

    __xml_strict__ = True

    isolated: YesNo = None


class Tune(Element):
    sndbuf: Annotated[int | None, CHILD] = None


class Teaming(Element):
    type: Literal["persistent", "transient"]
    persistent: str | None = None


class Script(Element):
    path: str | None = None


class Interface(BootableDevice):
    type: InterfaceType
    managed: YesNo = None
    trust_guest_rx_filters: Annotated[bool | None, YES_NO, "trustGuestRxFilters"] = None
    mac: Mac | None = None
    source: InterfaceSource | None = None
    vlan: Vlan | None = None
    virtualport: VirtualPort | None = None
    backend: Backend | None = None
    port_forwards: Annotated[list[PortForward], "portForward"] = []
    ips: Annotated[list[Ip], "ip"] = []
    routes: Annotated[list[Route], "route"] = []
    script: Script | None = None
    downscript: Script | None = None
    backend_domain: Annotated[BackendDomain | None, "backenddomain"] = None
    target: InterfaceTarget | None = None
    guest: GuestDevice | None = None
    model: InterfaceModel | None = None
    driver: InterfaceDriver | None = None
    filterref: FilterRef | None = None
    tune: Tune | None = None
    teaming: Teaming | None = None
    link: Link | None = None
    mtu: Mtu | None = None
    coalesce: Coalesce | None = None
    bandwidth: Bandwidth | None = None
    port: Port | None = None

    @property
    def host_function(self) -> str:
        """The PCI function of the host that the guest has, like "0000:01:10.0": of type hostdev, or in a live document
        of a network that is a pool of them; "" for none."""
        address = self.source.host_address if self.source is not None else None
        return address.pci_text if address is not None and self.type in ("hostdev", "network") else ""

    @property
    def is_macvtap(self) -> bool:
        """Whether it stands on an interface of the host: type direct, or in a live document of a network whose pool
        has that interface."""
        source = self.source
        pooled = self.type == "network" and source is not None and None not in (source.dev, source.mode)
        return self.type == "direct" or pooled


class BackendDomain(Element):
    name: str
