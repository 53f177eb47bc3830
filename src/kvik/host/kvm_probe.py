"""Run a tiny guest on /dev/kvm and time it: the only way to know whether KVM is of use.

This module's `main` runs in a process of its own, started by `host.probe`, which kills it when it hangs; it prints one
line of JSON. It imports nothing but the standard library and `kvik.kvm`, to start fast.

The guest is what a kernel is: 64-bit code in ring 0 with paging on. First it counts down in a loop, which is timed;
then it goes through instructions that every kernel's boot needs, stage by stage, each reported by a byte written to
port 0xE9. Guest-physical layout, one slot of 64 KiB from 0:

    0x1000 page tables A (PML4, PDPT, PD: identity map of the first 2 MiB)   0x4000 the same again, B
    0x7000 scratch   0x8000 IDT   0x9000 GDT, table pointers, TSS   0xA000 code   0xFFF0 stack, downwards
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import struct
import sys
import time
from typing import Any

from kvik.kvm import KvmError, System, Vcpu
from kvik.kvm.constants import API_VERSION, Capability
from kvik.kvm.exits import Exit, HltExit, InterruptedExit, IoExit
from kvik.kvm.structs import Regs, Segment, Sregs

MEMORY = 0x10000
TABLES_A, TABLES_B, SCRATCH, IDT, GDT, CODE, STACK = 0x1000, 0x4000, 0x7000, 0x8000, 0x9000, 0xA000, 0xFFF0
POINTERS, TSS = GDT + 0x100, GDT + 0x200
PORT = 0xE9

# Iterations of the loop. The first run pays for faults and translations, and every run for its entry and exit (up to
# milliseconds where KVM is nested in an emulator): the speed is the slope between two later runs.
WARM_UP, SHORT_RUN, LONG_RUN = 100, 1_000, 51_000  # at 1 us an instruction the long one still takes only 0.1 s
PRECISE_RUN = 1_000_000  # only where the first slope was fast
# Seconds from the opening of the device, but for those in which this process waited for a processor; 0.01 is usual,
# nested in an emulator 0.2.
GUEST_DEADLINE = 2.0
FAST = 50.0  # nanoseconds an instruction: hardware needs about 0.3 (nested 1), emulation hundreds

# What each stage does, in the order of the code; the names appear in messages.
STAGES = (
    "a counting loop",
    "stack, string and locked instructions",
    "cpuid and rdtsc",
    "model-specific registers",
    "descriptor tables",
    "control registers and page tables",
    "an exception and its return",
    "SSE and the FPU",
)


def _stage(number: int) -> bytes:
    return bytes((0xB0, 0x10 + number, 0xE6, PORT))  # mov $0x10+n,%al; out %al,$0xe9


def guest_code() -> bytes:
    """The guest's machine code (64-bit; AT&T syntax beside it). rbx: iterations of the loop."""
    h = bytes.fromhex
    return b"".join(
        (
            h("4889d9"),  # mov %rbx,%rcx
            h("48ffc9 75fb"),  # 1: dec %rcx; jnz 1b
            _stage(0),
            h("488d3c2500700000"),  # lea 0x7000,%rdi
            h("b940000000 31c0 fc f3aa"),  # mov $64,%ecx; xor %eax,%eax; cld; rep stosb
            h("f083042500700000 01"),  # lock addl $1,0x7000
            h("57 5e"),  # push %rdi; pop %rsi
            h("e802000000 eb01 c3"),  # call 2f; jmp 3f; 2: ret; 3:
            h("9c 9d"),  # pushfq; popfq
            _stage(1),
            h("31c0 31c9 0fa2 0f31"),  # xor %eax,%eax; xor %ecx,%ecx; cpuid; rdtsc
            _stage(2),
            h("b9800000c0 0f32 0f30"),  # mov $EFER,%ecx; rdmsr; wrmsr
            h("b9000100c0 31d2 b800700000 0f30"),  # FS_BASE := 0x7000
            h("0f01f8 0f01f8"),  # swapgs; swapgs
            _stage(3),
            h("0f01142500910000"),  # lgdt 0x9100
            h("0f011c2510910000"),  # lidt 0x9110
            h("b810000000 8ed8 8ed0"),  # mov $0x10,%eax; mov %eax,%ds; mov %eax,%ss
            h("b818000000 0f00d8"),  # mov $0x18,%eax; ltr %ax
            h("6a08 488d0503000000 50 48cb"),  # push $8; lea 4f(%rip),%rax; push %rax; lretq; 4:
            _stage(4),
            h("0f20c0 0f22c0"),  # mov %cr0,%rax; mov %rax,%cr0
            h("0f20e0 483580000000 0f22e0"),  # toggle CR4.PGE
            h("b800400000 0f22d8"),  # mov $0x4000,%eax; mov %rax,%cr3
            h("0f013c2500700000"),  # invlpg 0x7000
            h("b800100000 0f22d8 0f06"),  # mov $0x1000,%eax; mov %rax,%cr3; clts
            _stage(5),
            h("cc"),  # int3
            _stage(6),
            h("660fefc0 0f11042500700000 dbe3"),  # pxor %xmm0,%xmm0; movups %xmm0,0x7000; fninit
            _stage(7),
            h("f4 ebfe"),  # hlt; jmp .
            HANDLER,
        )
    )


