"""Allow-lists by name: a machine reaches what certain names resolve to, and nothing else.

    the machine --DNS to the gateway--> nftables (by its MAC) --> a dnsmasq of its own --> name servers
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
from pathlib import Path

from kvik.errors import ConfigError, HostError, MissingPackages, OperationFailed
from kvik.host import files, nftables, process, tools
from kvik.host.packages import how_to_install
from kvik.network.filters import table
from kvik.network.filters.table import FAMILY, TABLE
from kvik.network.filters.variables import ALLOWED, KEPT, set_name

__all__ = ["KEEP", "NAMES_MAX", "Resolver", "check_name", "lapse", "name_servers", "redirects"]

NAMES_MAX = 256
KEEP = 60  # seconds
SLACK = 5  # seconds between an answer and the machine's first packet
PORT_TRIES = 3
_NAT_TABLE = {"family": "inet", "name": "kvik_names"}
_NAT = {"family": "inet", "table": "kvik_names"}
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_SERVER = re.compile(r"^\s*nameserver\s+(\S+)", re.MULTILINE)


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
    listen: tuple[str, int],
    names: Sequence[str],
    servers: Sequence[str],
    pid_file: Path,
    *,
    keep: float,
) -> str:
    """dnsmasq(8), at this address and port. Nothing is cached, so that every answer passes through the sets."""
    sets = ",".join(f"{family}#{FAMILY}#{TABLE}#{set_name(value, device)}" for family, value in ALLOWED.items())
    lines = [
        "# made by kvik; changes are lost",
        f"listen-address={listen[0]}",
        f"port={listen[1]}",
        "bind-interfaces",
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


def redirects() -> set[str]:
    """The MAC addresses whose DNS the kernel leads to a resolver of their own. HostError."""
    try:
        found = nftables.run([{"list": {"map": {**_NAT, "name": "resolvers"}}}])
    except HostError as error:
        if error.errno != errno.ENOENT:
            raise
        return set()
    return {mac for mac, _ in found[0]["map"].get("elem", [])}


class Resolver:
    """The one of an interface's machine. Methods block."""

    def __init__(self, directory: Path, device: str, mac: str, keep: float = KEEP) -> None:
        self.device = device
        self.mac = mac
        self.keep = keep
        self.config_file = directory / f"{device}.names.conf"
        self.pid_file = directory / f"{device}.names.pid"

    def start(self, gateway: str, names: Sequence[str], servers: Sequence[str]) -> None:
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
        port = self._running(gateway, names, servers)
        if port is None:
            port = self._launch(program, gateway, names, servers)
        try:
            nftables.run(self._redirect(port))
        except BaseException:
            self.stop()
            raise

    def _running(self, gateway: str, names: Sequence[str], servers: Sequence[str]) -> int | None:
        """The port of one that was told the same, and runs."""
        text = (files.try_read_file(self.config_file, limit=1 << 20) or b"").decode(errors="replace")
        said = re.search(r"^port=(\d{1,5})$", text, re.MULTILINE)
        handle = self.find() if said else None
        if said is None or handle is None:
            return None
        handle.close()
        port = int(said[1])
        told = configuration(self.device, (gateway, port), names, servers, self.pid_file, keep=self.keep)
        return port if text == told else None

    def _launch(self, program: str, gateway: str, names: Sequence[str], servers: Sequence[str]) -> int:
        self._end()
        files.ensure_directory(self.config_file.parent)
        for attempt in range(PORT_TRIES):
            port = _free_port(gateway)
            text = configuration(self.device, (gateway, port), names, servers, self.pid_file, keep=self.keep)
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
        self._forget()
        try:
            nftables.run([{"delete": {"element": {**_NAT, "name": "resolvers", "elem": [self.mac]}}}])
        except HostError as error:
            if error.errno != errno.ENOENT:
                raise

    def _redirect(self, port: int) -> list[nftables.Command]:
        """DNS of this MAC to our port, whatever port it had: as often as wanted."""
        resolver = {"map": {"key": {"payload": {"protocol": "ether", "field": "saddr"}}, "data": "@resolvers"}}
        dns = {"payload": {"protocol": "th", "field": "dport"}}
        rule = [
            {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": {"set": [6, 17]}}},
            {"match": {"op": "==", "left": dns, "right": 53}},
            {"redirect": {"port": resolver}},
        ]
        hook = {"type": "nat", "hook": "prerouting", "prio": -101, "policy": "accept"}
        with suppress(HostError):  # of an earlier port; no element, no table: then there is nothing to take away
            nftables.run([{"delete": {"element": {**_NAT, "name": "resolvers", "elem": [self.mac]}}}])
        return [
            {"add": {"table": _NAT_TABLE}},
            {"add": {"map": {**_NAT, "name": "resolvers", "type": "ether_addr", "map": "inet_service"}}},
            {"add": {"chain": {**_NAT, "name": "dns", **hook}}},
            {"flush": {"chain": {**_NAT, "name": "dns"}}},
            {"add": {"rule": {**_NAT, "chain": "dns", "expr": rule}}},
            {"add": {"element": {**_NAT, "name": "resolvers", "elem": [[self.mac, port]]}}},
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


def _free_port(address: str) -> int:
    """Free for UDP and TCP at this moment."""
    for _ in range(16):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as tcp:
            try:
                udp.bind((address, 0))
                tcp.bind((address, udp.getsockname()[1]))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise HostError(f"cannot listen on {address}: {error.strerror}", errno=error.errno or 0) from error
                continue
            return int(udp.getsockname()[1])
    raise HostError(f"no port of {address} is free", errno=errno.EADDRINUSE)
