"""Numbers of the KVM interface, x86_64: ioctls, capabilities, exit reasons, flags.

Written from the kernel's uapi (linux/kvm.h, asm/kvm.h; Documentation/virt/kvm/api.rst). Names are the kernel's,
without the KVM_ prefix. Nothing here does anything.
"""

from __future__ import annotations

from kvik.numbers import Numbers

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
GET_MSR_INDEX_LIST = _iowr(0x02, 4)
CHECK_EXTENSION = _io(0x03)
GET_VCPU_MMAP_SIZE = _io(0x04)
GET_SUPPORTED_CPUID = _iowr(0x05, 8)
GET_EMULATED_CPUID = _iowr(0x09, 8)
GET_MSR_FEATURE_INDEX_LIST = _iowr(0x0A, 4)
# VM
CREATE_VCPU = _io(0x41)
GET_DIRTY_LOG = _iow(0x42, 16)
SET_USER_MEMORY_REGION = _iow(0x46, 32)
SET_TSS_ADDR = _io(0x47)
SET_IDENTITY_MAP_ADDR = _iow(0x48, 8)
CREATE_IRQCHIP = _io(0x60)
IRQ_LINE = _iow(0x61, 8)
GET_IRQCHIP = _iowr(0x62, 520)
SET_IRQCHIP = _ior(0x63, 520)  # read, although it writes: the kernel's own slip, kept for its ABI
REGISTER_COALESCED_MMIO = _iow(0x67, 16)
UNREGISTER_COALESCED_MMIO = _iow(0x68, 16)
SET_GSI_ROUTING = _iow(0x6A, 8)
IRQFD = _iow(0x76, 32)
CREATE_PIT2 = _iow(0x77, 64)
SET_BOOT_CPU_ID = _io(0x78)
IOEVENTFD = _iow(0x79, 64)
SET_CLOCK = _iow(0x7B, 48)
GET_CLOCK = _ior(0x7C, 48)
GET_PIT2 = _ior(0x9F, 112)
SET_PIT2 = _iow(0xA0, 112)
SIGNAL_MSI = _iow(0xA5, 32)
CLEAR_DIRTY_LOG = _iowr(0xC0, 24)
X86_SET_MSR_FILTER = _iow(0xC6, 392)
RESET_DIRTY_RINGS = _io(0xC7)
CREATE_DEVICE = _iowr(0xE0, 12)
# VM and vCPU, some also /dev/kvm and devices
ENABLE_CAP = _iow(0xA3, 104)
SET_TSC_KHZ = _io(0xA2)
GET_TSC_KHZ = _io(0xA3)
GET_STATS_FD = _io(0xCE)
SET_DEVICE_ATTR = _iow(0xE1, 24)
GET_DEVICE_ATTR = _iow(0xE2, 24)
HAS_DEVICE_ATTR = _iow(0xE3, 24)
# vCPU
RUN = _io(0x80)
GET_REGS = _ior(0x81, 0x90)
SET_REGS = _iow(0x82, 0x90)
GET_SREGS = _ior(0x83, 0x138)
SET_SREGS = _iow(0x84, 0x138)
TRANSLATE = _iowr(0x85, 24)
INTERRUPT = _iow(0x86, 4)
GET_MSRS = _iowr(0x88, 8)
SET_MSRS = _iow(0x89, 8)
SET_SIGNAL_MASK = _iow(0x8B, 4)
GET_FPU = _ior(0x8C, 416)
SET_FPU = _iow(0x8D, 416)
GET_LAPIC = _ior(0x8E, 1024)
SET_LAPIC = _iow(0x8F, 1024)
SET_CPUID2 = _iow(0x90, 8)
GET_CPUID2 = _iowr(0x91, 8)
TPR_ACCESS_REPORTING = _iowr(0x92, 40)
GET_MP_STATE = _ior(0x98, 4)
SET_MP_STATE = _iow(0x99, 4)
NMI = _io(0x9A)
SET_GUEST_DEBUG = _iow(0x9B, 72)
GET_VCPU_EVENTS = _ior(0x9F, 64)
SET_VCPU_EVENTS = _iow(0xA0, 64)
GET_DEBUGREGS = _ior(0xA1, 128)
SET_DEBUGREGS = _iow(0xA2, 128)
GET_XSAVE = _ior(0xA4, 4096)
SET_XSAVE = _iow(0xA5, 4096)
GET_XCRS = _ior(0xA6, 392)
SET_XCRS = _iow(0xA7, 392)
KVMCLOCK_CTRL = _io(0xAD)
SMI = _io(0xB7)
GET_SREGS2 = _ior(0xCC, 320)
SET_SREGS2 = _iow(0xCD, 320)
GET_XSAVE2 = _ior(0xCF, 4096)

