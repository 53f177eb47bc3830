"""Macvtap: a tap that stands on an interface of the host, with no bridge between (Documentation/networking/tuntap.rst,
drivers/net/macvtap.c, drivers/net/tap.c).

Its queues are opens of one character device, /dev/tapINDEX. Its numbers are read from the kernel's own list, in a sysfs
of this thread's network namespace that is mounted nowhere: an index is unique only within its namespace, so a
/dev/tapINDEX that is there may be another namespace's, and in a container there may be none. Then a node is made in a
tmpfs that is mounted nowhere either.

A macvtap does not go with its last descriptor: `delete_macvtap` takes it away.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from contextlib import ExitStack
from pathlib import Path

from kvik.errors import HostError
from kvik.host.netlink import Link, Netlink
from kvik.host.netlink_attributes import check_name
from kvik.host.tap import Tap

__all__ = ["TEMPLATE", "create_macvtap", "delete_macvtap", "follow_guest", "free_name"]

TEMPLATE = "macvtap"  # libvirt's: macvtap0, macvtap1, ...
_NAMES_MAX = 65536
_TUNSETIFF = 0x400454CA
_TUNSETVNETHDRSZ = 0x400454D8
_SIOCGIFHWADDR = 0x8927
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_IFREQ = struct.Struct("@16sH22x")
_HARDWARE = struct.Struct("@16sH6s16x")  # ifreq with a sockaddr of 6 bytes
_VIRTIO_HEADER = 12  # virtio_net_hdr_mrg_rxbuf; whoever gets the descriptors sets what it wants
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same numbers on every architecture; linux/mount.h
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC, _CMD_CREATE = 1, 1, 6
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def create_macvtap(
    lower: str, mode: str, *, name: str, mac: str, queues: int = 1, mtu: int | None = None, up: bool = True
) -> Tap:
    """Make a macvtap `name` on the interface `lower` and open its queues; on an error there is none.

    `mac` is the guest's own: frames for it, and no others (but in mode passthrough), come in. In mode passthrough the
    interface below takes it, until the macvtap is gone. `HostError` says what the kernel refuses.
    """
    check_name(name)
    if not 1 <= queues <= 256:
        raise HostError(f"cannot open {queues} queues of macvtap {name}: 1 to 256 are possible", errno=errno.EINVAL)
    with Netlink() as netlink, ExitStack() as undo:
        below = netlink.link(lower)
        if below.master:
            raise HostError(
                f"cannot make a macvtap on {lower}: it is a port of {netlink.link(below.master).name}",
                errno=errno.EBUSY,
                remedy=f"attach to that bridge (<interface type='bridge'>), or take {lower} out of it",
            )
        if mtu is not None and mtu > below.mtu:
            raise HostError(
                f"cannot make macvtap {name} with an MTU of {mtu}: {lower} has only {below.mtu}",
                errno=errno.EINVAL,
                remedy=f"give the interface at most {below.mtu}",
            )
        try:
            made = netlink.add_macvtap(name, below.index, mode, mac=mac)
        except HostError as error:
            raise _explained(error, lower, mode) from error
        undo.callback(netlink.delete_link, made.index)
        netlink.set_link(made.index, alias=_mark(mac))
        if made.mac != mac.lower():  # passthrough takes the address below, and hands ours down
            netlink.set_link(made.index, mac=mac)
        if mtu is not None:
            netlink.set_link(made.index, mtu=mtu)
        fds = _open_queues(name, made.index, mac.lower(), queues, undo)
        if not below.up:
            netlink.set_link(below.index, up=True)  # nothing comes through one that is down; libvirt sets it up, too
        if up:
            netlink.set_link(made.index, up=True)
        undo.pop_all()
    return Tap(name, made.index, fds)


def delete_macvtap(netlink: Netlink, name: str, mac: str) -> bool:
    """Delete a macvtap if it is the one with this address: a name alone may be somebody else's by now. False if it is
    gone, or is not ours."""
    try:
        link = netlink.link(name)
    except HostError as error:
        if error.errno == errno.ENODEV:
            return False
        raise
    if not _is_of(link, mac):
        return False
    netlink.delete_link(link.index)
    return True


def follow_guest(netlink: Netlink, name: str, mac: str, *, now: str, multicast: bool) -> None:
    """Let in what a guest that was made with the address `mac` listens to now: another address, and all multicast
    frames. `HostError` if it is gone, or is not ours."""
    link = netlink.link(name)
    if not _is_of(link, mac):
        raise HostError(f"{name} is not the macvtap that was made with the address {mac}", errno=errno.ESTALE)
    netlink.set_link(link.index, mac=now if now != link.mac else None, all_multicast=multicast)


def _mark(mac: str) -> str:
    return f"kvik {mac.lower()}"


def _is_of(link: Link, mac: str) -> bool:
    """A guest that is trusted to change its address leaves the mark to know it by; one that is being made has none."""
    return link.kind == "macvtap" and (link.mac == mac.lower() or link.alias == _mark(mac))


def free_name(netlink: Netlink, taken: set[str]) -> str:
    """The first of macvtap0, macvtap1, ... that neither is there nor is in `taken`."""
    there = {link.name for link in netlink.links()} | taken
    for number in range(_NAMES_MAX):
        if (name := f"{TEMPLATE}{number}") not in there:
            return name
    raise HostError(f"no name {TEMPLATE}0 to {TEMPLATE}{_NAMES_MAX - 1} is free", errno=errno.ENFILE)


def _explained(error: HostError, lower: str, mode: str) -> HostError:
    if error.errno == errno.EOPNOTSUPP:
        remedy = "load the module: modprobe macvtap; or attach to a bridge (<interface type='bridge'>)"
        return HostError(f"{error.message}: this kernel has no macvtap", errno=error.errno, remedy=remedy)
    if error.errno in (errno.EBUSY, errno.EINVAL):
        remedy = (
            f"mode passthrough needs {lower} for one machine alone"
            if mode == "passthrough"
            else f"see whether {lower} is used already: ip -d link show {lower}"
        )
        return HostError(error.message, errno=error.errno, remedy=remedy)
    return error


# Its character device


def _open_queues(name: str, index: int, mac: str, queues: int, undo: ExitStack) -> list[int]:
    with ExitStack() as close:
        directory, node = _node(name, index, close)
        fds = []
        for _ in range(queues):
            try:
                fd = os.open(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
            except OSError as error:
                remedy = "the cgroup of this container may forbid its device: allow character devices of that number"
                raise HostError(
                    f"cannot open the device of macvtap {name}: {error.strerror}",
                    errno=error.errno or 0,
                    remedy=remedy if error.errno == errno.EPERM else "",
                ) from error
            undo.callback(os.close, fd)
            fds.append(fd)
            _set_up_queue(fd, name, mac, queues)
    return fds


def _set_up_queue(fd: int, name: str, mac: str, queues: int) -> None:
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    try:
        found = bytearray(_HARDWARE.size)
        fcntl.ioctl(fd, _SIOCGIFHWADDR, found)
        whose, _, address = _HARDWARE.unpack(found)
        if whose.partition(b"\0")[0].decode() != name or address.hex(":") != mac:
            raise HostError(f"the device of macvtap {name} is another interface's", errno=errno.ESTALE)
        fcntl.ioctl(fd, _TUNSETIFF, bytearray(_IFREQ.pack(name.encode(), flags)))
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", _VIRTIO_HEADER))
    except OSError as error:
        raise HostError(f"cannot set up a queue of macvtap {name}: {error.strerror}", errno=error.errno or 0) from error


def _node(name: str, index: int, close: ExitStack) -> tuple[int | None, str]:
    """Where to open its character device: a directory's descriptor and a name in it, or a path."""
    numbers = _numbers(name, index, close)
    path = f"/dev/tap{index}"
    try:
        found = Path(path).stat()
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == numbers:
            return None, path
    except OSError:
        pass
    try:
        directory = _detached("tmpfs")
        close.callback(os.close, directory)
        os.mknod(path[5:], stat.S_IFCHR | 0o600, numbers, dir_fd=directory)
    except OSError as error:
        raise HostError(
            f"cannot make a device node for macvtap {name} ({os.major(numbers)}:{os.minor(numbers)}), and there is no "
            f"{path}: {error.strerror}",
            errno=error.errno or 0,
            remedy="run as root; in a container, with CAP_MKNOD and CAP_SYS_ADMIN, or with the host's /dev",
        ) from error
    return directory, path[5:]


