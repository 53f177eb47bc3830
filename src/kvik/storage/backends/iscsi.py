"""Pools of type iscsi: a target that the kernel logs in to (open-iscsi); its logical units are the volumes.

The password of a CHAP secret goes into the target's node record, which only root reads, and goes with it at the logout:
iscsiadm would take it on its command line, where everybody sees it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

from kvik.conf.storage_pool import PoolSource, SourceDevice, SourceHost
from kvik.errors import ConfigUnsupported, HostError, InvalidArgument
from kvik.host.files import atomic_write, read_file
from kvik.storage import scsi_units
from kvik.storage.backend import Contents
from kvik.storage.devices import DeviceBackend
from kvik.storage.scsi_units import attribute, names_in
from kvik.storage.tool import call, missing

__all__ = ["Backend", "portal_of", "targets"]

PORT = 3260  # RFC 7143, 13.1
DEADLINE = 45.0  # seconds: a login's own timeouts are 15 and 30
NO_RECORD = 21  # iscsiadm(8), "EXIT STATUS": no records, targets, sessions or portals found
RECORDS = ("/etc/iscsi/nodes", "/var/lib/iscsi/nodes")  # where distributions keep node records
TARGETS_MAX = 4096
SYSFS = Path("/sys")


def portal_of(host: SourceHost) -> str:
    name = f"[{host.name}]" if ":" in host.name else host.name
    return f"{name}:{host.port or PORT}"


def targets(portal: str, interface: str = "default") -> list[tuple[str, str]]:
    """(portal with the group's tag, target) of what a portal offers. One line each, in iscsiadm's documented form:
    "ADDRESS:PORT,TAG TARGET"."""
    argv = ["iscsiadm", "--mode", "discovery", "--type", "sendtargets", "--portal", portal]
    done = call([*argv, "--interface", interface, "--op", "nonpersistent"], timeout=DEADLINE, check=False)
    if done.code not in (0, NO_RECORD):
        raise HostError(f"portal {portal} was not asked for its targets: {done.message}")
    if done.code == NO_RECORD and not (SYSFS / "class/iscsi_transport").exists():  # it says the same of both
        raise HostError(
            f"portal {portal} was not asked for its targets: this kernel has no iSCSI", remedy="modprobe iscsi_tcp"
        )
    found = [line.split(" ", 1) for line in done.text.splitlines()[:TARGETS_MAX] if " " in line]
    return [(where, target.strip()) for where, target in found]


class Backend(DeviceBackend):
    type = "iscsi"
    sysfs: ClassVar[Path] = SYSFS

    @property
    def target(self) -> str:
        return self.document.origin.device

    # the pool

    def check(self) -> bool:
        return self._session() is not None

    def _session(self) -> Path | None:
        """The kernel's session with our target."""
        sessions = self.sysfs / "class/iscsi_session"
        for name in names_in(sessions):
            if attribute(sessions / name / "targetname") == self.target:
                return sessions / name
        return None

    def _host(self) -> int:
        """The number of the SCSI host of our session. HostError if there is none, or if it has lost its target."""
        session = self._session()
        if session is None:
            raise HostError(
                f"there is no session with target {self.target}", remedy=f"kvik pool-destroy {self.name}, then start it"
            )
        state = attribute(session / "state")
        if state and state != "LOGGED_IN":
            raise HostError(
                f"the session with target {self.target} is lost ({state}); the kernel goes on trying",
                remedy=f"look at the network and at portal {portal_of(self.document.origin.hosts[0])}",
            )
        for part in (session / "device").resolve().parts[::-1]:
            if part.startswith("host") and part[4:].isdecimal():
                return int(part[4:])
        raise HostError(f"the kernel shows no SCSI host for its session with target {self.target}")

    def start(self) -> None:
        if self._session() is None:
            self._login()
        try:
            scsi_units.scan(self._host(), self.sysfs)
        except BaseException:
            self.stop()
            raise

    def _login(self) -> None:
        source = self.document.origin
        portal = portal_of(source.hosts[0])
        interface = self._interface()
        offered = [where for where, target in targets(portal, interface) if target == self.target]
        if not offered:
            raise HostError(
                f"portal {portal} offers no target {self.target}",
                remedy=f"see which it offers: kvik find-storage-pool-sources-as iscsi {source.host}",
            )
        where = next((each for each in offered if each.startswith(f"{portal},")), offered[0])
        node = ["iscsiadm", "--mode", "node", "--portal", where, "--targetname", self.target, "--interface", interface]
        call([*node, "--op", "new"], timeout=DEADLINE)
        try:
            call([*node, "--op", "update", "--name", "node.startup", "--value", "manual"], timeout=DEADLINE)
            if source.auth is not None:
                self._authenticate(interface)
            call([*node, "--login"], timeout=DEADLINE)
        except BaseException:
            call([*node, "--op", "delete"], timeout=DEADLINE, check=False)
            raise

    def _interface(self) -> str:
        """Of open-iscsi, with the initiator's name that the document asks for; "default" has the host's."""
        initiator = self.document.origin.initiator
        if initiator is None:
            return "default"
        name = f"kvik-{hashlib.sha256(initiator.iqn.name.encode()).hexdigest()[:16]}"
        argv = ["iscsiadm", "--mode", "iface", "--interface", name]
        if call(argv, timeout=DEADLINE, check=False).code != 0:
            call([*argv, "--op", "new"], timeout=DEADLINE)
        for key, value in (("iface.initiatorname", initiator.iqn.name), ("iface.transport_name", "tcp")):
            call([*argv, "--op", "update", "--name", key, "--value", value], timeout=DEADLINE)
        return name

    def _authenticate(self, interface: str) -> None:
        """CHAP, RFC 7143 section 12.1.3, with name and secret in the node record."""
        auth = self.document.origin.auth
        assert auth is not None
        if auth.type != "chap":
            raise ConfigUnsupported("iscsi pool only supports 'chap' auth type", path="/pool/source/auth/@type")
        secret = self.secret("iscsi", auth.secret)
        if b"\n" in secret or b"\0" in secret:
            raise InvalidArgument("the secret holds a line break: it cannot be a CHAP secret")
        records = [
            record
            for directory in RECORDS
            for record in Path(directory, self.target).glob(f"*/{interface}")
            if record.is_file()
        ]
        if not records:
            raise HostError(f"open-iscsi has no record of target {self.target} in {' or '.join(RECORDS)}")
        settings = {
            b"node.session.auth.authmethod": b"CHAP",
            b"node.session.auth.username": auth.username.encode(),
            b"node.session.auth.password": secret,
        }
        for record in records:
            lines = [line for line in read_file(record).splitlines() if line.partition(b" = ")[0] not in settings]
            # The record's last line says that it ends; what is ours goes before it.
            at = len(lines) - 1 if lines and lines[-1].startswith(b"# END RECORD") else len(lines)
            lines[at:at] = [key + b" = " + value for key, value in settings.items()]
            atomic_write(record, b"\n".join([*lines, b""]), mode=0o600)

    def stop(self) -> None:
        """Log out, and forget the target and its password."""
        node = ["iscsiadm", "--mode", "node", "--targetname", self.target]
        if self._session() is not None:
            done = call([*node, "--logout"], timeout=DEADLINE, check=False)
            if done.code not in (0, NO_RECORD) or self._session() is not None:
                raise HostError(f"target {self.target} was not logged out of: {done.message}")
        done = call([*node, "--op", "delete"], timeout=DEADLINE, check=False)
        if done.code not in (0, NO_RECORD):
            raise HostError(f"open-iscsi keeps its record of target {self.target}: {done.message}")

    def clean(self) -> None:
        """Also where there is no session: the password may be written down already."""
        self.stop()

    def refresh(self) -> Contents:
        contents = Contents()
        host = self._host()
        scsi_units.scan(host, self.sysfs)
        scsi_units.fill(contents, host, self.sysfs, self.document.path)
        return contents

    # finding

    @classmethod
    def find_sources(cls, source: PoolSource | None) -> list[PoolSource]:
        """The targets that the host of `source` offers."""
        if source is None or not source.hosts:
            raise InvalidArgument("hostname must be specified for iscsi sources")
        host = source.hosts[0]
        check_host(host.name)
        names = dict.fromkeys(target for _, target in targets(portal_of(host)))
        return [PoolSource(hosts=[host], devices=[SourceDevice(path=name)]) for name in names]

    @classmethod
    def missing(cls) -> str:
        return missing("iscsiadm")


def check_host(name: str) -> None:
    """What becomes an argument of a tool: not an option, nothing invisible."""
    if not name or name.startswith("-") or not name.isprintable() or " " in name:
        raise InvalidArgument(f"{name!r} is not the name of a host")