HANDLER = bytes.fromhex("48cf")  # iretq


def fill_memory(memory: Any) -> None:
    """Write page tables, descriptor tables and code into the guest's memory (a writable buffer)."""
    for tables in (TABLES_A, TABLES_B):
        # Present, writable; the page directory's entry maps 2 MiB (PS).
        struct.pack_into("<Q", memory, tables, tables + 0x1000 | 3)
        struct.pack_into("<Q", memory, tables + 0x1000, tables + 0x2000 | 3)
        struct.pack_into("<Q", memory, tables + 0x2000, 0x83)
    code = guest_code()
    memory[CODE : CODE + len(code)] = code
    handler = CODE + len(code) - len(HANDLER)
    # 0x08: 64-bit code, 0x10: data, 0x18: TSS (two entries).
    tss = 0x67 | (TSS & 0xFFFFFF) << 16 | 0x89 << 40 | (TSS >> 24) << 56
    struct.pack_into("<5Q", memory, GDT, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, tss, 0)
    struct.pack_into("<HQ", memory, POINTERS, 0x27, GDT)
    struct.pack_into("<HQ", memory, POINTERS + 0x10, 0xFFF, IDT)
    for vector in range(256):
        # A 64-bit interrupt gate: selector 8, present, type 14.
        struct.pack_into("<HHHHII", memory, IDT + vector * 16, handler & 0xFFFF, 8, 0x8E00, handler >> 16, 0, 0)


def long_mode(sregs: Sregs) -> None:
    """Set the special registers for 64-bit code in ring 0 with paging."""
    sregs.cs = Segment(0, 0xFFFFFFFF, 8, type=11, present=1, s=1, l=1, g=1)
    data = Segment(0, 0xFFFFFFFF, 16, type=3, present=1, s=1, db=1, g=1)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.cr0 = 0x80050033  # PG AM WP NE ET MP PE
    sregs.cr3 = TABLES_A
    sregs.cr4 = 0x620  # PAE OSFXSR OSXMMEXCPT
    sregs.efer = 0x500  # LMA LME


def _timed(vcpu: Vcpu) -> tuple[Exit, int]:
    """Run to the next exit; thread CPU time (guest mode counts), so that a loaded host does not look slow."""
    started = time.thread_time_ns()
    while isinstance(reason := vcpu.run(), InterruptedExit):
        pass
    return reason, time.thread_time_ns() - started


def _start(vcpu: Vcpu, iterations: int) -> None:
    vcpu.set_regs(Regs(rip=CODE, rsp=STACK, rflags=2, rbx=iterations))


