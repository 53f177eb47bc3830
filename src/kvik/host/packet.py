"""Packet sockets that look at one interface's frames, chosen in the kernel (packet(7), socket(7), linux/filter.h)."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence

from kvik.errors import HostError

__all__ = ["DHCP_TO_CLIENT", "Instruction", "open_packet_socket"]

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand: struct sock_filter

_ETH_P_ALL = 3
_SO_ATTACH_FILTER = 26
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


def open_packet_socket(device: str, program: Sequence[Instruction]) -> socket.socket:
    """A non-blocking socket with the frames that `program` (classic BPF) takes, in both directions. HostError."""
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    try:
        # Protocol 0 takes nothing yet, so no frame comes in before the filter is there.
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    except OSError as error:
        remedy = "run as root, or with CAP_NET_RAW"
        raise HostError(
            f"cannot open a packet socket: {error.strerror}", errno=error.errno or 0, remedy=remedy
        ) from error
    try:
        filter_ = struct.pack("@HP", len(program), ctypes.addressof(buffer))  # struct sock_fprog
        made.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)
        made.bind((device, _ETH_P_ALL))
    except OSError as error:
        made.close()
        raise HostError(f"cannot listen on {device}: {error.strerror}", errno=error.errno or 0) from error
    return made
