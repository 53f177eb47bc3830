"""Names of machines on the host itself: NAME.DOMAIN of networks that have a <domain> is asked of their own dnsmasq.

    the host's programs --getaddrinfo--> the host's resolver --DOMAIN alone--> the network's dnsmasq
                                                  | all else: as before

How depends on who answers the host's questions. Nothing of the host's is edited: what is written is one file of our own
where that resolver looks for such files, or, with systemd-resolved, settings of the network's bridge in its memory,
which go with the bridge. A host whose programs ask a server elsewhere (a plain /etc/resolv.conf) has nobody who could
tell one domain from another: it is said, and nothing is done.

| resolver | what is done | made known by |
|---|---|---|
| systemd-resolved | `resolvectl dns`, `domain ~DOMAIN`, `default-route no` of the bridge | itself |
| NetworkManager with dns=dnsmasq | /etc/NetworkManager/dnsmasq.d/kvik.conf | `nmcli general reload dns-full` |
| dnsmasq on a loopback address | /etc/dnsmasq.d/kvik.conf | its service is restarted |
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from kvik.conf.network import Network
from kvik.conf.network_addresses import Subnet, ip_interface
from kvik.errors import ConfigError, KvikError, OperationInvalid, OperationUnsupported
from kvik.host import files, tools
from kvik.host.process import find_program
from kvik.network.egress import check_name, name_servers
from kvik.paths import Paths

__all__ = ["HostNames", "Report", "Zone", "zone_of"]

logger = logging.getLogger(__name__)

MARK = "# Made by kvik (kvik dns enable): changes are lost. 'kvik dns disable' takes it away."
ENABLED = "host-names"  # in <config>: which resolver was told
RELOAD_WAIT = 20.0  # seconds
_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Zone:
    """One network's names. `servers` are empty where the host cannot ask for them, and `why` says the reason."""

    network: str
    domain: str = ""
    bridge: str = ""
    servers: Sequence[str] = ()
    subnets: Sequence[Subnet] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    enabled: bool
    resolver: str  # "" for none that could be told
    file: str  # ours, or "" for none
    zones: Sequence[Zone]


def zone_of(document: Network, *, active: bool) -> Zone:
    """Of a network that this host made."""

    def no(why: str, domain: str = "") -> Zone:
        return Zone(document.name, domain, why=why)

    domain = document.domain.name if document.domain is not None else ""
    if not document.owns_bridge:
        return no("its bridge or device is not its own")
    if not domain:
        return no("it has no <domain name=.../>")
    try:
        domain = check_name(domain)
    except ConfigError as error:
        return no(error.message)
    if document.dns is not None and document.dns.enable is False:
        return no("its DNS is off", domain)
    if document.domain is not None and document.domain.local_only is False:
        return no("localOnly='no': it would ask the host for what it does not know, and the host it", domain)
    if not active:
        return no("it is not active", domain)
    interfaces = [ip_interface(ip) for ip in document.ips if ip.address is not None]
    if not interfaces:
        return no("it has no address", domain)
    return Zone(
        document.name,
        domain,
        document.bridge_name or "",
        [str(one.ip) for one in interfaces],
        [one.network for one in interfaces],
    )


class _Resolved:
    """systemd-resolved(8): settings of a link, which are gone with it."""

    name = "systemd-resolved"
    path: Path | None = None

    def __init__(self, root: Path) -> None:
        self.root = root

    def is_used(self) -> bool:
        """Its stub is the host's name server, or its NSS module is asked."""
        if not (self.root / "run/systemd/resolve").is_dir():
            return False
        switch = (files.try_read_file(self.root / "etc/nsswitch.conf", limit=_LIMIT) or b"").decode(errors="replace")
        asked = re.search(r"^hosts:.*\bresolve\b", switch, re.MULTILINE)
        stubs = {"127.0.0.53", "127.0.0.54"}
        return asked is not None or bool(stubs & {*name_servers(self.root / "etc/resolv.conf")})

    def tell(self, zones: Sequence[Zone]) -> None:
        for zone in zones:
            self._call("dns", zone.bridge, *zone.servers)
            self._call("domain", zone.bridge, f"~{zone.domain}")  # for questions below it, and not as a search domain
            self._call("default-route", zone.bridge, "no")
            self._call("dnssec", zone.bridge, "no")  # nobody above has signed it

    def forget(self, zones: Sequence[Zone]) -> None:
        for zone in zones:
            self._call("revert", zone.bridge)

    def _call(self, *words: str) -> None:
        if self.root == Path("/"):
            tools.run(["resolvectl", *words], timeout=RELOAD_WAIT)