def _numbers(name: str, index: int, close: ExitStack) -> int:
    """Its device's numbers. The sysfs that is mounted may be another namespace's: it is asked only where none of our
    own can be had, and believed if it has this interface."""
    where = f"class/net/{name}"
    try:
        sysfs = _detached("sysfs")
        close.callback(os.close, sysfs)
    except OSError:  # a container, or a kernel before 5.2
        try:
            sysfs = os.open("/sys", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"cannot open /sys: {error.strerror}", errno=error.errno or 0) from error
        close.callback(os.close, sysfs)
    try:
        if int(_read(sysfs, f"{where}/ifindex")) != index:
            raise HostError(f"/sys shows another network namespace than that of {name}", errno=errno.ESTALE)
        major, _, minor = _read(sysfs, f"{where}/macvtap/tap{index}/dev").partition(":")
        return os.makedev(int(major), int(minor))
    except (OSError, ValueError) as error:
        raise HostError(
            f"cannot find the device of macvtap {name}: {error}",
            errno=getattr(error, "errno", None) or errno.ENODEV,
            remedy="mount a sysfs of this network namespace at /sys, or run with CAP_SYS_ADMIN",
        ) from error


def _read(directory: int, path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(fd, 64).decode("ascii", "replace").strip()
    finally:
        os.close(fd)


def _detached(kind: str) -> int:
    """A file system of this kind that is mounted nowhere, by its root's descriptor; it goes with that (fsopen(2))."""
    context = _call(_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
    try:
        _call(_FSCONFIG, context, _CMD_CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def _call(number: int, *arguments: int | bytes | None) -> int:
    done = _libc.syscall(
        ctypes.c_long(number), *(ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)
    )
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(done)
