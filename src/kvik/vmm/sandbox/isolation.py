"""What a program that only turns one open file into another is denied beside paths: a network, sockets, other
processes, the kernel's odd corners, and more processor time, memory and disk than it was given.

For programs of others, which cannot confine themselves: the filter is on before they are executed, so it names what is
refused (ENOSYS) and lets the rest pass. Landlock, which comes with it, says what may be opened and executed.
"""

from __future__ import annotations

import ctypes
import os
import resource

from kvik.vmm.sandbox import seccomp

__all__ = ["LIMITS", "REFUSED", "isolate", "leave_namespaces"]

LIMITS = {"cpu": resource.RLIMIT_CPU, "memory": resource.RLIMIT_AS, "size": resource.RLIMIT_FSIZE}

_NEWUTS, _NEWIPC, _NEWUSER, _NEWNET = 0x04000000, 0x08000000, 0x10000000, 0x40000000  # linux/sched.h

# x86-64 numbers (asm/unistd_64.h).
REFUSED = {
    "socket": 41, "connect": 42, "bind": 49, "listen": 50, "socketpair": 53, "truncate": 76, "rename": 82, "mkdir": 83,
    "rmdir": 84, "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93,
    "lchown": 94, "ptrace": 101, "mknod": 133, "pivot_root": 155, "chroot": 161, "mount": 165, "umount2": 166,
    "init_module": 175, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "kexec_load": 246, "add_key": 248,
    "request_key": 249, "keyctl": 250, "mkdirat": 258, "mknodat": 259, "fchownat": 260, "unlinkat": 263,
    "renameat": 264, "linkat": 265, "symlinkat": 266, "fchmodat": 268, "unshare": 272, "perf_event_open": 298,
    "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313,
    "renameat2": 316, "bpf": 321, "userfaultfd": 323, "pidfd_send_signal": 424, "io_uring_setup": 425,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438,
    "fchmodat2": 452,
}  # fmt: skip


def isolate(limits: dict[str, int]) -> None:
    """This process, for good. `limits`: seconds of processor time, bytes of address space, bytes of any file that it
    writes. Needs no_new_privs for the filter. Raises OSError.
    """
    for name, value in limits.items():
        _, hard = resource.getrlimit(LIMITS[name])
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(LIMITS[name], (value, value))
    if os.uname().machine == "x86_64":
        seccomp.load(seccomp.pack(seccomp.assemble({}, seccomp.ALLOW, REFUSED.values())))


def leave_namespaces() -> None:
    """Into namespaces of its own, with no network; before anything else is given up. Where the host has none for its
    users, the filter alone refuses sockets."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    flags = _NEWNET | _NEWIPC | _NEWUTS
    if libc.unshare(flags if user == 0 else flags | _NEWUSER) < 0 or user == 0:
        return
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 - this program imports next to nothing
            file.write(text)
