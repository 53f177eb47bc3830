"""<pool>, the document of one storage pool, and its two directions: `parse_pool` and `format_pool`.

Parsing checks form only; `complete_pool` fills in what was left out and `validate_pool` checks sense; `load_pool` does
all three. Field names and order are those of https://libvirt.org/formatstorage.html
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from kvik.conf import tree
from kvik.conf.codec import CHILD, FS_NS, RBD_NS, SIGNED, UUID, VALUE, YES_NO, Element, Text, YesNo
from kvik.conf.machine import MachineDefaults
from kvik.conf.postparse import new_uuid
from kvik.conf.prepare import located
from kvik.conf.reader import read_xml
from kvik.conf.units import scale_of
from kvik.conf.validate import absolute, validate_name
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError

__all__ = [
    "DEFAULT_FORMATS", "FORMATS", "POOL_TYPES", "Permissions", "PoolSource", "PoolTarget", "Size", "StoragePool",
    "complete_pool", "format_pool", "load_pool", "parse_pool", "parse_source", "validate_permissions", "validate_pool",
]  # fmt: skip

PoolType = Literal[
    "dir", "fs", "netfs", "logical", "disk", "iscsi", "iscsi-direct", "scsi", "mpath", "rbd", "gluster", "zfs"
]
POOL_TYPES: tuple[str, ...] = get_args(PoolType)
# Formats of a pool's source, in libvirt's order; the first is meant where none is named, but for DEFAULT_FORMATS.
FORMATS: dict[str, tuple[str, ...]] = {
    "fs": (
        "auto", "ext2", "ext3", "ext4", "ufs", "iso9660", "udf", "gfs", "gfs2", "vfat", "hfs+", "xfs", "ocfs2", "vmfs",
        "btrfs",
    ),
    "netfs": ("auto", "nfs", "glusterfs", "cifs"),
    "logical": ("unknown", "lvm2"),
    "disk": ("unknown", "dos", "dvh", "gpt", "mac", "bsd", "pc98", "sun", "lvm2"),
}  # fmt: skip
DEFAULT_FORMATS = {type_: formats[0] for type_, formats in FORMATS.items()} | {"logical": "lvm2"}
NEEDS_PATH = ("dir", "fs", "netfs", "iscsi", "scsi")
NEEDS_HOST = ("netfs", "iscsi", "iscsi-direct", "rbd", "gluster")
NEEDS_DEVICE = ("fs", "disk", "iscsi", "iscsi-direct")
NEEDS_NAME = ("rbd", "gluster")
FIXED_PATHS = {"logical": "/dev/{}", "zfs": "/dev/zvol/{}"}  # where the kernel shows a group's volumes
DEFAULT_PATHS = {"mpath": "/dev/mapper", "disk": "/dev"}
MAX_SIZE = (1 << 63) - 1
MAX_ID = 0xFFFFFFFE  # the kernel's (uid_t)-1 means "leave it"


class Size(Element):
    """Bytes once the document is complete; `unit` as the document says it before."""

    unit: str | None = None
    value: Annotated[int, VALUE] = 0

    def normalise(self, path: str) -> None:
        """Make it bytes. Raises ConfigError for an unknown unit, and for more than 2^63 bytes."""
        if self.unit != "bytes":
            try:
                self.value *= scale_of(self.unit or "b")
            except ValueError as error:
                raise ConfigError(str(error), path=path) from None
            self.unit = "bytes"
        if self.value > MAX_SIZE:
            raise ConfigError(f"{self.value} is more than 2^63 bytes", path=path)


def bytes_of(value: int) -> Size:
    return Size(unit="bytes", value=value)


class Permissions(Element):
    """`mode` in octal digits; owner and group are numbers, -1 or none: the daemon's own."""

    mode: Text = None
    owner: Annotated[int | None, CHILD, SIGNED] = None
    group: Annotated[int | None, CHILD, SIGNED] = None
    label: Text = None

    @property
    def mode_bits(self) -> int | None:
        return int(self.mode, 8) if self.mode is not None else None


