"""What the switch gives up before it reads the first frame: it runs no program, writes no file, touches no process.

It reads what strangers send, so a flaw in it must not become theirs. It needs its sockets, and to read resolv.conf and
modules of its own: everything else a user may do is refused with EPERM (seccomp(2)). On other machines than x86-64 only
new privileges are given up.
"""

from __future__ import annotations

import ctypes
import os
import struct

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_MODE_FILTER = 2
_ARCH_X86_64 = 0xC000003E
_X32 = 0x4000_0000
_ALLOW, _EPERM = 0x7FFF_0000, 0x0005_0001

# x86-64 numbers (asm/unistd_64.h).
_REFUSED = {
    "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "truncate": 76, "ftruncate": 77, "rename": 82,
    "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "fchmod": 91,
    "chown": 92, "fchown": 93, "lchown": 94, "ptrace": 101, "mknod": 133, "pivot_root": 155, "chroot": 161,
    "mount": 165, "umount2": 166, "init_module": 175, "setxattr": 188, "tkill": 200, "tgkill": 234, "kexec_load": 246,
    "add_key": 248, "request_key": 249, "keyctl": 250, "mkdirat": 258, "mknodat": 259, "fchownat": 260,
    "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "fchmodat": 268, "unshare": 272,
    "perf_event_open": 298, "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
    "finit_module": 313, "renameat2": 316, "bpf": 321, "execveat": 322, "userfaultfd": 323, "pidfd_send_signal": 424,
    "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "pidfd_open": 434, "clone3": 435,
    "openat2": 437, "pidfd_getfd": 438,
}  # fmt: skip
_OPENS = {2: 1, 257: 2}  # open, openat: which argument holds the flags
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # linux/bpf_common.h


def program() -> bytes:
    """The filter as classic BPF: struct sock_filter's code, two jumps, operand."""
    # Jumps are relative to the next step; -1 stands for "refuse", None for "allow".
    calls = sorted(_REFUSED.values())
    opens = [
        ((_EQUAL, 0, 3, number), (_LOAD, 0, 0, 16 + 8 * argument), (_AND, 0, 0, _WRITES), (_EQUAL, None, -1, 0))
        for number, argument in _OPENS.items()
    ]
    steps: list[tuple[int, int | None, int, int]] = [
        (_LOAD, 0, 0, 4), (_EQUAL, 0, -1, _ARCH_X86_64), (_LOAD, 0, 0, 0), (_AT_LEAST, -1, 0, _X32),
        *((_EQUAL, -1, 0, number) for number in calls),
        *(step for group in opens for step in group),
        (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM),
    ]  # fmt: skip
    refuse, allow = len(steps) - 1, len(steps) - 2
    packed = []
    for place, (code, yes, no, operand) in enumerate(steps):
        jumps = [allow if jump is None else refuse if jump == -1 else place + 1 + jump for jump in (yes, no)]
        packed.append(struct.pack("=HBBI", code, *(jump - place - 1 for jump in jumps), operand))
    return b"".join(packed)


def confine() -> bool:
    """For good. Whether the filter is in place; OSError if the kernel refuses what it should not."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(option: int, first: int, second: object = None) -> None:
        if libc.prctl(ctypes.c_int(option), ctypes.c_ulong(first), second, ctypes.c_ulong(0), ctypes.c_ulong(0)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    prctl(_PR_SET_NO_NEW_PRIVS, 1, ctypes.c_ulong(0))
    if os.uname().machine != "x86_64":
        return False
    code = program()
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)))
    prctl(_PR_SET_SECCOMP, _MODE_FILTER, fprog)
    return True
