"""Which system calls the threads of a machine may make, and with which arguments.

Three roles. A **vcpu** thread runs the guest and answers its exits: KVM_RUN, interrupts, eventfds, the interpreter's
needs. The **main** role is all else: the event loop, disks, nets, QMP, snapshots to descriptors that somebody passed.
A **blk** process (`vmm/blk`) turns requests in its VMM's memory into reads and writes of files that it was given.
None can open a path, make a socket, run a program, map executable memory, touch another process or another user.
"""

from __future__ import annotations

from kvik.vmm.sandbox.seccomp import Arg, Instruction, assemble

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Conditions = Sequence[Sequence[Arg]]

# x86-64 numbers (asm/unistd_64.h) of the calls that a list below names.
NR = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "select": 23, "sched_yield": 24, "mremap": 25,
    "msync": 26, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getpid": 39, "socket": 41, "connect": 42,
    "accept": 43, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "getsockname": 51,
    "getpeername": 52, "socketpair": 53, "setsockopt": 54, "getsockopt": 55, "clone": 56, "exit": 60, "wait4": 61,
    "uname": 63, "fcntl": 72, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84,
    "unlink": 87, "getrusage": 98, "sigaltstack": 131, "fstatfs": 138, "mlock": 149, "munlock": 150, "prctl": 157,
    "gettid": 186,
    "futex": 202, "sched_setaffinity": 203, "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232,
    "epoll_ctl": 233, "tgkill": 234, "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263,
    "renameat": 264, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "sync_file_range": 277, "epoll_pwait": 281,
    "timerfd_create": 283, "fallocate": 285, "timerfd_settime": 286, "timerfd_gettime": 287, "accept4": 288,
    "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "preadv": 295, "pwritev": 296, "recvmmsg": 299,
    "prlimit64": 302, "sendmmsg": 307, "getcpu": 309, "renameat2": 316, "seccomp": 317, "getrandom": 318,
    "memfd_create": 319, "membarrier": 324, "mlock2": 325, "copy_file_range": 326, "preadv2": 327, "pwritev2": 328,
    "statx": 332, "rseq": 334, "pidfd_send_signal": 424, "io_uring_enter": 426, "io_uring_register": 427,
    "pidfd_open": 434, "clone3": 435, "close_range": 436, "epoll_pwait2": 441, "landlock_create_ruleset": 444,
    "landlock_restrict_self": 446, "futex_waitv": 449,
}  # fmt: skip

_LOW = 0xFFFF_FFFF  # ioctl's request and clone's flags: the kernel looks at the low 32 bits
_PROT_EXEC, _CLONE_THREAD, _AF_UNIX, _AT_EMPTY_PATH = 4, 0x10000, 1, 0x1000

_FORK = 0x0120_0011  # SIGCHLD, CLONE_CHILD_SETTID, CLONE_CHILD_CLEARTID


def _one_of(index: int, *values: int) -> Conditions:
    return [[Arg(index, value, _LOW)] for value in values]


def _io(kind: int, number: int, size: int = 0, direction: int = 0) -> int:
    """_IOC(): direction 1 writes to the kernel, 2 reads."""
    return direction << 30 | size << 16 | kind << 8 | number