class _Dnsmasq:
    """A dnsmasq that reads a directory, which nobody but its owner need know that we write into."""

    def __init__(self, root: Path, name: str, directory: str, reload: Sequence[Sequence[str]]) -> None:
        self.root, self.name, self.directory, self.reload = root, name, root / directory, reload
        self.path: Path | None = self.directory / "kvik.conf"

    def is_used(self) -> bool:
        """It runs, with that directory, and the host asks a loopback address."""
        asked = [ip_address(server).is_loopback for server in name_servers(self.root / "etc/resolv.conf")]
        return any(asked) and self.directory.is_dir() and self._runs()

    def _runs(self) -> bool:
        wanted = str(self.directory).encode()
        words = files.try_read_file(self.root / "etc/dnsmasq.conf", limit=_LIMIT) or b""
        named = re.search(rb"^conf-dir=" + re.escape(wanted) + rb"(,|/|\s|$)", words, re.MULTILINE)
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    argv = (entry / "cmdline").read_bytes().split(b"\0")
                    if argv[0].rpartition(b"/")[2] == b"dnsmasq":
                        own = re.compile(rb"(--conf-dir=|-7)?" + re.escape(wanted) + rb"/?(,.*)?")
                        if any(own.fullmatch(word) for word in argv[1:]):
                            return True
                        if named and not any(word.startswith((b"--conf-file", b"-C")) for word in argv):
                            return True
        return False

    def tell(self, zones: Sequence[Zone]) -> None:
        assert self.path is not None
        lines = [MARK]
        for zone in zones:
            lines += [f"server=/{zone.domain}/{server}" for server in zone.servers]
            lines += [f"rebind-domain-ok=/{zone.domain}/"]
            lines += [f"rev-server={subnet},{zone.servers[0]}" for subnet in zone.subnets]
        text = "\n".join([*lines, ""]).encode()
        before = files.try_read_file(self.path, limit=_LIMIT)
        if before == text:
            return
        if before is not None and not before.startswith(MARK.encode()):
            raise OperationInvalid(f"{self.path} is there and is not kvik's", remedy="move it away first")
        files.atomic_write(self.path, text, mode=0o644)
        self._reload()

    def forget(self, zones: Sequence[Zone]) -> None:
        assert self.path is not None
        if (files.try_read_file(self.path, limit=_LIMIT) or b"").startswith(MARK.encode()):
            files.remove_file(self.path)
            self._reload()

    def _reload(self) -> None:
        if self.root != Path("/"):
            return
        for argv in self.reload:
            if find_program(argv[0]) is not None and (argv[0] != "systemctl" or Path("/run/systemd/system").is_dir()):
                tools.run(argv, timeout=RELOAD_WAIT)
                return
        raise OperationUnsupported(
            f"nothing is installed that has {self.name} read {self.path}", remedy=f"restart {self.name} yourself"
        )


Resolver = _Resolved | _Dnsmasq


class HostNames:
    """One host's. Methods block; they may be called from any thread."""

    def __init__(self, paths: Paths) -> None:
        # The host's own files lie beside ours: below / or below KVIK_ROOT, and then no running resolver is touched.
        self.root = Path(paths.config_name.removesuffix("/etc/kvik") or "/") if paths.scope == "system" else None
        self._flag = paths.config / ENABLED
        self._lock = threading.Lock()

    def _resolvers(self) -> Sequence[Resolver]:
        root = self.root or Path("/")
        return (
            _Resolved(root),
            _Dnsmasq(
                root,
                "NetworkManager's dnsmasq",
                "etc/NetworkManager/dnsmasq.d",
                [["nmcli", "general", "reload", "dns-full"]],
            ),
            _Dnsmasq(
                root,
                "dnsmasq",
                "etc/dnsmasq.d",
                [["systemctl", "try-restart", "dnsmasq.service"], ["service", "dnsmasq", "restart"]],
            ),
        )

    def _told(self) -> Resolver | None:
        """Who was told, while it is enabled."""
        name = (files.try_read_file(self._flag, limit=256) or b"").decode(errors="replace").strip()
        return next((one for one in self._resolvers() if one.name == name), None)

    def status(self, zones: Sequence[Zone]) -> Report:
        if self.root is None:
            return Report(False, "", "", zones)
        told = self._told()
        used = told or next((one for one in self._resolvers() if one.is_used()), None)
        path = str(used.path) if used is not None and used.path is not None and used.path.exists() else ""
        return Report(told is not None, used.name if used is not None else "", path, zones)

    def enable(self, zones: Iterable[Zone]) -> str:
        """Tell the host's resolver, now and whenever networks come and go; its name. What fails leaves nothing.
        OperationUnsupported, OperationInvalid, HostError."""
        if self.root is None:
            raise OperationUnsupported(
                "a session's networks are not reachable from the host",
                remedy="names of machines are for the system's networks: kvik -c kvik:///system dns enable",
            )
        with self._lock:
            used = next((one for one in self._resolvers() if one.is_used()), None)
            if used is None:
                raise OperationUnsupported(
                    "this host has no resolver that could ask for one domain elsewhere",
                    remedy="install systemd-resolved, or use 'kvik ssh NAME' and 'kvik ip NAME', which need none",
                )
            before = self._told()
            if before is not None and before.name != used.name:  # the host has another resolver by now
                before.forget([])
            asked = [zone for zone in zones if zone.servers]
            try:
                used.tell(asked)
                files.ensure_directory(self._flag.parent)
                files.atomic_write(self._flag, f"{used.name}\n".encode())
            except BaseException:
                with suppress(KvikError):
                    used.forget(asked)
                raise
            return used.name

    def disable(self, zones: Iterable[Zone]) -> bool:
        """Take away all that was told; False if nothing was. HostError."""
        with self._lock:
            told = self._told()
            if told is None:
                return False
            told.forget([zone for zone in zones if zone.servers])
            files.remove_file(self._flag)
            return True

    def refresh(self, zones: Iterable[Zone]) -> None:
        """A network came or went. Never raises."""
        with self._lock:
            try:
                told = self._told()
                if told is not None:
                    told.tell([zone for zone in zones if zone.servers])
            except KvikError as error:
                logger.warning("names of machines are not known to the host's resolver: %s", error)
