"""The verdict on /dev/kvm: absent, forbidden, unusable or good, with the reason and the remedy.

Presence of the device proves nothing: `probe` runs a tiny guest (see `kvm_probe`) in a process of its own with a hard
deadline, so a /dev/kvm that hangs never hangs the caller. `judge`, `explain_absence` and `explain_refusal` are pure
over their arguments and a tree that looks like /proc and /sys.

The verdict is kept per boot in `directory`/kvm-verdict.json, keyed on everything that it depends on.
"""

from __future__ import annotations

import enum
import grp
import hashlib
import json
import os
import pwd
import signal
import stat
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvik.errors import HostError, KvikError, OperationTimeout
from kvik.host import process, tools
from kvik.host.cpu_model import cpu_model
from kvik.host.files import atomic_write, ensure_directory, try_read_file
from kvik.host.kvm_probe import FAST, GUEST_DEADLINE, STAGES
from kvik.host.sysfs import read_text
from kvik.kvm.extension import extension

DEADLINE = 30.0  # seconds for the whole probe process, which a busy host lets run now and then; the guest has its own
HANG_KEPT = 600.0  # seconds that a verdict of "hangs" is believed: it may have been the load
_FORMAT = 1  # raise when the probe or the verdict changes its meaning
_ROOT = Path("/")
_FALLBACK = "machines run by software emulation (TCG) meanwhile"


class State(enum.StrEnum):
    ABSENT = "absent"
    FORBIDDEN = "forbidden"
    UNUSABLE = "unusable"
    GOOD = "good"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether hardware acceleration can be used, in words for the user. `instruction_ns`: 0 if not measured."""

    usable: bool
    reason: str
    remedy: str = ""
    state: State = State.GOOD
    instruction_ns: float = 0.0
    exit_us: float = 0.0  # median of the probe's exits to user space
    cached: bool = False


# What the host's CPU and kernel offer ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Virtualization:
    """CPU vendor, hardware extension and the kernel's KVM, found without opening /dev/kvm."""

    vendor: str  # "Intel", "AMD", ...
    extension: str  # "VMX", "SVM" or "" (no flag in /proc/cpuinfo)
    paging: str  # second-level translation in use: "EPT", "NPT", or ""
    module: str  # "kvm_intel", "kvm_amd", "kvm_pvm", "built-in" or ""
    paravirtual: bool  # KVM without the hardware extension (KVM-PVM)
    nested: bool | None  # may guests of this host run KVM themselves; None: not told
    iommu: bool  # devices can be given to machines
    inside: str  # what this host is itself: "virtual machine", "container", "container in a virtual machine" or ""


def virtualization(root: Path = _ROOT) -> Virtualization:
    cpu = cpu_model(root)
    beneath = extension(str(root))
    around = ("container" if container(root) else "", "virtual machine" if "hypervisor" in cpu.flags else "")
    inside = " in a ".join(part for part in around if part)
    return Virtualization(
        vendor=cpu.vendor or cpu.vendor_id,
        extension=beneath.hardware,
        paging=beneath.paging,
        module=beneath.module,
        paravirtual=beneath.paravirtual,
        nested=beneath.nested,
        iommu=_has_entries(root / "sys/class/iommu") or _has_entries(root / "sys/kernel/iommu_groups"),
        inside=inside,
    )


def _has_entries(directory: Path) -> bool:
    try:
        return any(True for _ in directory.iterdir())
    except OSError:
        return False


def container(root: Path = _ROOT) -> str:
    """The container engine around us, or empty: by the marks that engines leave on purpose."""
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    mark = read_text(root / "run/systemd/container", 64)
    if mark:
        return mark
    for word in read_text(root / "proc/1/environ", 65536).split("\0"):
        if word.startswith("container=") and len(word) > len("container="):
            return word.removeprefix("container=")[:64]
    cgroups = read_text(root / "proc/1/cgroup", 65536)
    return next((engine for engine in ("docker", "kubepods", "lxc", "containerd") if f"/{engine}" in cgroups), "")


# Absent and forbidden -------------------------------------------------------------------------------------------


