"""A process with everything imported that a machine's start needs, of which machines are forks.

    keeper                        zygote                    machine
        <- it can fork ----------
    request, descriptors  ------>  fork
                                                            places the descriptors, takes its own name
        <------------------------- pid and pidfd ----------
                                                            main(argv)

What is said is in `host/zygote_wire.py`; the keeper is the daemon (`host/zygote.py`). The answer comes from the machine
itself, so that it is never about a process that has ended and been reaped; a machine that cannot give it ends, so that
none runs that nobody knows. One request is under way at a time. The zygote ends when its socket does; its machines,
each in a session of its own, do not care. A machine has nothing of another's: the zygote closes what it received as
soon as it has forked, and a fork closes all that it was not told to keep.

No byte of a guest's reaches the zygote: it hears its keeper only. It has no right that it would lend to its forks but
those of any child of the keeper, and no program that it runs gains one (no_new_privs). Each fork confines itself.

What a fork lacks beside a fresh process: a memory layout of its own (all machines of one zygote have their code and
heap at the same addresses) and an own seed for Python's hashes of strings, which no guest sees.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys

from kvik.host.zygote_wire import MAX_DESCRIPTORS, MAX_NUMBER, MAX_REQUEST, PROTOCOL, Request, answer
from kvik.vmm import process_image
from kvik.vmm.main import Prepared

__all__ = ["Fork", "main", "serve"]

# What a machine's start imports, besides the modules of `kvik.vmm.build`.
MODULES = (
    *("build", "options", "parts", "sandbox", "monitor.server", "virtio.transport", "virtio.console"),
    *("virtio.blk", "virtio.net", "virtio.rng", "virtio.balloon", "virtio.vsock", "devices.serial", "cpu.state"),
    *("backends.char", "backends.block", "backends.io_uring", "backends.tap", "backends.netsocket", "nets"),
)


class Fork:
    """`serve` returns it in a fork, whose command line is in `sys.argv`; `prepared`: what it says, if it is right."""

    __slots__ = ("prepared",)

    def __init__(self, prepared: Prepared | None) -> None:
        self.prepared = prepared


def _prepare(words: list[str]) -> Prepared | None:
    """What can be worked out once is not worked out in the fork, where each page that this writes is one more."""
    try:
        return Prepared.parse(words)
    except Exception:
        return None  # the fork finds the same, and tells its user


def serve(channel: socket.socket) -> Fork | None:
    """Fork for each request until the other end closes. Returns in the forks; None in the zygote, at its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: whoever cares has the pidfd
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # so that no collection in a fork writes to the pages that all share
    process_image.trim_heap()
    while True:
        data, fds, flags, _ = socket.recv_fds(channel, MAX_REQUEST + 1, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return None
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError("the request was cut off")
            request = Request.decode(data, len(fds))
            prepared = _prepare(request.argv[1:])
            if os.fork() == 0:
                _become(request, fds, channel)
                return Fork(prepared)
        except (ValueError, OSError) as error:
            if not _tell(channel, answer(error=str(error)[:500])):
                return None
        finally:
            for fd in fds:
                os.close(fd)


def _tell(channel: socket.socket, message: bytes) -> bool:
    """False when nobody is there any more."""
    try:
        channel.send(message)
    except OSError:
        return False
    return True


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
        socket.send_fds(channel, [answer(pid=os.getpid())], [pidfd])
        os.close(pidfd)
        channel.close()
    except BaseException as error:
        _tell(channel, answer(error=str(error)[:500]))
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


def main(fd: int) -> Fork | None:
    """Be a zygote on socket `fd` (AF_UNIX, SOCK_SEQPACKET), as `serve`."""
    from kvik.vmm.sandbox.privileges import no_new_privileges

    no_new_privileges()
    from kvik.vmm.confinement import LATE, LATE_CONTROL, OVERLAYS, import_all
    from kvik.vmm.rehearsal import rehearse

    import_all([*(f"kvik.vmm.{name}" for name in MODULES), *LATE, *LATE_CONTROL, *OVERLAYS])
    rehearse()
    process_image.prepare()
    renames = process_image.rename("kvik-zygote", ["kvik-zygote"], dict(os.environ))
    os.environ.clear()  # each fork gets its own
    channel = socket.socket(fileno=fd)
    if not _tell(channel, answer(zygote=PROTOCOL, renames=renames)):
        return None
    return serve(channel)
