"""Packet sockets that look at one interface's frames, chosen in the kernel (packet(7), socket(7), linux/filter.h)."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

from kvik.errors import HostError

__all__ = ["ADDRESS_CLAIMS", "DHCP_TO_CLIENT", "Instruction", "bound_to", "is_up", "open_packet_socket"]

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand: struct sock_filter

_ETH_P_ALL = 3
_SO_ATTACH_FILTER = 26
_SIOCGIFFLAGS, _IFF_UP = 0x8913, 1
_IFREQ = struct.Struct("=16sH22x")  # struct ifreq, linux/if.h
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
_LD_H, _LD_B, _LDX_IP, _LD_H_X = 0x28, 0x30, 0xB1, 0x48  # BPF_LD|H|ABS, LD|B|ABS, LDX|B|MSH, LD|H|IND
_JEQ, _JSET, _RET = 0x15, 0x45, 0x06

# Ethernet, IPv4, not a later fragment, UDP from port 67 to port 68 (RFC 2131, 4.1). nft and bridges see the same bytes.
DHCP_TO_CLIENT: Sequence[Instruction] = (
    (_LD_H, 0, 0, 12),
    (_JEQ, 0, 10, 0x0800),
    (_LD_B, 0, 0, 23),
    (_JEQ, 0, 8, 17),
    (_LD_H, 0, 0, 20),
    (_JSET, 6, 0, 0x1FFF),
    (_LDX_IP, 0, 0, 14),
    (_LD_H_X, 0, 0, 14),
    (_JEQ, 0, 3, 67),
    (_LD_H_X, 0, 0, 16),
    (_JEQ, 0, 1, 68),
    (_RET, 0, 0, 2048),
    (_RET, 0, 0, 0),
)

# By what a machine says which addresses it has: ARP; neighbour solicitations and advertisements (RFC 4861, 4.3 and 4.4:
# they have no extension headers); UDP from port 68 to port 67, not a later fragment.
ADDRESS_CLAIMS: Sequence[Instruction] = (
    (_LD_H, 0, 0, 12),
    (_JEQ, 16, 0, 0x0806),
    (_JEQ, 1, 0, 0x86DD),
    (_JEQ, 5, 15, 0x0800),
    (_LD_B, 0, 0, 20),
    (_JEQ, 0, 13, 58),
    (_LD_B, 0, 0, 54),
    (_JEQ, 10, 0, 135),
    (_JEQ, 9, 10, 136),
    (_LD_B, 0, 0, 23),
    (_JEQ, 0, 8, 17),
    (_LD_H, 0, 0, 20),
    (_JSET, 6, 0, 0x1FFF),
    (_LDX_IP, 0, 0, 14),
    (_LD_H_X, 0, 0, 14),
    (_JEQ, 0, 3, 68),
    (_LD_H_X, 0, 0, 16),
    (_JEQ, 0, 1, 67),
    (_RET, 0, 0, 1024),
    (_RET, 0, 0, 0),
)


def bound_to(sock: socket.socket) -> str:
    """The interface's name as it is now; empty if it is gone."""
    name: str = sock.getsockname()[0]
    return name


def is_up(sock: socket.socket, device: str) -> bool:
    """Whether that interface of the socket's network namespace is (administratively); False if it is gone."""
    try:
        answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(device.encode(), 0))
    except OSError:
        return False
    return bool(_IFREQ.unpack(answer)[1] & _IFF_UP)


def open_packet_socket(
    device: str, program: Sequence[Instruction], *, outgoing: bool = True, buffer: int = 0
) -> socket.socket:
    """A non-blocking socket with the frames that `program` (classic BPF) takes, in both directions, or not those that
    the host sends there: then the kernel need not copy them to ask (Linux 4.20; older ones copy). `buffer`: bytes that
    may wait in it; 0 is the system's default. HostError."""
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    filters = ctypes.create_string_buffer(code)
    try:
        # Protocol 0 takes nothing yet, so no frame comes in before the filter is there.
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    except OSError as error:
        remedy = "run as root, or with CAP_NET_RAW"
        raise HostError(
            f"cannot open a packet socket: {error.strerror}", errno=error.errno or 0, remedy=remedy
        ) from error
    try:
        filter_ = struct.pack("@HP", len(program), ctypes.addressof(filters))  # struct sock_fprog
        made.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)
        if buffer:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        if not outgoing:
            with suppress(OSError):
                made.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        made.bind((device, _ETH_P_ALL))
    except OSError as error:
        made.close()
        raise HostError(f"cannot listen on {device}: {error.strerror}", errno=error.errno or 0) from error
    return made
