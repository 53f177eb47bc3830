"""What this host can do, as findings: each says what is so, why it matters, and names the fix.

`examine` looks at everything and returns a `Report`; it raises nothing and every tool it asks has a deadline. The CLI
prints it; the manager uses `Verdict`s from `probe` directly.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvik.errors import KvikError
from kvik.host import facilities, node, packages, process, tools
from kvik.host.cpu_model import cpu_model
from kvik.host.probe import Verdict, Virtualization, kvm_verdict, virtualization
from kvik.paths import Paths

OLDEST_QEMU = (6, 2)  # JSON for -device: what the driver relies on
TOOL_TIMEOUT = 5.0  # seconds for each question to QEMU
_LOW_DISK = 2 << 30  # bytes
_LOW_MEMORY_KIB = 512 << 10
_ROOT = Path("/")

FIRMWARE: dict[str, tuple[str, ...]] = {
    "seabios": ("/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin", "/usr/share/seabios/bios.bin"),
    "qboot": ("/usr/share/qemu/qboot.rom", "/usr/share/qboot/qboot.rom", "/usr/share/qboot/bios.bin"),
    "ovmf": (
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
        "/usr/share/OVMF/OVMF_CODE.fd",
        "/usr/share/edk2/ovmf/OVMF_CODE.fd",
        "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
    ),
}
# What each tool is for, and where besides the search path it may lie.
TOOLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "qemu-img": ("converts and checks disk images that kvik does not itself", ()),
    "qemu-storage-daemon": ("formats other than raw and qcow2 for kvik-vmm", ()),
    "dnsmasq": ("gives addresses and names in virtual networks", ()),
    "nft": ("NAT and filtering of virtual networks", ()),
    "passt": ("fast networking without root", ()),
    "swtpm": ("TPM devices", ()),
    "virtiofsd": ("shared directories", ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")),
}


class Status(enum.StrEnum):
    OK = "ok"
    INFO = "info"  # worth knowing; nothing to do
    WARN = "warn"  # something will not work, or not well
    FAIL = "fail"  # machines do not run


@dataclass(frozen=True, slots=True)
class Finding:
    """`name` is stable (scripts look for it); `what` is the state, `why` the reason, `fix` what to do."""

    group: str
    name: str
    status: Status
    what: str
    why: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    findings: list[Finding]
    accelerator: str  # "kvm", "tcg" or "" (nothing runs)

    @property
    def usable(self) -> bool:
        """Machines can run at all."""
        return bool(self.accelerator) and all(finding.status is not Status.FAIL for finding in self.findings)

    def finding(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: {"usable", "accelerator", "findings": [{group, name, status, what, why, fix}]}."""
        return {
            "usable": self.usable,
            "accelerator": self.accelerator,
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class Emulator:
    """The QEMU binary and what it says of itself."""

    path: str = ""
    version: tuple[int, ...] = ()
    accelerators: tuple[str, ...] = ()
    error: str = ""


def find_emulator(path: str | None = None) -> Emulator:
    """Ask QEMU for its version and accelerators; bounded by `TOOL_TIMEOUT` each."""
    binary = path or process.find_program("qemu-system-x86_64")
    if not binary:
        return Emulator()
    try:
        text = tools.run([binary, "--version"], timeout=TOOL_TIMEOUT, limit=65536).text
        match = re.search(r"version (\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", text)
        if match is None:
            return Emulator(binary, error=f"its answer to --version is not QEMU's: {text[:200]!r}")
        version = tuple(int(part) for part in match.groups(default="0"))
        listing = tools.run([binary, "-accel", "help"], timeout=TOOL_TIMEOUT, limit=65536).text.splitlines()
    except KvikError as error:
        return Emulator(binary, error=error.message)
    # A heading, then one name a line; builds that split accelerators into modules list only the installed ones.
    accelerators = tuple(line.strip() for line in listing if re.fullmatch(r"\s*[a-z]{2,8}\s*", line))
    return Emulator(binary, version, accelerators)


def examine(
    paths: Paths | None = None, *, root: Path = _ROOT, fresh: bool = False, emulator: Emulator | None = None
) -> Report:
    """Look at everything. `fresh` runs the KVM probe anew; `root` moves /proc, /sys, /dev and /usr, for tests."""
    paths = paths or Paths.default()
    doctor = _Doctor(
        paths=paths,
        root=root,
        release=packages.release(root),
        verdict=kvm_verdict(paths.cache, root, fresh=fresh),
        host=virtualization(root),
        emulator=emulator or find_emulator(),
    )
    return Report(list(doctor.findings()), doctor.accelerator())


@dataclass(slots=True)
class _Doctor:
    paths: Paths
    root: Path
    release: packages.Release
    verdict: Verdict
    host: Virtualization
    emulator: Emulator = field(default_factory=Emulator)

    def install(self, what: str) -> str:
        return packages.how_to_install(what, self.release)

    def accelerator(self) -> str:
        if not self.emulator.version or self.emulator.version[:2] < OLDEST_QEMU:
            return ""
        if self.verdict.usable and "kvm" in self.emulator.accelerators:
            return "kvm"
        return "tcg" if "tcg" in self.emulator.accelerators else ""

    def findings(self) -> Iterator[Finding]:
        yield from self.acceleration()
        yield from self.qemu()
        yield from self.firmware()
        yield from self.kernel()
        yield from self.network()
        yield from self.room()
        yield from self.tools()
        yield from self.directories()

    def acceleration(self) -> Iterator[Finding]:
        group = "acceleration"
        verdict, host = self.verdict, self.host
        status = Status.OK if verdict.usable else Status.WARN
        yield Finding(group, "kvm", status, verdict.state.value, verdict.reason, verdict.remedy)
        chosen = self.accelerator()
        if chosen == "kvm":
            yield Finding(group, "accelerator", Status.OK, "kvm", "guest code runs on the CPU itself")
        elif chosen == "tcg":
            if verdict.usable:
                why, fix = "this QEMU was built without KVM", self.install("qemu-system-x86_64")
            else:
                why, fix = "KVM is not usable (above): machines run, several times slower", ""
            yield Finding(group, "accelerator", Status.WARN, "tcg (software emulation)", why, fix)
        else:
            why = "no QEMU that could run a machine (below)"
            yield Finding(group, "accelerator", Status.FAIL, "none", why, self.install("qemu-system-x86_64"))
        cpu = cpu_model(self.root)
        yield Finding(group, "cpu", Status.INFO, cpu.name or cpu.vendor_id or "unknown", f"{host.vendor}, {cpu.arch}")
        if host.extension:
            what = " with ".join(part for part in (host.extension, host.paging) if part)
            yield Finding(group, "extension", Status.OK, what, f"kernel module {host.module or 'not loaded'}")
        elif host.paravirtual:
            why = "KVM-PVM: KVM without VMX or SVM, known by its kernel module kvm_pvm"
            yield Finding(group, "extension", Status.INFO, "paravirtual", why)
        else:
            yield Finding(group, "extension", Status.INFO, "none", "no VMX or SVM in /proc/cpuinfo")
        if host.inside:
            yield Finding(group, "inside", Status.INFO, host.inside, "this host is one itself")
        if host.nested is not None:
            option = (
                f"echo 'options {host.module} nested=1' > /etc/modprobe.d/kvm-nested.conf, then reload {host.module}"
            )
            yield Finding(
                group,
                "nested",
                Status.OK if host.nested else Status.INFO,
                "yes" if host.nested else "no",
                "machines can run machines" if host.nested else "machines cannot run machines themselves",
                "" if host.nested else option,
            )
        why = "host devices can be given to machines" if host.iommu else "host devices cannot be given to machines"
        flag = "intel_iommu=on" if host.vendor == "Intel" else "amd_iommu=on"
        fix = (
            "" if host.iommu else f"if you need it: enable it in the firmware and add {flag} to the kernel's arguments"
        )
        yield Finding(group, "iommu", Status.OK if host.iommu else Status.INFO, "yes" if host.iommu else "no", why, fix)

    def qemu(self) -> Iterator[Finding]:
        group, emulator = "qemu", self.emulator
        fix = self.install("qemu-system-x86_64")
        if not emulator.path:
            why = "qemu-system-x86_64 is in none of the usual directories"
            yield Finding(group, "qemu", Status.FAIL, "not installed", why, fix)
            return
        if emulator.error:
            yield Finding(group, "qemu", Status.FAIL, emulator.path, f"it does not work: {emulator.error}", fix)
            return
        version = ".".join(map(str, emulator.version))
        if emulator.version[:2] < OLDEST_QEMU:
            oldest = ".".join(map(str, OLDEST_QEMU))
            yield Finding(group, "qemu", Status.FAIL, version, f"too old: {oldest} or later is needed", fix)
        else:
            yield Finding(group, "qemu", Status.OK, version, emulator.path)
        status = Status.OK if "tcg" in emulator.accelerators or self.accelerator() == "kvm" else Status.FAIL
        what = ", ".join(emulator.accelerators) or "none"
        yield Finding(group, "qemu-accelerators", status, what, "built in", "" if status is Status.OK else fix)

    def firmware(self) -> Iterator[Finding]:
        uses = {
            "seabios": ("BIOS boot from disks", Status.FAIL),
            "qboot": ("the fast path for direct kernel boot", Status.WARN),
            "ovmf": ("UEFI boot", Status.WARN),
        }
        for name, candidates in FIRMWARE.items():
            use, severity = uses[name]
            found = next((path for path in candidates if (self.root / path.lstrip("/")).is_file()), "")
            if found:
                yield Finding("firmware", name, Status.OK, found, use)
            else:
                yield Finding("firmware", name, severity, "not installed", f"needed for {use}", self.install(name))

    def kernel(self) -> Iterator[Finding]:
        group = "kernel"
        yield Finding(group, "kernel", Status.INFO, os.uname().release)
        abi = facilities.landlock()
        why = abi.why or "confines what a machine's process may open"
        yield Finding(group, "landlock", *_found(abi, f"ABI {abi.value}"), why, _kernel_fix(abi))
        for name, facility, use in (
            ("seccomp", facilities.seccomp(self.root), "confines what a machine's process may call"),
            ("namespaces", facilities.namespaces(self.root), "confinement and networking without root"),
            ("userfaultfd", facilities.userfaultfd(), "lazy restore and post-copy migration"),
            ("io_uring", facilities.io_uring(), "faster disks"),
        ):
            yield Finding(group, name, *_found(facility, "yes"), facility.why or use, _kernel_fix(facility))
        groups = facilities.cgroups(self.root)
        if groups.version:
            what = "v2" if groups.version == 2 else "v1 with v2 beside it" if groups.unified else "v1"
            yield Finding(group, "cgroups", Status.OK, what, " ".join(groups.controllers))
        else:
            fix = "mount -t cgroup2 none /sys/fs/cgroup"
            yield Finding(group, "cgroups", Status.WARN, "none", "needed to limit machines' shares", fix)
        ksm = facilities.ksm(self.root)
        what = {0: "no", 1: "off", 2: "on"}[ksm.value]
        fix = "to share equal pages among machines: echo 1 > /sys/kernel/mm/ksm/run" if ksm.value == 1 else ""
        yield Finding(group, "ksm", Status.INFO, what, ksm.why or "merges equal pages of machines", fix)
        thp = facilities.transparent_huge_pages(self.root)
        reserved = {
            pages.size_kib: pages.total for cell in node.cells(self.root) for pages in cell.pages[1:] if pages.total
        }
        pools = ", ".join(f"{count} of {size} KiB" for size, count in sorted(reserved.items())) or "none reserved"
        slow = thp == "never"
        yield Finding(
            group,
            "huge-pages",
            Status.WARN if slow else Status.OK,
            f"transparent: {thp or 'no'}; {pools}",
            "guest memory needs fewer page table look-ups with them",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled" if slow else "",
        )

    def network(self) -> Iterator[Finding]:
        group = "network"
        root = os.geteuid() == 0
        for name, facility, use, fix in (
            ("tun", facilities.device("/dev/net/tun", self.root), "taps: machines on bridges", "modprobe tun"),
            ("bridge", facilities.bridge(), "virtual networks", "modprobe bridge"),
            ("nf_tables", facilities.nf_tables(), "NAT and filters", "modprobe nf_tables"),
        ):
            # Without root none of these is of use anyway: user networking is what runs.
            status = Status.OK if facility else Status.WARN if root else Status.INFO
            what = "yes" if facility else "no"
            remedy = "" if facility else fix if root else "run as root for these networks; user networking needs none"
            yield Finding(group, name, status, what, facility.why or use, remedy)
        for name, path, module, use in (
            ("vhost-net", "/dev/vhost-net", "vhost_net", "faster networking in the kernel"),
            ("vhost-vsock", "/dev/vhost-vsock", "vhost_vsock", "sockets between host and machine"),
        ):
            facility = facilities.device(path, self.root)
            what, fix = ("yes", "") if facility else ("no", f"if the kernel has it: modprobe {module}")
            why = use if facility else f"{facility.why}; it would give {use}"
            yield Finding(group, name, Status.OK if facility else Status.INFO, what, why, fix)

    def room(self) -> Iterator[Finding]:
        memory = node.memory_stats(self.root)
        what = f"{_size(memory.available_kib << 10)} of {_size(memory.total_kib << 10)} available"
        low = memory.available_kib < _LOW_MEMORY_KIB
        fix = "end something that uses much" if low else ""
        yield Finding("room", "memory", Status.WARN if low else Status.OK, what, "for machines", fix)
        place = _existing(self.paths.images)
        try:
            info = os.statvfs(place)
        except OSError as error:
            yield Finding("room", "disk", Status.WARN, str(place), error.strerror or "")
            return
        free = info.f_bavail * info.f_frsize
        low = free < _LOW_DISK
        fix = f"free some space on the file system of {place}" if low else ""
        what = f"{_size(free)} free"
        yield Finding(
            "room", "disk", Status.WARN if low else Status.OK, what, f"for images in {self.paths.images}", fix
        )

    def tools(self) -> Iterator[Finding]:
        for name, (use, places) in TOOLS.items():
            found = process.find_program(name) or next((path for path in places if os.access(path, os.X_OK)), None)
            if found:
                yield Finding("tools", name, Status.OK, found, use)
            else:
                yield Finding("tools", name, Status.INFO, "not installed", f"for {use}", self.install(name))

    def directories(self) -> Iterator[Finding]:
        paths = self.paths
        for name, path in (
            ("config", paths.config),
            ("run", paths.run),
            ("data", paths.data),
            ("cache", paths.cache),
            ("log", paths.log),
        ):
            place = _existing(path)
            if os.access(place, os.W_OK | os.X_OK) and place.is_dir():
                yield Finding("directories", f"directory-{name}", Status.OK, str(path), "writable")
                continue
            try:
                read_only = bool(os.statvfs(place).f_flag & os.ST_RDONLY)
            except OSError:
                read_only = False
            why = f"{place} is " + ("on a read-only file system" if read_only else "not writable for this user")
            fix = f"mount -o remount,rw {place}" if read_only else f"chown {os.geteuid()} {place}"
            yield Finding("directories", f"directory-{name}", Status.FAIL, str(path), why, fix)


def _found(facility: facilities.Facility, what: str) -> tuple[Status, str]:
    return (Status.OK, what) if facility else (Status.WARN, "no")


def _kernel_fix(facility: facilities.Facility) -> str:
    if facility:
        return ""
    if "max_user_namespaces" in facility.why:
        return "sysctl user.max_user_namespaces=10000"
    if "unprivileged_userns_clone" in facility.why:
        return "sysctl kernel.unprivileged_userns_clone=1"
    if "lsm=" in facility.why:
        return "add landlock to lsm= in the kernel's arguments"
    if "switched off" in facility.why:
        return "allow it: sysctl (kernel.io_uring_disabled, vm.unprivileged_userfaultfd) or the container's profile"
    return "run a distribution kernel, 5.13 or later"


def _existing(path: Path) -> Path:
    """The path itself or the nearest directory above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
