"""<networkstatus>: an active network as it is written to disk, so that a restarted daemon finds it again.

The form is libvirt's (its document inside, the traffic class ids and the guaranteed rates handed out); the processes
that serve the network stand in our own namespace.
"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf import cpuset
from kvik.conf.codec import KVIK_NS, Element, YesNo
from kvik.conf.cpuset import format_cpuset, parse_cpuset
from kvik.conf.network import Network
from kvik.conf.reader import read_xml
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError, ResourceBusy

__all__ = ["Helper", "NetworkStatus", "Origin", "PortFloor", "format_status", "parse_status"]

RESERVED_CLASSES = "0-2"  # of tc's HTB: none, the root, and the class of those without a guaranteed rate
MAX_CLASS = cpuset.MAX - 1  # fits the 16 bits of a minor number of tc


class ClassIds(Element):
    bitmap: str = RESERVED_CLASSES


class Floor(Element):
    """The sum of the guaranteed rates of all interfaces, in KiB/s."""

    sum: int = 0


class Taint(Element):
    flag: str


class Helper(Element):
    """A process that serves the network; `started` in clock ticks since boot tells it from a later one of its PID."""

    name: str
    pid: int
    started: int


class PortFloor(Element):
    """A guaranteed rate, `floor` in kilobytes a second, of the interface with this port id and MAC address; frames for
    it are in traffic class `number`."""

    port: str
    mac: str
    number: Annotated[int, "class"]
    floor: int


class Origin(Element):
    """`state`: what is under way; what another `boot` (its id, random(4)) made is gone."""

    state: Literal["starting", "active", "stopping"]
    boot: str
    persistent: YesNo = None


class NetworkStatus(Element):
    class_id: ClassIds | None = None
    floor: Floor | None = None
    taints: Annotated[list[Taint], "taint"] = []
    network: Network | None = None
    origin: Annotated[Origin | None, f"{{{KVIK_NS}}}origin"] = None
    helpers: Annotated[list[Helper], f"{{{KVIK_NS}}}helper"] = []
    port_floors: Annotated[list[PortFloor], f"{{{KVIK_NS}}}floor"] = []

    @property
    def document(self) -> Network:
        """The network as it is active. `parse_status` has made sure that it is there."""
        assert self.network is not None
        return self.network

    @property
    def classes(self) -> frozenset[int]:
        return parse_cpuset(self.class_id.bitmap if self.class_id is not None else RESERVED_CLASSES)

    def take_class(self) -> int:
        """A class id for an interface with a guaranteed rate. Raises ResourceBusy when all are taken."""
        taken = self.classes
        number = next((number for number in range(MAX_CLASS + 1) if number not in taken), None)
        if number is None:
            raise ResourceBusy(f"network {self.document.name} has no traffic class left: all {MAX_CLASS} are taken")
        self.class_id = ClassIds(bitmap=format_cpuset(set(taken) | {number}))
        return number

    def free_class(self, number: int) -> None:
        """Hand one back; those that are reserved stay."""
        rest = (self.classes - {number}) | parse_cpuset(RESERVED_CLASSES)
        self.class_id = ClassIds(bitmap=format_cpuset(set(rest)))

    def add_floor(self, kib: int) -> None:
        """`kib` more of guaranteed rate (less if negative)."""
        self.floor = Floor(sum=max(0, (self.floor.sum if self.floor is not None else 0) + kib))


def parse_status(data: bytes) -> NetworkStatus:
    """Raises ConfigError for anything else than what `format_status`, or libvirt, wrote."""
    root = read_xml(data, "network status")
    if root.tag != "networkstatus":
        raise ConfigError(f"a network status starts with <networkstatus>, not <{root.tag}>", path=f"/{root.tag}")
    status = parse_element(root, NetworkStatus)
    if status.network is None:
        raise ConfigError("the network's document is missing", path="/networkstatus/network")
    try:
        _ = status.classes
    except ValueError as error:
        raise ConfigError(str(error), path="/networkstatus/class_id/@bitmap") from None
    return status


def format_status(status: NetworkStatus) -> bytes:
    """The bytes of the file; `class_id` and `floor` are always there, as libvirt expects them."""
    status.class_id = status.class_id or ClassIds()
    status.floor = status.floor or Floor()
    return format_element(status, "networkstatus").encode()
