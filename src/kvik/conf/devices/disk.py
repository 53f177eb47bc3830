"""<disk>: https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import (
    CHILD,
    SECRET,
    UUID,
    VALUE,
    YES_NO,
    Element,
    OnOff,
    Present,
    Text,
    YesNo,
)
from kvik.conf.devices.common import Address, BootableDevice, DeviceSeclabel, Reconnect, VirtioOptions

SourceType = Literal["file", "block", "dir", "network", "volume", "nvme", "vhostuser", "vhostvdpa"]
Bus = Literal["ide", "fdc", "scsi", "virtio", "xen", "usb", "uml", "sata", "sd", "nvme"]
Iops = Annotated[int | None, CHILD]


class Format(Element):
    type: str


class MetadataCache(Element):
    max_size: Annotated[int | None, CHILD, "max_size"] = None


class Secret(Element):
    """Names a secret, by UUID or usage; never the secret itself."""

    __xml_strict__ = True

    type: str | None = None
    uuid: Annotated[str | None, UUID] = None
    usage: str | None = None


class Auth(Element):
    __xml_strict__ = True

    username: str | None = None
    secret: Secret | None = None


class Cipher(Element):
    __xml_strict__ = True

    name: str | None = None
    size: int | None = None
    mode: str | None = None
    hash: str | None = None


class IvGen(Element):
    __xml_strict__ = True

    name: str | None = None
    hash: str | None = None


class Encryption(Element):
    __xml_strict__ = True

    format: str | None = None
    engine: Literal["qemu", "librbd"] | None = None
    secrets: Annotated[list[Secret], "secret"] = []
    cipher: Cipher | None = None
    ivgen: IvGen | None = None


class Host(Element):
    name: str | None = None
    port: str | None = None
    transport: Literal["tcp", "unix", "rdma"] | None = None
    socket: str | None = None


class Slice(Element):
    type: Literal["storage"] | None = None
    offset: int | None = None
    size: int | None = None


class Slices(Element):
    slices: Annotated[list[Slice], "slice"] = []


class Cookie(Element):
    name: str
    value: Annotated[str | None, VALUE, SECRET] = None


class Cookies(Element):
    cookies: Annotated[list[Cookie], "cookie"] = []


class Iqn(Element):
    name: str


class Initiator(Element):
    iqn: Iqn | None = None


class Named(Element):
    """`<snapshot name=.../>` and `<config file=.../>` of a network source."""

    name: str | None = None
    file: str | None = None


class Bytes(Element):
    """`<readahead size=.../>`, `<timeout seconds=.../>`."""

    size: int | None = None
    seconds: int | None = None


class Identity(Element):
    """Who a server is told one is: `user` and `group` (nfs), `username` (ssh)."""

    user: str | None = None
    group: str | None = None
    username: str | None = None
    keyfile: str | None = None
    agentsock: str | None = None


class KnownHosts(Element):
    path: str


class NetworkReconnect(Reconnect):
    """Seconds: `delay` for how long a request of a network disk waits for a server that is gone."""

    delay: int | None = None


class Ssl(Element):
    verify: YesNo = None


class Reservations(Element):
    managed: YesNo = None
    source: ReservationsSource | None = None


class ReservationsSource(Element):
    type: Literal["unix"] | None = None
    path: str | None = None
    mode: Literal["client"] | None = None


class DiskSource(Element):
    """Which fields mean something depends on the disk's type: `file`; `dev` (block); `dir`; `protocol`, `name`, `query`
    and `hosts` (network); `pool`, `volume` and `mode`; `type`, `path` and `reconnect` (vhostuser)."""

    file: str | None = None
    fdgroup: str | None = None
    dev: str | None = None
    dir: str | None = None
    protocol: str | None = None
    name: str | None = None
    query: str | None = None
    tls: YesNo = None
    tls_hostname: Annotated[str | None, "tlsHostname"] = None
    pool: str | None = None
    volume: str | None = None
    mode: Literal["host", "direct", "client", "server"] | None = None
    type: Literal["unix", "pci"] | None = None
    path: str | None = None
    managed: YesNo = None
    namespace: int | None = None
    startup_policy: Annotated[Literal["mandatory", "requisite", "optional"] | None, "startupPolicy"] = None
    index: int | None = None
    hosts: Annotated[list[Host], "host"] = []
    snapshot: Named | None = None
    config: Named | None = None
    address: Address | None = None
    seclabels: Annotated[list[DeviceSeclabel], "seclabel"] = []
    auth: Auth | None = None
    encryption: Encryption | None = None
    reservations: Reservations | None = None
    initiator: Initiator | None = None
    slices: Slices | None = None
    ssl: Ssl | None = None
    cookies: Cookies | None = None
    readahead: Bytes | None = None
    timeout: Bytes | None = None
    reconnect: NetworkReconnect | None = None
    identity: Identity | None = None
    known_hosts: Annotated[KnownHosts | None, "knownHosts"] = None

    @property
    def location(self) -> str | None:
        """The host path that this source names, if it names one."""
        return self.file or self.dev or self.dir


class BackingStore(Element):
    """An image below another. Without a type it ends the chain: nothing is probed beyond it."""

    type: SourceType | None = None
    index: int | None = None
    format: Format | None = None
    source: DiskSource | None = None
    backing_store: Annotated[BackingStore | None, "backingStore"] = None


class Mirror(Element):
    """A running block copy or active commit (live documents only)."""

    type: SourceType | None = None
    job: Literal["copy", "active-commit"] | None = None
    file: str | None = None
    format_attribute: Annotated[str | None, "format"] = None
    ready: Literal["yes", "abort", "pivot"] | None = None
    format: Format | None = None
    source: DiskSource | None = None
    backing_store: Annotated[BackingStore | None, "backingStore"] = None


class DiskQueue(Element):
    id: int


class DiskIoThread(Element):
    """Which of a disk's queues an I/O thread serves; none named: in turn with the others."""

    id: int
    queues: Annotated[list[DiskQueue], "queue"] = []


