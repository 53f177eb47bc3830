"""Network namespaces: made, entered by a thread of their own, gone with their last descriptor (network_namespaces(7)).

    with Namespace() as world:
        link = world.run(lambda: add_a_link())

A thread that entered another namespace is never given back: it ends with its work, so no other code can find itself
in the wrong network. What is bound to the namespace of the thread that made it (a `Netlink`, an `Nftables`, any
socket) stays there and may be used from any thread.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from kvik.errors import HostError

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


def _check(action: str, result: int) -> None:
    if result:
        number = ctypes.get_errno()
        remedy = "run as root, or with CAP_SYS_ADMIN" if number == 1 else ""
        raise HostError(f"cannot {action}: {os.strerror(number)}", errno=number, remedy=remedy)


def _in_thread(work: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name="netns", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def run_in_namespace(namespace: int, work: Callable[[], T]) -> T:
    """Call `work` in the network namespace of a descriptor, on a thread of its own; its result, or what it raised."""

    def body() -> T:
        _check("enter the network namespace", _libc.setns(namespace, _CLONE_NEWNET))
        return work()

    return _in_thread(body)


def open_namespace(pid: int = 0) -> int:
    """A descriptor of the network namespace of a process, or of the calling thread; the caller closes it."""
    path = f"/proc/{pid}/ns/net" if pid else "/proc/thread-self/ns/net"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open {path}: {error.strerror}", errno=error.errno or 0) from error


def identity() -> tuple[int, int]:
    """What tells the calling thread's network namespace from all others (device and inode, namespaces(7))."""
    found = os.stat("/proc/thread-self/ns/net")  # noqa: PTH116  a path of the kernel's
    return found.st_dev, found.st_ino


class Namespace:
    """A network namespace without a name: it lives as long as its descriptor, and as what runs or lies in it."""

    def __init__(self) -> None:
        def make() -> int:
            _check("make a network namespace", _libc.unshare(_CLONE_NEWNET))
            return open_namespace()

        self.fd = _in_thread(make)

    def run(self, work: Callable[[], T]) -> T:
        """Call `work` in it, on a thread of its own; its result, or what it raised."""
        return run_in_namespace(self.fd, work)

    def close(self) -> None:
        """Close the descriptor. Virtual interfaces inside are deleted by the kernel once nothing else holds it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
