"""What `kvik run` makes of its options: disks with their formats, the network, and the domain document."""

from __future__ import annotations

import os
import stat

from kvik.cli.document import escape, open_tag, tag
from kvik.cli.options import UsageError
from kvik.errors import InvalidArgument, NoNetwork, NotFound, OperationInvalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

QCOW2_MAGIC = b"QFI\xfb"
# Other people's formats: a machine runs from raw or qcow2.
FOREIGN = {b"KDMV": "vmdk", b"# Disk DescriptorFile": "vmdk", b"conectix": "vpc", b"vhdxfile": "vhdx"}
FOREIGN_SUFFIXES = {".vmdk": "vmdk", ".vdi": "vdi", ".vhd": "vpc", ".vhdx": "vhdx", ".qed": "qed"}
AGENT_CHANNEL = "org.qemu.guest_agent.0"


class DiskSource:
    """One disk of the new machine. `why` says how its format was found, for the user."""

    __slots__ = ("block", "bus", "format", "path", "readonly", "why")

    def __init__(self, path: str, format: str, why: str, *, bus: str, readonly: bool, block: bool) -> None:
        self.path = path
        self.format = format
        self.why = why
        self.bus = bus
        self.readonly = readonly
        self.block = block


def existing(path: str, what: str) -> str:
    """The absolute path of a readable file or block device; an error that says what to do otherwise."""
    full = os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111
    try:
        mode = os.stat(full).st_mode  # noqa: PTH116
    except OSError as error:
        raise NotFound(
            f"the {what} '{path}' cannot be used: {error.strerror}",
            remedy=f"give the path of an existing {what}; '{full}' was looked at",
        ) from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise InvalidArgument(f"the {what} '{full}' is neither a file nor a block device")
    if not os.access(full, os.R_OK):
        raise InvalidArgument(
            f"the {what} '{full}' is not readable by you", remedy=f"chmod a+r '{full}', or run as root"
        )
    return full


def disk(text: str) -> DiskSource:
    """`--disk PATH` or `--disk path=PATH,format=qcow2,bus=virtio,readonly`."""
    fields: dict[str, str] = {}
    parts = text.split(",") if "=" in text else [text]
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals and key != "readonly":
            if fields:
                raise UsageError(f"'{part}' in --disk {text} is not understood", remedy="write key=value")
            key, value = "path", part
        fields[key] = value
    unknown = set(fields) - {"path", "format", "bus", "readonly"}
    if unknown or "path" not in fields:
        what = f"unknown '{sorted(unknown)[0]}'" if unknown else "no path"
        raise UsageError(
            f"--disk {text}: {what}",
            remedy="write --disk path=FILE[,format=raw|qcow2][,bus=virtio|sata|scsi][,readonly]",
        )
    path = existing(fields["path"], "disk image")
    bus = fields.get("bus", "virtio")
    if bus not in ("virtio", "sata", "scsi"):
        raise UsageError(f"--disk {text}: no bus '{bus}'", remedy="one of: virtio, sata, scsi")
    block = stat.S_ISBLK(os.stat(path).st_mode)  # noqa: PTH116
    format_, why = disk_format(path, fields.get("format"), block=block)
    readonly = fields.get("readonly", "no") not in ("no", "off")
    return DiskSource(path, format_, why, bus=bus, readonly=readonly, block=block)


