"""<domain>, the document of one machine, and its two directions: `parse_domain` and `format_domain`.

Parsing checks form only; `postparse` fills in what was left out and `validate` checks sense. `prepare.load_domain` does
all three. https://libvirt.org/formatdomain.html
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from kvik.conf import tree
from kvik.conf.codec import CHILD, KIB, LIVE, ON_OFF, QEMU_NS, RAW, SIGNED, UUID, Element, Of, Text
from kvik.conf.cpu import Cpu, Vcpu, Vcpus
from kvik.conf.devices.chardev import Channel, Console, Parallel, Serial
from kvik.conf.devices.controller import Controller
from kvik.conf.devices.disk import Disk
from kvik.conf.devices.display import Audio, Graphics, Input, Sound, Video
from kvik.conf.devices.hostdev import Hostdev, Redirdev, RedirFilter, Smartcard
from kvik.conf.devices.interface import Interface
from kvik.conf.devices.memory import Memballoon, Memory, Shmem
from kvik.conf.devices.other import (
    Crypto,
    Filesystem,
    Hub,
    Iommu,
    Lease,
    Nvram,
    Panic,
    Rng,
    Tpm,
    Vsock,
    Watchdog,
)
from kvik.conf.features import Clock, Features, Perf, Pm
from kvik.conf.os import GenId, Os, Sysinfo
from kvik.conf.reader import read_xml
from kvik.conf.security import KeyWrap, LaunchSecurity, Seclabel
from kvik.conf.tuning import (
    BlkioTune,
    CpuTune,
    DefaultIoThread,
    IoThreadIds,
    MaxMemory,
    MemoryBacking,
    MemTune,
    NumaTune,
    Resource,
)
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError

LifecycleAction = Literal["destroy", "restart", "rename-restart", "preserve", "coredump-destroy", "coredump-restart"]


class Devices(Element):
    emulator: Text = None
    disks: Annotated[list[Disk], "disk"] = []
    controllers: Annotated[list[Controller], "controller"] = []
    leases: Annotated[list[Lease], "lease"] = []
    filesystems: Annotated[list[Filesystem], "filesystem"] = []
    interfaces: Annotated[list[Interface], "interface"] = []
    smartcards: Annotated[list[Smartcard], "smartcard"] = []
    serials: Annotated[list[Serial], "serial"] = []
    parallels: Annotated[list[Parallel], "parallel"] = []
    consoles: Annotated[list[Console], "console"] = []
    channels: Annotated[list[Channel], "channel"] = []
    inputs: Annotated[list[Input], "input"] = []
    tpms: Annotated[list[Tpm], "tpm"] = []
    graphics: Annotated[list[Graphics], "graphics"] = []
    sounds: Annotated[list[Sound], "sound"] = []
    audios: Annotated[list[Audio], "audio"] = []
    videos: Annotated[list[Video], "video"] = []
    hostdevs: Annotated[list[Hostdev], "hostdev"] = []
    redirdevs: Annotated[list[Redirdev], "redirdev"] = []
    redirfilter: RedirFilter | None = None
    hubs: Annotated[list[Hub], "hub"] = []
    watchdogs: Annotated[list[Watchdog], "watchdog"] = []
    memballoon: Memballoon | None = None
    rngs: Annotated[list[Rng], "rng"] = []
    nvram: Nvram | None = None
    panics: Annotated[list[Panic], "panic"] = []
    shmems: Annotated[list[Shmem], "shmem"] = []
    memorys: Annotated[list[Memory], "memory"] = []
    iommu: Iommu | None = None
    vsock: Vsock | None = None
    cryptos: Annotated[list[Crypto], "crypto"] = []


class QemuArg(Element):
    value: str


class QemuEnv(Element):
    name: str
    value: str | None = None


class QemuCommandline(Element):
    """Arguments handed to QEMU as they are."""

    arguments: Annotated[list[QemuArg], f"{{{QEMU_NS}}}arg"] = []
    environment: Annotated[list[QemuEnv], f"{{{QEMU_NS}}}env"] = []

    @property
    def args(self) -> list[str]:
        return [item.value for item in self.arguments]

    @property
    def env(self) -> list[tuple[str, str]]:
        return [(item.name, item.value or "") for item in self.environment]


class IdMapEntry(Element):
    start: int
    target: int
    count: int


class Domain(Element, kw_only=True):
    """Memory in KiB throughout. `id` is None unless this is the document of a running machine."""

    type: Literal["kvm", "qemu", "test", "kqemu", "xen", "lxc", "vz", "bhyve", "hvf"]
    id: Annotated[int | None, SIGNED, LIVE] = None
    name: Annotated[str, CHILD] = ""
    uuid: Annotated[str | None, CHILD, UUID] = None
    genid: GenId | None = None
    title: Text = None
    description: Text = None
    metadata: Annotated[list[bytes], RAW] = []
    max_memory: Annotated[MaxMemory | None, "maxMemory"] = None
    memory: Annotated[int, CHILD, KIB] = 0
    memory_dump_core: Annotated[bool | None, ON_OFF, Of("memory"), "dumpCore"] = None
    current_memory: Annotated[int | None, CHILD, KIB, "currentMemory"] = None
    blkiotune: BlkioTune | None = None
    memtune: MemTune | None = None
    memory_backing: Annotated[MemoryBacking | None, "memoryBacking"] = None
    vcpu: Vcpu | None = None
    vcpus: Vcpus | None = None
    iothreads: Annotated[int | None, CHILD] = None
    iothreadids: IoThreadIds | None = None
    defaultiothread: DefaultIoThread | None = None
    cputune: CpuTune | None = None
    numatune: NumaTune | None = None
    resource: Resource | None = None
    sysinfos: Annotated[list[Sysinfo], "sysinfo"] = []
    os: Os
    features: Features | None = None
    cpu: Cpu | None = None
    clock: Clock | None = None
    on_poweroff: Annotated[LifecycleAction | None, CHILD] = None
    on_reboot: Annotated[LifecycleAction | None, CHILD] = None
    on_crash: Annotated[LifecycleAction | None, CHILD] = None
    on_lockfailure: Annotated[Literal["poweroff", "restart", "pause", "ignore"] | None, CHILD] = None
    pm: Pm | None = None
    perf: Perf | None = None
    keywrap: KeyWrap | None = None
    launch_security: Annotated[LaunchSecurity | None, "launchSecurity"] = None
    devices: Devices = msgspec.field(default_factory=Devices)
    seclabels: Annotated[list[Seclabel], "seclabel"] = []
    qemu_commandline: Annotated[QemuCommandline | None, f"{{{QEMU_NS}}}commandline"] = None

    def warnings(self) -> list[str]:
        """One line for each thing that this document says and kvik does not understand."""
        return tree.warnings(self, "/domain")

    def copy(self) -> Domain:
        return tree.clone(self)


def parse_domain(xml: str | bytes) -> Domain:
    """The document as it stands, nothing filled in. Raises ConfigError with line, path and reason."""
    root = read_xml(xml, "domain document")
    if root.tag != "domain":
        raise ConfigError(f"a domain document starts with <domain>, not <{root.tag}>", path=f"/{root.tag}")
    return parse_element(root, Domain)


def format_domain(domain: Domain, secure: bool = False, inactive: bool = False) -> str:
    """libvirt's XML. `secure` includes passwords; `inactive` leaves out what is true of a running machine only."""
    return format_element(domain, "domain", secure=secure, inactive=inactive)
