"""What a host and an emulator can do, as libvirt's two capability documents, built from plain data.

https://libvirt.org/formatcaps.html and https://libvirt.org/formatdomaincaps.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvik.conf.codec import escape


@dataclass(frozen=True, slots=True)
class HostCell:
    """One NUMA node; `cpus` are (id, socket, die, core, siblings as a set such as "0-1"); `pages` KiB -> count."""

    id: int
    memory_kib: int
    cpus: Sequence[tuple[int, int, int, int, str]] = ()
    pages: Mapping[int, int] = field(default_factory=dict)
    distances: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GuestMachine:
    """A machine type; `canonical` is what the alias `name` stands for."""

    name: str
    max_cpus: int = 255
    canonical: str = ""


@dataclass(frozen=True, slots=True)
class GuestArch:
    """One architecture that guests can have here. `domains` are domain types: 'qemu', 'kvm', 'test'."""

    arch: str
    emulator: str
    machines: Sequence[GuestMachine] = ()
    domains: Sequence[str] = ("qemu",)
    os_type: str = "hvm"

    @property
    def wordsize(self) -> int:
        return 32 if self.arch in ("i686", "armv7l", "ppc", "riscv32", "mips") else 64


@dataclass(frozen=True, slots=True)
class HostCapabilities:
    uuid: str
    arch: str
    model: str = ""
    vendor: str = ""
    sockets: int = 1
    dies: int = 1
    cores: int = 1
    threads: int = 1
    features: Sequence[str] = ()
    page_sizes_kib: Sequence[int] = (4,)
    cells: Sequence[HostCell] = ()
    iommu: bool = False
    migration_uris: Sequence[str] = ("tcp",)
    security_models: Sequence[tuple[str, str]] = ()  # (model, DOI)
    guests: Sequence[GuestArch] = ()


def _tag(name: str, text: object = "", /, **attributes: object) -> str:
    """`<name a='1'>text</name>`; attributes that are None or empty are left out."""
    given = "".join(f" {key}='{escape(str(value))}'" for key, value in attributes.items() if value not in (None, ""))
    return f"<{name}{given}>{escape(str(text))}</{name}>" if text != "" else f"<{name}{given}/>"


class _Lines:
    """Indented text; `block` opens an element until the `with` ends."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def add(self, *lines: str) -> None:
        self.lines += ["  " * self.depth + line for line in lines]

    def block(self, name: str, /, **attributes: object) -> _Block:
        return _Block(self, name, attributes)

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


class _Block:
    def __init__(self, out: _Lines, name: str, attributes: Mapping[str, object]) -> None:
        self.out, self.name, self.attributes = out, name, attributes

    def __enter__(self) -> None:
        self.out.add(_tag(self.name, **self.attributes)[:-2] + ">")
        self.out.depth += 1

    def __exit__(self, *_: object) -> None:
        self.out.depth -= 1
        self.out.add(f"</{self.name}>")


def format_capabilities(host: HostCapabilities) -> str:
    """The `<capabilities>` document."""
    out = _Lines()
    with out.block("capabilities"):
        with out.block("host"):
            out.add(_tag("uuid", host.uuid))
            with out.block("cpu"):
                out.add(_tag("arch", host.arch))
                out.add(*(_tag("model", host.model) for _ in [1] if host.model))
                out.add(*(_tag("vendor", host.vendor) for _ in [1] if host.vendor))
                out.add(
                    _tag("topology", sockets=host.sockets, dies=host.dies, cores=host.cores, threads=host.threads),
                    *(_tag("feature", name=name) for name in host.features),
                    *(_tag("pages", unit="KiB", size=size) for size in host.page_sizes_kib),
                )
            with out.block("power_management"):
                pass
            out.add(_tag("iommu", support="yes" if host.iommu else "no"))
            with out.block("migration_features"):
                out.add("<live/>")
                with out.block("uri_transports"):
                    out.add(*(_tag("uri_transport", uri) for uri in host.migration_uris))
            if host.cells:
                _topology(out, host.cells)
            for model, doi in host.security_models:
                with out.block("secmodel"):
                    out.add(_tag("model", model), _tag("doi", doi))
        for guest in host.guests:
            _guest(out, guest)
    return out.text()


def _topology(out: _Lines, cells: Sequence[HostCell]) -> None:
    with out.block("topology"), out.block("cells", num=len(cells)):
        for cell in cells:
            with out.block("cell", id=cell.id):
                out.add(_tag("memory", cell.memory_kib, unit="KiB"))
                out.add(*(_tag("pages", count, unit="KiB", size=size) for size, count in cell.pages.items()))
                if cell.distances:
                    with out.block("distances"):
                        out.add(*(_tag("sibling", id=other, value=value) for other, value in cell.distances.items()))
                with out.block("cpus", num=len(cell.cpus)):
                    for number, socket, die, core, siblings in cell.cpus:
                        out.add(_tag("cpu", id=number, socket_id=socket, die_id=die, core_id=core, siblings=siblings))