def explain_absence(root: Path = _ROOT) -> Verdict:
    """Why there is no /dev/kvm."""
    host = virtualization(root)
    engine = container(root)

    def absent(why: str, remedy: str) -> Verdict:
        return Verdict(False, f"/dev/kvm does not exist: {why}", f"{remedy}; {_FALLBACK}", State.ABSENT)

    if host.module and engine:
        return absent(
            f"this is a container ({engine}) that was not given the device",
            "start it with --device /dev/kvm",
        )
    if host.module:
        return absent(
            f"the kernel module {host.module} is loaded, but nothing made the device node",
            "make it: mknod -m 660 /dev/kvm c 10 232 && chgrp kvm /dev/kvm (or start udev)",
        )
    if host.extension:
        module = "kvm_intel" if host.extension == "VMX" else "kvm_amd"
        where = " on the container's host" if engine else ""
        return absent(
            f"the CPU has {host.extension}, but the kernel module {module} is not loaded",
            f"load it{where}: modprobe {module}; if that fails, enable virtualization in the firmware setup",
        )
    if host.inside.endswith("virtual machine"):
        return absent(
            "this host is itself a virtual machine, and its hypervisor does not hand on VMX or SVM",
            "enable nested virtualization for it (libvirt: <cpu mode='host-passthrough'/> and the module option "
            "nested=1; clouds: an instance type that has it)",
        )
    return absent(
        "the CPU has neither VMX nor SVM, or they are disabled in the firmware",
        "enable virtualization (Intel VT-x, AMD-V, SVM mode) in the firmware setup",
    )


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """What stat says of /dev/kvm, and who asks."""

    owner: str
    group: str
    mode: int  # permission bits
    user: str
    group_members: tuple[str, ...] = ()  # of `group`, by the group database
    is_device: bool = True


def _name_of_user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def device_node(path: Path) -> DeviceNode:
    info = path.stat()
    try:
        entry = grp.getgrgid(info.st_gid)
        group, members = entry.gr_name, tuple(entry.gr_mem)
    except KeyError:
        group, members = str(info.st_gid), ()
    return DeviceNode(
        owner=_name_of_user(info.st_uid),
        group=group,
        mode=stat.S_IMODE(info.st_mode),
        user=_name_of_user(os.geteuid()),
        group_members=members,
        is_device=stat.S_ISCHR(info.st_mode),
    )


def explain_refusal(device: DeviceNode, root: Path = _ROOT) -> Verdict:
    """Why /dev/kvm may not be opened, from its owner, group and mode."""
    what = f"/dev/kvm may not be opened by {device.user}: it belongs to {device.owner}:{device.group}"
    reason = f"{what} with mode {device.mode:04o}"
    group_may = device.mode & 0o060 == 0o060
    if device.mode & 0o006 == 0o006 or device.user == device.owner == "root":
        engine = container(root)
        if engine:
            remedy = f"the container ({engine}) forbids the device: start it with --device /dev/kvm"
        else:
            remedy = "a device cgroup or a security module forbids it: see dmesg and the audit log"
    elif group_may and device.user in device.group_members:
        reason += f"; {device.user} is a member of {device.group}, but this session began before that"
        remedy = f"log out and in again, or run: newgrp {device.group}"
    elif group_may and device.group != "root":
        remedy = f"run as root: usermod -aG {device.group} {device.user}; then log out and in again"
    else:
        remedy = (
            "run as root: groupadd -f -r kvm && chgrp kvm /dev/kvm && chmod 660 /dev/kvm && "
            f"usermod -aG kvm {device.user} (Debian's udev rules do the first part); then log out and in again"
        )
    return Verdict(False, reason, f"{remedy}; {_FALLBACK}", State.FORBIDDEN)


# Judging what the guest did -------------------------------------------------------------------------------------

_EBUSY, _ENOMEM, _EMFILE, _ENFILE, _ENODEV, _ENXIO = 16, 12, 24, 23, 19, 6


