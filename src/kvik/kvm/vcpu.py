"""One virtual CPU: its registers and events, and KVM_RUN (api.rst 2, "vcpu ioctls"; 5, "The kvm_run structure")."""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
from fcntl import ioctl

from kvik.kvm import constants as c
from kvik.kvm.constants import ExitReason
from kvik.kvm.descriptor import AttributeOwner, KvmError
from kvik.kvm.msrs import read_msrs, write_msrs
from kvik.kvm.structs import CpuidTable, Debugregs, Fpu, Regs, Run, Sregs, Sregs2, VcpuEvents, Xcrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.kvm.dirty_ring import DirtyRing
    from kvik.kvm.exits import Exit

_RUN = c.RUN
_INTR = ExitReason.INTR
_UNION = Run.u.offset
_IO = struct.Struct("<BBHIQ")  # direction (1: out), size, port, count, data_offset
_MMIO = struct.Struct("<Q8xIB")  # phys_addr, (data,) len, is_write
_COALESCED = struct.Struct("<QII8s")  # phys_addr, len, pio, data
_SYNC_REGS = Run.kvm_dirty_regs.offset + 8
_EXIT_REASON_WORD = Run.exit_reason.offset // 4
_PAGE = 4096
_EHWPOISON = 133  # `errno` has no name for it


class Translation(ctypes.Structure):
    """struct kvm_translation: the answer has `physical_address` if `valid`."""

    _fields_ = [
        ("linear_address", ctypes.c_uint64),
        ("physical_address", ctypes.c_uint64),
        ("valid", ctypes.c_uint8),
        ("writeable", ctypes.c_uint8),
        ("usermode", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 5),
    ]