def disk_format(path: str, asked: str | None, *, block: bool = False) -> tuple[str, str]:
    """("raw" or "qcow2", why). A guest can write any header into its own raw disk, so a header alone decides nothing:
    the name must say the same, or the user."""
    with open(path, "rb") as file:  # noqa: PTH123
        head = file.read(64)
    is_qcow2 = head.startswith(QCOW2_MAGIC)
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122
    if asked is not None:
        if asked not in ("raw", "qcow2"):
            raise UsageError(f"no disk format '{asked}'", remedy="one of: raw, qcow2")
        if asked == "qcow2" and not is_qcow2:
            raise InvalidArgument(f"'{path}' is no qcow2 image: its header is missing", remedy="say format=raw")
        return asked, "as you said"
    foreign = next((name for magic, name in FOREIGN.items() if head.startswith(magic)), FOREIGN_SUFFIXES.get(suffix))
    if foreign:
        raise InvalidArgument(
            f"'{path}' is a {foreign} image, which machines do not run from",
            remedy=f"convert it: qemu-img convert -f {foreign} -O qcow2 '{path}' '{path}.qcow2'",
        )
    if suffix in (".qcow2", ".qcow"):
        if not is_qcow2:
            raise InvalidArgument(
                f"'{path}' is named like a qcow2 image but has no qcow2 header",
                remedy="if it is a raw image, say --disk path=...,format=raw",
            )
        return "qcow2", "by its name and header"
    if is_qcow2 and block:
        raise InvalidArgument(
            f"the block device '{path}' begins like a qcow2 image", remedy="say format=raw or format=qcow2"
        )
    if is_qcow2:
        raise InvalidArgument(
            f"'{path}' begins like a qcow2 image but is not named like one, and a guest can write such a header "
            "into a raw disk to read files of the host",
            remedy=f"say which it is: --disk path={path},format=qcow2 (or raw)",
        )
    return "raw", "a block device" if block else "no image header"


def interface_xml(kind: str, source: str = "") -> str:
    """A virtio `<interface>`."""
    inner = f"      {source}\n" if source else ""
    return f"    <interface type='{kind}'>\n{inner}      <model type='virtio'/>\n    </interface>\n"


def network_xml(name: str | None, networks: Mapping[str, bool], sys: str = "/sys/class/net") -> str:
    """The `<interface>` of `--network none|user|network=NAME|bridge=NAME|NAME`; `networks` has the daemon's virtual
    networks, and which of them are active. Without a name: the network `default` where it is active, else user."""
    if name == "none":
        return ""
    if name is None:
        name = "network=default" if networks.get("default") else "user"
    if name == "user":
        return interface_xml("user")
    wanted = name.removeprefix("network=")
    if wanted in networks:
        if not networks[wanted]:
            raise OperationInvalid(f"network '{wanted}' is not active", remedy=f"start it: kvik net-start {wanted}")
        return interface_xml("network", tag("source", network=wanted))
    bridge = name.removeprefix("bridge=")
    # isdir follows a name with dots or slashes out of the directory: a network interface's name has neither slash.
    if bridge and "/" not in bridge and os.path.isdir(f"{sys}/{bridge}/bridge"):  # noqa: PTH112
        return interface_xml("bridge", tag("source", bridge=bridge))
    try:
        found = sorted(os.listdir(sys))  # noqa: PTH208
    except OSError:
        found = []
    bridges = [one for one in found if os.path.isdir(f"{sys}/{one}/bridge")]  # noqa: PTH112
    have = f"networks here: {', '.join(networks)}" if networks else "there is no virtual network"
    have += f"; bridges here: {', '.join(bridges)}" if bridges else "; this host has no bridge"
    raise NoNetwork(
        f"there is no network or bridge '{wanted if wanted != name else bridge}'",
        remedy=f"use --network user (no set-up, no root) or --network none; {have}",
    )


class Machine:
    """All that the document says."""

    __slots__ = (
        "accelerated", "append", "cdrom", "cpu", "disks", "emulator", "firmware", "graphics", "initrd", "kernel", "log",
        "machine", "memory_kib", "name", "network", "uuid", "vcpus",
    )  # fmt: skip

    def __init__(self, name: str, *, accelerated: bool) -> None:
        from uuid import uuid4

        self.name = name
        self.uuid = str(uuid4())
        self.accelerated = accelerated
        self.memory_kib = 512 << 10
        self.vcpus = 1
        self.cpu: str | None = None
        self.machine = "q35"
        self.emulator = ""  # empty: the driver's own choice, which is QEMU
        self.firmware = "bios"
        self.kernel: str | None = None
        self.initrd: str | None = None
        self.append: str | None = None
        self.disks: list[DiskSource] = []
        self.cdrom: str | None = None
        self.network = ""
        self.log: str | None = None
        self.graphics = False


TARGETS = {"virtio": "vd", "sata": "sd", "scsi": "sd"}


