"""The command line of kvik-vmm -> `MachineConfig`.

An option's value is `FIRST,key=value,...`: keys are the fields of its class in `config`, so that there is one list of
them. A comma in a value is written twice, as with QEMU.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument
from kvik.vmm import config as c
from kvik.vmm.config import MachineConfig
from kvik.vmm.settings import annotation, fields_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["OPTIONS", "Option", "help_text", "parse", "parse_size"]


class Option:
    """`field` of MachineConfig (with a dot: of one of its parts). What its value describes and whether it may be given
    again and again follow from the field's type; `first` is what may stand in front without a name."""

    __slots__ = ("field", "first", "help", "kind", "made", "many", "metavar")

    def __init__(self, field: str, metavar: str, help: str, first: str = "") -> None:
        self.field, self.metavar, self.help, self.first = field, metavar, help, first
        owner: type = MachineConfig
        *parts, last = field.split(".")
        for part in parts:
            owner = c.CLASSES[annotation(owner, part)]
        self.kind = annotation(owner, last)
        self.many = self.kind.startswith("list[")
        self.made = c.CLASSES.get(self.kind.removeprefix("list[").removesuffix("]"))


OPTIONS = {
    "name": Option("name", "NAME", "the machine's name, in messages and in QMP"),
    "uuid": Option("uuid", "UUID", "its UUID, which the guest sees in SMBIOS"),
    "kernel": Option("boot.kernel", "FILE", "a bzImage or an uncompressed ELF kernel"),
    "initrd": Option("boot.initrd", "FILE", "its initial RAM disk"),
    "append": Option("boot.cmdline", "TEXT", "its command line"),
    "boot": Option("boot", "protocol=auto|pvh|bzimage", "how it is entered; more files by descriptor"),
    "firmware": Option("boot.firmware", "FILE", "UEFI firmware (OVMF) in place of a kernel"),
    "nvram": Option("boot.nvram", "FILE", "the firmware's variables"),
    "memory": Option("memory", "SIZE", "RAM: 512M, 4G; with shared, hugepages=2M, prealloc, hotplug=SIZE", "size"),
    "numa": Option("memory.nodes", "memory=SIZE", "a NUMA node: cpus=0-1, distances=10:20, host-nodes=0", "memory"),
    "cpus": Option("cpus", "N", "vCPUs; with maximum, sockets, dies, cores, threads", "count"),
    "cpu": Option("cpus.model", "MODEL", "CPU model and features: host, x86-64-v3,+avx2,-x2apic; help lists them"),
    "smbios": Option("smbios", "serial=TEXT", "what the guest reads in SMBIOS"),
    "rtc": Option("rtc", "utc|localtime|SECONDS", "the clock at power-on", "base"),
    "serial": Option("serials", "BACKEND", "a 16550 on stdio, null, pty, file:PATH, unix:PATH or fd=N", "backend"),
    "console": Option("consoles", "BACKEND", "a virtio console", "backend"),
    "channel": Option("channels", "NAME,backend=BACKEND", "a named port: org.qemu.guest_agent.0", "name"),
    "debugcon": Option("debugcon", "BACKEND", "bytes written to port 0xE9, or with firmware 0x402", "backend"),
    "disk": Option("disks", "FILE", "a raw disk; with readonly, cache, serial, queues, bps, iops, ...", "path"),
    "vhost-user-blk": Option("vhost_user_blk", "SOCKET", "a disk served by another process", "socket"),
    "net": Option("nets", "tap", "an interface on tap, passt,path=SOCKET or none; mac, queues, vhost, ...", "backend"),
    "rng": Option("rng", "", "a source of randomness"),
    "balloon": Option("balloon", "", "a memory balloon with free page reporting"),
    "vsock": Option("vsock", "CID", "a socket to the host; uds=PATH for our own, without the kernel's", "cid"),
    "fs": Option("fs", "tag=T,socket=PATH", "a directory shared through virtiofsd", "tag"),
    "virtio-mem": Option("virtio_mem", "SIZE", "memory that can be plugged while running", "size"),
    "watchdog": Option("watchdog", "ACTION", "a watchdog: reset, poweroff, pause, inject-nmi, none", "action"),
    "pvpanic": Option("pvpanic", "on|off", "tell of guest panics"),
    "vmgenid": Option("vmgenid", "on|off", "tell the guest that it was restored"),
    "qmp": Option("qmp", "SOCKET|fd=N", "a monitor"),
    "gdb": Option("gdb", "tcp:HOST:PORT|unix:PATH", "a debugger's port"),
    "metrics": Option("metrics", "unix:PATH", "counters as Prometheus text"),
    "paused": Option("paused", "", "do not run before QMP says cont"),
    "incoming": Option("incoming", "unix:PATH|tcp:HOST:PORT|fd=N", "wait for a migration"),
    "restore": Option("restore", "DIRECTORY", "start from a snapshot"),
    "catch-up": Option("catch_up", "", "with restore: the guest's clock counts the time it was at rest"),
    "migratable": Option("migratable", "", "the sandbox lets it be migrated away, over a descriptor sent with getfd"),
    "snapshots": Option("snapshots", "DIRECTORY", "the only place where a sandboxed machine may save itself"),
    "sandbox": Option("sandbox", "on|log|off", "Landlock and seccomp once everything is open (on)"),
    "trace": Option("trace", "FILE|-", "record every exit; summary at the end"),
    "log": Option("log", "text|json", "form of messages on stderr"),
    "on-reboot": Option("on_reboot", "reset|shutdown|none", "when the guest reboots"),
    "on-poweroff": Option("on_poweroff", "shutdown|pause", "when the guest powers off"),
    "on-panic": Option("on_panic", "pause|shutdown|exit-failure|none", "when the guest panics"),
}  # fmt: skip

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZES = {"size", "memory", "hotplug", "hugepages", "requested", "block", "bps", "bps_burst", "rx_bps", "tx_bps"}


