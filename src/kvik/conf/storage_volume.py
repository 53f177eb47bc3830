"""<volume>, the document of one storage volume, and its two directions: `parse_volume` and `format_volume`.

Parsing checks form only; `complete_volume` fills in what was left out and `validate_volume` checks sense. Field names
and order are those of https://libvirt.org/formatstorage.html#storage-volume-xml
"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf import tree
from kvik.conf.codec import CHILD, PRESENT, VALUE, Element, Text
from kvik.conf.prepare import located
from kvik.conf.reader import read_xml
from kvik.conf.storage_pool import Permissions, Size, bytes_of, validate_permissions
from kvik.conf.units import scale_of
from kvik.conf.validate import absolute
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError, ConfigUnsupported, InvalidArgument

__all__ = [
    "BackingStore", "StorageVolume", "VolumeTarget", "check_volume_name", "complete_volume", "format_volume",
    "load_volume", "parse_volume", "validate_volume",
]  # fmt: skip

NAME_LIMIT = 255  # bytes: NAME_MAX of file systems
# What a name may hold beside letters and digits of any script. Not: '/', control and format characters, quotes and
# wildcards of shells; and neither '-' nor '.' at the start, which make options and hidden files of names.
NAME_SIGNS = frozenset(" ._-+=:@%,()[]{}~#&!^")
FILE_FORMATS = (
    "raw", "none", "dir", "bochs", "cloop", "dmg", "iso", "vpc", "vdi", "fat", "vhd", "ploop", "cow", "qcow", "qcow2",
    "qed", "vmdk",
)  # fmt: skip
PARTITION_FORMATS = ("none", "linux", "fat16", "fat32", "linux-swap", "linux-lvm", "linux-raid", "extended")
CLUSTER_SIZES = [1 << power for power in range(9, 22)]  # qcow2: 512 B to 2 MiB


class SourceExtent(Element):
    start: int
    end: int


class ExtentDevice(Element):
    """A device that parts of the volume lie on."""

    path: str
    extents: Annotated[list[SourceExtent], "extent"] = []


class VolumeSource(Element):
    devices: Annotated[list[ExtentDevice], "device"] = []


class VolumeFormat(Element):
    type: str


class Timestamps(Element):
    """Seconds since the epoch, with nanoseconds behind a point."""

    atime: Text = None
    mtime: Text = None
    ctime: Text = None
    btime: Text = None


class VolumeFeatures(Element):
    lazy_refcounts: Annotated[bool, PRESENT] = False
    extended_l2: Annotated[bool, PRESENT] = False


class ClusterSize(Element, kw_only=True):
    unit: str | None = None
    value: Annotated[int, VALUE]


class EncryptionSecret(Element):
    type: Literal["passphrase"]
    uuid: str | None = None
    usage: str | None = None


class EncryptionCipher(Element):
    name: str
    size: int | None = None
    mode: str | None = None
    hash: str | None = None


class EncryptionIvgen(Element):
    name: str
    hash: str | None = None


class Encryption(Element):
    format: Literal["default", "qcow", "luks", "luks2", "luks-any"] = "default"
    engine: str | None = None
    secrets: Annotated[list[EncryptionSecret], "secret"] = []
    cipher: EncryptionCipher | None = None
    ivgen: EncryptionIvgen | None = None


class VolumeTarget(Element):
    path: Text = None
    format: VolumeFormat | None = None
    permissions: Permissions | None = None
    timestamps: Timestamps | None = None
    encryption: Encryption | None = None
    compat: Text = None
    cluster_size: Annotated[ClusterSize | None, "clusterSize"] = None
    features: VolumeFeatures | None = None


class BackingStore(Element):
    """What the volume shows wherever nothing was written to it."""

    path: Annotated[str, CHILD] = ""
    format: VolumeFormat | None = None
    permissions: Permissions | None = None
    timestamps: Timestamps | None = None


class StorageVolume(Element):
    type: Literal["file", "block", "dir", "network", "netdir"] | None = None
    name: Annotated[str, CHILD] = ""
    key: Text = None
    source: VolumeSource | None = None
    capacity: Size | None = None
    allocation: Size | None = None
    physical: Size | None = None
    target: VolumeTarget | None = None
    backing_store: Annotated[BackingStore | None, "backingStore"] = None

    @property
    def path(self) -> str:
        return (self.target.path or "") if self.target is not None else ""

    @property
    def format(self) -> str:
        """raw where the document does not say."""
        return self.target.format.type if self.target is not None and self.target.format is not None else "raw"

    @property
    def size(self) -> int:
        """Capacity in bytes: what a guest sees."""
        return self.capacity.value if self.capacity is not None else 0

    @property
    def allocated(self) -> int:
        """Bytes that it takes of its pool."""
        return self.allocation.value if self.allocation is not None else 0

    def warnings(self) -> list[str]:
        """One line for each thing that this document says and kvik does not understand."""
        return tree.warnings(self, "/volume")

    def copy(self) -> StorageVolume:
        return tree.clone(self)


def check_volume_name(name: str) -> str:
    """The name if a volume can have it, else `InvalidArgument`: only what is on the white list above."""
    reason = ""
    if not name:
        reason = "it is empty"
    elif not (name[0].isalnum() or name[0] == "_"):
        reason = f"it begins with {name[0]!r}"
    elif name[-1] == " ":
        reason = "it ends with a space"
    elif bad := next((sign for sign in name if not (sign.isalnum() or sign in NAME_SIGNS)), ""):
        reason = f"it holds {bad!r}"
    elif len(name.encode("utf-8", "surrogatepass")) > NAME_LIMIT:
        reason = f"it has more than {NAME_LIMIT} bytes"
    if reason:
        raise InvalidArgument(
            f"volume name {name[:80]!r} is not allowed: {reason}",
            remedy="use letters, digits and any of ._-+=:@%,()[]{}~#&!^ and space, a letter or digit first",
        )
    return name


def parse_volume(xml: str | bytes) -> StorageVolume:
    """The document as it stands, nothing filled in. Raises ConfigError with line, path and reason."""
    root = read_xml(xml, "storage volume document")
    if root.tag != "volume":
        raise ConfigError(f"a storage volume document starts with <volume>, not <{root.tag}>", path=f"/{root.tag}")
    return parse_element(root, StorageVolume)


def format_volume(document: StorageVolume) -> str:
    return format_element(document, "volume")


def load_volume(xml: str | bytes, formats: tuple[str, ...] = FILE_FORMATS, *, copies: bool = False) -> StorageVolume:
    """Parse, complete, validate, as the document of a volume that is to be made. `copies`: of another volume, whose
    capacity it has where it says none. Raises ConfigError with line, path and reason."""
    document = parse_volume(xml)
    with located(xml):
        complete_volume(document, copies=copies)
        validate_volume(document, formats)
    return document


def complete_volume(document: StorageVolume, *, copies: bool = False) -> None:
    """Sizes in bytes; no allocation said means all of the capacity, as in libvirt."""
    document.target = document.target or VolumeTarget()
    if document.capacity is None:
        if not copies and document.backing_store is None:
            raise ConfigError("missing capacity element", path="/volume/capacity")
    else:
        document.capacity.normalise("/volume/capacity")
    if document.allocation is not None:
        document.allocation.normalise("/volume/allocation")
    elif document.capacity is not None:
        document.allocation = bytes_of(document.capacity.value)
    document.physical = None
    cluster = document.target.cluster_size
    if cluster is not None and cluster.unit != "B":
        try:
            cluster.value *= scale_of(cluster.unit or "b")
        except ValueError as error:
            raise ConfigError(str(error), path="/volume/target/clusterSize") from None
        cluster.unit = "B"


def validate_volume(document: StorageVolume, formats: tuple[str, ...] = FILE_FORMATS) -> None:
    """Raises ConfigError for the first thing that is wrong."""
    if not document.name:
        raise ConfigError("missing volume name element", path="/volume/name")
    if "/" in document.name:
        raise ConfigError(f"volume name '{document.name}' cannot contain '/'", path="/volume/name")
    try:
        check_volume_name(document.name)
    except InvalidArgument as error:
        raise ConfigError(error.message, path="/volume/name", remedy=error.remedy) from None
    target = document.target or VolumeTarget()
    if target.format is not None and target.format.type not in formats:
        raise ConfigUnsupported(
            f"unknown volume format type {target.format.type}",
            path="/volume/target/format/@type",
            remedy=f"known are {', '.join(formats)}",
        )
    if target.permissions is not None:
        validate_permissions(target.permissions, "/volume/target/permissions")
    if target.compat is not None and target.compat not in ("0.10", "1.1"):
        raise ConfigError(f"{target.compat!r} is not a version of qcow2: 0.10 or 1.1", path="/volume/target/compat")
    if target.cluster_size is not None and target.cluster_size.value not in CLUSTER_SIZES:
        raise ConfigError(
            f"clusters of {target.cluster_size.value} bytes are not possible",
            path="/volume/target/clusterSize",
            remedy="a power of two between 512 and 2097152",
        )
    if document.backing_store is not None:
        backing = document.backing_store
        if not backing.path:
            raise ConfigError("a backing store needs a path", path="/volume/backingStore")
        absolute(backing.path, "/volume/backingStore/path", "backing store")