class Vcpu(AttributeOwner):
    """One virtual CPU. Every call must come from one thread, best always the same (api.rst 2)."""

    def __init__(self, fd: int, mmap_size: int, xsave_size: int = 4096, ring_size: int = 0) -> None:
        super().__init__(fd)
        self.dirty_ring: DirtyRing | None = None
        self._xsave_size = xsave_size
        try:
            self._map = mmap.mmap(fd, mmap_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            if ring_size:
                from kvik.kvm.dirty_ring import DirtyRing

                self.dirty_ring = DirtyRing(fd, ring_size)
        except BaseException:
            self.close()
            raise
        self._view = memoryview(self._map)
        self._run = Run.from_buffer(self._map)
        self._words = self._view[:_PAGE].cast("I")
        self._mmio_data = self._view[_UNION + 8 : _UNION + 16]

    def close(self) -> None:
        if self.dirty_ring is not None:
            self.dirty_ring.close()
        if hasattr(self, "_run"):
            del self._run
            try:
                self._words.release()
                self._mmio_data.release()
                self._view.release()
                self._map.close()
            except BufferError:
                pass  # an exit's data is still held somewhere: the mapping goes when that does
        super().close()

    def enable_cap(self, capability: int, *arguments: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP on the vCPU (4.37; chapter 6 lists them): up to four arguments."""
        self._enable_cap(capability, arguments, flags)

    # Running

    def enter(self) -> int:
        """KVM_RUN (4.10) until the guest needs user space; the exit's reason (`ExitReason`) and nothing else: read what
        belongs to it with `io`, `mmio` or `exit`. A signal or `immediate_exit` gives INTR, a vCPU that was not started
        too. The interpreter lock is released meanwhile."""
        try:
            ioctl(self.fd, _RUN)  # without an argument: an integer one is first tried as a buffer, at twice the cost
        except OSError as error:
            number = error.errno
            if number in (errno.EINTR, errno.EAGAIN):
                return _INTR
            if number in (errno.EFAULT, _EHWPOISON) and self._words[_EXIT_REASON_WORD] == ExitReason.MEMORY_FAULT:
                return ExitReason.MEMORY_FAULT  # KVM_CAP_MEMORY_FAULT_INFO: told beside EFAULT or EHWPOISON
            raise KvmError(number or 0, "RUN") from None
        return self._words[_EXIT_REASON_WORD]

    def exit(self) -> Exit:
        """The last exit as a value, while it was not INTR."""
        from kvik.kvm.decode import decode  # thirty classes, that a machine's start must not wait for

        return decode(self._run, self._view)

    def run(self) -> Exit:
        """`enter` and `exit` in one."""
        if self.enter() != _INTR:
            return self.exit()
        from kvik.kvm.exits import InterruptedExit

        return InterruptedExit()

    def io(self) -> tuple[int, int, int, int, int]:
        """Of an IO exit: direction (1: out), size, port, count, and the offset of the data in `page`."""
        return _IO.unpack_from(self._map, _UNION)

    def mmio(self) -> tuple[int, int, int, memoryview]:
        """Of an MMIO exit: address, size (1 to 8), whether a write, and the data, of which the first `size` bytes
        count: what was written, or where to put the answer. Always the same view."""
        address, size, write = _MMIO.unpack_from(self._map, _UNION)
        return address, size, write, self._mmio_data

    @property
    def page(self) -> memoryview:
        """The whole mapping of kvm_run, writable: port I/O data lies in it. Release what you cut from it before
        `close`."""
        return self._view

    @property
    def immediate_exit(self) -> bool:
        """Makes the next, or running, KVM_RUN return at once (api.rst 5); a signal handler sets it."""
        return bool(self._run.immediate_exit)

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self._map[Run.immediate_exit.offset] = value

    def request_interrupt_window(self, wanted: bool) -> None:
        """Without an in-kernel irqchip: exit as soon as the guest can take an interrupt."""
        self._run.request_interrupt_window = wanted

    def set_hypercall_result(self, value: int) -> None:
        """The answer to `HypercallExit`."""
        self._run.u.hypercall.ret = value

    def set_msr_result(self, value: int = 0, error: bool = False) -> None:
        """The answer to `MsrExit`: what was read, or `error` for #GP in the guest."""
        self._run.u.msr.data = value
        self._run.u.msr.error = error

    def coalesced(self) -> list[tuple[int, bool, bytes]]:
        """Take what `Vm.register_coalesced` gathered: (address, whether a port, data) in order. The ring is the
        machine's, seen through any vCPU; only one thread may take at a time."""
        ring = c.COALESCED_MMIO_PAGE_OFFSET * _PAGE
        room = (_PAGE - 8) // _COALESCED.size
        first, last = struct.unpack_from("<II", self._map, ring)
        taken = []
        while first != last and first < room:
            address, length, pio, data = _COALESCED.unpack_from(self._map, ring + 8 + first * _COALESCED.size)
            taken.append((address, bool(pio), data[: min(length, 8)]))
            first = (first + 1) % room
        struct.pack_into("<I", self._map, ring, first)
        return taken

    # Registers

    def set_cpuid(self, table: CpuidTable) -> None:
        """KVM_SET_CPUID2 (as 4.20): before the first run."""
        self._struct("SET_CPUID2", table)

    def cpuid(self) -> CpuidTable:
        """KVM_GET_CPUID2."""
        table = CpuidTable()
        table.nent = CpuidTable.MAX
        self._struct("GET_CPUID2", table)
        return table

    def regs(self) -> Regs:
        """KVM_GET_REGS (4.11)."""
        registers = Regs()
        self._struct("GET_REGS", registers)
        return registers

    def set_regs(self, registers: Regs) -> None:
        """KVM_SET_REGS (4.12)."""
        self._struct("SET_REGS", registers)

    def sregs(self) -> Sregs:
        """KVM_GET_SREGS (4.13)."""
        registers = Sregs()
        self._struct("GET_SREGS", registers)
        return registers

    def set_sregs(self, registers: Sregs) -> None:
        """KVM_SET_SREGS (4.14)."""
        self._struct("SET_SREGS", registers)

    def sregs2(self) -> Sregs2:
        """KVM_GET_SREGS2 (4.131)."""
        registers = Sregs2()
        self._struct("GET_SREGS2", registers)
        return registers

    def set_sregs2(self, registers: Sregs2) -> None:
        """KVM_SET_SREGS2 (4.132)."""
        self._struct("SET_SREGS2", registers)

    def fpu(self) -> Fpu:
        """KVM_GET_FPU (4.22)."""
        state = Fpu()
        self._struct("GET_FPU", state)
        return state

    def set_fpu(self, state: Fpu) -> None:
        """KVM_SET_FPU (4.23)."""
        self._struct("SET_FPU", state)

    def xsave(self) -> bytes:
        """KVM_GET_XSAVE (4.42), or KVM_GET_XSAVE2 (4.134) where the state is larger than 4096 bytes."""
        area = bytearray(self._xsave_size)
        self._struct("GET_XSAVE2" if self._xsave_size > 4096 else "GET_XSAVE", area)
        return bytes(area)

    def set_xsave(self, area: bytes) -> None:
        """KVM_SET_XSAVE (4.43), of what `xsave` gave."""
        if len(area) != self._xsave_size:
            raise ValueError(f"the XSAVE area of this vCPU has {self._xsave_size} bytes, not {len(area)}")
        self._struct("SET_XSAVE", bytearray(area))

    def xcrs(self) -> Xcrs:
        """KVM_GET_XCRS (4.44)."""
        registers = Xcrs()
        self._struct("GET_XCRS", registers)
        return registers

    def set_xcrs(self, registers: Xcrs) -> None:
        """KVM_SET_XCRS (4.45)."""
        self._struct("SET_XCRS", registers)

    def debugregs(self) -> Debugregs:
        """KVM_GET_DEBUGREGS (4.33)."""
        registers = Debugregs()
        self._struct("GET_DEBUGREGS", registers)
        return registers

    def set_debugregs(self, registers: Debugregs) -> None:
        """KVM_SET_DEBUGREGS (4.34)."""
        self._struct("SET_DEBUGREGS", registers)

    def lapic(self) -> bytes:
        """KVM_GET_LAPIC (4.57): the local APIC's registers, 1024 bytes laid out as its page is."""
        state = bytearray(1024)
        self._struct("GET_LAPIC", state)
        return bytes(state)

    def set_lapic(self, state: bytes) -> None:
        """KVM_SET_LAPIC (4.58)."""
        if len(state) != 1024:
            raise ValueError(f"the state of a local APIC has 1024 bytes, not {len(state)}")
        self._struct("SET_LAPIC", bytearray(state))

    def msrs(self, indices: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
        """KVM_GET_MSRS (4.18): (index, value) pairs in order, and the indices that the kernel refused."""
        return read_msrs(self, indices)

    def set_msrs(self, pairs: list[tuple[int, int]]) -> list[int]:
        """KVM_SET_MSRS (4.19) in the order given; the indices that the kernel refused."""
        return write_msrs(self, pairs)

    def translate(self, address: int) -> Translation:
        """KVM_TRANSLATE (4.15): a linear address through the guest's own page tables."""
        answer = Translation(linear_address=address)
        self._struct("TRANSLATE", answer)
        return answer

    def sync(self, registers: int) -> None:
        """KVM_CAP_SYNC_REGS (6.74): put these register sets (SYNC_X86_*) into the page at each exit, so that
        `synced_regs` needs no ioctl."""
        self._run.kvm_valid_regs = registers

    def synced_regs(self) -> Regs:
        """The general registers inside the page, as of the last exit; they change in place at the next. Do not keep it
        beyond `close`."""
        return Regs.from_buffer(self._map, _SYNC_REGS)

    def synced_sregs(self) -> Sregs:
        """As `synced_regs`, the special registers."""
        return Sregs.from_buffer(self._map, _SYNC_REGS + ctypes.sizeof(Regs))

    def synced_changed(self, registers: int) -> None:
        """Load these sets (SYNC_X86_*) from the page at the next run."""
        self._run.kvm_dirty_regs = registers

    # Events and state

    def vcpu_events(self) -> VcpuEvents:
        """KVM_GET_VCPU_EVENTS (4.31)."""
        events = VcpuEvents()
        self._struct("GET_VCPU_EVENTS", events)
        return events

    def set_vcpu_events(self, events: VcpuEvents) -> None:
        """KVM_SET_VCPU_EVENTS (4.32)."""
        self._struct("SET_VCPU_EVENTS", events)

    def mp_state(self) -> int:
        """KVM_GET_MP_STATE (4.38): `constants.MpState`."""
        state = bytearray(4)
        self._struct("GET_MP_STATE", state)
        return int.from_bytes(state, "little")

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE (4.39)."""
        self._struct("SET_MP_STATE", bytearray(state.to_bytes(4, "little")))

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT (4.16): inject, without an in-kernel irqchip; only while the guest can take it."""
        self._bytes("INTERRUPT", vector.to_bytes(4, "little"))

    def nmi(self) -> None:
        """KVM_NMI (4.64)."""
        self._int("NMI")

    def smi(self) -> None:
        """KVM_SMI."""
        self._int("SMI")

    def tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ (4.56)."""
        return self._int("GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ (4.55)."""
        self._int("SET_TSC_KHZ", khz)

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL (4.70): tell the guest that it was paused, so that its watchdogs stay calm. EINVAL if the
        guest uses no kvmclock."""
        self._int("KVMCLOCK_CTRL")

    def set_guest_debug(self, control: int, debug_registers: tuple[int, ...] = ()) -> None:
        """KVM_SET_GUEST_DEBUG (4.87): GUESTDBG_* flags, 0 to end; with USE_HW_BP the eight debug registers (0 to 3 the
        addresses, 7 the control). Exits are `DebugExit`."""
        values = (*debug_registers, *[0] * 8)[:8]
        self._struct("SET_GUEST_DEBUG", bytearray(struct.pack("<II8Q", control, 0, *values)))

    def set_signal_mask(self, blocked: set[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK (4.21): the signals blocked while the guest runs, instead of the thread's; None: the
        thread's own again. `immediate_exit` is the simpler way to the same end."""
        if blocked is None:
            self._int("SET_SIGNAL_MASK")
            return
        mask = 0
        for number in blocked:
            mask |= 1 << number - 1
        self._bytes("SET_SIGNAL_MASK", struct.pack("<IQ", 8, mask))
