"""Allow-lists by name: a machine reaches what certain names resolve to, and nothing else.

    the machine --DNS to the gateway--> nftables (by its place) --> a dnsmasq of its own --> name servers
                                                                     | answers A, AAAA
                                                                     v
                                              the sets allow4-TAP, allow6-TAP that its filter looks up
                                                                     | `lapse`, every KEEP seconds
                                                                     v
                                              the sets kept4-TAP, kept6-TAP, whose elements end by themselves

The dnsmasq has no servers but for the allowed names (and what is below them), so every other question is refused:
names cannot carry data out. The filter `allow-names` (filters/builtin.py) lets DNS go to the gateway only, and so
through this redirection. The process outlives the daemon; it is found again by its configuration file, and watched
(egress_keeper.py).

Its place is its tap, its MAC, and the host's interface that has the gateway's addresses. A MAC alone proves nothing,
and by which port a packet came is known on the bridge only: there what comes from listed taps is marked (chain
`names`), and only what is marked is led to a resolver. Then the mark is taken away, before routing looks at marks.

dnsmasq cannot give an element a time to live, and adding one that is there changes nothing. So a name's addresses are
moved to a second set every KEEP seconds, where they stay for as long; the machine is told no TTL above KEEP. An answer
then holds at least as long as its TTL, and at most 2 * KEEP seconds and a little.
"""

from __future__ import annotations

import errno
import ipaddress
import math
import os
import pwd
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvik.errors import ConfigError, HostError, MissingPackages, OperationFailed
from kvik.host import files, nftables, process, tools
from kvik.host.netlink import Netlink
from kvik.host.packages import how_to_install
from kvik.network.filters import table
from kvik.network.filters.match import match
from kvik.network.filters.table import FAMILY, TABLE
from kvik.network.filters.variables import ALLOWED, KEPT, set_name

__all__ = ["KEEP", "NAMES_MAX", "Place", "Resolver", "check_name", "find_place", "lapse", "name_servers", "redirects"]

