"""Landlock: from now on this thread, and those it starts, open no path and no TCP port (userspace-api/landlock.rst).

What is already open stays usable. The rule set names every right the kernel's ABI knows and allows none of them, save
below directories that the caller lists. No right can be had back.
"""

from __future__ import annotations

import ctypes
import os
import struct

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

# Rights by the ABI that brought them; LANDLOCK_ACCESS_FS_*. 1 (Linux 5.13): EXECUTE .. MAKE_SYM, bits 0 to 12.
_FS_BITS = {1: 13, 2: 14, 3: 15, 5: 16}  # 2: REFER, 3: TRUNCATE, 5: IOCTL_DEV
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE, IOCTL_DEV = (
    1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 14, 1 << 15,
)  # fmt: skip
_READ = READ_FILE | READ_DIR
_WRITE = _READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | TRUNCATE
_NET = 0b11  # ABI 4: BIND_TCP, CONNECT_TCP
_SCOPE = 0b11  # ABI 6: ABSTRACT_UNIX_SOCKET, SIGNAL

_ATTRIBUTES = struct.Struct("=QQQ")  # struct landlock_ruleset_attr
_PATH_BENEATH = struct.Struct("=Qi")  # struct landlock_path_beneath_attr, packed

_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    result: int = _libc.syscall(
        ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    )
    return result


def abi() -> int:
    """The kernel's Landlock ABI, from 1 on; 0 where it is absent or not enabled at boot."""
    return max(0, _syscall(_LANDLOCK_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION))


def handled(version: int) -> tuple[int, int, int]:
    """Rights on files, on TCP, and scopes that ABI `version` can take away."""
    files = (1 << max((bits for since, bits in _FS_BITS.items() if since <= version), default=0)) - 1
    return files, _NET if version >= 4 else 0, _SCOPE if version >= 6 else 0


def restrict(
    readable: tuple[str, ...] = (),
    writable: tuple[str, ...] = (),
    removable: tuple[str, ...] = (),
    *,
    programs: tuple[str, ...] = (),
    files: dict[int, bool] | None = None,
) -> int:
    """Take every right from this thread and those it will start; the ABI used, 0 if the kernel has none.

    Below the directories of `readable` files can be read, below those of `writable` also made, written and removed; in
    those of `removable` files can be removed; what lies below `programs` can also be executed. `files`: single open
    files that may be opened anew (through /proc/self/fd), true for writing as well. Needs no_new_privs. Raises OSError.
    """
    version = abi()
    if not version:
        return 0
    handles, net, scope = handled(version)
    attributes = _ATTRIBUTES.pack(handles, net, scope)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _syscall(_LANDLOCK_CREATE_RULESET, attributes, size, 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), f"landlock_create_ruleset: {os.strerror(ctypes.get_errno())}")
    try:
        granted = ((readable, _READ), (writable, _WRITE), (removable, REMOVE_FILE), (programs, _READ | EXECUTE))
        for paths, rights in granted:
            for path in paths:
                _allow(ruleset, path, rights & handles)
        for fd, write in (files or {}).items():
            _rule(
                ruleset, fd, (READ_FILE | ((WRITE_FILE | TRUNCATE | IOCTL_DEV) if write else IOCTL_DEV)) & handles, ""
            )
        if _syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) < 0:
            raise OSError(ctypes.get_errno(), f"landlock_restrict_self: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(ruleset)
    return version


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _rule(ruleset, fd, rights, path)
    finally:
        os.close(fd)


def _rule(ruleset: int, fd: int, rights: int, name: str) -> None:
    if _syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, _PATH_BENEATH.pack(rights, fd), 0) < 0:
        why = os.strerror(ctypes.get_errno())
        raise OSError(ctypes.get_errno(), f"landlock_add_rule {name or f'descriptor {fd}'}: {why}")