def judge(result: dict[str, Any], host: Virtualization) -> Verdict:
    """The verdict on what `kvm_probe.probe` returned. Keys that are missing or of a wrong type are as not measured."""

    def number(key: str) -> float:
        value = result.get(key)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0

    def unusable(why: str, remedy: str) -> Verdict:
        return Verdict(
            False,
            f"/dev/kvm is unusable: {why}",
            f"{remedy}; {_FALLBACK}",
            State.UNUSABLE,
            instruction_ns=speed,
            exit_us=_median(result.get("exit_us")),
        )

    speed = number("instruction_ns")
    error = str(result.get("error") or "")[:500]
    name = "KVM-PVM, paravirtual" if host.paravirtual else "KVM"
    outside = (
        "run kvik where the CPU's own extension (VMX or SVM) is handed on: on the physical host, or in a virtual "
        "machine with nested virtualization"
    )
    if speed > FAST:
        what = f"guest code runs by emulation ({speed:.0f} ns an instruction, {name}), too slow for a stock kernel"
        return unusable(what, outside)
    if error:
        code = int(number("errno"))
        if code == _EBUSY:
            return unusable(
                f"another hypervisor holds the CPU's {host.extension or 'virtualization'} extension ({error})",
                "end it (VirtualBox, VMware, ...) or unload its module",
            )
        if code in (_ENODEV, _ENXIO):
            module = "kvm_intel" if host.extension == "VMX" else "kvm_amd"
            return unusable(f"no kernel module answers behind it ({error})", f"load one: modprobe {module}")
        if code in (_ENOMEM, _EMFILE, _ENFILE):
            return unusable(f"{error}", "free memory or raise the limits (ulimit -n, ulimit -v) and try again")
        if result.get("step") == "run":
            return unusable(error, outside if host.inside else "look into the kernel log (dmesg) and report it")
        return unusable(f"{error} (while: {result.get('step')})", "look into the kernel log: dmesg | grep -i kvm")
    if result.get("step") != "done" or speed <= 0 or result.get("stage") != len(STAGES) - 1:
        return unusable("the probe gave no complete answer", "look into the kernel log: dmesg | grep -i kvm")
    carried = " with ".join(part for part in (host.extension or name, host.paging) if part)
    return Verdict(
        True,
        f"KVM works ({carried}; {speed:.1f} ns an instruction)",
        "",
        State.GOOD,
        instruction_ns=speed,
        exit_us=_median(result.get("exit_us")),
    )