def probe(path: str = "/dev/kvm") -> dict[str, Any]:
    """Go as far as it goes. Keys: `step` reached, `error` if one stopped it (`errno`), and what was measured."""
    result: dict[str, Any] = {"step": "open"}
    try:
        with System(path) as system:
            result["step"] = "version"
            result["api"] = system.api_version()
            if result["api"] != API_VERSION:
                return result | {"error": f"KVM interface version {result['api']}, not {API_VERSION}"}
            result["max_vcpus"] = system.check_extension(Capability.MAX_VCPUS)
            result["step"] = "create"
            _run_guest(system, result)
    except KvmError as error:
        result |= {"error": error.strerror, "errno": error.errno}
    except OSError as error:
        result |= {"error": str(error), "errno": error.errno or 0}
    return result


def _run_guest(system: System, result: dict[str, Any]) -> None:
    memory = mmap.mmap(-1, MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fill_memory(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with system.create_vm() as vm:
        vm.set_identity_map_addr(0xFFFBC000)
        vm.set_tss_addr(0xFFFBD000)
        vm.set_user_memory_region(0, 0, MEMORY, address)
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid(system.supported_cpuid())
            sregs = vcpu.sregs()
            long_mode(sregs)
            vcpu.set_sregs(sregs)
            result["step"] = "run"
            if not _measure_speed(vcpu, result):
                return
            result["exit_us"] = []
            for number in range(1, len(STAGES)):
                reason, spent = _timed(vcpu)
                if not _reached(reason, number, result):
                    return
                result["exit_us"].append(round(spent / 1000, 1))
            reason, _ = _timed(vcpu)
            if not isinstance(reason, HltExit):
                result["error"] = f"the guest did not halt: {reason}"
                return
            result["step"] = "done"


def _measure_speed(vcpu: Vcpu, result: dict[str, Any]) -> bool:
    """Time the loop; False if it did not get to its end."""

    def spent_on(iterations: int) -> int:
        _start(vcpu, iterations)
        reason, spent = _timed(vcpu)
        return spent if _reached(reason, 0, result) else -1

    runs = [spent_on(iterations) for iterations in (WARM_UP, SHORT_RUN, SHORT_RUN)]
    if min(runs) < 0:
        return False
    short = min(runs[1:])
    slopes: list[float] = []
    # Slow runs are repeated and the fastest believed: a host's hiccup of a few ms must not look like emulation.
    for iterations in (LONG_RUN, LONG_RUN, LONG_RUN, PRECISE_RUN):
        if iterations == LONG_RUN and slopes and slopes[-1] <= FAST:
            continue
        if iterations == PRECISE_RUN and slopes[-1] > FAST:
            break
        spent = spent_on(iterations)
        if spent < 0:
            return False
        slopes.append(max(spent - short, 1) / (2 * (iterations - SHORT_RUN)))
    speed = slopes[-1] if slopes[-1] <= FAST else min(slopes)
    result["instruction_ns"] = max(round(speed, 3), 0.001)
    return True


def _reached(reason: Exit, number: int, result: dict[str, Any]) -> bool:
    if isinstance(reason, IoExit) and reason.port == PORT and reason.data[0] == 0x10 + number:
        result["stage"] = number
        return True
    text = repr(reason) if not isinstance(reason, IoExit) else f"I/O on port {reason.port:#x}"
    result["error"] = f"guest code failed at {STAGES[number]}: {text}"
    return False


def _waited() -> float:
    """Seconds that this thread has waited for a processor (proc(5), schedstat); 0 where the kernel does not count."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:  # noqa: PTH123 - pathlib is not imported
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _give_up_in_time() -> None:
    """From now on the guest has its time: when that is over, SIGALRM ends the process. Not before it has really had
    it: on a busy host a guest that works takes seconds, of which it runs in few."""
    began, waited = time.monotonic(), _waited()

    def look(*_: object) -> None:
        left = GUEST_DEADLINE - (time.monotonic() - began) + (_waited() - waited)
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.01))
            return
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGALRM)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, GUEST_DEADLINE)


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else "/dev/kvm"
    _give_up_in_time()  # only now: how long this took to start says nothing of KVM
    while (result := probe(path)).get("errno") == errno.EINTR:
        pass  # the alarm came amid an ioctl that a signal breaks off, and there was time left
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(result), flush=True)