class DiskIoThreads(Element):
    iothreads: Annotated[list[DiskIoThread], "iothread"] = []


class DiskDriver(VirtioOptions):
    name: str | None = None
    type: str | None = None
    cache: Literal["default", "none", "writethrough", "writeback", "directsync", "unsafe"] | None = None
    error_policy: Literal["stop", "report", "ignore", "enospace"] | None = None
    rerror_policy: Literal["stop", "report", "ignore"] | None = None
    io: Literal["threads", "native", "io_uring"] | None = None
    ioeventfd: OnOff = None
    event_idx: OnOff = None
    copy_on_read: OnOff = None
    discard: Literal["unmap", "ignore"] | None = None
    discard_no_unref: OnOff = None
    detect_zeroes: Literal["off", "on", "unmap"] | None = None
    iothread: int | None = None
    queues: int | None = None
    queue_size: int | None = None
    max_bootsize: int | None = None
    metadata_cache: MetadataCache | None = None
    iothreads: DiskIoThreads | None = None


class DiskTarget(Element):
    dev: str | None = None
    bus: Bus | None = None
    tray: Literal["open", "closed"] | None = None
    removable: OnOff = None
    rotation_rate: int | None = None
    dpofua: OnOff = None


class IoTune(Element):
    """Limits in bytes or requests a second; `_max` are bursts, `_max_length` how long they may last (seconds)."""

    total_bytes_sec: Iops = None
    read_bytes_sec: Iops = None
    write_bytes_sec: Iops = None
    total_iops_sec: Iops = None
    read_iops_sec: Iops = None
    write_iops_sec: Iops = None
    total_bytes_sec_max: Iops = None
    read_bytes_sec_max: Iops = None
    write_bytes_sec_max: Iops = None
    total_iops_sec_max: Iops = None
    read_iops_sec_max: Iops = None
    write_iops_sec_max: Iops = None
    size_iops_sec: Iops = None
    group_name: Text = None
    total_bytes_sec_max_length: Iops = None
    read_bytes_sec_max_length: Iops = None
    write_bytes_sec_max_length: Iops = None
    total_iops_sec_max_length: Iops = None
    read_iops_sec_max_length: Iops = None
    write_iops_sec_max_length: Iops = None


class Geometry(Element):
    cyls: int | None = None
    heads: int | None = None
    secs: int | None = None
    trans: Literal["auto", "none", "lba"] | None = None


class BlockIo(Element):
    logical_block_size: int | None = None
    physical_block_size: int | None = None
    discard_granularity: int | None = None


class Disk(BootableDevice, kw_only=True):
    type: SourceType = "file"
    device: Literal["disk", "cdrom", "floppy", "lun"] = "disk"
    model: Literal["virtio", "virtio-transitional", "virtio-non-transitional"] | None = None
    rawio: YesNo = None
    sgio: Literal["filtered", "unfiltered"] | None = None
    snapshot: Literal["internal", "external", "no", "manual"] | None = None
    driver: DiskDriver | None = None
    auth: Auth | None = None
    source: DiskSource | None = None
    backing_store: Annotated[BackingStore | None, "backingStore"] = None
    mirror: Mirror | None = None
    backend_domain: Annotated[BackendDomain | None, "backenddomain"] = None
    geometry: Geometry | None = None
    blockio: BlockIo | None = None
    target: DiskTarget
    iotune: IoTune | None = None
    readonly: Present = False
    shareable: Present = False
    transient: Transient | None = None
    serial: Text = None
    wwn: Text = None
    vendor: Text = None
    product: Text = None
    encryption: Encryption | None = None


class BackendDomain(Element):
    name: str


class Transient(Element):
    share_backing: Annotated[bool | None, YES_NO, "shareBacking"] = None
