"""human-monitor-command: the few lines that people and scripts type, in QEMU's form.

Reference: QEMU's hmp-commands.hx, hmp-commands-info.hx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvik.vmm import guestview
from kvik.vmm.faults import GuestFault
from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.schema import TEXT, Int, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.vcpu import VcpuThread

MAX_UNITS = 4096
_SIZES = {"b": 1, "h": 2, "w": 4, "g": 8}


def _status(context: Context, index: int) -> str:
    machine = context.machine
    if machine.status == "running":
        return "VM status: running"
    return "VM status: paused" + (f" ({machine.status})" if machine.status != "paused" else "")


def _cpus(context: Context, index: int) -> str:
    return "\n".join(
        f"{'*' if vcpu.index == index else ' '} CPU #{vcpu.index}: thread_id={vcpu.thread_id}"
        for vcpu in context.machine.vcpus
    )


def _vcpu(context: Context, index: int) -> VcpuThread:
    for vcpu in context.machine.vcpus:
        if vcpu.index == index:
            return vcpu
    raise QmpError(f"CPU#{index} is not there")


def _registers(context: Context, index: int) -> str:
    thread = _vcpu(context, index)
    with context.machine.paused():
        r, s = thread.vcpu.regs(), thread.vcpu.sregs()
    rows = (("rax", "rbx", "rcx", "rdx"), ("rsi", "rdi", "rbp", "rsp"), ("r8", "r9", "r10", "r11"),
            ("r12", "r13", "r14", "r15"))  # fmt: skip
    lines = [f"CPU#{index}"]
    lines += [" ".join(f"{name.upper():<3}={getattr(r, name):016x}" for name in row) for row in rows]
    lines.append(f"RIP={r.rip:016x} RFL={r.rflags:08x} CPL={s.cs.dpl}")
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr"):
        segment = getattr(s, name)
        lines.append(f"{name.upper():<3}={segment.selector:04x} {segment.base:016x} {segment.limit:08x}")
    lines += [
        f"{name.upper():<3}=     {getattr(s, name).base:016x} {getattr(s, name).limit:08x}" for name in ("gdt", "idt")
    ]
    lines.append(f"CR0={s.cr0:08x} CR2={s.cr2:016x} CR3={s.cr3:016x} CR4={s.cr4:08x}")
    lines.append(f"EFER={s.efer:016x}")
    return "\n".join(lines)


def _examine(context: Context, index: int, words: list[str], *, physical: bool) -> str:
    """x/FMT ADDRESS and xp/FMT ADDRESS: FMT is a count, then d u x o c, then b h w g."""
    count, letter, size = 1, "x", 4
    if words and words[0].startswith("/"):
        text = words.pop(0)[1:]
        digits = text[: len(text) - len(text.lstrip("0123456789"))]
        count = int(digits[:6]) if digits else 1
        for mark in text[len(digits) :]:
            if mark in _SIZES:
                size = _SIZES[mark]
            elif mark in "dxuoc":
                letter = mark
            else:
                return f"invalid char in format: '{mark}'"
    if len(words) != 1:
        return "an address is expected"
    try:
        address = int(words[0].removeprefix("$"), 0)
    except ValueError:
        return f"{words[0][:40]!r} is no number"
    if not 0 < count <= MAX_UNITS or not 0 <= address < 1 << 64:
        return f"a count from 1 to {MAX_UNITS} and an address of 64 bits are expected"
    machine, thread = context.machine, _vcpu(context, index)
    lines: list[str] = []
    per_line = 1 if letter == "c" else max(16 // size, 1)
    with machine.paused():
        for first in range(0, count, per_line):
            place = address + first * size
            length = min(per_line, count - first) * size
            try:
                if physical:
                    data = guestview.read_physical(machine, place, length)
                else:
                    data = guestview.read_virtual(machine, thread, place, length)
            except GuestFault:
                lines.append("Cannot access memory")
                break
            values = [int.from_bytes(data[at : at + size], "little") for at in range(0, length, size)]
            lines.append(f"{place:016x}: " + " ".join(_formatted(value, letter, size) for value in values))
    return "\n".join(lines)


def _formatted(value: int, letter: str, size: int) -> str:
    if letter == "x":
        return f"0x{value:0{2 * size}x}"
    if letter == "o":
        return f"0{value:o}"
    if letter == "c":
        return repr(chr(value & 0xFF)) if 32 <= value & 0xFF < 127 else f"'\\x{value & 0xFF:02x}'"
    if letter == "d" and value >> 8 * size - 1:
        value -= 1 << 8 * size
    return str(value)


def _mtree(context: Context, index: int) -> str:
    machine = context.machine
    lines = [f"{region.start:016x}-{region.end - 1:016x} RAM" for region in machine.memory.regions]
    for bus in (machine.mmio, machine.ports):
        lines += [f"{start:016x}-{start + size - 1:016x} {bus.name}: {name}" for start, size, name in bus.ranges()]
    return "\n".join(lines)


_INFO: dict[str, Callable[[Context, int], str]] = {
    "status": _status,
    "cpus": _cpus,
    "registers": _registers,
    "mtree": _mtree,
    "name": lambda context, index: context.machine.config.name,
    "uuid": lambda context, index: context.machine.config.uuid or "00000000-0000-0000-0000-000000000000",
    "kvm": lambda context, index: "kvm support: enabled",
    "version": lambda context, index: context.server.package,
}
# Lines that are QMP commands without arguments
_SAME = ("stop", "cont", "system_reset", "system_powerdown", "quit")
_HELP = f"info {' | '.join(_INFO)}\nx/FMT ADDRESS, xp/FMT ADDRESS\n{', '.join(_SAME)}"


def human_monitor_command(context: Context, arguments: Arguments) -> str:
    line, index = arguments["command-line"].strip(), arguments.get("cpu-index", 0)
    if "cpu-index" in arguments:
        _vcpu(context, index)
    command, _, rest = line.partition(" ")
    command, slash, form = command.partition("/")
    words = ([f"/{form}"] if slash else []) + rest.split()
    name = {"q": "quit", "c": "cont", "s": "stop", "?": "help"}.get(command, command)
    if name == "info":
        known = _INFO.get(words[0]) if words else None
        text = known(context, index) if known else f"unknown command: '{line[:80]}'"
    elif name in ("x", "xp"):
        text = _examine(context, index, words, physical=name == "xp")
    elif name in _SAME:
        context.server.commands[name].handler(context, {})
        text = ""
    elif name == "help":
        text = _HELP
    else:
        text = f"unknown command: '{line[:80]}'"
    return text.replace("\n", "\r\n") + ("\r\n" if text else "")


COMMANDS: Sequence[Command] = (
    Command(
        "human-monitor-command",
        human_monitor_command,
        Struct({"command-line": TEXT, "*cpu-index": Int(0, 65535)}),
        TEXT,
        summary="info status | cpus | registers | mtree, x, xp, ...",
    ),
)