_KVM, _VHOST, _USERFAULTFD = 0xAE, 0xAF, 0xAA
# What a vCPU thread asks of KVM while the guest runs: itself, interrupts, and what a BAR that moves needs.
KVM_RUN = _io(_KVM, 0x80)
_VCPU_KVM = (
    KVM_RUN,
    _io(_KVM, 0xA5, 32, 1),  # KVM_SIGNAL_MSI
    _io(_KVM, 0x61, 8, 1),  # KVM_IRQ_LINE
    _io(_KVM, 0x67, 8, 3),  # KVM_IRQ_LINE_STATUS
    _io(_KVM, 0x6A, 8, 1),  # KVM_SET_GSI_ROUTING
    _io(_KVM, 0x76, 32, 1),  # KVM_IRQFD
    _io(_KVM, 0x79, 64, 1),  # KVM_IOEVENTFD
    _io(_KVM, 0x46, 32, 1),  # KVM_SET_USER_MEMORY_REGION
)
# The other ioctls of a vCPU's own descriptor that its thread makes when told to: its state, read and set.
_VCPU_STATE = tuple(
    _io(_KVM, number, size, direction)
    for number, size, direction in (
        (0x81, 144, 2), (0x82, 144, 1),  # GET/SET_REGS
        (0x83, 312, 2), (0x84, 312, 1),  # GET/SET_SREGS
        (0xCC, 320, 2), (0xCD, 320, 1),  # GET/SET_SREGS2
        (0x88, 8, 3), (0x89, 8, 1),  # GET/SET_MSRS
        (0x8C, 416, 2), (0x8D, 416, 1),  # GET/SET_FPU
        (0x8E, 1024, 2), (0x8F, 1024, 1),  # GET/SET_LAPIC
        (0x98, 4, 2), (0x99, 4, 1),  # GET/SET_MP_STATE
        (0x9F, 64, 2), (0xA0, 64, 1),  # GET/SET_VCPU_EVENTS
        (0xA1, 128, 2), (0xA2, 128, 1),  # GET/SET_DEBUGREGS
        (0xA4, 4096, 2), (0xA5, 4096, 1), (0xCF, 4096, 2),  # GET/SET_XSAVE, GET_XSAVE2
        (0xA6, 392, 2), (0xA7, 392, 1),  # GET/SET_XCRS
        (0x91, 8, 3), (0x90, 8, 1),  # GET/SET_CPUID2
        (0xA2, 0, 0), (0xA3, 0, 0),  # SET/GET_TSC_KHZ
        (0x9B, 72, 1), (0x85, 24, 3), (0x86, 4, 1),  # SET_GUEST_DEBUG, TRANSLATE, INTERRUPT
        (0x9A, 0, 0), (0xAD, 0, 0),  # NMI, KVMCLOCK_CTRL
        (0x9E, 8, 2), (0xB7, 0, 0),  # X86_SET_MCE and SMI
    )
)  # fmt: skip
_TTY = (0x5401, 0x5402, 0x5403, 0x5404, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450)  # not TIOCSTI, which types for the user
_TUN = tuple(_io(0x54, n, 4, d) for n, d in ((208, 1), (210, 2), (211, 2), (212, 1), (216, 1), (217, 1)))
_BLOCK = (
    0x1277,
    0x127F,
    0x1261,
    0x127C,
    0x127D,
    0x1268,
    0x127B,
    0x1278,
    _io(0x12, 114, 8, 2),
)  # BLKDISCARD and friends


def _ioctls(*kinds: int, requests: Sequence[int] = ()) -> Conditions:
    """Requests of whole kinds (the type byte), and single ones."""
    return [[Arg(1, kind << 8, 0xFF00)] for kind in kinds] + [[Arg(1, request, _LOW)] for request in requests]


_FREELY: Conditions = ()
_NOT_EXECUTABLE: Conditions = [[Arg(2, 0, _PROT_EXEC)]]

# What the interpreter and the C library need in any thread.
_RUNTIME = (
    "futex", "read", "write", "clock_gettime", "munmap", "madvise", "brk", "close", "rt_sigreturn", "rt_sigprocmask",
    "sched_yield", "gettid", "getpid", "exit", "exit_group", "clock_nanosleep", "nanosleep", "restart_syscall",
    "getrandom", "membarrier", "rseq", "set_robust_list", "sigaltstack", "rt_sigaction", "poll", "ppoll", "getrusage",
    "sched_getaffinity", "sched_setaffinity", "getcpu", "mlock", "mlock2", "munlock", "eventfd2", "fstat", "mremap",
    "clock_getres", "uname", "select", "pselect6", "epoll_ctl", "readv", "writev", "preadv", "pwritev", "lseek",
)  # fmt: skip
_MAIN = (
    "epoll_wait", "epoll_pwait", "epoll_pwait2", "epoll_create1", "pread64", "pwrite64", "preadv2", "pwritev2",
    "io_uring_enter", "io_uring_register", "recvmsg", "sendmsg", "recvfrom", "sendto", "recvmmsg", "sendmmsg", "accept",
    "accept4", "shutdown", "getsockname", "getpeername", "setsockopt", "getsockopt", "fcntl", "dup", "dup2", "dup3",
    "fsync", "fdatasync", "ftruncate", "fallocate", "sync_file_range", "copy_file_range", "memfd_create", "msync",
    "timerfd_create", "timerfd_settime", "timerfd_gettime", "close_range", "seccomp", "landlock_create_ruleset",
    "landlock_restrict_self", "futex_waitv", "wait4",
)  # fmt: skip
# A process that has one disk's images and its VMM's memory.
_BLK = (
    "epoll_wait", "epoll_pwait", "epoll_pwait2", "pread64", "pwrite64", "preadv2", "pwritev2", "io_uring_enter",
    "recvmsg", "sendmsg", "recvfrom", "sendto", "accept", "accept4", "getsockname", "getsockopt", "setsockopt",
    "fcntl", "fsync", "fdatasync", "ftruncate", "fallocate", "sync_file_range", "fstatfs", "seccomp",
    "landlock_create_ruleset", "landlock_restrict_self",
)  # fmt: skip
_PATHS = (
    "openat", "newfstatat", "statx", "stat", "lstat", "getdents64", "unlinkat", "unlink", "renameat", "renameat2",
    "rename", "mkdir", "mkdirat", "rmdir",
)  # fmt: skip
# For a vCPU thread that speaks to a vhost-user back end over a socket that is open.
_SOCKETS = ("sendto", "sendmsg", "recvfrom", "recvmsg")
_FIONBIO, _FIOCLEX = 0x5421, 0x5451
_PRCTL = _one_of(0, 15, 22, 38)  # SET_NAME; SET_SECCOMP and SET_NO_NEW_PRIVS, which only take away


