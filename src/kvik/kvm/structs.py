"""Structures of the KVM interface, x86_64, as ctypes: layouts only (linux/kvm.h, asm/kvm.h)."""

from __future__ import annotations

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64


class Regs(ctypes.Structure):
    """struct kvm_regs: general purpose registers."""

    _fields_ = [
        (name, c_uint64)
        for name in [
            "rax",
            "rbx",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "rsp",
            "rbp",
            "r8",
            "r9",
            "r10",
            "r11",
            "r12",
            "r13",
            "r14",
            "r15",
            "rip",
            "rflags",
        ]
    ]


class Segment(ctypes.Structure):
    """struct kvm_segment."""

    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *[(name, c_uint8) for name in ["type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding"]],
    ]


class DescriptorTable(ctypes.Structure):
    """struct kvm_dtable."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class Sregs(ctypes.Structure):
    """struct kvm_sregs: segments, tables, control registers."""

    _fields_ = [
        *[(name, Segment) for name in ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"]],
        ("gdt", DescriptorTable),
        ("idt", DescriptorTable),
        *[(name, c_uint64) for name in ["cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"]],
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class Sregs2(ctypes.Structure):
    """struct kvm_sregs2: `Sregs` without the interrupt bitmap, with the PDPTRs of PAE paging."""

    _fields_ = [
        *[(name, Segment) for name in ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"]],
        ("gdt", DescriptorTable),
        ("idt", DescriptorTable),
        *[(name, c_uint64) for name in ["cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base", "flags"]],
        ("pdptrs", c_uint64 * 4),
    ]


class Fpu(ctypes.Structure):
    """struct kvm_fpu: x87 and SSE state; `Vcpu.xsave` has all of it and more."""

    _fields_ = [
        ("fpr", c_uint8 * 16 * 8),
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftwx", c_uint8),
        ("pad1", c_uint8),
        ("last_opcode", c_uint16),
        ("last_ip", c_uint64),
        ("last_dp", c_uint64),
        ("xmm", c_uint8 * 16 * 16),
        ("mxcsr", c_uint32),
        ("pad2", c_uint32),
    ]


class Xcr(ctypes.Structure):
    """struct kvm_xcr."""

    _fields_ = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class Xcrs(ctypes.Structure):
    """struct kvm_xcrs: XCR0, which says what XSAVE saves."""

    _fields_ = [("nr_xcrs", c_uint32), ("flags", c_uint32), ("xcrs", Xcr * 16), ("padding", c_uint64 * 16)]


class Debugregs(ctypes.Structure):
    """struct kvm_debugregs."""

    _fields_ = [
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    ]


class VcpuEvents(ctypes.Structure):
    """struct kvm_vcpu_events, its anonymous structures flattened: exceptions, interrupts and NMIs on their way."""

    _fields_ = [
        ("exception_injected", c_uint8),
        ("exception_nr", c_uint8),
        ("exception_has_error_code", c_uint8),
        ("exception_pending", c_uint8),
        ("exception_error_code", c_uint32),
        ("interrupt_injected", c_uint8),
        ("interrupt_nr", c_uint8),
        ("interrupt_soft", c_uint8),
        ("interrupt_shadow", c_uint8),
        ("nmi_injected", c_uint8),
        ("nmi_pending", c_uint8),
        ("nmi_masked", c_uint8),
        ("nmi_pad", c_uint8),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi_smm", c_uint8),
        ("smi_pending", c_uint8),
        ("smi_smm_inside_nmi", c_uint8),
        ("smi_latched_init", c_uint8),
        ("triple_fault_pending", c_uint8),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


class ClockData(ctypes.Structure):
    """struct kvm_clock_data: `clock` in nanoseconds; `realtime` (since the epoch) and `host_tsc` if `flags` say so."""

    _fields_ = [
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    ]


class PitChannelState(ctypes.Structure):
    """struct kvm_pit_channel_state: one counter of the 8254."""

    _fields_ = [
        ("count", c_uint32),
        ("latched_count", c_uint16),
        *[
            (name, c_uint8)
            for name in [
                *("count_latched", "status_latched", "status", "read_state", "write_state"),
                *("write_latch", "rw_mode", "mode", "bcd", "gate"),
            ]
        ],
        ("count_load_time", ctypes.c_int64),
    ]


class PitState2(ctypes.Structure):
    """struct kvm_pit_state2."""

    _fields_ = [("channels", PitChannelState * 3), ("flags", c_uint32), ("reserved", c_uint32 * 9)]


class UserspaceMemoryRegion(ctypes.Structure):
    """struct kvm_userspace_memory_region."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class CpuidEntry(ctypes.Structure):
    """struct kvm_cpuid_entry2."""

    _fields_ = [
        *[(name, c_uint32) for name in ["function", "index", "flags", "eax", "ebx", "ecx", "edx"]],
        ("padding", c_uint32 * 3),
    ]


class CpuidTable(ctypes.Structure):
    """struct kvm_cpuid2 with room for the kernel's maximum (KVM_MAX_CPUID_ENTRIES)."""

    MAX = 256
    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", CpuidEntry * MAX)]


class _RunIo(ctypes.Structure):
    _fields_ = [
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class _RunMmio(ctypes.Structure):
    _fields_ = [("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8)]


class _RunFailEntry(ctypes.Structure):
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class _RunInternal(ctypes.Structure):
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _RunSystemEvent(ctypes.Structure):
    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _RunMsr(ctypes.Structure):
    _fields_ = [
        ("error", c_uint8),
        ("pad", c_uint8 * 7),
        ("reason", c_uint32),
        ("index", c_uint32),
        ("data", c_uint64),
    ]


class _RunHypercall(ctypes.Structure):
    _fields_ = [("nr", c_uint64), ("args", c_uint64 * 6), ("ret", c_uint64), ("longmode", c_uint32), ("pad", c_uint32)]


class _RunDebug(ctypes.Structure):
    _fields_ = [("exception", c_uint32), ("pad", c_uint32), ("pc", c_uint64), ("dr6", c_uint64), ("dr7", c_uint64)]


class _RunEx(ctypes.Structure):
    _fields_ = [("exception", c_uint32), ("error_code", c_uint32)]


class _RunTprAccess(ctypes.Structure):
    _fields_ = [("rip", c_uint64), ("is_write", c_uint32), ("pad", c_uint32)]


class _RunMemoryFault(ctypes.Structure):
    _fields_ = [("flags", c_uint64), ("gpa", c_uint64), ("size", c_uint64)]


class _RunUnion(ctypes.Union):
    _fields_ = [
        ("hardware_exit_reason", c_uint64),
        ("fail_entry", _RunFailEntry),
        ("io", _RunIo),
        ("mmio", _RunMmio),
        ("internal", _RunInternal),
        ("system_event", _RunSystemEvent),
        ("msr", _RunMsr),
        ("hypercall", _RunHypercall),
        ("debug", _RunDebug),
        ("ex", _RunEx),
        ("tpr_access", _RunTprAccess),
        ("memory_fault", _RunMemoryFault),
        ("eoi_vector", c_uint8),
        ("notify_flags", c_uint32),
        ("padding", c_uint8 * 256),
    ]


class Run(ctypes.Structure):
    """The head of struct kvm_run, shared with the kernel through mmap (api.rst 5)."""

    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("u", _RunUnion),
        ("kvm_valid_regs", c_uint64),
        ("kvm_dirty_regs", c_uint64),
    ]
