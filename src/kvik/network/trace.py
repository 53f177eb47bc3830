"""Which nftables rule, or chain policy, a marked packet died by: the kernel's own trace (nft(8), "meta nftrace")."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

from kvik.errors import HostError
from kvik.host.netlink_attributes import attributes, text

__all__ = ["Step", "Tracer", "parse_trace"]

NETLINK_NETFILTER = 12
NFNLGRP_NFTRACE = 9  # linux/netfilter/nfnetlink.h
NFT_MSG_TRACE = 10 << 8 | 17  # NFNL_SUBSYS_NFTABLES and the message: linux/netfilter/nf_tables.h
_TABLE, _CHAIN, _RULE, _TYPE, _VERDICT, _ID, _NFPROTO, _POLICY = 1, 2, 3, 4, 5, 6, 15, 16  # NFTA_TRACE_*
_VERDICT_CODE = 1  # NFTA_VERDICT_CODE
_POLICY_STEP, _RULE_STEP = 1, 3  # NFT_TRACETYPE_*
_NF_DROP = 0
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}  # NFPROTO_*
_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_FAMILY = struct.Struct("=BBH")  # nfgenmsg
_MAX = 4096  # steps that are read


@dataclass(frozen=True, slots=True)
class Step:
    """One packet at one place. `rule` is its handle; 0: the chain's policy."""

    packet: int
    family: str
    table: str
    chain: str
    rule: int
    dropped: bool


def parse_trace(payload: bytes) -> Step | None:
    """Decode what follows the header of an NFT_MSG_TRACE; None for what is no decision."""
    if len(payload) < _FAMILY.size:
        return None
    family = _FAMILY.unpack_from(payload)[0]
    found = attributes(payload, _FAMILY.size)
    kind = int.from_bytes(found.get(_TYPE, b""), "big")
    if kind == _POLICY_STEP:
        verdict = found.get(_POLICY, b"")
    elif kind == _RULE_STEP:
        verdict = attributes(found.get(_VERDICT, b"")).get(_VERDICT_CODE, b"")
    else:
        return None
    return Step(
        packet=int.from_bytes(found.get(_ID, b""), "big"),
        family=_FAMILIES.get(family, str(family)),
        table=text(found.get(_TABLE, b"")),
        chain=text(found.get(_CHAIN, b"")),
        rule=int.from_bytes(found.get(_RULE, b""), "big") if kind == _RULE_STEP else 0,
        dropped=len(verdict) == 4 and int.from_bytes(verdict, "big") & 0xFF == _NF_DROP,
    )


class Tracer:
    """Listens, in the network namespace of the thread that made it, to what becomes of packets that a rule marked."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
            )
            self._socket.bind((0, 1 << (NFNLGRP_NFTRACE - 1)))
        except OSError as error:
            raise HostError(f"cannot listen to packet traces: {error.strerror}", errno=error.errno or 0) from error

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def steps(self) -> list[Step]:
        """What has been heard since the last call."""
        found: list[Step] = []
        while len(found) < _MAX:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:  # nothing more; or ENOBUFS, some were lost
                break
            while len(data) >= _HEADER.size:
                length, kind, _, _, _ = _HEADER.unpack_from(data)
                if not _HEADER.size <= length <= len(data):
                    break
                if kind == NFT_MSG_TRACE and (step := parse_trace(data[_HEADER.size : length])) is not None:
                    found.append(step)
                data = data[(length + 3) & ~3 :]
        return found
