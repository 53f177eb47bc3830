"""Tap devices: made through /dev/net/tun, handed to a VMM as descriptors.

They are not persistent: the kernel removes the interface when the last descriptor is closed, that is when the
machine's process ends, however it ends. Sources: Documentation/networking/tuntap.rst, linux/if_tun.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass

from kvik.errors import HostError
from kvik.host.netlink import Netlink
from kvik.host.netlink_attributes import check_name

_TUNSETIFF = 0x400454CA
_TUNSETVNETHDRSZ = 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE, _IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x0100, 0x8000
_IFREQ = struct.Struct("@16sH22x")
_DEVICE = "/dev/net/tun"


@dataclass(slots=True)
class Tap:
    """A tap interface; the descriptors (one a queue) are the caller's, who closes them once the VMM has them."""

    name: str
    index: int
    fds: list[int]

    def close(self) -> None:
        """Close our descriptors; the interface goes with the last one that anybody holds."""
        while self.fds:
            os.close(self.fds.pop())


def _open_queue(name: str, flags: int) -> tuple[int, str]:
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        remedy = "load the module: modprobe tun" if error.errno in (errno.ENOENT, errno.ENODEV) else ""
        if error.errno in (errno.EACCES, errno.EPERM):
            remedy = "run as root, or use the network type 'user', which needs no tap"
        raise HostError(f"cannot open {_DEVICE}: {error.strerror}", errno=error.errno or 0, remedy=remedy) from error
    try:
        request = bytearray(_IFREQ.pack(name.encode(), flags))
        fcntl.ioctl(fd, _TUNSETIFF, request)
    except OSError as error:
        os.close(fd)
        reason = error.strerror
        if error.errno == errno.EBUSY:
            reason = "a device with that name exists and is in use"
        remedy = "run as root, or with CAP_NET_ADMIN" if error.errno == errno.EPERM else ""
        raise HostError(f"cannot make tap {name}: {reason}", errno=error.errno or 0, remedy=remedy) from error
    return fd, request[:16].partition(b"\0")[0].decode()


def create_tap(
    name: str = "",
    *,
    bridge: str | None = None,
    queues: int = 1,
    mac: str | None = None,
    mtu: int | None = None,
    vnet_header: bool = True,
    up: bool = True,
) -> Tap:
    """Make a tap, set it up and make it a port of an existing bridge; on any error nothing is left.

    `name` may hold one "%d", which the kernel replaces by the first free number; empty means "vnet%d". `mac` is the
    host side's address, which should not be the guest's. An existing interface of that name is refused.
    """
    name = name or "vnet%d"
    check_name(name)
    if not 1 <= queues <= 256:
        raise HostError(f"cannot make tap {name} with {queues} queues: 1 to 256 are possible", errno=errno.EINVAL)
    flags = _IFF_TAP | _IFF_NO_PI
    flags |= _IFF_VNET_HDR if vnet_header else 0
    flags |= _IFF_MULTI_QUEUE if queues > 1 else 0
    with ExitStack() as undo:
        # EXCL: never silently attach to a persistent tap that somebody else made.
        fd, real = _open_queue(name, flags | _IFF_TUN_EXCL)
        undo.callback(os.close, fd)
        fds = [fd]
        for _ in range(queues - 1):
            fd, _ = _open_queue(real, flags)
            undo.callback(os.close, fd)
            fds.append(fd)
        with Netlink() as netlink:
            index = netlink.link(real).index
            master = None
            if bridge is not None:
                found = netlink.link(bridge)
                if found.kind != "bridge":
                    raise HostError(f"cannot use {bridge} as a bridge: it is none", errno=errno.EINVAL)
                master = found.index
                mtu = mtu or found.mtu
            netlink.set_link(index, mac=mac, mtu=mtu)
            if master is not None:
                netlink.set_link(index, master=master)
            if up:
                netlink.set_link(index, up=True)
        undo.pop_all()
    return Tap(real, index, fds)
