"""userfaultfd: another process supplies the pages that are touched and not there, or lets those be written that are
protected against it (admin-guide/mm/userfaultfd.rst).

A range of this process's memory is registered; whoever touches a missing page of it, or writes to a protected one, a
thread, KVM or vhost, waits until somebody who holds the descriptor puts a page there, or takes its protection away. The
descriptor belongs to the memory of the process that opened it, whichever process uses it: so another process serves the
faults, and none of its own threads can be in the way. When the last of its holders has closed it nobody waits any more.

Faults that the kernel takes on the process's behalf (KVM's are such) need a privilege: CAP_SYS_PTRACE, the device
/dev/userfaultfd, or the sysctl vm.unprivileged_userfaultfd.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from kvik.errors import HostError
from kvik.vmm.layout import PAGE

__all__ = ["Userfaultfd"]

_API = 0xAA
FEATURE_MISSING_SHMEM = 1 << 5
# Protection of any memory, be it huge pages or a memfd (Linux 5.19); of private pages that are not there yet (6.4).
FEATURE_WRITES, FEATURE_UNPOPULATED = 1 << 0 | 1 << 12, 1 << 13
_MODE_MISSING, _MODE_WRITES = 1 << 0, 1 << 1
_PROTECT = 1 << 0  # UFFDIO_WRITEPROTECT_MODE_WP
_PROTECTS = 1 << 6  # UFFDIO_WRITEPROTECT on the range
_EVENT_PAGEFAULT = 0x12
_NEEDED = 1 << 2 | 1 << 3 | 1 << 4  # UFFDIO_WAKE, COPY, ZEROPAGE on the range
_SYS_USERFAULTFD = 323  # x86_64
_IOC_NEW = 0xAA00
_MESSAGE = struct.Struct("<B7xQQ8x")  # struct uffd_msg: event, flags, address
_BATCH = 64


class _Api(ctypes.Structure):
    _fields_ = [("api", ctypes.c_uint64), ("features", ctypes.c_uint64), ("ioctls", ctypes.c_uint64)]


class _Range(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class _Register(ctypes.Structure):
    _fields_ = [("range", _Range), ("mode", ctypes.c_uint64), ("ioctls", ctypes.c_uint64)]


class _Copy(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("dst", "src", "len", "mode")] + [("copy", ctypes.c_int64)]


class _Zeropage(ctypes.Structure):
    _fields_ = [("range", _Range), ("mode", ctypes.c_uint64), ("zeropage", ctypes.c_int64)]


class _Writeprotect(ctypes.Structure):
    _fields_ = [("range", _Range), ("mode", ctypes.c_uint64)]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


def _request(number: int, size: int, direction: int = 3) -> int:
    return direction << 30 | size << 16 | _API << 8 | number


_UFFDIO_API = _request(0x3F, ctypes.sizeof(_Api))
_UFFDIO_REGISTER = _request(0, ctypes.sizeof(_Register))
_UFFDIO_UNREGISTER = _request(1, ctypes.sizeof(_Range), 2)
_UFFDIO_WAKE = _request(2, ctypes.sizeof(_Range), 2)
_UFFDIO_COPY = _request(3, ctypes.sizeof(_Copy))
_UFFDIO_ZEROPAGE = _request(4, ctypes.sizeof(_Zeropage))
_UFFDIO_WRITEPROTECT = _request(6, ctypes.sizeof(_Writeprotect))


def _new(passed: int) -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC) if passed < 0 else os.dup(passed)
    except OSError:  # before Linux 6.1, or not ours
        fd = _libc.syscall(ctypes.c_long(_SYS_USERFAULTFD), ctypes.c_int(flags))
        if fd >= 0:
            return int(fd)
        number = ctypes.get_errno()
        if number == errno.EPERM:
            text = "this process may not have a userfaultfd that sees the kernel's own faults, as KVM's are"
            remedy = "let its user open /dev/userfaultfd, or set the sysctl vm.unprivileged_userfaultfd to 1"
        else:
            text, remedy = "this kernel gives no userfaultfd", "it needs CONFIG_USERFAULTFD"
        raise HostError(f"{text}: {os.strerror(number)}", errno=number, remedy=remedy) from None
    try:
        return fcntl.ioctl(device, _IOC_NEW, flags)
    except OSError as error:
        raise HostError(f"/dev/userfaultfd gives none: {error.strerror}", errno=error.errno or 0) from error
    finally:
        os.close(device)


def _lacking(features: int) -> str:
    if features & FEATURE_MISSING_SHMEM:
        return "this kernel's userfaultfd knows no shared memory: it came with Linux 4.11"
    return "this kernel's userfaultfd protects no memory against writing: it came with Linux 5.19"


class Userfaultfd:
    """One, for this process's memory. Addresses are this process's, sizes whole pages. HostError.

    `needed`: its features, missing pages unless said; `features` is what it has. `device`: /dev/userfaultfd, opened by
    somebody who may; it stays the caller's.
    """

    def __init__(self, needed: int = FEATURE_MISSING_SHMEM, *, device: int = -1) -> None:
        self.fd = _new(device)
        try:
            self.features = self._handshake(0)
            if self.features & needed != needed:
                raise HostError(_lacking(needed & ~self.features), errno=errno.EOPNOTSUPP)
            os.close(self.fd)  # the handshake is done once a descriptor: first to ask, then to choose
            self.fd = _new(device)
            self._handshake(needed | self.features & FEATURE_UNPOPULATED if needed & 1 else needed)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, fd: int) -> Userfaultfd:
        """One that another process opened: addresses are that one's. The descriptor is taken."""
        made = cls.__new__(cls)
        made.fd, made.features = fd, 0
        return made

    def _handshake(self, wanted: int) -> int:
        api = _Api(_API, wanted, 0)
        self._ioctl(_UFFDIO_API, api, "the handshake with userfaultfd")
        return int(api.features)

    def _ioctl(self, request: int, argument: ctypes.Structure, what: str) -> None:
        if _libc.ioctl(self.fd, request, ctypes.addressof(argument)) < 0:
            number = ctypes.get_errno()
            raise HostError(f"{what} failed: {os.strerror(number)}", errno=number)

    def register(self, address: int, size: int) -> None:
        """From now on a missing page there is a fault for us."""
        argument = _Register(_Range(address, size), _MODE_MISSING, 0)
        self._ioctl(_UFFDIO_REGISTER, argument, f"watching {size >> 20} MiB of memory for missing pages")
        if argument.ioctls & _NEEDED != _NEEDED:
            self.unregister(address, size)
            raise HostError("this kind of memory cannot be filled page by page", remedy="use no huge pages")

    def watch_writes(self, address: int, size: int) -> None:
        """From now on a write there is a fault for us where `protect` said so."""
        argument = _Register(_Range(address, size), _MODE_WRITES, 0)
        self._ioctl(_UFFDIO_REGISTER, argument, f"watching {size >> 20} MiB of memory for writes")
        if not argument.ioctls & _PROTECTS:
            self.unregister(address, size)
            raise HostError("this kind of memory cannot be protected page by page", errno=errno.EOPNOTSUPP)

    def protect(self, address: int, size: int, *, on: bool = True) -> None:
        """Let whoever writes there wait; or, with `on` false, write, who waits already as well."""
        argument = _Writeprotect(_Range(address, size), _PROTECT if on else 0)
        while _libc.ioctl(self.fd, _UFFDIO_WRITEPROTECT, ctypes.addressof(argument)) < 0:
            number = ctypes.get_errno()
            if number != errno.EAGAIN:  # the memory's map is being changed: again
                raise HostError(f"memory cannot be protected against writing: {os.strerror(number)}", errno=number)

    def unregister(self, address: int, size: int) -> None:
        """The kernel fills pages by itself again; who waits goes on."""
        self._ioctl(_UFFDIO_UNREGISTER, _Range(address, size), "giving memory back to the kernel")

    def wake(self, address: int, size: int) -> None:
        """Whoever waits there looks again, and faults again if nothing came."""
        self._ioctl(_UFFDIO_WAKE, _Range(address, size), "waking what waits for memory")

    def copy(self, address: int, source: int, size: int, *, again: bool = False) -> None:
        """Put `size` bytes of the calling process's memory there and wake who waits. A page that is there already is an
        error, since nobody knows what it holds; with `again` it stays as it is."""
        end = address + size
        while address < end:
            argument = _Copy(address, source, end - address, 0, 0)
            if _libc.ioctl(self.fd, _UFFDIO_COPY, ctypes.addressof(argument)) >= 0:
                return
            done = self._skipped(argument.copy, address, again)
            address, source = address + done, source + done

    def zero(self, address: int, size: int, *, again: bool = False) -> None:
        """The same with zeroes."""
        end = address + size
        while address < end:
            argument = _Zeropage(_Range(address, end - address), 0, 0)
            if _libc.ioctl(self.fd, _UFFDIO_ZEROPAGE, ctypes.addressof(argument)) >= 0:
                return
            address += self._skipped(argument.zeropage, address, again)

    def _skipped(self, done: int, address: int, again: bool) -> int:
        """How far a call came that failed: the bytes that it filled, or the page that was there already."""
        number = ctypes.get_errno()
        if done > 0:
            return int(done)
        if number == errno.EEXIST and again:
            self.wake(address, PAGE)
            return PAGE
        if number == errno.EAGAIN:  # the memory's map is being changed: again
            return 0
        raise HostError(f"a page of memory cannot be filled: {os.strerror(number)}", errno=number)

    def faults(self) -> list[int]:
        """Addresses of pages that somebody waits for since the last call, or waits to write to."""
        try:
            data = os.read(self.fd, _MESSAGE.size * _BATCH)
        except BlockingIOError:
            return []
        return [address & -PAGE for event, _, address in _MESSAGE.iter_unpack(data) if event == _EVENT_PAGEFAULT]

    def close(self) -> None:
        """Who still waits goes on, with zeroes."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
