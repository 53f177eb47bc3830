"""One descriptor of the KVM interface and its ioctls; the error they raise."""

from __future__ import annotations

import ctypes
import errno
import os
from fcntl import ioctl

from kvik.kvm import constants as c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    Self = TypeVar("Self", bound="Descriptor")

# fcntl.ioctl takes an integer argument as a signed C int only, copies buffers up to 1024 bytes back and forth, and
# keeps the interpreter lock with longer ones; the C library through ctypes does none of that.
_IN_PLACE = 1024
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)

# What an errno usually means to an ioctl of KVM, when nothing better is known.
_MEANING = {
    errno.ENOTTY: "this KVM does not know the call",
    errno.EINVAL: "this KVM refuses the arguments",
    errno.ENXIO: "what it acts on was not created (an interrupt controller?)",
    errno.EEXIST: "it was there already, or a vCPU was",
    errno.EFAULT: "an address in it is not mapped",
}


class KvmError(OSError):
    """An ioctl on a KVM descriptor failed; `ioctl` is its name without KVM_, `capability` what it needs, or ""."""

    def __init__(self, number: int, ioctl: str, detail: str = "") -> None:
        self.ioctl = ioctl
        self.capability = c.NEEDS.get(ioctl, "")
        hints = [text for text in (detail, _MEANING.get(number)) if text]
        if self.capability and number in (errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            hints.append(f"it needs KVM_CAP_{self.capability}")
        super().__init__(number, f"KVM_{ioctl}: {os.strerror(number)}" + (f" ({'; '.join(hints)})" if hints else ""))


def address_of(buffer: bytearray | memoryview | ctypes.Structure) -> int:
    """Where a writable buffer lies in this process; it must outlive the use of the address."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class Descriptor:
    """Owns one descriptor; a context manager."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _int(self, name: str, argument: int = 0, detail: str = "") -> int:
        """An ioctl with an integer argument that fits a C int; its result."""
        try:
            return ioctl(self.fd, getattr(c, name), argument)
        except OSError as error:
            raise KvmError(error.errno or 0, name, detail) from None

    def _long(self, name: str, argument: int) -> int:
        """An ioctl with an integer argument of any size, or an address; its result. Releases the interpreter lock."""
        result: int = _libc.ioctl(self.fd, getattr(c, name), argument)
        if result < 0:
            raise KvmError(ctypes.get_errno(), name)
        return result

    def _struct(self, name: str, structure: ctypes.Structure | bytearray, detail: str = "") -> int:
        """An ioctl on a structure, read or written in place. Releases the interpreter lock."""
        size = len(structure) if isinstance(structure, bytearray) else ctypes.sizeof(structure)
        if size > _IN_PLACE:
            return self._long(name, address_of(structure))
        try:
            result: int = ioctl(self.fd, getattr(c, name), structure)  # typed as Any for a buffer
            return result
        except OSError as error:
            raise KvmError(error.errno or 0, name, detail) from None

    def _bytes(self, name: str, data: bytes, detail: str = "") -> None:
        """An ioctl that only reads its small structure and never waits: the interpreter lock stays."""
        try:
            ioctl(self.fd, getattr(c, name), data)
        except OSError as error:
            raise KvmError(error.errno or 0, name, detail) from None

    def _enable_cap(self, capability: int, arguments: tuple[int, ...], flags: int) -> None:
        """KVM_ENABLE_CAP (api.rst 4.37)."""
        values = b"".join(value.to_bytes(8, "little") for value in arguments)
        data = capability.to_bytes(4, "little") + flags.to_bytes(4, "little") + values
        name = c.Capability.name_of(capability)
        self._struct("ENABLE_CAP", bytearray(data.ljust(104, b"\0")), f"capability {name}")

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION (4.4): 0 if absent, else 1 or a limit. A machine may answer otherwise than the system."""
        return self._int("CHECK_EXTENSION", capability)

    def stats_fd(self) -> int:
        """KVM_GET_STATS_FD (4.133): a descriptor for `kvik.kvm.stats`; the caller closes it."""
        return self._int("GET_STATS_FD")


class AttributeOwner(Descriptor):
    """A descriptor with attributes (4.80, 4.81): values of 64 bits behind (group, attribute)."""

    def has_attr(self, group: int, attribute: int) -> bool:
        try:
            self._bytes("HAS_DEVICE_ATTR", _attr(group, attribute, 0))
        except KvmError as error:
            if error.errno in (errno.ENXIO, errno.ENOTTY, errno.EPERM):
                return False
            raise
        return True

    def attr(self, group: int, attribute: int) -> int:
        value = bytearray(8)
        self._struct("GET_DEVICE_ATTR", bytearray(_attr(group, attribute, address_of(value))))
        return int.from_bytes(value, "little")

    def set_attr(self, group: int, attribute: int, value: int) -> None:
        held = bytearray(value.to_bytes(8, "little"))
        self._struct("SET_DEVICE_ATTR", bytearray(_attr(group, attribute, address_of(held))))


def _attr(group: int, attribute: int, address: int) -> bytes:
    """struct kvm_device_attr."""
    return bytes(4) + group.to_bytes(4, "little") + attribute.to_bytes(8, "little") + address.to_bytes(8, "little")