def _guest(out: _Lines, guest: GuestArch) -> None:
    with out.block("guest"):
        out.add(_tag("os_type", guest.os_type))
        with out.block("arch", name=guest.arch):
            out.add(_tag("wordsize", guest.wordsize), _tag("emulator", guest.emulator))
            for machine in guest.machines:
                out.add(_tag("machine", machine.name, canonical=machine.canonical, maxCpus=machine.max_cpus))
            out.add(*(_tag("domain", type=kind) for kind in guest.domains))
        with out.block("features"):
            if guest.arch in ("x86_64", "i686", "aarch64"):
                out.add(_tag("acpi", default="on", toggle="yes"))
            if guest.arch in ("x86_64", "i686"):
                out.add(_tag("apic", default="on", toggle="no"))
            if guest.arch == "i686":
                out.add("<pae/>", "<nonpae/>")
            out.add("<cpuselection/>", "<deviceboot/>", _tag("disksnapshot", default="on", toggle="no"))


@dataclass(frozen=True, slots=True)
class DomainCapabilities:
    """What one emulator offers for one architecture, machine type and domain type.

    `devices` maps an element (disk, graphics, video, ...) to its enums (bus, type, modelType, ...); an empty
    mapping means supported without choice, an absent key not supported. `cpu_models` are
    (name, usable, vendor or "unknown").
    """

    path: str
    domain: str
    machine: str
    arch: str
    max_vcpus: int
    iothreads: bool = True
    firmwares: Sequence[str] = ()  # automatically selectable: "bios", "efi"
    loaders: Sequence[str] = ()  # firmware files
    secure_boot: bool = False
    cpu_modes: Sequence[str] = ("custom", "maximum")
    host_model: str = ""
    cpu_models: Sequence[tuple[str, bool, str]] = ()
    memory_sources: Sequence[str] = ("file", "anonymous", "memfd")
    devices: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    features: Mapping[str, bool] = field(default_factory=dict)


_DEVICES = ("disk", "graphics", "video", "hostdev", "rng", "filesystem", "tpm", "redirdev", "channel")
_FEATURES = ("gic", "vmcoreinfo", "genid", "backingStoreInput", "backup", "sev", "sgx")


def _enum(out: _Lines, name: str, values: Sequence[str]) -> None:
    if values:
        with out.block("enum", name=name):
            out.add(*(_tag("value", value) for value in values))
    else:
        out.add(_tag("enum", name=name))


def format_domain_capabilities(caps: DomainCapabilities) -> str:
    """The `<domainCapabilities>` document."""
    out = _Lines()
    with out.block("domainCapabilities"):
        out.add(_tag("path", caps.path), _tag("domain", caps.domain), _tag("machine", caps.machine))
        out.add(_tag("arch", caps.arch), _tag("vcpu", max=caps.max_vcpus))
        out.add(_tag("iothreads", supported="yes" if caps.iothreads else "no"))
        with out.block("os", supported="yes"):
            _enum(out, "firmware", caps.firmwares)
            with out.block("loader", supported="yes"):
                out.add(*(_tag("value", path) for path in caps.loaders))
                _enum(out, "type", ("rom", "pflash"))
                _enum(out, "readonly", ("yes", "no"))
                _enum(out, "secure", ("yes", "no") if caps.secure_boot else ("no",))
        with out.block("cpu"):
            for mode in ("host-passthrough", "maximum", "host-model", "custom"):
                _cpu_mode(out, mode, caps)
        with out.block("memoryBacking", supported="yes"):
            _enum(out, "sourceType", caps.memory_sources)
        with out.block("devices"):
            for kind in [*_DEVICES, *(kind for kind in caps.devices if kind not in _DEVICES)]:
                enums = caps.devices.get(kind)
                if not enums:
                    out.add(_tag(kind, supported="no" if enums is None else "yes"))
                    continue
                with out.block(kind, supported="yes"):
                    for name, values in enums.items():
                        _enum(out, name, values)
        with out.block("features"):
            for name in _FEATURES:
                out.add(_tag(name, supported="yes" if caps.features.get(name) else "no"))
    return out.text()


def _cpu_mode(out: _Lines, mode: str, caps: DomainCapabilities) -> None:
    if mode not in caps.cpu_modes:
        out.add(_tag("mode", name=mode, supported="no"))
        return
    with out.block("mode", name=mode, supported="yes"):
        if mode == "host-passthrough":
            _enum(out, "hostPassthroughMigratable", ("on", "off"))
        elif mode == "maximum":
            _enum(out, "maximumMigratable", ("on", "off"))
        elif mode == "host-model":
            out.add(_tag("model", caps.host_model or "qemu64", fallback="forbid"))
        else:
            for name, usable, vendor in caps.cpu_models:
                out.add(_tag("model", name, usable="yes" if usable else "no", vendor=vendor))
