"""Raw DNS questions, as a guest's resolver would send them, and what is in the answer's head."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

NOERROR, NXDOMAIN, REFUSED = 0, 3, 5
A, AAAA, MX = 1, 28, 15


def ask(name: str, server: str, kind: int = A, *, patience: float = 0.5, tries: int = 4) -> tuple[int, str] | None:
    """(result code, the last address of the answer or ""); None if nobody answers. In the caller's namespace."""
    question = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"
    message = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + question + struct.pack(">HH", kind, 1)
    family = socket.AF_INET if ip_address(server).version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as made:
        made.settimeout(patience)
        for _ in range(tries):
            try:
                made.sendto(message, (server, 53))
                answer = made.recv(2048)
            except OSError:  # nobody, or unreachable
                continue
            size = 16 if kind == AAAA else 4
            count = struct.unpack_from(">H", answer, 6)[0]
            return answer[3] & 0xF, str(ip_address(answer[-size:])) if count else ""
    return None
