"""What one network is told to be, as JSON: the daemon writes it, the switch reads it."""

from __future__ import annotations

from kvik.errors import InvalidArgument
from kvik.named import NamedTuple
from kvik.network.switch.packets import ip_bytes, ip_text, mac_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

HOSTS = 1024  # most reservations, and most names: all of them fit into one message


class Host(NamedTuple):
    """A reservation: an address for a card."""

    ip: bytes
    name: str = ""


class Settings(NamedTuple):
    """Addresses are packed. `first` to `last` are given by DHCP; 0: there is no DHCP."""

    name: str
    mac: bytes  # the gateway's
    ip: bytes
    prefix: int
    first: int = 0
    last: int = 0
    lease: int = 3600  # seconds
    router: bool = True  # there is a way out, by the gateway
    dns: bool = True
    forward_dns: bool = True  # names that are not ours are asked for outside
    domain: str = ""
    mtu: int = 0
    hosts: Mapping[bytes, Host] = {}  # by the card's address
    names: Mapping[str, bytes] = {}  # further names

    @property
    def mask(self) -> int:
        return (0xFFFF_FFFF << (32 - self.prefix)) & 0xFFFF_FFFF

    @property
    def network(self) -> int:
        return int.from_bytes(self.ip, "big") & self.mask

    @property
    def netmask(self) -> bytes:
        return self.mask.to_bytes(4, "big")

    @property
    def broadcast(self) -> bytes:
        return (self.network | ~self.mask & 0xFFFF_FFFF).to_bytes(4, "big")

    def contains(self, address: bytes) -> bool:
        return int.from_bytes(address, "big") & self.mask == self.network

    def usable(self, address: bytes) -> bool:
        """Whether a machine may have it."""
        number = int.from_bytes(address, "big")
        inside = self.contains(address) and number != self.network and address != self.broadcast
        return inside and address != self.ip


def from_json(given: Mapping[str, Any]) -> Settings:
    """Raises `InvalidArgument`, which names the value."""
    try:
        first, last = given.get("range", ["", ""])
        settings = Settings(
            name=str(given["name"]),
            mac=mac_bytes(given["mac"]),
            ip=ip_bytes(given["ip"]),
            prefix=int(given["prefix"]),
            first=int.from_bytes(ip_bytes(first), "big") if first else 0,
            last=int.from_bytes(ip_bytes(last), "big") if last else 0,
            lease=int(given.get("lease", 3600)) or 0xFFFF_FFFF,  # 0: for ever, as in a network document
            router=bool(given.get("router", True)),
            dns=bool(given.get("dns", True)),
            forward_dns=bool(given.get("forward_dns", True)),
            domain=str(given.get("domain", "")).lower(),
            mtu=int(given.get("mtu", 0)),
            hosts={
                mac_bytes(mac): Host(ip_bytes(host["ip"]), str(host.get("name", "")).lower())
                for mac, host in given.get("hosts", {}).items()
            },
            names={str(name).lower(): ip_bytes(ip) for name, ip in given.get("names", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArgument(f"the switch's settings are not what they must be: {error}") from error
    if not 8 <= settings.prefix <= 30:
        raise InvalidArgument(f"a network of prefix {settings.prefix} has no room; 8 to 30 can be used")
    if settings.mac[0] & 1:
        raise InvalidArgument("the gateway's Ethernet address is a group's")
    ends = [number.to_bytes(4, "big") for number in (settings.first, settings.last) if number]
    for address in (*ends, *(host.ip for host in settings.hosts.values())):
        if not settings.usable(address):
            raise InvalidArgument(
                f"{ip_text(address)} is no address for machines of {ip_text(settings.ip)}/{settings.prefix}"
            )
    if settings.first > settings.last:
        raise InvalidArgument("the DHCP range ends before it begins")
    if len(settings.hosts) > HOSTS or len(settings.names) > HOSTS:
        raise InvalidArgument(f"more than {HOSTS} hosts")
    return settings
