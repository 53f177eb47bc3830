"""<domainbackup>, a backup of a running machine's disks: `parse_backup` and `format_backup`.

push    the VMM writes what is to be kept into `<target>`
pull    the VMM shows it to NBD clients at `<server>`; what the guest overwrites meanwhile is kept in `<scratch>`

Parsing checks form only; what a backup of a certain machine needs is worked out where it begins
(`manager/backup/plan.py`). https://libvirt.org/formatbackup.html
"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, Element, YesNo
from kvik.conf.devices.disk import DiskSource, Format
from kvik.conf.reader import read_xml
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError

__all__ = ["Backup", "BackupDisk", "BackupDisks", "BackupServer", "format_backup", "parse_backup"]


class BackupServer(Element):
    """Where NBD clients come to: `name` and `port`, or `socket` (a path)."""

    transport: Literal["tcp", "unix", "rdma"] | None = None
    tls: YesNo = None
    name: str | None = None
    port: int | None = None
    socket: str | None = None


class BackupDisk(Element):
    """`name` is the disk's target; `incremental` the checkpoint since which changes are wanted; `index` the number of
    the target or scratch in a running backup."""

    name: str
    backup: YesNo = None
    type: Literal["file", "block"] | None = None
    backup_mode: Annotated[Literal["full", "incremental"] | None, "backupmode"] = None
    incremental: str | None = None
    export_name: Annotated[str | None, "exportname"] = None
    export_bitmap: Annotated[str | None, "exportbitmap"] = None
    index: int | None = None
    driver: Format | None = None
    target: DiskSource | None = None
    scratch: DiskSource | None = None


class BackupDisks(Element):
    disks: Annotated[list[BackupDisk], "disk"] = []


class Backup(Element):
    mode: Literal["push", "pull"] | None = None
    incremental: Annotated[str | None, CHILD] = None
    server: BackupServer | None = None
    disks: BackupDisks | None = None

    @property
    def pull(self) -> bool:
        return self.mode == "pull"

    @property
    def chosen(self) -> list[BackupDisk]:
        """The disks that it is of."""
        return [disk for disk in self.disks.disks if disk.backup is not False] if self.disks else []


def parse_backup(xml: str | bytes) -> Backup:
    """The document as it stands. Raises ConfigError with line, path and reason."""
    root = read_xml(xml, "backup document")
    if root.tag != "domainbackup":
        raise ConfigError(f"a backup document starts with <domainbackup>, not <{root.tag}>", path=f"/{root.tag}")
    return parse_element(root, Backup)


def format_backup(backup: Backup) -> str:
    """libvirt's XML."""
    return format_element(backup, "domainbackup")