NAMES_MAX = 256
KEEP = 60  # seconds
SLACK = 5  # seconds between an answer and the machine's first packet
PORT_TRIES = 3
_NAT_TABLE = {"family": "inet", "name": "kvik_names"}
_NAT = {"family": "inet", "table": "kvik_names"}
_REDIRECTS = "resolver_ports"  # interface and MAC -> port
_TAPS = "named_taps"
_MARK = 1 << 24  # a bit that the usual users of marks (tailscale, Cilium, kube-proxy) leave alone
_BEFORE_FILTERS, _REDIRECT, _AFTER = -311, -101, -99
_PAIR = ["ifname", "ether_addr"]
_NOBODY4, _NOBODY6 = "127.0.0.1", "::1"  # as a gateway that there is not: neither comes or goes by a wire
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_SERVER = re.compile(r"^\s*nameserver\s+(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a listed machine finds the host: `interface` has the gateway's addresses."""

    interface: str
    four: Sequence[str]
    six: Sequence[str]  # link-local ones among them

    @property
    def variables(self) -> dict[str, Sequence[str]]:
        return {"GATEWAY": self.four or [_NOBODY4], "GATEWAY6": self.six or [_NOBODY6]}


def find_place(device: str, gateways: Sequence[str] = ()) -> Place:
    """Of a tap: its bridge's addresses, or the interface of the host that has the first of `gateways`.
    ConfigError, HostError."""
    with Netlink() as netlink:
        index = netlink.link(device).master
        if gateways:
            found = [one.index for one in netlink.addresses() if str(one.interface.ip) == gateways[0]]
            index = found[0] if found else 0
        addresses = [one.interface.ip for one in netlink.addresses(index)] if index else []
        name = next((link.name for link in netlink.links() if link.index == index), "")
    if not addresses:
        raise ConfigError(
            f"an allow-list by name needs an address of this host on the bridge of {device}, which has none"
            if not gateways
            else f"no interface of this host has the address {gateways[0]}, which is to answer DNS for {device}",
            remedy="put the machine on a network with NAT, or give the filter a parameter GATEWAY",
        )
    four, six = ([str(one) for one in addresses if one.version == version] for version in (4, 6))
    return Place(name, list(gateways) or four, six)


def check_name(name: str) -> str:
    """A DNS name in lower case, without a dot at its end (RFC 1035, 2.3.4). ConfigError."""
    plain = name.lower().removesuffix(".")
    if len(plain) > 253 or not all(_LABEL.fullmatch(label) for label in plain.split(".")):
        raise ConfigError(f"{name[:80]!r} is not a DNS name", remedy="write names such as example.org")
    with suppress(ValueError):
        ipaddress.ip_address(plain)
        raise ConfigError(f"{name!r} is an address, not a name")
    return plain


def name_servers(path: Path = Path("/etc/resolv.conf")) -> list[str]:
    """The host's own (resolv.conf(5)); at most three, as the resolver library takes."""
    text = (files.try_read_file(path, limit=1 << 16) or b"").decode(errors="replace")
    found = []
    for word in _SERVER.findall(text):
        with suppress(ValueError):
            found.append(str(ipaddress.ip_address(word)))
    return found[:3]


def configuration(
    device: str,
    place: Place,
    port: int,
    names: Sequence[str],
    servers: Sequence[str],
    *,
    pid_file: Path,
    keep: float,
) -> str:
    """dnsmasq(8), at this port of the place. Nothing is cached, so that every answer passes through the sets."""
    sets = ",".join(f"{family}#{FAMILY}#{TABLE}#{set_name(value, device)}" for family, value in ALLOWED.items())
    lines = [
        "# made by kvik; changes are lost",
        f"interface={place.interface}",
        "except-interface=lo",
        f"port={port}",
        "bind-dynamic",  # IPv6 addresses are there a moment after the interface, when nobody else has claimed them
        "no-resolv",
        "no-hosts",
        "cache-size=0",
        f"max-ttl={math.ceil(keep)}",
        f"user={_user()}",
        f"pid-file={pid_file}",
    ]
    for name in names:
        lines += [f"server=/{name}/{server}" for server in servers]
        lines.append(f"nftset=/{name}/{sets}")
    return "\n".join([*lines, ""])


def _user() -> str:
    for name in ("dnsmasq", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return "root"


def lapse(devices: Sequence[str], keep: float = KEEP) -> None:
    """What the names of these interfaces' machines resolved to is from now on kept, for `keep` seconds. HostError.

    Element by element: what dnsmasq adds meanwhile stays where it is.
    """
    commands: list[nftables.Command] = []
    for device in devices:
        for family, value in ALLOWED.items():
            allowed, kept = set_name(value, device), set_name(KEPT[family], device)
            found = nftables.run([{"list": {"set": {"family": FAMILY, "table": TABLE, "name": allowed}}}])
            for address in found[0]["set"].get("elem", []):
                again = {"elem": {"val": address, "timeout": math.ceil(keep + min(keep, SLACK))}}
                # An element keeps the timeout it was made with: out and in again.
                commands += [table.add("element", name=kept, elem=[address])]
                commands += [table.delete("element", name=kept, elem=[address])]
                commands += [table.add("element", name=kept, elem=[again])]
                commands += [table.delete("element", name=allowed, elem=[address])]
    nftables.run(commands)


def redirects() -> set[tuple[str, str]]:
    """The host's interfaces and MACs whose DNS the kernel leads to a resolver of their own. HostError."""
    try:
        found = nftables.run([{"list": {"map": {**_NAT, "name": _REDIRECTS}}}])
    except HostError as error:
        if error.errno != errno.ENOENT:
            raise
        return set()
    return {(key["concat"][0], key["concat"][1]) for key, _ in found[0]["map"].get("elem", [])}


class Resolver:
    """The one of an interface's machine. Methods block."""

    def __init__(self, directory: Path, device: str, mac: str, keep: float = KEEP) -> None:
        self.device = device
        self.mac = mac
        self.keep = keep
        self.config_file = directory / f"{device}.names.conf"
        self.pid_file = directory / f"{device}.names.pid"

    def start(self, place: Place, names: Sequence[str], servers: Sequence[str]) -> None:
        """Answer for these names, in place of what answered before; the same one goes on if it would be told the same.
        HostError, ConfigError, OperationFailed."""
        if not servers:
            raise ConfigError(
                "no name server is known for the allowed names",
                remedy="name one in /etc/resolv.conf, or in a parameter DNSSERVER of the filter",
            )
        program = process.find_program("dnsmasq")
        if program is None:
            raise MissingPackages(
                "an allow-list by name needs dnsmasq, which is not installed",
                packages=("dnsmasq-base",),
                command=how_to_install("dnsmasq-base"),
            )
        before = self._interface()
        port = self._running(place, names, servers)
        if port is None:
            port = self._launch(program, place, names, servers)
        try:
            nftables.run(self._redirect(place, port, before))
        except BaseException:
            self.stop()
            raise

    def _running(self, place: Place, names: Sequence[str], servers: Sequence[str]) -> int | None:
        """The port of one that was told the same, and runs."""
        text = (files.try_read_file(self.config_file, limit=1 << 20) or b"").decode(errors="replace")
        said = re.search(r"^port=(\d{1,5})$", text, re.MULTILINE)
        handle = self.find() if said else None
        if said is None or handle is None:
            return None
        handle.close()
        port = int(said[1])
        told = configuration(self.device, place, port, names, servers, pid_file=self.pid_file, keep=self.keep)
        return port if text == told else None

    def _launch(self, program: str, place: Place, names: Sequence[str], servers: Sequence[str]) -> int:
        self._end()
        files.ensure_directory(self.config_file.parent)
        for attempt in range(PORT_TRIES):
            port = _free_port([*place.four, *place.six])
            text = configuration(self.device, place, port, names, servers, pid_file=self.pid_file, keep=self.keep)
            files.atomic_write(self.config_file, text.encode(), durable=False)
            result = tools.run([program, f"--conf-file={self.config_file}"], timeout=10)
            if result.code == 0:
                break
            if attempt == PORT_TRIES - 1:  # else somebody else may have taken the port meanwhile
                self._forget()
                raise OperationFailed(f"the resolver of {self.device} did not start: {result.message[-300:]}")
        return port

    def stop(self) -> None:
        """Harmless if there is none."""
        self._end()
        self._lead_nobody()
        self._forget()

    def _lead_nobody(self) -> None:
        """Take away the redirection to the port of our file, and the mark; what is not there is no matter."""
        interface = self._interface()
        gone = [{**table.place(_TAPS), "elem": [self.device]}]
        if interface:
            gone.append({**_NAT, "name": _REDIRECTS, "elem": [_pair(interface, self.mac)]})
        for element in gone:
            try:
                nftables.run([{"delete": {"element": element}}])
            except HostError as error:
                if error.errno != errno.ENOENT:
                    raise

    def _interface(self) -> str:
        """The host's interface that our file tells of, or ""."""
        text = (files.try_read_file(self.config_file, limit=1 << 20) or b"").decode(errors="replace")
        found = re.search(r"^interface=(\S+)$", text, re.MULTILINE)
        return found[1] if found is not None else ""

    def _redirect(self, place: Place, port: int, before: str) -> list[nftables.Command]:
        """DNS of this tap and MAC to our port, whatever port it had, at whatever interface `before`.
        One transaction: without a redirection the machine would ask the network's own DNS."""
        key = {"concat": [{"meta": {"key": "iifname"}}, {"payload": {"protocol": "ether", "field": "saddr"}}]}
        resolver = {"map": {"key": key, "data": f"@{_REDIRECTS}"}}
        dns = {"payload": {"protocol": "th", "field": "dport"}}
        mark: dict[str, Any] = {"meta": {"key": "mark"}}
        is_marked = match({"&": [mark, _MARK]}, _MARK)
        rule = [
            is_marked,
            match({"meta": {"key": "l4proto"}}, {"set": [6, 17]}),
            match(dns, 53),
            {"redirect": {"port": resolver}},
        ]
        unmark = {"mangle": {"key": mark, "value": {"&": [mark, 0xFFFFFFFF ^ _MARK]}}}
        hook = {"hook": "prerouting", "policy": "accept"}
        gone = redirects() & {(place.interface, self.mac), (before, self.mac)}
        old = [{"delete": {"element": {**_NAT, "name": _REDIRECTS, "elem": [_pair(*pair)]}}} for pair in sorted(gone)]
        return [
            *self._mark(mark),
            {"add": {"table": _NAT_TABLE}},
            {"add": {"map": {**_NAT, "name": _REDIRECTS, "type": _PAIR, "map": "inet_service"}}},
            {"add": {"chain": {**_NAT, "name": "dns", "type": "nat", "prio": _REDIRECT, **hook}}},
            {"flush": {"chain": {**_NAT, "name": "dns"}}},
            {"add": {"rule": {**_NAT, "chain": "dns", "expr": rule}}},
            {"add": {"chain": {**_NAT, "name": "unmark", "type": "filter", "prio": _AFTER, **hook}}},
            {"flush": {"chain": {**_NAT, "name": "unmark"}}},
            {"add": {"rule": {**_NAT, "chain": "unmark", "expr": [is_marked, unmark]}}},
            *old,
            {"add": {"element": {**_NAT, "name": _REDIRECTS, "elem": [[_pair(place.interface, self.mac), port]]}}},
        ]

    def _mark(self, mark: dict[str, Any]) -> list[nftables.Command]:
        """All that comes from our tap, and from no other port of any bridge."""
        hook = {"type": "filter", "hook": "prerouting", "prio": _BEFORE_FILTERS, "policy": "accept"}
        set_mark = {"mangle": {"key": mark, "value": {"|": [mark, _MARK]}}}
        return [
            {"add": {"table": {"family": FAMILY, "name": TABLE}}},
            table.add("set", name=_TAPS, type="ifname"),
            table.add("chain", name="names", **hook),
            table.flush("names"),
            table.add("rule", chain="names", expr=[match({"meta": {"key": "iifname"}}, f"@{_TAPS}"), set_mark]),
            table.add("element", name=_TAPS, elem=[self.device]),
        ]

    def find(self) -> process.ProcessHandle | None:
        """The process with our file, if the pid file still tells of it."""
        with suppress(HostError, ValueError):
            pid = int(files.try_read_file(self.pid_file, limit=64) or b"0")
            stat = process.read_stat(pid) if pid > 0 else None
            found = process.find(pid, stat.start_time) if stat is not None else None
            if found is not None:
                with suppress(OSError):
                    argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    if os.fsencode(f"--conf-file={self.config_file}") in argv:
                        return found
                found.close()
        return None

    def _end(self) -> None:
        found = self.find()
        if found is not None:
            with found:
                found.terminate(2.0)

    def _forget(self) -> None:
        for path in (self.config_file, self.pid_file):
            files.remove_file(path, durable=False)


def _pair(name: str, mac: str) -> dict[str, list[str]]:
    return {"concat": [name, mac]}


def _free_port(addresses: Sequence[str]) -> int:
    """Free for UDP and TCP at this moment, at the first of these. The others are as free, or dnsmasq says so."""
    address = addresses[0]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for _ in range(16):
        with socket.socket(family, socket.SOCK_DGRAM) as udp, socket.socket(family) as tcp:
            try:
                udp.bind(("" if ":" in address else address, 0))
                tcp.bind(("" if ":" in address else address, udp.getsockname()[1]))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise HostError(f"cannot listen on {address}: {error.strerror}", errno=error.errno or 0) from error
                continue
            return int(udp.getsockname()[1])
    raise HostError(f"no port of {address} is free", errno=errno.EADDRINUSE)