def target_name(prefix: str, index: int) -> str:
    """vda, ..., vdz, vdaa, ..."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return prefix + letters


def disks_xml(machine: Machine) -> list[str]:
    lines: list[str] = []
    used: dict[str, int] = {}

    def target(bus: str) -> str:
        prefix = TARGETS[bus]
        used[prefix] = used.get(prefix, 0) + 1
        return tag("target", dev=target_name(prefix, used[prefix] - 1), bus=bus)

    for disk in machine.disks:
        lines += [
            "    " + open_tag("disk", type="block" if disk.block else "file", device="disk"),
            "      " + tag("driver", name="qemu", type=disk.format, discard="unmap"),
            "      " + tag("source", **{"dev" if disk.block else "file": disk.path}),
            "      " + target(disk.bus),
            *(["      <readonly/>"] if disk.readonly else []),
            "    </disk>",
        ]
    if machine.cdrom:
        lines += [
            "    <disk type='file' device='cdrom'>",
            "      <driver name='qemu' type='raw'/>",
            "      " + tag("source", file=machine.cdrom),
            "      " + target("sata"),
            "      <readonly/>",
            "    </disk>",
        ]
    if any(disk.bus == "scsi" for disk in machine.disks):
        lines.append("    <controller type='scsi' index='0' model='virtio-scsi'/>")
    return lines


def cpu_xml(machine: Machine) -> str:
    """host-passthrough under KVM, everything emulation can do otherwise; `--cpu` decides."""
    name = machine.cpu or ("host-passthrough" if machine.accelerated else "maximum")
    if name in ("host", "host-passthrough", "max", "maximum", "host-model"):
        mode = {"host": "host-passthrough", "max": "maximum"}.get(name, name)
        return f"  <cpu mode='{mode}'/>"
    return f"  <cpu mode='custom' match='exact'>\n    <model fallback='forbid'>{escape(name)}</model>\n  </cpu>"


def domain_xml(machine: Machine) -> str:
    """The document: q35 and virtio unless told otherwise, a serial console that is also logged, the agent's channel."""
    boot: list[str] = []
    if machine.kernel:
        boot.append(f"    <kernel>{escape(machine.kernel)}</kernel>")
        if machine.initrd:
            boot.append(f"    <initrd>{escape(machine.initrd)}</initrd>")
        if machine.append is not None:
            boot.append(f"    <cmdline>{escape(machine.append)}</cmdline>")
    else:
        boot += ["    <boot dev='cdrom'/>"] if machine.cdrom else []
        boot += ["    <boot dev='hd'/>"] if machine.disks else []
    log = [f"      {tag('log', file=machine.log, append='off')}"] if machine.log else []
    graphics = [
        "    <graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1'/>",
        "    <video>\n      <model type='vga'/>\n    </video>",
    ]
    lines = [
        f"<domain type='{'kvm' if machine.accelerated else 'qemu'}'>",
        f"  <name>{escape(machine.name)}</name>",
        # Named by us: a document without one would redefine the machine that has this name.
        f"  <uuid>{machine.uuid}</uuid>",
        f"  <memory unit='KiB'>{machine.memory_kib}</memory>",
        f"  <vcpu placement='static'>{machine.vcpus}</vcpu>",
        "  <os firmware='efi'>" if machine.firmware == "uefi" else "  <os>",
        f"    <type arch='x86_64' machine='{escape(machine.machine)}'>hvm</type>",
        *boot,
        "  </os>",
        "  <features>\n    <acpi/>\n    <apic/>\n  </features>",
        cpu_xml(machine),
        "  <clock offset='utc'/>",
        "  <on_poweroff>destroy</on_poweroff>",
        "  <on_reboot>restart</on_reboot>",
        "  <on_crash>destroy</on_crash>",
        "  <devices>",
        *([f"    <emulator>{escape(machine.emulator)}</emulator>"] if machine.emulator else []),
        *disks_xml(machine),
        *([machine.network.rstrip("\n")] if machine.network else []),
        "    <serial type='pty'>",
        *log,
        "      <target port='0'/>",
        "    </serial>",
        "    <console type='pty'>\n      <target type='serial' port='0'/>\n    </console>",
        "    <channel type='unix'>",
        f"      <target type='virtio' name='{AGENT_CHANNEL}'/>",
        "    </channel>",
        *(graphics if machine.graphics else []),
        "    <memballoon model='virtio'/>",
        "    <rng model='virtio'>\n      <backend model='random'>/dev/urandom</backend>\n    </rng>",
        "  </devices>",
        "</domain>",
    ]
    return "\n".join(lines) + "\n"
