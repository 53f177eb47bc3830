"""Descriptors that a client sends with SCM_RIGHTS: named ones (getfd) and sets (add-fd), as QEMU has them.

Reference: QEMU's qapi/misc.json, monitor/fds.c.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.schema import ID, NOTHING, Int, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_NAMED = 256
MAX_SETS = 1024
MAX_IN_SET = 64
_PREFIX = "/dev/fdset/"


def take_named(named: dict[str, int], *names: str) -> list[int]:
    """Those descriptors that came by getfd: the caller's from now on. Raises `QmpError`, and then all stay."""
    for name in names:
        if name not in named:
            raise QmpError(f"File descriptor named '{name}' not found")
    return [named.pop(name) for name in names]


class FdSets:
    """The sets of one machine: shared by its monitors, closed with it."""

    def __init__(self) -> None:
        self._sets: dict[int, list[tuple[int, str]]] = {}  # set -> (descriptor, what the client called it)

    def add(self, fd: int, number: int | None, opaque: str) -> int:
        """Takes over `fd`; the set's number. Raises `QmpError`, and then `fd` is still the caller's."""
        if number is None:
            number = next(free for free in range(len(self._sets) + 1) if free not in self._sets)
        members = self._sets.get(number, [])
        if len(self._sets) >= MAX_SETS or len(members) >= MAX_IN_SET:
            raise QmpError("Too many file descriptors are held already")
        self._sets.setdefault(number, members).append((fd, opaque))
        return number

    def remove(self, number: int, fd: int | None) -> None:
        members = self._sets.get(number, [])
        leaving = [item for item in members if fd is None or item[0] == fd]
        if not leaving:
            name = f"fdset-id:{number}" + (f", fd:{fd}" if fd is not None else "")
            raise QmpError(f"File descriptor named '{name}' not found")
        for item in leaving:
            members.remove(item)
            os.close(item[0])
        if not members:
            del self._sets[number]

    def open(self, path: str, flags: int) -> int:
        """A descriptor of the caller's own for `path`, which may be /dev/fdset/N: then a duplicate of the member with
        the same access mode (os.O_ACCMODE). Raises `QmpError`, OSError."""
        import fcntl

        if not path.startswith(_PREFIX):
            return os.open(path, flags | os.O_CLOEXEC)
        number = path.removeprefix(_PREFIX)
        for fd, _ in self._sets.get(int(number), []) if number.isdecimal() and len(number) < 12 else []:
            mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            if mode == flags & os.O_ACCMODE:
                return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        raise QmpError(f"Could not open '{path}': no descriptor of that set has the right access mode")

    def listed(self) -> list[dict[str, Any]]:
        def told(fd: int, opaque: str) -> dict[str, Any]:
            return {"fd": fd} | ({"opaque": opaque} if opaque else {})

        return [{"fdset-id": number, "fds": [told(*item) for item in held]} for number, held in self._sets.items()]

    def close(self) -> None:
        for members in self._sets.values():
            for fd, _ in members:
                os.close(fd)
        self._sets.clear()


def _received(context: Context) -> int:
    fd = context.session.take_fd()
    if fd is None:
        raise QmpError("No file descriptor supplied via SCM_RIGHTS")
    return fd


def _getfd(context: Context, arguments: Arguments) -> None:
    fd = _received(context)
    name = arguments["fdname"]
    named = context.server.named_fds
    if not name or name[0].isdigit() or (len(named) >= MAX_NAMED and name not in named):
        os.close(fd)
        if len(named) >= MAX_NAMED:
            raise QmpError("Too many file descriptors are held already")
        raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
    old = named.pop(name, None)
    if old is not None:
        os.close(old)
    named[name] = fd


def _closefd(context: Context, arguments: Arguments) -> None:
    fd = context.server.named_fds.pop(arguments["fdname"], None)
    if fd is None:
        raise QmpError(f"File descriptor named '{arguments['fdname']}' not found")
    os.close(fd)


def _add_fd(context: Context, arguments: Arguments) -> dict[str, int]:
    fd = _received(context)
    try:
        number = context.fdsets.add(fd, arguments.get("fdset-id"), arguments.get("opaque", ""))
    except QmpError:
        os.close(fd)
        raise
    return {"fdset-id": number, "fd": fd}


def _remove_fd(context: Context, arguments: Arguments) -> None:
    context.fdsets.remove(arguments["fdset-id"], arguments.get("fd"))


def _query_fdsets(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    return context.fdsets.listed()


_SET = Int(0, 2**31 - 1)

COMMANDS: Sequence[Command] = (
    Command("getfd", _getfd, Struct({"fdname": ID}), NOTHING, summary="keep the descriptor sent along, by name"),
    Command("closefd", _closefd, Struct({"fdname": ID}), NOTHING, summary="close a named descriptor"),
    Command(
        "add-fd",
        _add_fd,
        Struct({"*fdset-id": _SET, "*opaque": ID}),
        Struct({"fdset-id": Int(), "fd": Int()}),
        summary="put the descriptor sent along into a set, to be opened as /dev/fdset/N",
    ),
    Command(
        "remove-fd", _remove_fd, Struct({"fdset-id": _SET, "*fd": _SET}), NOTHING, summary="close members of a set"
    ),
    Command("query-fdsets", _query_fdsets, summary="the sets and what the client called their members"),
)