class SourceHost(Element):
    name: str
    port: int | None = None


class FreeExtent(Element):
    start: int
    end: int


class SourceDevice(Element):
    path: str
    part_separator: YesNo = None
    free_extents: Annotated[list[FreeExtent], "freeExtent"] = []


class SourceDirectory(Element):
    path: str


class ParentAddress(Element):
    domain: str | None = None
    bus: str | None = None
    slot: str | None = None
    function: str | None = None


class AdapterParent(Element):
    unique_id: int | None = None
    address: ParentAddress | None = None


class SourceAdapter(Element):
    """A SCSI host by its name, by the PCI address of its parent, or (fc_host) by its world-wide names."""

    type: Literal["scsi_host", "fc_host"] | None = None
    name: str | None = None
    parent: str | None = None
    parent_wwnn: str | None = None
    parent_wwpn: str | None = None
    parent_fabric_wwn: str | None = None
    managed: YesNo = None
    wwnn: str | None = None
    wwpn: str | None = None
    parent_address: Annotated[AdapterParent | None, "parentaddr"] = None


class InitiatorName(Element):
    name: str


class Initiator(Element):
    iqn: InitiatorName


class AuthSecret(Element):
    uuid: str | None = None
    usage: str | None = None


class SourceAuth(Element):
    type: Literal["chap", "ceph", "cifs"]  # cifs: kvik's own, of an SMB share
    username: str
    secret: AuthSecret


class SourceFormat(Element):
    type: str


class SourceProtocol(Element):
    ver: str


class Named(Element):
    name: str


class PoolSource(Element):
    __xml_open__ = True

    hosts: Annotated[list[SourceHost], "host"] = []
    devices: Annotated[list[SourceDevice], "device"] = []
    dir: SourceDirectory | None = None
    adapter: SourceAdapter | None = None
    name: Text = None
    initiator: Initiator | None = None
    format: SourceFormat | None = None
    auth: SourceAuth | None = None
    protocol: SourceProtocol | None = None
    vendor: Named | None = None
    product: Named | None = None

    @property
    def host(self) -> str:
        """Of the first host. `validate_pool` has made sure that there is one where the type needs it."""
        return self.hosts[0].name

    @property
    def device(self) -> str:
        return self.devices[0].path


class PoolTarget(Element):
    path: Text = None
    permissions: Permissions | None = None


class Cow(Element):
    state: Annotated[bool, YES_NO]


class PoolFeatures(Element):
    cow: Cow | None = None


class RefreshVolume(Element):
    allocation: Literal["default", "capacity"]


class Refresh(Element):
    volume: RefreshVolume


class MountOption(Element):
    name: str


class MountOptions(Element):
    """Options handed to mount(8), each a word of its own."""

    options: Annotated[list[MountOption], f"{{{FS_NS}}}option"] = []


class ConfigOption(Element):
    name: str
    value: str


class ConfigOptions(Element):
    """Settings handed to librados."""

    options: Annotated[list[ConfigOption], f"{{{RBD_NS}}}option"] = []


class StoragePool(Element):
    """`capacity`, `allocation` and `available` are what the last refresh found, 0 for an inactive pool."""

    type: PoolType
    name: Annotated[str, CHILD] = ""
    uuid: Annotated[str | None, CHILD, UUID] = None
    capacity: Size | None = None
    allocation: Size | None = None
    available: Size | None = None
    features: PoolFeatures | None = None
    source: PoolSource | None = None
    target: PoolTarget | None = None
    refresh: Refresh | None = None
    mount_options: Annotated[MountOptions | None, f"{{{FS_NS}}}mount_opts"] = None
    config_options: Annotated[ConfigOptions | None, f"{{{RBD_NS}}}config_opts"] = None

    @property
    def path(self) -> str:
        """Where its volumes are seen on this host; "" for pools whose volumes are reached over the network only."""
        return (self.target.path or "") if self.target is not None else ""

    @property
    def origin(self) -> PoolSource:
        """The source of a complete document."""
        assert self.source is not None
        return self.source

    @property
    def format(self) -> str:
        """Of the source: the file system, the kind of partition table; "" where the type has none."""
        return self.source.format.type if self.source is not None and self.source.format is not None else ""

    def warnings(self) -> list[str]:
        """One line for each thing that this document says and kvik does not understand."""
        return tree.warnings(self, "/pool")

    def copy(self) -> StoragePool:
        return tree.clone(self)


