"""<lease>: a lock that a machine must hold while it runs, on this host or on any that shares the file.

    <lease><lockspace>shop</lockspace><key>db</key><target path='/shared/leases' offset='1048576'/></lease>

The lock is an open file description lock (fcntl(2), F_OFD_SETLK) on the byte at `offset`; the VMM inherits the
descriptor, so the lock outlives the daemon and ends with the VMM, however that ends. NFS carries such locks between
hosts. The block at `offset` says who holds it, for messages only. Where sanlock made leases they are its own
(`sanlock.py`). https://libvirt.org/formatdomain.html#device-leases
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from kvik.conf.devices.other import Lease
from kvik.errors import ConfigError, HostError, ResourceBusy
from kvik.host.files import host_error
from kvik.host.reach import about, closer, obtain

__all__ = ["LEASE_PREFIX", "open_leases", "take_leases"]

LEASE_PREFIX = "lease:"
BLOCK = 512  # bytes of the record; leases in one file lie at least so far apart
_MARK = b"kvik lease 1\n"
_FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid


def open_leases(leases: Iterable[Lease], machine: str, uuid: str, held: ExitStack) -> dict[str, int]:
    """Take all of a machine's leases, or none. Descriptors by the names under which a VMM inherits them; they are the
    caller's until `held` is closed. Raises `ResourceBusy` that names the holder, `ConfigError`, `HostError`. Blocks.
    """
    return {f"{LEASE_PREFIX}{number}": _take(lease, machine, uuid, held) for number, lease in enumerate(leases)}


async def take_leases(leases: Sequence[Lease], machine: str, uuid: str, held: ExitStack) -> dict[str, int]:
    """`open_leases` beside the event loop; on an error none is held."""
    own = ExitStack()

    def take() -> dict[str, int]:
        with ExitStack() as taken:
            found = open_leases(leases, machine, uuid, taken)
            own.push(taken.pop_all())
        return found

    found = await obtain(lambda _: own.close(), take)
    held.push(own)
    return found


def _take(lease: Lease, machine: str, uuid: str, held: ExitStack) -> int:
    target = lease.target
    if not lease.key or target is None or not target.path.startswith("/"):
        raise ConfigError("a <lease> needs a <key> and a <target path='/...'>", path="/domain/devices/lease")
    what = f"lease '{lease.key}'" + (f" of lockspace '{lease.lockspace}'" if lease.lockspace else "")
    offset = target.offset or 0
    if offset >> 62:
        raise ConfigError(f"{what}: offset {offset} is beyond any file", path="/domain/devices/lease/target/@offset")
    about(target.path)
    try:
        # Non-blocking: a FIFO must not hold up the daemon. A link is not followed: the file is made if it is missing.
        fd = os.open(target.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise host_error("open", target.path, error) from error
    held.callback(closer(fd), fd)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ConfigError(f"{what}: {target.path} is neither a file nor a block device")
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ResourceBusy(
                f"{what} is held by {_holder(fd, offset)}", remedy="stop that machine, or wait until it has ended"
            ) from error
        raise HostError(f"{what}: {target.path} cannot be locked: {error.strerror}", errno=error.errno or 0) from error
    before = os.pread(fd, BLOCK, offset)
    if before.strip(b"\0") and not before.startswith(_MARK):
        raise ConfigError(
            f"{what}: {target.path} holds something else at byte {offset}", remedy="name a new file, or another offset"
        )
    record = _MARK + f"{machine}\n{uuid}\n{socket.gethostname()}\n".encode(errors="replace")
    try:
        os.pwrite(fd, record[:BLOCK].ljust(BLOCK, b"\0"), offset)
    except OSError as error:
        raise host_error("write", target.path, error) from error
    return fd


def _holder(fd: int, offset: int) -> str:
    """Who wrote the record, as far as it can be told; it is no more than a hint, and from outside."""
    data = os.pread(fd, BLOCK, offset)
    if data.startswith(_MARK):
        name, _, host, *_ = [*data.rstrip(b"\0").decode(errors="replace").splitlines()[1:], "", "", ""]
        if name.isprintable() and host.isprintable() and name:
            return f"machine '{name}'" + (f" on host {host}" if host else "")
    return "another program"
