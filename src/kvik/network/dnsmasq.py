"""A network's DHCP and DNS: one dnsmasq, its configuration, its leases (dnsmasq(8)).

Everything it is told is in one file that root writes and it reads before it drops its privileges; a change is a new
file and a restart, which takes some milliseconds and keeps the leases. It goes to the background by itself once its
sockets are bound: that its first process ends well means that it serves.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import pwd
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvik.conf.network import DhcpHost, DhcpRange, Dns, Lease, Network, NetworkIp
from kvik.conf.network_addresses import Subnet, ip_interface
from kvik.errors import ConfigUnsupported, HostError, MissingPackages, OperationFailed
from kvik.host import files, process, tools
from kvik.host.packages import how_to_install

__all__ = ["Dnsmasq", "LeaseEntry", "configuration", "is_needed"]

PROGRAM = "dnsmasq"
PACKAGE = "dnsmasq-base"
START_WAIT = 10.0  # seconds until it serves or has said why not
STOP_WAIT = 2.0
MAX_LEASES = 65536
LEASES_LIMIT = 16 << 20  # bytes of its file that are read
USERS = ("dnsmasq", "nobody")
# Options that an administrator may hand through: what they do stays within what the network does anyway. Others, such
# as dhcp-script or conf-file, would run programs or read files as root.
OPTIONS = frozenset(
    """
    address all-servers auth-ttl bogus-nxdomain bogus-priv cache-size cname dhcp-boot dhcp-broadcast dhcp-ignore
    dhcp-ignore-names dhcp-mac dhcp-match dhcp-name-match dhcp-option dhcp-option-force dhcp-option-pxe
    dhcp-rapid-commit dhcp-reply-delay dhcp-sequential-ip dhcp-userclass dhcp-vendorclass domain-needed expand-hosts
    filterwin2k host-record interface-name local local-ttl localise-queries log-dhcp log-queries max-cache-ttl
    max-ttl min-cache-ttl mx-host naptr-record neg-ttl no-negcache pxe-prompt pxe-service ptr-record quiet-dhcp
    quiet-dhcp6 ra-param rebind-domain-ok rebind-localhost-ok server srv-host stop-dns-rebind synth-domain
    txt-record
    """.split()  # noqa: SIM905
)


def is_needed(document: Network) -> bool:
    """Whether there is anything to serve: an address to serve on, and DHCP or DNS not switched off."""
    if not document.owns_bridge or not any(ip.address for ip in document.ips):
        return False
    return _serves_dns(document) or _advertises(document) or any(ip.dhcp or ip.tftp for ip in document.ips)


def _serves_dns(document: Network) -> bool:
    return document.dns is None or document.dns.enable is not False


def _advertises(document: Network) -> bool:
    return any(ip_interface(ip).version == 6 for ip in document.ips if ip.address is not None)


# Configuration --------------------------------------------------------------------------------------------------


def _word(text: str, what: str) -> str:
    """Text that may stand between the commas of a line. Raises ConfigUnsupported for what would end it."""
    if not text or not text.isprintable() or any(char in text for char in ',"#\\ '):
        raise ConfigUnsupported(
            f"{what} {text!r} cannot be told to dnsmasq", remedy="leave out spaces, quotes, , # and \\"
        )
    return text


def _address(text: str | None) -> str:
    return str(ipaddress.ip_address(text or ""))


def _quoted(text: str, what: str) -> str:
    if not text.isprintable() or any(char in text for char in '"\\'):
        raise ConfigUnsupported(f"{what} {text!r} cannot be told to dnsmasq", remedy="leave out quotes and \\")
    return f'"{text}"'


def _path(path: Path) -> str:
    text = str(path)
    return text if re.fullmatch(r"[A-Za-z0-9/._+=-]+", text) else _quoted(text, "path")


def configuration(document: Network, *, pid_file: Path, lease_file: Path, user: str) -> str:
    """The file's text. Raises ConfigUnsupported. All of dnsmasq's options that we use are here."""
    lines = [
        f"# Made by kvik for network {document.name!r}: changes are lost. Change the network: kvik net-edit",
        f"pid-file={_path(pid_file)}",
        f"user={user}",
        "strict-order",
        f"interface={_word(document.bridge_name or '', 'bridge')}",
        "except-interface=lo",
        "bind-dynamic",  # only this bridge's addresses, so that any number of networks can have port 53
        "no-hosts" if not _serves_dns(document) else "local-service",
        *_dns(document),
        *_dhcp(document, lease_file),
        *_tftp(document),
        *_options(document),
    ]
    return "\n".join(lines) + "\n"


def _dns(document: Network) -> Iterator[str]:
    dns = document.dns or Dns()
    domain = document.domain
    if domain is not None:
        yield f"domain={_word(domain.name, 'domain')}"
        yield "expand-hosts"
    if not _serves_dns(document):
        yield "port=0"
        return
    # What is the network's own is answered by the network, whatever is asked about it. Else a question for a machine's
    # AAAA, of which there is none, goes outside, and is lost or REFUSED there: then `nslookup web` fails.
    if domain is not None and domain.local_only is not False:
        yield f"local=/{domain.name}/"
    if dns.forward_plain_names is not True:
        yield "domain-needed"  # for addresses; it holds without name servers too, which local=// does not
        yield "local=//"
    if dns.forwarders:
        if any(forwarder.domain is None for forwarder in dns.forwarders):
            yield "no-resolv"
        for forwarder in dns.forwarders:
            place = f"/{_word(forwarder.domain, 'domain')}/" if forwarder.domain else ""
            yield f"server={place}{_address(forwarder.addr) if forwarder.addr else '#'}"
    elif document.forward is None:
        yield "no-resolv"  # a network that reaches nothing outside asks nobody outside either
        for name in sorted({name for host in dns.hosts for name in host.hostnames if "." in name}):
            yield f"local=/{_word(name, 'name')}/"
    for ip in document.ips:
        if ip.local_ptr and ip.address is not None:
            yield from (f"local=/{zone}/" for zone in _reverse_zones(ip_interface(ip).network))
    for txt in dns.txts:
        yield f"txt-record={_word(txt.name, 'name')},{_quoted(txt.value, 'text')}"
    for srv in dns.srvs:
        name = f"_{_word(srv.service, 'service')}._{_word(srv.protocol, 'protocol')}"
        name += f".{_word(srv.domain, 'domain')}" if srv.domain else ""
        figures = [str(figure) for figure in (srv.port, srv.priority, srv.weight) if figure is not None]
        yield "srv-host=" + ",".join([name, *([_word(srv.target, "target"), *figures] if srv.target else [])])
    for host in dns.hosts:
        names = [_word(name, "name") for name in host.hostnames]
        if domain is not None:  # records, unlike hosts files, are not completed with the domain
            names += [f"{name}.{domain.name}" for name in names if "." not in name]
        if names:
            yield "host-record=" + ",".join([*names, _address(host.ip)])


def _reverse_zones(subnet: Subnet) -> list[str]:
    """The zones of in-addr.arpa or ip6.arpa that make up the subnet."""
    step = 8 if subnet.version == 4 else 4  # bits in a label
    length = min(subnet.max_prefixlen, -(-subnet.prefixlen // step) * step)
    zones = []
    for part in subnet.subnets(new_prefix=length) if length > subnet.prefixlen else [subnet]:
        labels = part.network_address.reverse_pointer.split(".")
        zones.append(".".join(labels[(part.max_prefixlen - length) // step :]))
    return zones


def _dhcp(document: Network, lease_file: Path) -> Iterator[str]:
    served: list[tuple[NetworkIp, Subnet]] = [(ip, ip_interface(ip).network) for ip in document.ips if ip.address]
    with_dhcp = [(ip, subnet) for ip, subnet in served if ip.dhcp is not None]
    v6 = [(ip, subnet) for ip, subnet in served if subnet.version == 6]
    if not with_dhcp and not v6:
        return
    yield f"dhcp-leasefile={_path(lease_file)}"
    yield "dhcp-no-override"
    if with_dhcp:
        yield "dhcp-authoritative"  # nobody else serves this bridge: a client from elsewhere is told so at once
        yield "no-ping"  # the table of leases knows who has what; a ping would delay every first offer by 3 s
    leases = 0
    for ip, subnet in with_dhcp:
        assert ip.dhcp is not None
        for range_ in ip.dhcp.ranges:
            first, last = ipaddress.ip_address(range_.start), ipaddress.ip_address(range_.end)
            leases += min(int(last) - int(first) + 1, MAX_LEASES)
            yield f"dhcp-range={first},{last},{_size(subnet)}{_lease(range_.lease)}"
        if not ip.dhcp.ranges and ip.dhcp.hosts:
            yield f"dhcp-range={ip.address},static{',' + _size(subnet) if subnet.version == 6 else ''}"
            leases += len(ip.dhcp.hosts)
        for host in ip.dhcp.hosts:
            if ip.dhcp.ranges and not _in_ranges(host, ip.dhcp.ranges):
                leases += 1  # or who has a range's last address would keep it from the address reserved for it
            yield "dhcp-host=" + _host(host, subnet.version)
        if ip.dhcp.bootp is not None:
            server = ip.dhcp.bootp.server
            boot = [_word(ip.dhcp.bootp.file, "boot file"), *(["", _word(server, "server")] if server else [])]
            yield "dhcp-boot=" + ",".join(boot)
    if leases:
        yield f"dhcp-lease-max={min(leases, MAX_LEASES)}"
    if document.forward is None:
        yield "dhcp-option=option:router"  # with nothing after it: no default route to where nothing is forwarded
    if not _serves_dns(document):
        yield "dhcp-option=option:dns-server"
    if document.mtu is not None:
        yield f"dhcp-option=option:mtu,{document.mtu.size}"
    if v6:
        yield "enable-ra"
        if document.forward is None:
            yield "ra-param=*,0,0"  # advertised, but as no way out (RFC 4861, 4.2: router lifetime 0)
        for ip, subnet in v6:
            if ip.dhcp is None or not (ip.dhcp.ranges or ip.dhcp.hosts):
                # ra-names: machines that make their address of their MAC have an AAAA record beside their lease's name.
                yield f"dhcp-range={subnet.network_address},ra-names,{subnet.prefixlen}"


def _in_ranges(host: DhcpHost, ranges: Sequence[DhcpRange]) -> bool:
    """A host without an address takes one of a range."""
    if not host.ip:
        return True
    address = int(ipaddress.ip_address(host.ip))
    return any(
        int(ipaddress.ip_address(item.start)) <= address <= int(ipaddress.ip_address(item.end)) for item in ranges
    )


def _size(subnet: Subnet) -> str:
    return str(subnet.netmask) if subnet.version == 4 else str(subnet.prefixlen)


def _lease(lease: Lease | None) -> str:
    if lease is None:
        return ""
    return f",{lease.seconds}" if lease.expiry else ",infinite"


def _host(host: DhcpHost, version: int) -> str:
    parts = []
    if host.id:
        parts.append(f"id:{_word(host.id, 'DHCP identifier')}")
    if host.mac:
        parts.append(_word(host.mac, "MAC address"))
    if host.ip:
        address = ipaddress.ip_address(host.ip)
        parts.append(f"[{address}]" if version == 6 else str(address))
    if host.name:
        parts.append(_word(host.name, "name"))
    return ",".join(parts) + _lease(host.lease)


def _tftp(document: Network) -> Iterator[str]:
    roots = {ip.tftp.root for ip in document.ips if ip.tftp is not None}
    if len(roots) > 1:
        raise ConfigUnsupported(f"network {document.name!r} has {len(roots)} TFTP directories; one is what is served")
    for root in roots:
        yield "enable-tftp"
        yield f"tftp-root={_path(Path(root))}"


def _options(document: Network) -> Iterator[str]:
    for option in document.dnsmasq_options.options if document.dnsmasq_options else []:
        line = option.value.strip()
        if not line.isprintable() or line.partition("=")[0].strip() not in OPTIONS:
            raise ConfigUnsupported(
                f"network {document.name!r}: dnsmasq option {line[:80]!r} is not handed through",
                path="/network/dnsmasq:options",
                remedy=f"options that are: {', '.join(sorted(OPTIONS))}",
            )
        yield line


# Leases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeaseEntry:
    """An address that is lent. `expiry` is seconds since the epoch, 0 for ever; what is not known is empty."""

    interface: str
    expiry: int
    address: str
    prefix: int
    mac: str = ""
    hostname: str = ""
    client_id: str = ""
    iaid: str = ""

    @property
    def version(self) -> int:
        return ipaddress.ip_address(self.address).version


def parse_leases(text: str, document: Network) -> list[LeaseEntry]:
    """dnsmasq's lease file: "EXPIRY MAC ADDRESS NAME CLIENT-ID" a line; after a "duid" line those of DHCPv6, with IAID
    and DUID in place of MAC and client id. Lines that are neither are left out: a guest chose some of the words."""
    subnets = [ip_interface(ip).network for ip in document.ips if ip.address is not None]
    found: list[LeaseEntry] = []
    for line in text.splitlines()[: 2 * MAX_LEASES]:
        fields = line.split(" ")
        if len(fields) != 5:
            continue
        expiry, who, where, name, client = fields
        try:
            address = ipaddress.ip_address(where)
            prefix = next((subnet.prefixlen for subnet in subnets if address in subnet), address.max_prefixlen)
            entry = LeaseEntry(
                interface=document.bridge_name or "",
                expiry=int(expiry),
                address=str(address),
                prefix=prefix,
                mac=who.lower() if address.version == 4 else _mac_of_duid(client),
                hostname="" if name == "*" else name,
                client_id="" if client == "*" else client,
                iaid=who if address.version == 6 else "",
            )
        except ValueError:
            continue
        found.append(entry)
    return found


def _mac_of_duid(duid: str) -> str:
    """The MAC address in a DUID that is made of one (RFC 8415, 11.2 and 11.4), or ""."""
    octets = duid.lower().split(":")
    if octets[:4] == ["00", "01", "00", "01"] and len(octets) == 14:  # by link-layer address plus time, Ethernet
        return ":".join(octets[8:])
    if octets[:4] == ["00", "03", "00", "01"] and len(octets) == 10:
        return ":".join(octets[4:])
    return ""


# The process ----------------------------------------------------------------------------------------------------


def _user() -> str:
    for name in USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return "root"


def _file_stem(name: str) -> str:
    """The network's name where dnsmasq takes it for a part of a path; one made of it where that would mean more (blanks
    and '#' begin a comment, quotes are taken away)."""
    if re.fullmatch(r"[A-Za-z0-9._+-]+", name):
        return name
    return "=" + hashlib.sha256(name.encode()).hexdigest()[:32]  # no name above has a '='


class Dnsmasq:
    """The dnsmasq of one network. Methods block; `directory` keeps its files across restarts of anybody."""

    def __init__(self, name: str, directory: Path, run: Path) -> None:
        self.name = name
        stem = _file_stem(name)
        self.config_file = directory / f"{stem}.conf"
        self.lease_file = directory / f"{stem}.leases"
        self.pid_file = run / f"{stem}.pid"
        self.handle: process.ProcessHandle | None = None

    def write(self, document: Network) -> bool:
        """Write the configuration; False if it is there already. Raises ConfigUnsupported, HostError."""
        text = configuration(document, pid_file=self.pid_file, lease_file=self.lease_file, user=_user()).encode()
        if files.try_read_file(self.config_file) == text:
            return False
        files.ensure_directory(self.config_file.parent)
        files.atomic_write(self.config_file, text, durable=False)
        return True

    def start(self) -> None:
        """Serve. Raises HostError (MissingPackages) with dnsmasq's own words if it does not."""
        program = process.find_program(PROGRAM)
        if program is None:
            raise MissingPackages(
                f"network {self.name!r} needs dnsmasq for DHCP and DNS, which is not installed",
                packages=(PACKAGE,),
                command=how_to_install(PACKAGE),
            )
        files.remove_file(self.pid_file, durable=False)
        result = tools.run([program, f"--conf-file={self.config_file}"], timeout=START_WAIT)
        if result.code != 0:
            words = result.message.splitlines()
            raise OperationFailed(f"dnsmasq of network {self.name!r} did not start: {' '.join(words)[-500:]}")
        self.handle = self.find()
        if self.handle is None:
            raise OperationFailed(f"dnsmasq of network {self.name!r} ended as soon as it had started")

    def find(self) -> process.ProcessHandle | None:
        """The one that serves, whoever started it; None if there is none."""
        with contextlib.suppress(HostError, ValueError):
            found = self._held(int(files.try_read_file(self.pid_file, limit=64) or b"0"))
            if found is not None:
                return found
        return None

    def _held(self, pid: int) -> process.ProcessHandle | None:
        """The process, if it is a dnsmasq with our file on its command line."""
        stat = process.read_stat(pid) if pid > 0 else None
        found = process.find(pid, stat.start_time) if stat is not None else None
        if found is None:
            return None
        with contextlib.suppress(OSError):
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if os.path.basename(argv[0]) == PROGRAM.encode() and self._argument in argv:  # noqa: PTH119 - bytes
                return found
        found.close()
        return None

    @property
    def _argument(self) -> bytes:
        return f"--conf-file={self.config_file}".encode()

    def stop(self) -> None:
        """End it and wait until it has ended; harmless if there is none."""
        handle = self.handle or self.find()
        self.handle = None
        if handle is not None:
            handle.terminate(STOP_WAIT)
            handle.close()
        files.remove_file(self.pid_file, durable=False)

    def stop_strays(self) -> int:
        """End every one that has our file: what a daemon left that was killed while it started one."""
        ended = 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (found := self._held(int(entry.name))) is not None:
                found.terminate(STOP_WAIT)
                found.close()
                ended += 1
        self.handle = None
        files.remove_file(self.pid_file, durable=False)
        return ended

    def leases(self, document: Network) -> list[LeaseEntry]:
        """What is lent now: nothing that has expired."""
        data = files.try_read_file(self.lease_file, limit=LEASES_LIMIT) or b""
        now = time.time()
        return [
            lease
            for lease in parse_leases(data.decode("utf-8", "replace"), document)
            if lease.expiry == 0 or lease.expiry > now
        ]

    def forget(self) -> None:
        """Remove its files: the network is gone for good."""
        for path in (self.config_file, self.lease_file, self.pid_file):
            files.remove_file(path, durable=False)