def parse_pool(xml: str | bytes) -> StoragePool:
    """The document as it stands, nothing filled in. Raises ConfigError with line, path and reason."""
    root = read_xml(xml, "storage pool document")
    if root.tag != "pool":
        raise ConfigError(f"a storage pool document starts with <pool>, not <{root.tag}>", path=f"/{root.tag}")
    return parse_element(root, StoragePool)


def parse_source(xml: str | bytes) -> PoolSource:
    """The <source> that a search for pools is given."""
    root = read_xml(xml, "storage source document")
    if root.tag != "source":
        raise ConfigError(f"a storage source document starts with <source>, not <{root.tag}>", path=f"/{root.tag}")
    return parse_element(root, PoolSource)


def format_pool(document: StoragePool, *, inactive: bool = False) -> str:
    """libvirt's XML of a complete document."""
    return format_element(document, "pool", inactive=inactive)


def load_pool(xml: str | bytes, defaults: MachineDefaults | None = None) -> StoragePool:
    """Parse, complete, validate. Raises ConfigError with line, path and reason."""
    document = parse_pool(xml)
    with located(xml):
        complete_pool(document, defaults)
        validate_pool(document)
    return document


def complete_pool(document: StoragePool, defaults: MachineDefaults | None = None) -> None:
    """Fill in what libvirt fills in, in place: UUID, figures of 0, the source's format, the path of a group's volumes.

    Doing it twice changes nothing.
    """
    if document.uuid is None:
        document.uuid = new_uuid(defaults or MachineDefaults())
    document.capacity, document.allocation, document.available = bytes_of(0), bytes_of(0), bytes_of(0)
    source = document.source = document.source or PoolSource()
    document.name = document.name or source.name or ""
    if document.type in FORMATS and source.format is None:
        source.format = SourceFormat(type=DEFAULT_FORMATS[document.type])
    if document.type in FIXED_PATHS:
        source.name = source.name or document.name
        _target(document).path = FIXED_PATHS[document.type].format(source.name)
    if document.type in DEFAULT_PATHS and not document.path:
        _target(document).path = DEFAULT_PATHS[document.type]
    if source.adapter is not None and source.adapter.type is None:
        source.adapter.type = "fc_host" if source.adapter.wwnn else "scsi_host"
    if len(document.path) > 1:
        _target(document).path = document.path.rstrip("/") or "/"


def _target(document: StoragePool) -> PoolTarget:
    if document.target is None:
        document.target = PoolTarget()
    return document.target


def validate_pool(document: StoragePool) -> None:
    """Raises ConfigError for the first thing that is wrong."""
    validate_name(document.name, "/pool/name")
    source, target = document.origin, document.target or PoolTarget()
    if document.type in NEEDS_PATH and not target.path:
        raise ConfigError("missing storage pool target path", path="/pool/target")
    _validate_source(document.type, source)
    absolute(target.path, "/pool/target/path", "target path")
    if target.path is not None and ".." in target.path.split("/"):
        raise ConfigError(f"{target.path!r} holds a '..'", path="/pool/target/path")
    if target.permissions is not None:
        validate_permissions(target.permissions, "/pool/target/permissions")
    for option in document.mount_options.options if document.mount_options is not None else []:
        if not option.name.isprintable() or "," in option.name or not option.name.strip():
            raise ConfigError(
                f"mount option {option.name!r} is not one word without ','", path="/pool/fs:mount_opts/fs:option"
            )


