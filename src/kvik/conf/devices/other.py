"""The small devices: <rng>, <watchdog>, <tpm>, <panic>, <vsock>, <iommu>, <hub>, <crypto>, and <filesystem>.
https://libvirt.org/formatdomain.html#devices"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, KIB, UUID, VALUE, YES_NO, Element, OnOff, Present, Text, YesNo
from kvik.conf.devices.chardev import ChardevSource, Protocol
from kvik.conf.devices.common import Device, DeviceSeclabel, VirtioOptions


class RngRate(Element):
    """At most `bytes` every `period` milliseconds."""

    bytes: int
    period: int | None = None


class RngBackend(Element):
    """`value` is a path (random); sources and protocol as of a character device (egd)."""

    model: Literal["random", "egd", "builtin"]
    type: Literal["dev", "file", "pipe", "unix", "tcp", "udp", "pty", "null"] | None = None
    value: Annotated[str | None, VALUE] = None
    sources: Annotated[list[ChardevSource], "source"] = []
    protocol: Protocol | None = None


class Rng(Device):
    model: Literal["virtio", "virtio-transitional", "virtio-non-transitional"] = "virtio"
    rate: RngRate | None = None
    backend: RngBackend | None = None
    driver: VirtioOptions | None = None


class Watchdog(Device):
    model: Literal["i6300esb", "ib700", "diag288", "itco"]
    action: Literal["reset", "shutdown", "poweroff", "pause", "none", "dump", "inject-nmi"] | None = None


class TpmDevice(Element):
    path: str | None = None


class TpmSource(Element):
    """`path` (external: of a socket; emulator: of the state), `mode`."""

    type: Literal["file", "dir", "unix"] | None = None
    mode: Literal["connect"] | None = None
    path: str | None = None
    seclabels: Annotated[list[DeviceSeclabel], "seclabel"] = []


class TpmEncryption(Element):
    __xml_strict__ = True

    secret: Annotated[str, UUID]


class PcrBanks(Element):
    sha1: Present = False
    sha256: Present = False
    sha384: Present = False
    sha512: Present = False


class TpmProfile(Element):
    source: str | None = None
    remove_disabled: Annotated[Literal["check", "fips-host"] | None, "removeDisabled"] = None
    name: str | None = None


class TpmBackend(Element):
    type: Literal["passthrough", "emulator", "external"]
    version: Literal["1.2", "2.0"] | None = None
    persistent_state: Annotated[bool | None, YES_NO, "persistent_state"] = None
    debug: int | None = None
    device: TpmDevice | None = None
    source: TpmSource | None = None
    encryption: TpmEncryption | None = None
    active_pcr_banks: PcrBanks | None = None
    profile: TpmProfile | None = None


class Tpm(Device):
    model: Literal["tpm-tis", "tpm-crb", "tpm-spapr", "spapr-tpm-proxy"] | None = None
    backend: TpmBackend | None = None


class Panic(Device):
    model: Literal["isa", "pseries", "hyperv", "s390", "pvpanic"] | None = None


class Cid(Element):
    auto: YesNo = None
    address: int | None = None


class Vsock(Device):
    model: Literal["virtio", "virtio-transitional", "virtio-non-transitional"] | None = None
    cid: Cid | None = None
    driver: VirtioOptions | None = None


class IommuDriver(Element):
    intremap: OnOff = None
    caching_mode: OnOff = None
    eim: OnOff = None
    iotlb: OnOff = None
    aw_bits: int | None = None
    dma_translation: OnOff = None
    xtsup: OnOff = None
    passthrough: OnOff = None


class Iommu(Device):
    model: Literal["intel", "smmuv3", "virtio", "amd"]
    driver: IommuDriver | None = None


class Hub(Device):
    type: Literal["usb"]


class CryptoBackend(Element):
    model: Literal["builtin", "lkcf"]
    queues: int | None = None


class Crypto(Device):
    model: Literal["virtio"]
    type: Literal["qemu"]
    backend: CryptoBackend | None = None
    driver: VirtioOptions | None = None


class FilesystemDriver(VirtioOptions):
    type: Literal["path", "handle", "loop", "nbd", "ploop", "virtiofs", "mtp"] | None = None
    format: str | None = None
    name: str | None = None
    wrpolicy: Literal["immediate"] | None = None
    queue: int | None = None


class FilesystemSource(Element):
    """`dir` (mount), `file`, `dev` (block), `pool` and `volume`, `name` (template), `socket` of an external virtiofsd,
    `usage` in KiB (ram)."""

    dir: str | None = None
    file: str | None = None
    dev: str | None = None
    name: str | None = None
    pool: str | None = None
    volume: str | None = None
    socket: str | None = None
    usage: Annotated[int | None, KIB] = None


class FilesystemTarget(Element):
    """For QEMU a tag by which the guest mounts it, not a path."""

    dir: str


class FilesystemCache(Element):
    mode: Literal["none", "always"] | None = None


class FilesystemLock(Element):
    posix: OnOff = None
    flock: OnOff = None


class Sandbox(Element):
    __xml_strict__ = True

    mode: Literal["namespace", "chroot"] | None = None


class ThreadPool(Element):
    size: int


class OpenFiles(Element):
    max: int


class FilesystemBinary(Element):
    path: str | None = None
    xattr: OnOff = None
    cache: FilesystemCache | None = None
    lock: FilesystemLock | None = None
    sandbox: Sandbox | None = None
    thread_pool: ThreadPool | None = None
    openfiles: OpenFiles | None = None


class IdMapEntry(Element):
    __xml_strict__ = True

    start: int
    target: int
    count: int


class FilesystemIdMap(Element):
    __xml_strict__ = True

    uids: Annotated[list[IdMapEntry], "uid"] = []
    gids: Annotated[list[IdMapEntry], "gid"] = []


class Filesystem(Device):
    type: Literal["mount", "template", "file", "block", "ram", "bind", "volume"] = "mount"
    accessmode: Literal["passthrough", "mapped", "squash"] | None = None
    model: Literal["virtio", "virtio-transitional", "virtio-non-transitional"] | None = None
    multidevs: Literal["default", "remap", "forbid", "warn"] | None = None
    fmode: str | None = None
    dmode: str | None = None
    driver: FilesystemDriver | None = None
    source: FilesystemSource | None = None
    target: FilesystemTarget | None = None
    readonly: Present = False
    space_hard_limit: Annotated[int | None, CHILD, KIB] = None
    space_soft_limit: Annotated[int | None, CHILD, KIB] = None
    binary: FilesystemBinary | None = None
    idmap: FilesystemIdMap | None = None


class Nvram(Device):
    """pSeries NVRAM; only its address is known."""


class Lease(Element):
    """A lock that must be held while the machine runs."""

    __xml_strict__ = True

    lockspace: Text = None
    key: Text = None
    target: LeaseTarget | None = None


class LeaseTarget(Element):
    __xml_strict__ = True

    path: str
    offset: int | None = None
