"""<domaincheckpoint>, a moment since which a machine's changes are tracked: `parse_checkpoint`, `format_checkpoint`.

Parsing checks form only; what a checkpoint of a certain machine needs is worked out where it is made
(`manager/checkpoints/create.py`). https://libvirt.org/formatcheckpoint.html
"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, KVIK_NS, Element, Text
from kvik.conf.devices.disk import DiskSource
from kvik.conf.domain import Domain
from kvik.conf.reader import read_xml
from kvik.conf.tree import clone
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError

__all__ = [
    "Checkpoint", "CheckpointDisk", "CheckpointDisks", "CheckpointParent", "TrackedImage", "TrackedImages",
    "format_checkpoint", "parse_checkpoint", "place_of",
]  # fmt: skip


def place_of(source: DiskSource) -> str | None:
    """Which image it is, for comparing: its path, or its name at its protocol's first server."""
    if source.location or not source.protocol:
        return source.location
    host = source.hosts[0] if source.hosts else None
    return f"{source.protocol}://{(host.name or host.socket or '') if host else ''}/{source.name or ''}"


class CheckpointParent(Element):
    name: Annotated[str, CHILD]


class CheckpointDisk(Element):
    """`name` is the disk's target, or the path of its image; `bitmap` what its dirty bitmap is called; `size` bytes
    that changed since (only where it was asked for)."""

    name: str
    checkpoint: Literal["no", "bitmap"] | None = None
    bitmap: str | None = None
    size: int | None = None


class CheckpointDisks(Element):
    disks: Annotated[list[CheckpointDisk], "disk"] = []


class TrackedImage(Element):
    disk: str
    path: str


class TrackedImages(Element):
    images: Annotated[list[TrackedImage], f"{{{KVIK_NS}}}image"] = []


class Checkpoint(Element):
    """Times in seconds since the epoch. `domain` is the machine as it was. `images` says for each disk in which image
    tracking began: from the machine's top image down to that one, each must have the bitmap. As images are merged it
    moves with what they hold, which <domain> does not."""

    name: Text = None
    description: Text = None
    parent: CheckpointParent | None = None
    creation_time: Annotated[int | None, CHILD, "creationTime"] = None
    disks: CheckpointDisks | None = None
    domain: Domain | None = None
    images: Annotated[TrackedImages | None, f"{{{KVIK_NS}}}images"] = None

    def bitmap_of(self, target: str) -> str | None:
        """What the bitmap of a disk is called; None for one that this checkpoint does not track."""
        for disk in self.disks.disks if self.disks else ():
            if disk.name == target and disk.checkpoint == "bitmap":
                return disk.bitmap or self.name
        return None

    def image_of(self, target: str) -> str | None:
        """The path of the image in which tracking of a disk began; None if nothing says so."""
        for image in self.images.images if self.images else ():
            if image.disk == target:
                return image.path
        for disk in self.domain.devices.disks if self.domain else ():
            if disk.target.dev == target and disk.source is not None:
                return place_of(disk.source)
        return None

    @property
    def tracked(self) -> list[str]:
        """The targets of the disks that have a bitmap."""
        return [disk.name for disk in self.disks.disks if disk.checkpoint == "bitmap"] if self.disks else []


def parse_checkpoint(xml: str | bytes) -> Checkpoint:
    """The document as it stands. Raises ConfigError with line, path and reason."""
    root = read_xml(xml, "checkpoint document")
    if root.tag != "domaincheckpoint":
        raise ConfigError(
            f"a checkpoint document starts with <domaincheckpoint>, not <{root.tag}>", path=f"/{root.tag}"
        )
    return parse_element(root, Checkpoint)


def format_checkpoint(checkpoint: Checkpoint, *, secure: bool = False, domain: bool = True) -> str:
    """libvirt's XML. `secure` includes passwords of the domain in it; without `domain` that is left out."""
    if not domain:
        checkpoint = clone(checkpoint)
        checkpoint.domain = None
    return format_element(checkpoint, "domaincheckpoint", secure=secure, inactive=True)