# The capability to ask for before an ioctl; a failure's message names it.
NEEDS = {
    "GET_EMULATED_CPUID": "EXT_EMUL_CPUID",
    "GET_MSR_FEATURE_INDEX_LIST": "GET_MSR_FEATURES",
    "CREATE_IRQCHIP": "IRQCHIP",
    "IRQ_LINE": "IRQCHIP",
    "GET_IRQCHIP": "IRQCHIP",
    "SET_IRQCHIP": "IRQCHIP",
    "REGISTER_COALESCED_MMIO": "COALESCED_MMIO",
    "UNREGISTER_COALESCED_MMIO": "COALESCED_MMIO",
    "SET_GSI_ROUTING": "IRQ_ROUTING",
    "IRQFD": "IRQFD",
    "CREATE_PIT2": "PIT2",
    "GET_PIT2": "PIT_STATE2",
    "SET_PIT2": "PIT_STATE2",
    "IOEVENTFD": "IOEVENTFD",
    "GET_CLOCK": "ADJUST_CLOCK",
    "SET_CLOCK": "ADJUST_CLOCK",
    "SIGNAL_MSI": "SIGNAL_MSI",
    "CLEAR_DIRTY_LOG": "MANUAL_DIRTY_LOG_PROTECT2",
    "X86_SET_MSR_FILTER": "X86_MSR_FILTER",
    "RESET_DIRTY_RINGS": "DIRTY_LOG_RING",
    "CREATE_DEVICE": "DEVICE_CTRL",
    "SET_IDENTITY_MAP_ADDR": "SET_IDENTITY_MAP_ADDR",
    "SET_TSS_ADDR": "SET_TSS_ADDR",
    "SET_BOOT_CPU_ID": "SET_BOOT_CPU_ID",
    "SET_TSC_KHZ": "TSC_CONTROL",
    "GET_TSC_KHZ": "GET_TSC_KHZ",
    "GET_STATS_FD": "BINARY_STATS_FD",
    "GET_MP_STATE": "MP_STATE",
    "SET_MP_STATE": "MP_STATE",
    "NMI": "USER_NMI",
    "SMI": "X86_SMM",
    "SET_GUEST_DEBUG": "SET_GUEST_DEBUG",
    "GET_VCPU_EVENTS": "VCPU_EVENTS",
    "SET_VCPU_EVENTS": "VCPU_EVENTS",
    "GET_DEBUGREGS": "DEBUGREGS",
    "SET_DEBUGREGS": "DEBUGREGS",
    "GET_XSAVE": "XSAVE",
    "SET_XSAVE": "XSAVE",
    "GET_XSAVE2": "XSAVE2",
    "GET_XCRS": "XCRS",
    "SET_XCRS": "XCRS",
    "KVMCLOCK_CTRL": "KVMCLOCK_CTRL",
    "GET_SREGS2": "SREGS2",
    "SET_SREGS2": "SREGS2",
    "TPR_ACCESS_REPORTING": "VAPIC",
}

# Flags of a memory region (api.rst 4.35)
MEM_LOG_DIRTY_PAGES = 1 << 0
MEM_READONLY = 1 << 1

# Flags of KVM_GET_CLOCK and KVM_SET_CLOCK (4.29, 4.30)
CLOCK_TSC_STABLE = 1 << 1
CLOCK_REALTIME = 1 << 2
CLOCK_HOST_TSC = 1 << 3

# Arguments of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (7.18)
DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
DIRTY_LOG_INITIALLY_SET = 1 << 1

# Flags of an entry of the dirty ring (8.29), and of the run mapping's pages
DIRTY_GFN_DIRTY = 1 << 0
DIRTY_GFN_RESET = 1 << 1
DIRTY_LOG_PAGE_OFFSET = 64  # pages
COALESCED_MMIO_PAGE_OFFSET = 2  # pages

# KVM_SET_GUEST_DEBUG's control (4.87)
GUESTDBG_ENABLE = 1 << 0
GUESTDBG_SINGLESTEP = 1 << 1
GUESTDBG_USE_SW_BP = 1 << 16
GUESTDBG_USE_HW_BP = 1 << 17
GUESTDBG_INJECT_DB = 1 << 18
GUESTDBG_INJECT_BP = 1 << 19
GUESTDBG_BLOCKIRQ = 1 << 20

# Register sets of kvm_run.kvm_valid_regs and kvm_dirty_regs (KVM_CAP_SYNC_REGS, 6.74)
SYNC_X86_REGS = 1 << 0
SYNC_X86_SREGS = 1 << 1
SYNC_X86_EVENTS = 1 << 2

# KVM_X86_SET_MSR_FILTER (4.97), and what KVM_CAP_X86_USER_SPACE_MSR (7.21) hands to user space
MSR_FILTER_READ = 1 << 0
MSR_FILTER_WRITE = 1 << 1
MSR_FILTER_DEFAULT_ALLOW = 0
MSR_FILTER_DEFAULT_DENY = 1 << 0
MSR_EXIT_REASON_INVAL = 1 << 0
MSR_EXIT_REASON_UNKNOWN = 1 << 1
MSR_EXIT_REASON_FILTER = 1 << 2

