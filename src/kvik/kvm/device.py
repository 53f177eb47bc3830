"""System, Vm, Vcpu: each made by its parent, each a context manager around one descriptor (api.rst 2).

    with System() as system, system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        ...

An ioctl that fails raises `KvmError`, an OSError that names the ioctl. Only x86_64.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from typing import TypeVar

from kvik.kvm import constants as c
from kvik.kvm.constants import Capability, ExitReason
from kvik.kvm.exits import (
    Exit,
    FailEntryExit,
    HltExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MmioExit,
    MsrExit,
    ShutdownExit,
    SystemEventExit,
    UnknownExit,
)
from kvik.kvm.structs import CpuidTable, Regs, Run, Sregs, UserspaceMemoryRegion

_Self = TypeVar("_Self", bound="_Descriptor")

# fcntl.ioctl takes an integer argument as a signed C int only; an address above 2 GiB needs the C library.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)


class KvmError(OSError):
    """An ioctl on a KVM descriptor failed; `ioctl` is its name without KVM_."""

    def __init__(self, number: int, ioctl: str) -> None:
        super().__init__(number, f"KVM_{ioctl}: {os.strerror(number)}")
        self.ioctl = ioctl


class _Descriptor:
    """Owns one descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _int(self, name: str, argument: int = 0) -> int:
        """An ioctl with an integer argument that fits a C int; its result."""
        try:
            return fcntl.ioctl(self.fd, getattr(c, name), argument)
        except OSError as error:
            raise KvmError(error.errno or 0, name) from None

    def _struct(self, name: str, structure: ctypes.Structure) -> int:
        """An ioctl on a structure, read or written in place."""
        try:
            result: int = fcntl.ioctl(self.fd, getattr(c, name), structure)  # typed as Any for a buffer
            return result
        except OSError as error:
            raise KvmError(error.errno or 0, name) from None


class System(_Descriptor):
    """/dev/kvm. Raises OSError if it cannot be opened."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def api_version(self) -> int:
        """KVM_GET_API_VERSION (api.rst 4.1): 12 for every kernel since 2.6.22."""
        return self._int("GET_API_VERSION")

    def check_extension(self, capability: Capability | int) -> int:
        """KVM_CHECK_EXTENSION (4.4): 0 if absent, else 1 or a limit."""
        return self._int("CHECK_EXTENSION", int(capability))

    def vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE (4.5): bytes to map of each vCPU."""
        return self._int("GET_VCPU_MMAP_SIZE")

    def supported_cpuid(self) -> CpuidTable:
        """KVM_GET_SUPPORTED_CPUID (4.46)."""
        table = CpuidTable()
        table.nent = CpuidTable.MAX
        self._struct("GET_SUPPORTED_CPUID", table)
        return table

    def create_vm(self, machine_type: int = 0) -> Vm:
        """KVM_CREATE_VM (4.2)."""
        while True:
            try:
                return Vm(self._int("CREATE_VM", machine_type), self.vcpu_mmap_size())
            except KvmError as error:
                if error.errno != errno.EINTR:  # a signal while it allocates: the kernel's documented answer
                    raise


class Vm(_Descriptor):
    """One machine: memory slots and vCPUs."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_size = vcpu_mmap_size

    def check_extension(self, capability: Capability | int) -> int:
        """KVM_CHECK_EXTENSION on the machine (4.4): may differ from the system's answer."""
        return self._int("CHECK_EXTENSION", int(capability))

    def set_tss_addr(self, address: int) -> None:
        """KVM_SET_TSS_ADDR (4.35): three guest-physical pages below 4 GiB that Intel's CPUs without unrestricted guest
        mode need; must come before the first vCPU."""
        if _libc.ioctl(self.fd, c.SET_TSS_ADDR, address) < 0:
            raise KvmError(ctypes.get_errno(), "SET_TSS_ADDR")

    def set_identity_map_addr(self, address: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR (4.41): one page, for the same CPUs."""
        try:
            fcntl.ioctl(self.fd, c.SET_IDENTITY_MAP_ADDR, address.to_bytes(8, "little"))
        except OSError as error:
            raise KvmError(error.errno or 0, "SET_IDENTITY_MAP_ADDR") from None

    def set_user_memory_region(self, slot: int, guest_address: int, size: int, address: int, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION (4.35): bytes; page aligned. `address` is in this process and must stay mapped;
        size 0 deletes the slot."""
        self._struct("SET_USER_MEMORY_REGION", UserspaceMemoryRegion(slot, flags, guest_address, size, address))

    def create_vcpu(self, number: int) -> Vcpu:
        """KVM_CREATE_VCPU (4.7); `number` is the APIC id."""
        return Vcpu(self._int("CREATE_VCPU", number), self._vcpu_mmap_size)


class Vcpu(_Descriptor):
    """One virtual CPU. Every call must come from one thread, best always the same (api.rst 2)."""

    def __init__(self, fd: int, mmap_size: int) -> None:
        super().__init__(fd)
        try:
            self._map = mmap.mmap(fd, mmap_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            self.close()
            raise
        self._view = memoryview(self._map)
        self._run = Run.from_buffer(self._map)

    def close(self) -> None:
        if hasattr(self, "_run"):
            del self._run
            try:
                self._view.release()
                self._map.close()
            except BufferError:
                pass  # an exit's data is still held somewhere: the mapping goes when that does
        super().close()

    def set_cpuid(self, table: CpuidTable) -> None:
        """KVM_SET_CPUID2 (4.47)."""
        self._struct("SET_CPUID2", table)

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

    @property
    def immediate_exit(self) -> bool:
        """Makes the next, or running, KVM_RUN return at once (api.rst 5); a signal handler sets it."""
        return bool(self._run.immediate_exit)

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self._run.immediate_exit = value

    def run(self) -> Exit:
        """KVM_RUN (4.10) until the guest needs user space. The interpreter lock is released meanwhile."""
        try:
            fcntl.ioctl(self.fd, c.RUN, 0)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.EAGAIN):
                return InterruptedExit()
            raise KvmError(error.errno or 0, "RUN") from None
        return self._exit()

    def _exit(self) -> Exit:
        run = self._run
        reason = run.exit_reason
        if reason == ExitReason.IO:
            io = run.u.io
            size, count, start = io.size, io.count, io.data_offset
            return IoExit(io.direction == 1, io.port, size, count, self._view[start : start + size * count])
        if reason == ExitReason.MMIO:
            mmio = run.u.mmio
            start = Run.u.offset + type(mmio).data.offset
            return MmioExit(bool(mmio.is_write), mmio.phys_addr, self._view[start : start + min(mmio.len, 8)])
        if reason == ExitReason.HLT:
            return HltExit()
        if reason == ExitReason.INTR:
            return InterruptedExit()
        if reason == ExitReason.SHUTDOWN:
            return ShutdownExit()
        if reason == ExitReason.FAIL_ENTRY:
            return FailEntryExit(run.u.fail_entry.hardware_entry_failure_reason, run.u.fail_entry.cpu)
        if reason == ExitReason.INTERNAL_ERROR:
            internal = run.u.internal
            return InternalErrorExit(internal.suberror, tuple(internal.data[: min(internal.ndata, 16)]))
        if reason == ExitReason.SYSTEM_EVENT:
            event = run.u.system_event
            return SystemEventExit(event.type, tuple(event.data[: min(event.ndata, 16)]))
        if reason in (ExitReason.X86_RDMSR, ExitReason.X86_WRMSR):
            return MsrExit(reason == ExitReason.X86_WRMSR, run.u.msr.index, run.u.msr.data)
        return UnknownExit(reason, run.u.hardware_exit_reason)
