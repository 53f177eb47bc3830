"""<domainsnapshot>, the document of one snapshot of a machine: `parse_snapshot` and `format_snapshot`.

Parsing checks form only; what a snapshot of a certain machine needs is worked out where it is taken
(`manager/snapshots/create.py`). https://libvirt.org/formatsnapshot.html
"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, KVIK_NS, RAW, Element, Text
from kvik.conf.devices.disk import DiskSource, Format, SourceType
from kvik.conf.domain import Domain
from kvik.conf.reader import read_xml
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError

__all__ = [
    "Snapshot", "SnapshotDisk", "SnapshotDisks", "SnapshotMemory", "SnapshotParent", "SnapshotTaken",
    "format_snapshot", "parse_snapshot",
]  # fmt: skip

Kind = Literal["no", "internal", "external", "manual"]
State = Literal[
    "nostate", "running", "blocked", "paused", "shutdown", "shutoff", "crashed", "pmsuspended", "disk-snapshot"
]


class SnapshotParent(Element):
    name: Annotated[str, CHILD]


class SnapshotMemory(Element):
    snapshot: Literal["no", "internal", "external"] | None = None
    file: str | None = None


class SnapshotDisk(Element):
    """`name` is the disk's target, or the path of its image; `source` the new image on top of it (external)."""

    name: str
    snapshot: Kind | None = None
    type: SourceType | None = None
    driver: Format | None = None
    source: DiskSource | None = None


class SnapshotDisks(Element):
    disks: Annotated[list[SnapshotDisk], "disk"] = []


class SnapshotTaken(Element):
    """What libvirt's document has no place for: how long the guest stood still (microseconds), the copies of the
    firmware's variables and of the TPM's state that belong to the snapshot, the file of its memory that we made (the
    document's own <memory> may be anybody's), what it is called inside its images, and why the guest stood still while
    its memory was written although it was to go on."""

    pause: int | None = None
    nvram: str | None = None
    tpm: str | None = None
    memory: str | None = None
    tag: str | None = None
    stood: str | None = None


class Snapshot(Element):
    """Times in seconds since the epoch. `domain` is the machine as it was: its disks are the images that keep the
    snapshot; `inactive` its persistent definition, where that was another."""

    name: Text = None
    description: Text = None
    state: Annotated[State | None, CHILD] = None
    parent: SnapshotParent | None = None
    creation_time: Annotated[int | None, CHILD, "creationTime"] = None
    memory: SnapshotMemory | None = None
    disks: SnapshotDisks | None = None
    domain: Domain | None = None
    inactive: Annotated[Domain | None, "inactiveDomain"] = None
    cookie: Annotated[list[bytes], RAW] = []
    taken: Annotated[SnapshotTaken | None, f"{{{KVIK_NS}}}taken"] = None

    @property
    def external(self) -> bool:
        """Whether any part of it is kept outside of the disks' own images."""
        if self.memory is not None and self.memory.snapshot == "external":
            return True
        return any(disk.snapshot == "external" for disk in self.disks.disks) if self.disks else False

    @property
    def internal(self) -> bool:
        if self.memory is not None and self.memory.snapshot == "internal":
            return True
        return any(disk.snapshot == "internal" for disk in self.disks.disks) if self.disks else False


def parse_snapshot(xml: str | bytes) -> Snapshot:
    """The document as it stands. Raises ConfigError with line, path and reason."""
    root = read_xml(xml, "snapshot document")
    if root.tag != "domainsnapshot":
        raise ConfigError(f"a snapshot document starts with <domainsnapshot>, not <{root.tag}>", path=f"/{root.tag}")
    return parse_element(root, Snapshot)


def format_snapshot(snapshot: Snapshot, secure: bool = False) -> str:
    """libvirt's XML. `secure` includes passwords of the domain in it."""
    return format_element(snapshot, "domainsnapshot", secure=secure, inactive=True)