def _median(values: object) -> float:
    numbers = sorted(value for value in values if isinstance(value, (int, float))) if isinstance(values, list) else []
    return float(numbers[len(numbers) // 2]) if numbers else 0.0


# Probing --------------------------------------------------------------------------------------------------------

# Isolated (-I) and without site (-S): nothing of the user's environment takes part, and it starts in a few ms.
_BOOTSTRAP = "import sys; sys.path.insert(0, sys.argv.pop(1)); from kvik.host.kvm_probe import main; main()"


def probe_command(path: Path) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, str(Path(__file__).parents[2]), str(path)]


def probe(root: Path = _ROOT, *, deadline: float = DEADLINE, command: list[str] | None = None) -> Verdict:
    """Find out, without the cache. Takes about 50 ms, 2 s when the guest hangs, at most `deadline`; never raises."""
    device = root / "dev/kvm"
    try:
        seen = device_node(device)
    except FileNotFoundError:
        return explain_absence(root)
    except OSError as error:
        why = f"/dev/kvm cannot be looked at: {error.strerror}"
        return Verdict(False, why, "check the mode of /dev", State.FORBIDDEN)
    if not seen.is_device:
        return Verdict(
            False,
            "/dev/kvm is not a device node",
            f"remove it and make it anew: rm /dev/kvm && mknod -m 660 /dev/kvm c 10 232; {_FALLBACK}",
            State.UNUSABLE,
        )
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except PermissionError:
        return explain_refusal(seen, root)
    except OSError:
        pass  # the probe's own words are better
    host = virtualization(root)
    limit = deadline
    try:
        done = tools.run(command or probe_command(device), timeout=deadline, limit=65536, check=False)
        if done.code == -signal.SIGALRM:
            limit = GUEST_DEADLINE
            raise OperationTimeout("the guest hangs")
        result = json.loads(done.out)
        if not isinstance(result, dict):
            raise ValueError("not an object")
    except OperationTimeout:
        return Verdict(
            False,
            f"/dev/kvm is unusable: a tiny guest did not end within {limit:g} s",
            f"look into the kernel log: dmesg | grep -i kvm; {_FALLBACK}",
            State.UNUSABLE,
        )
    except (HostError, ValueError) as error:
        what = str(error) if isinstance(error, HostError) else done.message or process.describe_exit(done.code)
        return Verdict(
            False,
            f"/dev/kvm could not be probed: {what}",
            f"run kvik doctor --fresh and report it; {_FALLBACK}",
            State.UNUSABLE,
        )
    return judge(result, host)


# The cache ------------------------------------------------------------------------------------------------------


def cache_key(root: Path = _ROOT) -> str:
    """A digest of all that the verdict depends on: boot, device node, who asks, kernel, KVM's modules and options."""
    try:
        info = (root / "dev/kvm").stat()
        device: object = [info.st_dev, info.st_ino, info.st_rdev, info.st_mode, info.st_uid, info.st_gid]
        # Also the device's ctime: chmod and back, or setfacl, change it.
        device = [*device, info.st_ctime_ns] if isinstance(device, list) else device
    except OSError as error:
        device = error.errno
    modules: dict[str, object] = {}
    for name in ("kvm", "kvm_intel", "kvm_amd", "kvm_pvm"):
        base = root / "sys/module" / name
        if base.is_dir():
            try:
                parameters = sorted(base.joinpath("parameters").iterdir())[:200]
            except OSError:
                parameters = []
            values = {path.name: read_text(path, 256) for path in parameters}
            modules[name] = [read_text(base / "srcversion", 64), values]
    text = json.dumps(
        [
            _FORMAT,
            read_text(root / "proc/sys/kernel/random/boot_id", 64),
            os.uname().release,
            os.geteuid(),
            sorted({os.getegid(), *os.getgroups()}),
            device,
            modules,
            container(root),
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _decode(data: bytes, key: str, now: float) -> Verdict | None:
    """A kept verdict, if every field is what it must be: the file may have been written by anybody."""
    try:
        kept = json.loads(data)
        if kept["key"] != key or not isinstance(kept["until"], (int, float)) or 0 < kept["until"] < now:
            return None
        fields = kept["verdict"]
        verdict = Verdict(
            usable=fields["usable"],
            reason=fields["reason"],
            remedy=fields["remedy"],
            state=State(fields["state"]),
            instruction_ns=float(fields["instruction_ns"]),
            exit_us=float(fields["exit_us"]),
            cached=True,
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = (verdict.reason, verdict.remedy)
    sound = (
        isinstance(verdict.usable, bool)
        and verdict.usable == (verdict.state is State.GOOD)
        and all(isinstance(text, str) and len(text) < 4096 and text.isprintable() for text in texts)
        and 0 <= verdict.instruction_ns < 1e9
        and (not verdict.usable or 0 < verdict.instruction_ns <= FAST)
        and 0 <= verdict.exit_us < 1e9
    )
    return verdict if sound else None


def kvm_verdict(directory: Path | None = None, root: Path = _ROOT, *, fresh: bool = False) -> Verdict:
    """The verdict, kept in `directory` (a private one such as `Paths.cache`) until something it depends on changes.

    `fresh` probes anew. Never raises; a cache that cannot be read or written costs only the time of a probe.
    """
    key = cache_key(root)
    # Not the wall clock, which may be set: seconds since boot, and the key holds the boot's id.
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    file = directory / "kvm-verdict.json" if directory is not None else None
    if file is not None and not fresh:
        try:
            kept = try_read_file(file, limit=65536)
            verdict = _decode(kept, key, now) if kept is not None and _ours(file) else None
        except KvikError:
            verdict = None
        if verdict is not None:
            return verdict
    verdict = probe(root)
    if file is not None:
        hung = verdict.state is State.UNUSABLE and verdict.instruction_ns == 0
        document = {
            "key": key,
            "until": now + HANG_KEPT if hung else 0,
            "verdict": asdict(replace(verdict, cached=False)),
        }
        try:
            ensure_directory(file.parent)
            atomic_write(file, json.dumps(document, indent=1).encode() + b"\n", durable=False)
        except KvikError:
            pass
    return verdict


def _ours(file: Path) -> bool:
    try:
        info = file.lstat()
    except OSError:
        return False
    return info.st_uid in (0, os.geteuid()) and not info.st_mode & 0o022