def _validate_source(kind: str, source: PoolSource) -> None:
    here = "/pool/source"
    if kind in NEEDS_HOST and not source.hosts:
        raise ConfigError("missing storage pool source host name", path=here)
    if kind in NEEDS_DEVICE and not source.devices:
        raise ConfigError("missing storage pool source device name", path=here)
    if kind == "netfs" and source.dir is None:
        raise ConfigError("missing storage pool source path", path=here)
    if kind in NEEDS_NAME and not source.name:
        raise ConfigError("missing mandatory 'name' field for the source", path=here)
    if kind == "iscsi-direct" and source.initiator is None:
        raise ConfigError("missing storage pool initiator iqn", path=here)
    if kind == "scsi":
        _validate_adapter(source.adapter)
    if kind in FORMATS and source.format is not None and source.format.type not in FORMATS[kind]:
        raise ConfigError(
            f"unknown pool format type {source.format.type}",
            path=f"{here}/format/@type",
            remedy=f"known are {', '.join(FORMATS[kind])}",
        )
    for host in source.hosts:
        _word(host.name, f"{here}/host/@name")
        if host.port is not None and not 0 < host.port < 65536:
            raise ConfigError(f"{host.port} is not a port", path=f"{here}/host/@port")
    for device in source.devices:
        _word(device.path, f"{here}/device/@path")
        if kind in ("fs", "disk", "logical"):
            absolute(device.path, f"{here}/device/@path", "source device")
    if source.dir is not None:
        _word(source.dir.path, f"{here}/dir/@path")
    if source.name is not None:
        _word(source.name, f"{here}/name")
        if kind in ("logical", "zfs") and (source.name.startswith(".") or ".." in source.name.split("/")):
            raise ConfigError(f"{source.name!r} is not the name of a group", path=f"{here}/name")
        if kind == "logical" and "/" in source.name:
            raise ConfigError(f"{source.name!r} is not the name of a volume group", path=f"{here}/name")
    if source.initiator is not None:
        _word(source.initiator.iqn.name, f"{here}/initiator/iqn/@name")
    if source.protocol is not None and not all(part.isdecimal() for part in source.protocol.ver.split(".")):
        raise ConfigError(f"{source.protocol.ver!r} is not a version", path=f"{here}/protocol/@ver")
    if source.auth is not None and (source.auth.secret.uuid is None) == (source.auth.secret.usage is None):
        raise ConfigError("a secret is named by its uuid or by its usage", path=f"{here}/auth/secret")


def _validate_adapter(adapter: SourceAdapter | None) -> None:
    here = "/pool/source/adapter"
    if adapter is None:
        raise ConfigError("missing storage pool source adapter", path="/pool/source")
    if adapter.type == "fc_host":
        for what, name in (("wwnn", adapter.wwnn), ("wwpn", adapter.wwpn)):
            if name is None or len(name) != 16 or not set(name.lower()) <= set("0123456789abcdef"):
                raise ConfigError(f"'{what}' must be 16 hexadecimal digits", path=f"{here}/@{what}")
    elif adapter.name is None and adapter.parent_address is None:
        raise ConfigError("either 'name' or 'parent' must be specified for the 'scsi_host' adapter", path=here)
    elif adapter.name is not None:
        number = adapter.name.removeprefix("scsi_host").removeprefix("host")
        if not number.isdecimal():
            raise ConfigError(f"{adapter.name!r} is not a SCSI host such as scsi_host2", path=f"{here}/@name")


def _word(text: str, path: str) -> None:
    """What becomes an argument of a tool: not an option, nothing invisible."""
    if not text or text.startswith("-") or not text.isprintable():
        raise ConfigError(f"{text!r} cannot name a source", path=path)


def validate_permissions(permissions: Permissions, path: str) -> None:
    if permissions.mode is not None and not (
        0 < len(permissions.mode) <= 5
        and set(permissions.mode) <= set("01234567")
        and int(permissions.mode, 8) < 0o10000
    ):
        raise ConfigError(f"{permissions.mode!r} is not an octal mode", path=f"{path}/mode")
    for what, number in (("owner", permissions.owner), ("group", permissions.group)):
        if number is not None and not -1 <= number <= MAX_ID:
            raise ConfigError(f"{number} is not a user or group", path=f"{path}/{what}")
