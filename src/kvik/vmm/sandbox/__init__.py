"""The machine's process confines itself before it looks at anything the guest made.

    sandbox.close_stray(keep)            # first of all: descriptors that the caller leaked
    ...                                  # open everything, import everything
    sandbox.enter("main", policy)        # main thread: limits, capabilities, Landlock, seccomp
    sandbox.enter("vcpu", policy)        # first thing in each vCPU thread: the narrower list
    sandbox.enter("io", policy)          # first thing in each I/O thread: the main thread's list
    sandbox.enter("blk", policy)         # kvik-blk, which serves one disk's images to a VMM

Landlock, capabilities and seccomp belong to a thread and pass on to threads it starts later. So a vCPU thread may be
started before the main thread has imported its control plane: it confines itself, and the main thread enters before it
runs its loop, which is the first time that it handles a guest's request. After that no import works: preload.
"""

from __future__ import annotations

import os
import sys

from kvik.vmm.sandbox import landlock, privileges, seccomp
from kvik.vmm.sandbox.policy import program
from kvik.vmm.sandbox.privileges import close_stray

__all__ = ["Policy", "assemble", "close_stray", "enter", "preload"]

# What the standard library imports inside functions that a running machine calls; an import cannot be done inside.
_LATE = ("encodings.ascii", "encodings.latin_1", "traceback", "linecache")


class Policy:
    """`action`: what a forbidden call meets: "kill" (the process ends), "errno" (EPERM), "log" (audit log only).

    `readable`, `writable`: directories that stay open to it, none by default. `removable`: directories where files may
    be removed and nothing else (sockets that the machine made), if the kernel has Landlock. `unix_connect`: connecting
    to Unix sockets stays possible, which a vsock device with guest-initiated connections needs. `sockets`: vCPU
    threads speak over sockets that are open (vhost-user). `forks`: the main thread may fork, and end what it forked; a
    child can do no more than it, and no program can be run. `descriptors`: their bound.
    """

    __slots__ = ("action", "descriptors", "forks", "readable", "removable", "sockets", "unix_connect", "writable")

    def __init__(
        self,
        action: str = "errno",
        *,
        readable: tuple[str, ...] = (),
        writable: tuple[str, ...] = (),
        removable: tuple[str, ...] = (),
        unix_connect: bool = False,
        sockets: bool = False,
        forks: bool = False,
        descriptors: int = 4096,
    ) -> None:
        if action not in seccomp.ACTIONS:
            raise ValueError(f"sandbox action {action!r}: one of {', '.join(seccomp.ACTIONS)}")
        self.action = action
        self.readable = readable
        self.writable = writable
        self.removable = removable
        self.unix_connect = unix_connect
        self.sockets = sockets
        self.forks = forks
        self.descriptors = descriptors


def preload() -> None:
    """Import what would otherwise be imported on first use, and load what the C library would: a thread that ends calls
    pthread_exit, which opens libgcc_s, and aborts the process where it cannot."""
    import ctypes

    for name in _LATE:
        if name not in sys.modules:
            __import__(name)
    try:
        ctypes.CDLL("libgcc_s.so.1")
    except OSError:
        pass  # another C library than GNU's


# Filters as the kernel takes them, by what they depend on: one for all vCPUs, and those of a zygote for its forks. Made
# for the process id `_SELF`, which none has, and which stands in one place.
_filters: dict[tuple[object, ...], bytes] = {}
_SELF = 0x7FFF_FFFE


def assemble(role: str, policy: Policy) -> bytes:
    """The filter of this process's threads of that role."""
    key = (
        role,
        seccomp.ACTIONS[policy.action],
        bool(policy.readable or policy.writable),
        bool(policy.removable) and landlock.abi() > 0,
        policy.unix_connect,
        policy.sockets,
        policy.forks,
    )
    if key not in _filters:
        _, action, paths, remove, unix_connect, sockets, forks = key
        _filters[key] = seccomp.pack(
            program(
                role,
                _SELF,
                action,
                paths=paths,
                remove=remove,
                unix_connect=unix_connect,
                sockets=sockets,
                forks=forks,
            )
        )
    before, after = _filters[key].split(_SELF.to_bytes(4, "little"))
    return before + os.getpid().to_bytes(4, "little") + after


def enter(role: str, policy: Policy, *, inherited: bool = False) -> dict[str, int | str]:
    """Confine the calling thread, for good; the roles "main" and "blk" also bound the whole process. Says what is in
    force. `inherited`: the thread was started by a confined one, and needs only a narrower list of calls.

    Threads started before are not touched: each enters by itself. Raises OSError when the kernel refuses a part; a
    kernel without Landlock is no error but told ("landlock": 0), since seccomp forbids opening as well.
    """
    if role not in ("main", "io", "vcpu", "blk"):
        raise ValueError(f"sandbox role {role!r}: main, io, vcpu or blk")
    if role in ("main", "blk"):
        preload()
        privileges.limit(policy.descriptors)
    code = assemble(role, policy)
    if not inherited:
        privileges.no_new_privileges()
    version = 0
    if policy.action != "log" and not inherited:  # neither of these can tell without forbidding
        version = landlock.restrict(policy.readable, policy.writable, policy.removable)
        privileges.drop_capabilities()
    seccomp.load(code)
    return {
        "role": role,
        "landlock": version,
        "seccomp": policy.action,
        "instructions": len(code) // seccomp.INSTRUCTION_SIZE,
    }
