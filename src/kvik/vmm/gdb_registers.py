"""Registers as gdb numbers and names them: the target description, reading, writing.

Reference: gdb's manual, "Standard Target Features / i386 Features", and its gdb/features/i386/*.xml for the order.
"""

from __future__ import annotations

from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.kvm.vcpu import Vcpu

__all__ = ["DESCRIPTION", "REGISTERS", "Register", "RegisterFile"]


class Register(NamedTuple):
    name: str
    bits: int
    kind: str  # gdb's type
    source: str  # which of KVM's structures has it: regs, sregs, fpu, xsave


_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16)))
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
_X87 = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
_MXCSR = 24  # its offset in the XSAVE area (SDM 1, 13.4.1)
_SYSTEM = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")

FEATURES: dict[str, tuple[Register, ...]] = {
    "org.gnu.gdb.i386.core": (
        *(Register(name, 64, "data_ptr" if name in ("rbp", "rsp") else "int64", "regs") for name in _GENERAL),
        Register("rip", 64, "code_ptr", "regs"),
        Register("eflags", 32, "int32", "regs"),
        *(Register(name, 32, "int32", "sregs") for name in _SEGMENTS),
        *(Register(f"st{number}", 80, "i387_ext", "fpu") for number in range(8)),
        *(Register(name, 32, "int", "fpu") for name in _X87),
    ),
    "org.gnu.gdb.i386.sse": (
        *(Register(f"xmm{number}", 128, "uint128", "fpu") for number in range(16)),
        Register("mxcsr", 32, "int", "xsave"),
    ),
    "org.gnu.gdb.i386.segments": (
        Register("fs_base", 64, "int64", "sregs"),
        Register("gs_base", 64, "int64", "sregs"),
    ),
    "org.kvik.i386.system": tuple(Register(name, 64, "int64", "sregs") for name in _SYSTEM),
}
REGISTERS: tuple[Register, ...] = tuple(register for feature in FEATURES.values() for register in feature)


def _description() -> str:
    lines = ['<?xml version="1.0"?>', '<!DOCTYPE target SYSTEM "gdb-target.dtd">', "<target>"]
    lines.append("<architecture>i386:x86-64</architecture>")
    number = 0
    for feature, registers in FEATURES.items():
        lines.append(f'<feature name="{feature}">')
        for register in registers:
            lines.append(
                f'<reg name="{register.name}" bitsize="{register.bits}" type="{register.kind}" regnum="{number}"/>'
            )
            number += 1
        lines.append("</feature>")
    return "\n".join([*lines, "</target>"])


DESCRIPTION = _description()


class RegisterFile:
    """The registers of one vCPU that stands still: read at most once, written back by `flush`."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._sets: dict[str, Any] = {}
        self._changed: set[str] = set()

    def _set(self, source: str) -> Any:
        if source not in self._sets:
            self._sets[source] = getattr(self._vcpu, source)()
        return self._sets[source]

    def read(self, number: int) -> bytes:
        """Little-endian. Raises IndexError."""
        register = REGISTERS[number]
        size, held, name = register.bits // 8, self._set(register.source), register.name
        if name == "mxcsr":  # KVM_GET_FPU leaves it out
            return bytes(held[_MXCSR : _MXCSR + 4])
        if name.startswith("st"):
            return bytes(held.fpr[int(name[2:])])[:10]
        if name.startswith("xmm"):
            return bytes(held.xmm[int(name[3:])])
        return int(self._integer(held, name)).to_bytes(size, "little")

    @staticmethod
    def _integer(held: Any, name: str) -> int:
        if name == "eflags":
            return int(held.rflags) & 0xFFFF_FFFF
        if name in _SEGMENTS:
            return int(getattr(held, name).selector)
        if name.endswith("_base"):
            return int(getattr(held, name[:2]).base)
        if name in _X87:
            # ftag: one bit a register in FXSAVE's form; gdb wants two, 3 for empty.
            if name == "ftag":
                return sum(0 if held.ftwx >> number & 1 else 3 << 2 * number for number in range(8))
            fields = {"fctrl": "fcw", "fstat": "fsw", "fop": "last_opcode", "fioff": "last_ip", "fooff": "last_dp"}
            return int(getattr(held, fields[name])) & 0xFFFF_FFFF if name in fields else 0
        return int(getattr(held, name))

    def write(self, number: int, data: bytes) -> None:
        """Takes effect with `flush`. Raises IndexError, ValueError for what cannot be written or has another size."""
        register = REGISTERS[number]
        if len(data) != register.bits // 8:
            raise ValueError(f"{register.name} has {register.bits // 8} bytes")
        held, name, value = self._set(register.source), register.name, int.from_bytes(data, "little")
        if self.read(number) == data:
            return
        if name == "mxcsr":
            self._sets["xsave"] = held[:_MXCSR] + data + held[_MXCSR + 4 :]
        elif name.startswith("st"):
            held.fpr[int(name[2:])][:10] = list(data)
        elif name.startswith("xmm"):
            held.xmm[int(name[3:])][:] = list(data)
        elif name == "eflags":
            held.rflags = value
        elif name.endswith("_base"):
            getattr(held, name[:2]).base = value
        elif name in ("fctrl", "fstat"):
            setattr(held, {"fctrl": "fcw", "fstat": "fsw"}[name], value & 0xFFFF)
        elif name in _SEGMENTS or name in _X87:
            raise ValueError(f"{name} is read-only here")  # a selector without its descriptor means nothing
        else:
            setattr(held, name, value)
        self._changed.add(register.source)

    def flush(self) -> None:
        """Raises KvmError if the kernel refuses a value; the vCPU then has what it had."""
        try:
            # XSAVE's area holds what KVM_SET_FPU sets, too: first the whole, then the part.
            for source in sorted(self._changed, key=lambda source: source != "xsave"):
                getattr(self._vcpu, f"set_{source}")(self._sets[source])
        finally:
            self._changed.clear()
            self._sets.clear()
