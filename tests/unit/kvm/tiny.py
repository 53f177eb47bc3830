"""The smallest machine: 64 KiB of memory from 0, one vCPU in 16-bit real mode, code at 0x1000."""

from __future__ import annotations

import mmap
import os
import signal
from types import TracebackType

import pytest

from kvik.kvm import System, Vcpu, Vm
from kvik.kvm.descriptor import address_of
from kvik.kvm.exits import Exit, InterruptedExit
from kvik.kvm.structs import Regs

needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm may not be opened here")

SIZE, CODE, HANDLER, STACK = 0x10000, 0x1000, 0x1100, 0x8000
VECTOR = 0x40
LIMIT = 20.0  # seconds until a guest that should have left guest mode is given up
WAIT = "fb f4 eb fd"  # sti; 1: hlt; jmp 1b


class Tiny:
    """`code` and `handler` (of the interrupt VECTOR) are machine code as hexadecimal text."""

    def __init__(self, code: str, handler: str = "", irqchip: bool = False, flags: int = 0) -> None:
        self.system = System()
        self.vm: Vm = self.system.create_vm()
        self.memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for place, text in ((CODE, code), (HANDLER, handler)):
            data = bytes.fromhex(text)
            self.memory[place : place + len(data)] = data
        self.memory[VECTOR * 4 : VECTOR * 4 + 4] = HANDLER.to_bytes(4, "little")
        self.vm.set_identity_map_addr(0xFFFBC000)
        self.vm.set_tss_addr(0xFFFBD000)
        if irqchip:
            self.vm.create_irqchip()
        self.flags = flags
        self.map_memory(flags)
        self._vcpu: Vcpu | None = None

    def map_memory(self, flags: int) -> None:
        self.vm.set_user_memory_region(0, 0, SIZE, address_of(memoryview(self.memory)), flags)

    @property
    def vcpu(self) -> Vcpu:
        """Made when first asked for, so that a test can still configure the machine."""
        if self._vcpu is None:
            self._vcpu = self.vm.create_vcpu(0)
            self._vcpu.set_cpuid(self.system.supported_cpuid())
            sregs = self._vcpu.sregs()
            for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
                segment.base = segment.selector = 0
            self._vcpu.set_sregs(sregs)
            self._vcpu.set_regs(Regs(rip=CODE, rsp=STACK, rflags=2))
        return self._vcpu

    def enable_lapic(self) -> None:
        """Software-enable the local APIC (SVR bit 8), with LINT0 masked."""
        state = bytearray(self.vcpu.lapic())
        state[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
        state[0x350:0x354] = (0x10000).to_bytes(4, "little")
        self.vcpu.set_lapic(bytes(state))

    def run(self, seconds: float = LIMIT) -> Exit:
        """One exit; `InterruptedExit` after `seconds`."""
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return self.vcpu.run()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def halts(self) -> bool:
        return isinstance(self.run(0.05), InterruptedExit)

    def __enter__(self) -> Tiny:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for part in (self._vcpu, self.vm, self.system):
            if part is not None:
                part.close()
