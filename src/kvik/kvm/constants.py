"""Numbers of the KVM interface, x86_64: ioctls, capabilities, exit reasons.

Written from the kernel's uapi (linux/kvm.h, asm/kvm.h; Documentation/virt/kvm/api.rst). Names are the kernel's,
without the KVM_ prefix. Nothing here does anything.
"""

from __future__ import annotations

import enum

API_VERSION = 12  # api.rst 4.1: "applications should refuse to run if KVM_GET_API_VERSION returns another value"
_KVMIO = 0xAE


def _io(number: int) -> int:
    return _KVMIO << 8 | number


def _iow(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | _KVMIO << 8 | number


def _ior(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | _KVMIO << 8 | number


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | _KVMIO << 8 | number


# /dev/kvm
GET_API_VERSION = _io(0x00)
CREATE_VM = _io(0x01)
CHECK_EXTENSION = _io(0x03)
GET_VCPU_MMAP_SIZE = _io(0x04)
GET_SUPPORTED_CPUID = _iowr(0x05, 8)
# VM
CREATE_VCPU = _io(0x41)
SET_USER_MEMORY_REGION = _iow(0x46, 32)
SET_TSS_ADDR = _io(0x47)
SET_IDENTITY_MAP_ADDR = _iow(0x48, 8)
CREATE_IRQCHIP = _io(0x60)
# vCPU
RUN = _io(0x80)
GET_REGS = _ior(0x81, 0x90)
SET_REGS = _iow(0x82, 0x90)
GET_SREGS = _ior(0x83, 0x138)
SET_SREGS = _iow(0x84, 0x138)
SET_CPUID2 = _iow(0x90, 8)

# Flags of a memory region (api.rst 4.35)
MEM_LOG_DIRTY_PAGES = 1 << 0
MEM_READONLY = 1 << 1


class Capability(enum.IntEnum):
    """KVM_CAP_* that kvik asks for (api.rst 4.4)."""

    IRQCHIP = 0
    HLT = 1
    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    EXT_CPUID = 7
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    SYNC_MMU = 16
    IRQ_ROUTING = 25
    IRQFD = 32
    PIT2 = 33
    IOEVENTFD = 36
    SET_IDENTITY_MAP_ADDR = 37
    ADJUST_CLOCK = 39
    XSAVE = 55
    MAX_VCPUS = 66
    TSC_DEADLINE_TIMER = 72
    SYNC_REGS = 74
    SIGNAL_MSI = 77
    READONLY_MEM = 81
    IMMEDIATE_EXIT = 136


class ExitReason(enum.IntEnum):
    """KVM_EXIT_* (api.rst 5, "The kvm_run structure")."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    HYPERV = 27
    X86_RDMSR = 29
    X86_WRMSR = 30
    X86_BUS_LOCK = 33
    NOTIFY = 37


class InternalErrorKind(enum.IntEnum):
    """KVM_INTERNAL_ERROR_*."""

    EMULATION = 1
    SIMUL_EX = 2
    DELIVERY_EV = 3
    UNEXPECTED_EXIT_REASON = 4
