"""seccomp: an allow-list of system calls, assembled to classic BPF and given to the calling thread (seccomp(2)).

The program checks the architecture first, refuses x32 numbers, then compares the call's number with each of the list.
A call may carry conditions on its arguments: alternatives, each a set of masked comparisons that must all hold.
Pointers cannot be followed, so only arguments that are plain numbers are worth a condition.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_SECCOMP = 317
_SET_MODE_FILTER = 1
_FILTER_FLAG_TSYNC, _FILTER_FLAG_LOG = 1, 2

KILL_PROCESS, ERRNO, LOG, ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFC_0000, 0x7FFF_0000
ACTIONS = {"kill": KILL_PROCESS, "errno": ERRNO | errno.EPERM, "log": LOG}

AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x4000_0000

# Classic BPF (linux/bpf_common.h): class | size or operation | mode or source.
LD_ABS, AND_K, JEQ_K, JGE_K, RET_K = 0x20, 0x54, 0x15, 0x35, 0x06
_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter
INSTRUCTION_SIZE = _INSTRUCTION.size
_NR, _ARCH, _ARGS = 0, 4, 16  # offsets in struct seccomp_data
_MAX = 4096  # BPF_MAXINSNS


class Arg(NamedTuple):
    """A condition: argument `number` AND `mask` equals `value`."""

    number: int
    value: int
    mask: int = 0xFFFF_FFFF_FFFF_FFFF


class Instruction(NamedTuple):
    code: int
    k: int
    jt: int = 0
    jf: int = 0


# What a list says of one call: allowed (no alternatives), or only so.
Conditions = "Sequence[Sequence[Arg]]"


def _compare(condition: Arg) -> list[Instruction]:
    """Load, mask and compare the halves of one argument; a mismatch is marked by jf=255 and patched by the caller."""
    code: list[Instruction] = []
    for half in (0, 1):
        mask = condition.mask >> 32 * half & 0xFFFF_FFFF
        value = condition.value >> 32 * half & 0xFFFF_FFFF
        if not mask:
            continue
        code.append(Instruction(LD_ABS, _ARGS + 8 * condition.number + 4 * half))  # little endian: low half first
        if mask != 0xFFFF_FFFF:
            code.append(Instruction(AND_K, mask))
        code.append(Instruction(JEQ_K, value, 0, 255))
    return code


def _block(alternatives: Sequence[Sequence[Arg]], otherwise: int) -> list[Instruction]:
    """What follows the match of a call's number: ends in a verdict on every path."""
    if not alternatives:
        return [Instruction(RET_K, ALLOW)]
    block: list[Instruction] = []
    for conditions in alternatives:
        part = [instruction for condition in conditions for instruction in _compare(condition)]
        part.append(Instruction(RET_K, ALLOW))
        for at, instruction in enumerate(part):
            if instruction.jf == 255:
                part[at] = Instruction(instruction.code, instruction.k, 0, len(part) - at - 1)
        block += part
    block.append(Instruction(RET_K, otherwise))
    return block


def assemble(
    allowed: Mapping[int, Sequence[Sequence[Arg]]], otherwise: int, unsupported: Iterable[int] = ()
) -> list[Instruction]:
    """The program. `otherwise` is the verdict on all else; the calls of `unsupported` answer ENOSYS whatever it is, for
    libraries that then use an older call. Put the frequent calls first."""
    code = [
        Instruction(LD_ABS, _ARCH),
        Instruction(JEQ_K, AUDIT_ARCH_X86_64, 1, 0),
        Instruction(RET_K, KILL_PROCESS),
        Instruction(LD_ABS, _NR),
        Instruction(JGE_K, _X32_BIT, 0, 1),
        Instruction(RET_K, KILL_PROCESS),
    ]
    for number, alternatives in allowed.items():
        block = _block(alternatives, otherwise)
        if len(block) > 255:
            raise ValueError(f"system call {number}: {len(block)} instructions of conditions, 255 are possible")
        code.append(Instruction(JEQ_K, number, 0, len(block)))
        code += block
    for number in unsupported:
        code += (Instruction(JEQ_K, number, 0, 1), Instruction(RET_K, ERRNO | errno.ENOSYS))
    code.append(Instruction(RET_K, otherwise))
    if len(code) > _MAX:
        raise ValueError(f"a filter of {len(code)} instructions, {_MAX} are possible")
    return code


def pack(code: Sequence[Instruction]) -> bytes:
    """As the kernel takes it."""
    return b"".join([_INSTRUCTION.pack(i.code, i.jt, i.jf, i.k) for i in code])


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def load(data: bytes, *, all_threads: bool = False) -> None:
    """Put the filter (of `pack`) on the calling thread, or on all; later threads inherit it, none can shed it.

    Needs no_new_privs. Refusals are in the audit log where the kernel keeps one. Raises OSError.
    """
    program = _Program(len(data) // _INSTRUCTION.size, data)
    flags = _FILTER_FLAG_LOG | (_FILTER_FLAG_TSYNC if all_threads else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(
        ctypes.c_long(_SECCOMP), ctypes.c_ulong(_SET_MODE_FILTER), ctypes.c_ulong(flags), ctypes.byref(program)
    )
    if result < 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
    if result > 0:  # TSYNC: the thread that could not be brought under the filter
        raise OSError(errno.EBUSY, f"seccomp: thread {result} has a filter of its own")