# Arguments of KVM_CAP_X86_DISABLE_EXITS (7.13), _X2APIC_API (7.7), _X86_BUS_LOCK_EXIT (7.22), _X86_NOTIFY_VMEXIT
X86_DISABLE_EXITS_MWAIT = 1 << 0
X86_DISABLE_EXITS_HLT = 1 << 1
X86_DISABLE_EXITS_PAUSE = 1 << 2
X86_DISABLE_EXITS_CSTATE = 1 << 3
X2APIC_API_USE_32BIT_IDS = 1 << 0
X2APIC_API_DISABLE_BROADCAST_QUIRK = 1 << 1
BUS_LOCK_DETECTION_OFF = 1 << 0
BUS_LOCK_DETECTION_EXIT = 1 << 1
X86_NOTIFY_VMEXIT_ENABLED = 1 << 0
X86_NOTIFY_VMEXIT_USER = 1 << 1


class Capability(Numbers):
    """KVM_CAP_* of x86 (api.rst 4.4)."""

    IRQCHIP = 0
    HLT = 1
    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    VAPIC = 6
    EXT_CPUID = 7
    CLOCKSOURCE = 8
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    COALESCED_MMIO = 15
    SYNC_MMU = 16
    IOMMU = 18
    USER_NMI = 22
    SET_GUEST_DEBUG = 23
    REINJECT_CONTROL = 24
    IRQ_ROUTING = 25
    MCE = 31
    IRQFD = 32
    PIT2 = 33
    SET_BOOT_CPU_ID = 34
    PIT_STATE2 = 35
    IOEVENTFD = 36
    SET_IDENTITY_MAP_ADDR = 37
    ADJUST_CLOCK = 39
    INTERNAL_ERROR_DATA = 40
    VCPU_EVENTS = 41
    HYPERV = 44
    DEBUGREGS = 50
    X86_ROBUST_SINGLESTEP = 51
    ENABLE_CAP = 54
    XSAVE = 55
    XCRS = 56
    ASYNC_PF = 59
    TSC_CONTROL = 60
    GET_TSC_KHZ = 61
    MAX_VCPUS = 66
    TSC_DEADLINE_TIMER = 72
    SYNC_REGS = 74
    KVMCLOCK_CTRL = 76
    SIGNAL_MSI = 77
    READONLY_MEM = 81
    IRQFD_RESAMPLE = 82
    DEVICE_CTRL = 89
    EXT_EMUL_CPUID = 95
    ENABLE_CAP_VM = 98
    CHECK_EXTENSION_VM = 105
    DISABLE_QUIRKS = 116
    X86_SMM = 117
    MULTI_ADDRESS_SPACE = 118
    SPLIT_IRQCHIP = 121
    IOEVENTFD_ANY_LENGTH = 122
    VCPU_ATTRIBUTES = 127
    MAX_VCPU_ID = 128
    X2APIC_API = 129
    IMMEDIATE_EXIT = 136
    X86_DISABLE_EXITS = 143
    GET_MSR_FEATURES = 153
    NESTED_STATE = 157
    COALESCED_PIO = 162
    EXCEPTION_PAYLOAD = 164
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    HALT_POLL = 182
    X86_USER_SPACE_MSR = 188
    X86_MSR_FILTER = 189
    DIRTY_LOG_RING = 192
    X86_BUS_LOCK_EXIT = 193
    SET_GUEST_DEBUG2 = 195
    SREGS2 = 200
    EXIT_HYPERCALL = 201
    BINARY_STATS_FD = 203
    EXIT_ON_EMULATION_FAILURE = 204
    VM_GPA_BITS = 207
    XSAVE2 = 208
    SYS_ATTRIBUTES = 209
    DISABLE_QUIRKS2 = 213
    VM_TSC_CONTROL = 214
    X86_TRIPLE_FAULT_EVENT = 218
    X86_NOTIFY_VMEXIT = 219
    DIRTY_LOG_RING_ACQ_REL = 223
    MEMORY_FAULT_INFO = 232
    VM_TYPES = 235


class ExitReason(Numbers):
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
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    XEN = 34
    NOTIFY = 37
    MEMORY_FAULT = 39


class InternalErrorKind(Numbers):
    """KVM_INTERNAL_ERROR_*."""

    EMULATION = 1
    SIMUL_EX = 2
    DELIVERY_EV = 3
    UNEXPECTED_EXIT_REASON = 4


class SystemEvent(Numbers):
    """KVM_SYSTEM_EVENT_*."""

    SHUTDOWN = 1
    RESET = 2
    CRASH = 3
    WAKEUP = 4
    SUSPEND = 5
    SEV_TERM = 6


class MpState(Numbers):
    """KVM_MP_STATE_* (api.rst 4.38)."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    AP_RESET_HOLD = 9


class Irqchip(Numbers):
    """KVM_IRQCHIP_*: the chips of KVM_CREATE_IRQCHIP (api.rst 4.24)."""

    PIC_MASTER = 0
    PIC_SLAVE = 1
    IOAPIC = 2
