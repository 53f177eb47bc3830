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


RANGES = 64
FOR_EVER = 0xFFFF_FFFF  # of a lease (RFC 2131, 3.3)


class Host(NamedTuple):
    """A reservation: an address for a card. `lease` in seconds; 0: the network's."""

    ip: bytes
    name: str = ""
    lease: int = 0


class Range(NamedTuple):
    """Addresses that DHCP gives, as numbers, both ends included."""

    first: int
    last: int
    lease: int = 0


class Settings(NamedTuple):
    """Addresses are packed. Without `ip` there is no gateway: machines are among themselves, and ask nobody."""

    name: str
    mac: bytes  # the gateway's
    ip: bytes = b""
    prefix: int = 0
    ranges: tuple[Range, ...] = ()
    lease: int = 3600  # seconds
    router: bool = True  # there is a way out, by the gateway
    dns: bool = True
    forward_dns: bool = True  # names that are not ours are asked for outside
    forward_plain: bool = False  # names without a dot too
    local_only: bool = True  # names of our domain are never asked for outside
    domain: str = ""
    mtu: int = 0
    hosts: Mapping[bytes, Host] = {}  # by the card's address
    names: Mapping[str, tuple[bytes, ...]] = {}  # further names

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

    @property
    def dhcp(self) -> bool:
        return bool(self.ranges or self.hosts)

    def lease_of(self, mac: bytes, ip: bytes) -> int:
        """Seconds that this card may have this address."""
        host = self.hosts.get(mac)
        if host is not None and host.lease:
            return host.lease
        number = int.from_bytes(ip, "big")
        given = next((item.lease for item in self.ranges if item.first <= number <= item.last), 0)
        return given or self.lease

    def contains(self, address: bytes) -> bool:
        return bool(self.ip) and int.from_bytes(address, "big") & self.mask == self.network

    def usable(self, address: bytes) -> bool:
        """Whether a machine may have it."""
        number = int.from_bytes(address, "big")
        inside = self.contains(address) and number != self.network and address != self.broadcast
        return inside and address != self.ip


def from_json(given: Mapping[str, Any]) -> Settings:
    """Raises `InvalidArgument`, which names the value."""
    try:
        settings = Settings(
            name=str(given["name"]),
            mac=mac_bytes(given["mac"]),
            ip=ip_bytes(given["ip"]) if given.get("ip") else b"",
            prefix=int(given.get("prefix", 0)),
            ranges=tuple(_range(*item) for item in given.get("ranges", ())),
            lease=int(given.get("lease", 3600)),
            router=bool(given.get("router", True)),
            dns=bool(given.get("dns", True)),
            forward_dns=bool(given.get("forward_dns", True)),
            forward_plain=bool(given.get("forward_plain", False)),
            local_only=bool(given.get("local_only", True)),
            domain=str(given.get("domain", "")).lower(),
            mtu=int(given.get("mtu", 0)),
            hosts={
                mac_bytes(mac): Host(ip_bytes(host["ip"]), str(host.get("name", "")).lower(), int(host.get("lease", 0)))
                for mac, host in given.get("hosts", {}).items()
            },
            names={str(name).lower(): tuple(map(ip_bytes, ips)) for name, ips in given.get("names", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArgument(f"the switch's settings are not what they must be: {error}") from error
    if not settings.ip and (settings.dhcp or settings.router or settings.prefix):
        raise InvalidArgument("without an address of its own the network has no DHCP and no way out")
    if settings.ip and not 8 <= settings.prefix <= 30:
        raise InvalidArgument(f"a network of prefix {settings.prefix} has no room; 8 to 30 can be used")
    if settings.mac[0] & 1:
        raise InvalidArgument("the gateway's Ethernet address is a group's")
    ends = [number.to_bytes(4, "big") for item in settings.ranges for number in (item.first, item.last)]
    for address in (*ends, *(host.ip for host in settings.hosts.values())):
        if not settings.usable(address):
            raise InvalidArgument(
                f"{ip_text(address)} is no address for machines of {ip_text(settings.ip)}/{settings.prefix}"
            )
    leases = [*(item.lease for item in settings.ranges), *(host.lease for host in settings.hosts.values())]
    if settings.lease <= 0 or min(leases, default=0) < 0:
        raise InvalidArgument("a lease is at least one second")
    if any(item.first > item.last for item in settings.ranges):
        raise InvalidArgument("a DHCP range ends before it begins")
    if len(settings.hosts) > HOSTS or len(settings.names) > HOSTS or len(settings.ranges) > RANGES:
        raise InvalidArgument(f"more than {HOSTS} hosts, or more than {RANGES} DHCP ranges")
    return settings


def _range(first: str, last: str, lease: int = 0) -> Range:
    return Range(int.from_bytes(ip_bytes(first), "big"), int.from_bytes(ip_bytes(last), "big"), int(lease))
