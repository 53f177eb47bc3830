"""Pools of type scsi: the logical units of one SCSI host, such as a Fibre Channel adapter, or of a virtual port of one
(NPIV), which is created when the pool starts. All of it is read and written in sysfs.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import ClassVar

from kvik.conf.storage_pool import SourceAdapter
from kvik.errors import ConfigError, HostError
from kvik.storage import scsi_units
from kvik.storage.backend import Contents
from kvik.storage.devices import DeviceBackend
from kvik.storage.scsi_units import attribute, names_in

__all__ = ["Backend"]

APPEARING = 10.0  # seconds until a virtual port is a SCSI host
_HOST = re.compile(r"(?:scsi_)?host(\d+)")


def _hex(text: str | None) -> str:
    """A world-wide name without its 0x, in small letters."""
    return (text or "").lower().removeprefix("0x")


class Backend(DeviceBackend):
    type = "scsi"
    sysfs: ClassVar[Path] = Path("/sys")

    @property
    def adapter(self) -> SourceAdapter:
        adapter = self.document.origin.adapter
        assert adapter is not None  # `validate_pool` has made sure
        return adapter

    # the pool

    def check(self) -> bool:
        return self._find() is not None

    def _find(self) -> int | None:
        """The number of the pool's SCSI host, if it is there."""
        adapter = self.adapter
        if adapter.type == "fc_host":
            return self._fc_host(_hex(adapter.wwnn), _hex(adapter.wwpn))
        if adapter.parent_address is not None:
            return self._by_address(adapter)
        match = _HOST.fullmatch(adapter.name or "")
        if match is None or not (self.sysfs / f"class/scsi_host/host{match[1]}").exists():
            return None
        return int(match[1])

    def _host(self) -> int:
        host = self._find()
        if host is None:
            raise HostError(
                f"there is no SCSI host {self._words()} on this host", errno=2, remedy="see ls /sys/class/scsi_host"
            )
        return host

    def _words(self) -> str:
        adapter = self.adapter
        return adapter.name or (f"{adapter.wwnn}:{adapter.wwpn}" if adapter.wwnn else "at its parent's address")

    def _numbers(self, kind: str) -> list[int]:
        """Of all hosts of a class of sysfs."""
        directory = self.sysfs / "class" / kind
        return sorted(int(match[1]) for name in names_in(directory) if (match := _HOST.fullmatch(name)) is not None)

    def _fc_host(self, wwnn: str, wwpn: str) -> int | None:
        """By both names, or by the one that is given."""
        for number in self._numbers("fc_host"):
            here = self.sysfs / f"class/fc_host/host{number}"
            if (not wwnn or _hex(attribute(here / "node_name")) == wwnn) and (
                not wwpn or _hex(attribute(here / "port_name")) == wwpn
            ):
                return number
        return None

    def _by_address(self, adapter: SourceAdapter) -> int | None:
        """By the PCI address of its parent and its number among those of that parent."""
        parent = adapter.parent_address
        address = parent.address if parent is not None else None
        if parent is None or address is None:
            raise ConfigError("missing scsi_host adapter address", path="/pool/source/adapter/parentaddr")
        try:
            parts = [int(each or "0", 0) for each in (address.domain, address.bus, address.slot, address.function)]
        except ValueError as error:
            raise ConfigError(f"not a PCI address: {error}", path="/pool/source/adapter/parentaddr/address") from None
        wanted = "{:04x}:{:02x}:{:02x}.{:x}".format(*parts)
        for number in self._numbers("scsi_host"):
            here = self.sysfs / f"class/scsi_host/host{number}"
            if wanted in here.resolve().parts and attribute(here / "unique_id") == str(parent.unique_id or 0):
                return number
        return None

    def start(self) -> None:
        """A virtual port that is not there is created. What was created goes with the pool, where the document says
        so (managed='yes') or names no parent."""
        adapter = self.adapter
        if adapter.type == "fc_host" and self._find() is None:
            parent = self._parent()
            self._vport(parent, "vport_create")
            if adapter.parent is None:
                adapter.parent, adapter.managed = f"scsi_host{parent}", adapter.managed is not False
            deadline = time.monotonic() + APPEARING
            while self._find() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        scsi_units.scan(self._host(), self.sysfs)

    def _parent(self) -> int:
        """The adapter that makes virtual ports for us. HostError if there is none, or it has no room."""
        adapter = self.adapter
        if adapter.parent is not None:
            match = _HOST.fullmatch(adapter.parent)
            found = int(match[1]) if match is not None else None
            found = found if found in self._numbers("fc_host") else None
        elif adapter.parent_wwnn or adapter.parent_wwpn:
            found = self._fc_host(_hex(adapter.parent_wwnn), _hex(adapter.parent_wwpn))
        else:
            found = next((number for number in self._numbers("fc_host") if self._suits(number)), None)
        if found is None:
            raise HostError(
                f"no Fibre Channel adapter for the virtual port {self._words()}",
                errno=2,
                remedy="name it with parent='scsi_hostN'; see ls /sys/class/fc_host",
            )
        if not (self._operations(found) / "vport_create").exists():
            raise HostError(f"Fibre Channel adapter scsi_host{found} makes no virtual ports (NPIV)")
        return found

    def _suits(self, number: int) -> bool:
        """An online port with room, of the fabric that the document names."""
        here, operations = self.sysfs / f"class/fc_host/host{number}", self._operations(number)
        fabric = _hex(self.adapter.parent_fabric_wwn)
        if fabric and _hex(attribute(here / "fabric_name")) != fabric:
            return False
        if attribute(here / "port_state") != "Online" or not (operations / "vport_create").exists():
            return False
        used, most = attribute(operations / "npiv_vports_inuse"), attribute(operations / "max_npiv_vports")
        return not (used.isdecimal() and most.isdecimal() and int(used) >= int(most))

    def _operations(self, number: int) -> Path:
        """Where the kernel keeps a port's NPIV files: with its fc_host, in old kernels with its scsi_host."""
        here = self.sysfs / f"class/fc_host/host{number}"
        return here if (here / "vport_create").exists() else self.sysfs / f"class/scsi_host/host{number}"

    def _vport(self, parent: int, what: str) -> None:
        path = self._operations(parent) / what
        try:
            path.write_text(f"{_hex(self.adapter.wwpn)}:{_hex(self.adapter.wwnn)}")
        except OSError as error:
            raise HostError(
                f"{what} of {self._words()} at scsi_host{parent} failed: {error.strerror}", errno=error.errno or 0
            ) from error

    def stop(self) -> None:
        adapter = self.adapter
        if adapter.type == "fc_host" and adapter.managed and adapter.parent and self._find() is not None:
            self._vport(self._parent(), "vport_delete")

    def refresh(self) -> Contents:
        contents, host = Contents(), self._host()
        scsi_units.scan(host, self.sysfs)
        scsi_units.fill(contents, host, self.sysfs, self.document.path)
        return contents
