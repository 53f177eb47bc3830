"""A process with everything imported that a machine's start needs, of which machines are forks.

    manager                          zygote                         machine
    one datagram: JSON + SCM_RIGHTS  ->  fork
                                                                    places the descriptors, takes its own name
            <- one datagram: JSON + SCM_RIGHTS: the machine's pidfd -
                                                                    main(argv)

The answer comes from the machine itself, so that it is never about a process that has ended and been reaped. One
request is under way at a time. The zygote ends when its socket does; its machines, each in a session of its own, do not
care. A machine has nothing of another's: the zygote closes what it received as soon as it has forked, and a fork closes
all that it was not told to keep.

What a fork lacks beside a fresh process: a memory layout of its own (all machines of one zygote have their code and
heap at the same addresses) and an own seed for Python's hashes of strings, which no guest sees.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys

from kvik.vmm import process_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["MAX_DESCRIPTORS", "MAX_REQUEST", "Request", "serve"]

MAX_REQUEST = 128 << 10  # bytes
MAX_DESCRIPTORS = 253  # SCM_MAX_FD, unix(7)
MAX_NUMBER = 1 << 16

# What a machine's start imports, besides the modules of `kvik.vmm.build`.
MODULES = (
    *("build", "options", "parts", "sandbox", "monitor.server", "virtio.transport", "virtio.console"),
    *("virtio.blk", "virtio.net", "virtio.rng", "virtio.balloon", "virtio.vsock", "devices.serial", "cpu.state"),
    *("backends.char", "backends.block", "backends.io_uring", "backends.tap", "backends.netsocket", "nets"),
)


class Request:
    """`argv` with the program's name first; `numbers[i]` is the number that descriptor i of the message is to have."""

    __slots__ = ("argv", "directory", "environment", "numbers")

    def __init__(self, argv: list[str], environment: dict[str, str], numbers: list[int], directory: str = "/") -> None:
        self.argv, self.environment, self.numbers, self.directory = argv, environment, numbers, directory

    def encode(self) -> bytes:
        """Raises ValueError if it is more than a message holds."""
        fields = {"argv": self.argv, "env": self.environment, "fds": self.numbers, "cwd": self.directory}
        data = json.dumps(fields).encode("ascii")
        if len(data) > MAX_REQUEST or len(self.numbers) > MAX_DESCRIPTORS:
            raise ValueError("the request is too long for a zygote")
        return data

    @classmethod
    def decode(cls, data: bytes, descriptors: int) -> Request:
        """Raises ValueError for anything that `encode` does not make of a request with so many descriptors."""
        try:
            fields = json.loads(data)
        except RecursionError:
            raise ValueError("the request is nested too deeply") from None
        if not isinstance(fields, dict) or fields.keys() != {"argv", "env", "fds", "cwd"}:
            raise ValueError("the request has not the fields of one")
        argv, environment, numbers, directory = fields["argv"], fields["env"], fields["fds"], fields["cwd"]
        if not _texts(argv) or not argv:
            raise ValueError("its argv is no list of words")
        if not isinstance(environment, dict) or not _texts([*environment, *environment.values()]):
            raise ValueError("its environment is none")
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < MAX_NUMBER for n in numbers):
            raise ValueError("its descriptors' numbers are none")
        if len(numbers) != descriptors or len(set(numbers)) != descriptors:
            raise ValueError(f"{len(numbers)} numbers do not name {descriptors} descriptors")
        if not _texts([directory]) or not directory.startswith("/"):
            raise ValueError("its directory is no absolute path")
        return cls(argv, environment, numbers, directory)


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and "\0" not in value for value in values)


def serve(channel: socket.socket) -> Request | None:
    """Fork for each request until the other end closes. Returns in the forks, with their request; None in the zygote,
    at its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: whoever cares has the pidfd
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # so that no collection in a fork writes to the pages that all share
    while True:
        data, fds, flags, _ = socket.recv_fds(channel, MAX_REQUEST + 1, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return None
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError("the request was cut off")
            request = Request.decode(data, len(fds))
            if os.fork() == 0:
                _become(request, fds, channel)
                return request
        except (ValueError, OSError) as error:
            channel.send(json.dumps({"error": str(error)[:500]}).encode("ascii"))
        finally:
            for fd in fds:
                os.close(fd)


def _become(request: Request, fds: list[int], channel: socket.socket) -> None:
    """In the fork: a process as `exec` would have made it. Empties `fds`. Does not return when it cannot."""
    try:
        os.setsid()
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        channel = _place(request.numbers, fds, channel)
        os.chdir(request.directory)
        os.environ.clear()
        os.environ.update(request.environment)
        process_image.rename("kvik-vmm", request.argv, request.environment)
        if "random" in sys.modules:
            sys.modules["random"].seed()
        sys.argv = request.argv
        pidfd = os.pidfd_open(os.getpid())
        socket.send_fds(channel, [json.dumps({"pid": os.getpid()}).encode("ascii")], [pidfd])
        os.close(pidfd)
        channel.close()
    except BaseException as error:
        try:
            channel.send(json.dumps({"error": str(error)[:500]}).encode("ascii"))
        finally:
            os._exit(1)


def _place(numbers: list[int], fds: list[int], channel: socket.socket) -> socket.socket:
    """Put each descriptor under its number and close all others but the channel, which comes to lie above them."""
    import fcntl

    above = max([2, *numbers, *fds, channel.fileno()]) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in fds]
    fds.clear()
    for number, fd in zip(numbers, moved, strict=True):
        os.dup2(fd, number, inheritable=True)
    last = fcntl.fcntl(channel.fileno(), fcntl.F_DUPFD_CLOEXEC, max([above, *moved]) + 1)
    channel.detach()
    kept = sorted({0, 1, 2, *numbers, last})
    for low, high in zip(kept, [*kept[1:], MAX_NUMBER * 2], strict=True):
        if low + 1 < high:  # an empty range means all from there on to CPython 3.11
            os.closerange(low + 1, high)
    return socket.socket(fileno=last)


def main(fd: int) -> Request | None:
    """Be a zygote on socket `fd` (AF_UNIX, SOCK_SEQPACKET), as `serve`."""
    import importlib

    for name in MODULES:
        importlib.import_module(f"kvik.vmm.{name}")
    process_image.prepare()
    process_image.rename("kvik-zygote", ["kvik-zygote"], dict(os.environ))
    return serve(socket.socket(fileno=fd))
