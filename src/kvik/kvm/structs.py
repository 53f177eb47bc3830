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


class _RunUnion(ctypes.Union):
    _fields_ = [
        ("hardware_exit_reason", c_uint64),
        ("fail_entry", _RunFailEntry),
        ("io", _RunIo),
        ("mmio", _RunMmio),
        ("internal", _RunInternal),
        ("system_event", _RunSystemEvent),
        ("msr", _RunMsr),
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