def parse(arguments: list[str]) -> MachineConfig:
    """Raises `InvalidArgument`, naming the option, what is wrong with it and what is right."""
    config = MachineConfig()
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in OPTIONS:
            raise InvalidArgument(f"kvik-vmm has no option {word!r}", remedy=_closest(name))
        option = OPTIONS[name]
        flag = option.kind == "bool" or (option.made is not None and not option.first and not option.metavar)
        if not equals:
            following = arguments[position] if position < len(arguments) else None
            if following is not None and not (flag and following.startswith("--")):
                value = following
                position += 1
            elif not flag:
                raise InvalidArgument(f"--{name} needs a value", remedy=f"for example --{name} {option.metavar}")
        _store(config, name, option, value)
    return config


def _store(config: MachineConfig, name: str, option: Option, value: str) -> None:
    owner: Any = config
    *parts, last = option.field.split(".")
    for part in parts:
        owner = getattr(owner, part)
    if name == "cpu":
        model, *features = value.split(",")
        owner.model, owner.features = model, tuple(features)
        return
    made: Any
    if option.made is not None:
        made = option.made() if option.many else getattr(owner, last)
        _fill(made, name, option, value)
    elif option.many:
        made = value
    else:
        made = _convert(name, last, option.kind, value)
    if option.many:
        getattr(owner, last).append(made)
    else:
        setattr(owner, last, made)


def _fill(made: Any, name: str, option: Option, text: str) -> None:
    known = fields_of(type(made))
    for number, part in enumerate(_split(text)):
        key, equals, value = part.partition("=")
        key = key.replace("-", "_")
        if key == "fd" and "fds" in known:
            key = "fds"
        elif number == 0 and option.first and (not equals or key not in known):
            key, value = option.first, part
        elif not equals:
            value = "on"
        if key not in known:
            raise InvalidArgument(
                f"--{name} has no {key!r}", remedy=f"it has {', '.join(k.replace('_', '-') for k in known)}"
            )
        setattr(made, key, _convert(f"{name} {key.replace('_', '-')}", key, annotation(type(made), key), value))


def _split(text: str) -> list[str]:
    """Words between single commas; a doubled comma is one comma of the word."""
    if not text:
        return []
    return [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]


def _convert(name: str, key: str, kind: str, value: str) -> Any:
    if kind == "bool":
        if value not in ("", "on", "off", "yes", "no", "true", "false"):
            raise InvalidArgument(f"--{name} is on or off, not {value!r}")
        return value in ("", "on", "yes", "true")
    if kind == "int":
        return (
            parse_size(value, name, MIB_UNIT if key in ("size", "memory") else 0)
            if key in _SIZES
            else _int(name, value)
        )
    if kind == "tuple[int, ...]":
        return tuple(_numbers(name, value))
    if kind == "tuple[str, ...]":
        return tuple(value.split(":"))
    return value


MIB_UNIT = 20


def _int(name: str, value: str) -> int:
    try:
        return int(value, 0)
    except ValueError:
        raise InvalidArgument(f"--{name} is a number, not {value!r}") from None


def _numbers(name: str, value: str) -> list[int]:
    """0-3:7 -> 0 1 2 3 7"""
    found: list[int] = []
    for part in value.split(":"):
        first, dash, last = part.partition("-")
        begin = _int(name, first)
        end = _int(name, last) if dash else begin
        if not 0 <= begin <= end < 1 << 20:
            raise InvalidArgument(f"--{name}: {part!r} is no range")
        found += range(begin, end + 1)
    return found


def parse_size(text: str, name: str = "memory", unit: int = 0) -> int:
    """Bytes of 512M, 4G, 65536. A bare number counts 2**`unit` bytes."""
    number, suffix = text, ""
    if text[-1:].isalpha():
        number, suffix = text[:-1], text[-1].upper()
    if not number.isascii() or not number.isdigit() or suffix not in _UNITS or len(number) > 15:
        raise InvalidArgument(f"--{name}: {text!r} is no size", remedy="write it like 512M or 4G")
    return int(number) << (_UNITS[suffix] if suffix else unit)


def _closest(name: str) -> str:
    near = [f"--{known}" for known in OPTIONS if known.startswith(name[:3])]
    return f"did you mean {' or '.join(near[:3])}?" if name and near else "see kvik-vmm --help"


def help_text() -> str:
    """What --help prints."""
    width = max(len(f"--{name} {option.metavar}") for name, option in OPTIONS.items() if len(option.metavar) < 24) + 2
    lines = ["usage: kvik-vmm --kernel FILE [--initrd FILE] [--memory SIZE] [--cpus N] [OPTION ...]", ""]
    for name, option in OPTIONS.items():
        left = f"  --{name} {option.metavar}".rstrip()
        gap = "" if len(left) < width + 2 else f"\n{'':<{width + 2}}"
        lines.append(f"{left:<{width + 2}}{gap}{option.help}")
    return "\n".join(lines) + "\n"