def _blk(pid: int) -> dict[str, Conditions]:
    return {
        "ioctl": _ioctls(_USERFAULTFD, requests=(*_BLOCK, _FIONBIO, _FIOCLEX)),
        **dict.fromkeys(_RUNTIME + _BLK, _FREELY),
        "newfstatat": [[Arg(3, _AT_EMPTY_PATH, _AT_EMPTY_PATH)]],
        "mmap": _NOT_EXECUTABLE,
        "mprotect": _NOT_EXECUTABLE,
        "clone": [[Arg(0, _CLONE_THREAD, _CLONE_THREAD)]],
        "tgkill": [[Arg(0, pid, _LOW)]],
        "prctl": _PRCTL,
        "prlimit64": [[Arg(0, 0, _LOW), Arg(2, 0)]],
    }


def allowed(
    role: str,
    pid: int,
    *,
    paths: bool = False,
    remove: bool = False,
    unix_connect: bool = False,
    sockets: bool = False,
    forks: bool = False,
) -> dict[int, Sequence[Sequence[Arg]]]:
    """The list of `role` ("vcpu", "io", "main" or "blk") for the process `pid`: number -> alternatives of conditions.

    `paths`: Landlock lets some directory through, so opening must be possible. `remove`: it lets files be removed
    somewhere. `unix_connect`: a vsock device connects to Unix sockets on the host. `sockets`: vCPU threads use
    sockets that are open. `forks`: a migration forks senders, as the C library's fork(3) does it, and ends them.
    """
    vcpu = role == "vcpu"
    if role == "blk":
        return {NR[name]: conditions for name, conditions in _blk(pid).items()}
    calls: dict[str, Conditions] = {
        "ioctl": _ioctls(_VHOST, requests=_VCPU_KVM + _VCPU_STATE + _TUN + ((_FIONBIO,) if sockets else ()))
        if vcpu
        else _ioctls(_KVM, _VHOST, _USERFAULTFD, requests=_TTY + _TUN + _BLOCK),
        **dict.fromkeys(_RUNTIME, _FREELY),
        "mmap": _NOT_EXECUTABLE,
        "mprotect": _NOT_EXECUTABLE,
        "tgkill": [[Arg(0, pid, _LOW)]],  # kicks of vCPU threads; never another process
        "prctl": _PRCTL,
        "prlimit64": [[Arg(0, 0, _LOW), Arg(2, 0)]],  # its own limits, read only: abort and sysconf ask
    }
    if sockets:
        calls |= dict.fromkeys(_SOCKETS, _FREELY)
    if not vcpu:
        calls |= dict.fromkeys(_MAIN, _FREELY)
        if remove:
            calls["unlink"] = _FREELY
        # How the C library does fstat(2). A path beside the flag would be looked at: its size and owner, no more.
        calls["newfstatat"] = [[Arg(3, _AT_EMPTY_PATH, _AT_EMPTY_PATH)]]
        calls["clone"] = [[Arg(0, _CLONE_THREAD, _CLONE_THREAD)]]  # threads, no processes
        if forks:
            calls["clone"] = [*calls["clone"], [Arg(0, _FORK, _LOW)]]
            calls |= dict.fromkeys(("socketpair", "pidfd_open", "pidfd_send_signal"), _FREELY)
            calls["prctl"] = [*_PRCTL, *_one_of(0, 1)]  # SET_PDEATHSIG: a sender ends with the machine
        if paths:
            calls |= dict.fromkeys(_PATHS, _FREELY)
        if unix_connect:
            calls["socket"] = _one_of(0, _AF_UNIX)
            calls["connect"] = _FREELY
    return {NR[name]: conditions for name, conditions in calls.items()}


def program(
    role: str,
    pid: int,
    otherwise: int,
    *,
    paths: bool = False,
    remove: bool = False,
    unix_connect: bool = False,
    sockets: bool = False,
    forks: bool = False,
) -> list[Instruction]:
    """The filter of a role. clone3 answers ENOSYS, so that the C library uses clone, whose flags can be seen."""
    list_of_calls = allowed(
        role, pid, paths=paths, remove=remove, unix_connect=unix_connect, sockets=sockets, forks=forks
    )
    return assemble(list_of_calls, otherwise, () if role == "vcpu" else (NR["clone3"],))
