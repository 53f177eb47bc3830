"""Names (RFC 1035): machines' own are answered, their addresses backwards too; everything else is somebody else's."""

from __future__ import annotations

import struct

from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

TTL = 5  # seconds: machines come and go
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = range(6)

_HEADER = struct.Struct("!HHHHHH")
_A, _PTR, _ANY, _IN = 1, 12, 255, 1
_RESPONSE, _OPCODE, _AUTHORITATIVE, _RECURSION, _AVAILABLE = 0x8000, 0x7800, 0x0400, 0x0100, 0x0080


class Query(NamedTuple):
    id: int
    flags: int
    labels: tuple[bytes, ...]  # in small letters
    kind: int
    question: bytes  # as it was sent

    @property
    def name(self) -> str:
        """Labels with dots; what is not ASCII cannot be one of ours."""
        return b".".join(self.labels).decode("ascii", "replace")


def parse(data: bytes) -> Query | int | None:
    """A query; or the RCODE that answers it; or None where an answer would be none's business."""
    if not _HEADER.size <= len(data) <= 65535:
        return None
    number, flags, questions, *_ = _HEADER.unpack_from(data)
    if flags & _RESPONSE:
        return None
    if flags & _OPCODE:
        return NOTIMP
    if questions != 1:
        return FORMERR
    labels, position, total = [], _HEADER.size, 0
    while True:
        if position >= len(data):
            return FORMERR
        size = data[position]
        if not size:
            break
        total += size + 1
        # The two high bits mark a pointer (4.1.4), which has nothing to point at in the first name.
        if size > 63 or total > 254 or position + 1 + size > len(data):
            return FORMERR
        labels.append(data[position + 1 : position + 1 + size].lower())
        position += 1 + size
    if position + 5 > len(data):
        return FORMERR
    kind, class_ = struct.unpack_from("!HH", data, position + 1)
    if class_ != _IN:
        return REFUSED
    return Query(number, flags, tuple(labels), kind, data[_HEADER.size : position + 5])


def error(data: bytes, rcode: int) -> bytes:
    """An answer without content, to a message of at least a header."""
    query = parse(data)
    question = query.question if isinstance(query, Query) else b""
    number, flags = struct.unpack_from("!HH", data)
    flags = _RESPONSE | flags & (_OPCODE | _RECURSION) | _AVAILABLE | rcode
    return _HEADER.pack(number, flags, 1 if question else 0, 0, 0, 0) + question


def truncated(answer: bytes) -> bytes:
    """The answer's header and question, marked as cut (TC): whoever wants all of it asks again over TCP."""
    (flags,) = struct.unpack_from("!H", answer, 2)
    query = parse(answer[:2] + struct.pack("!H", flags & ~_RESPONSE) + answer[4:])
    question = query.question if isinstance(query, Query) else b""
    return answer[:2] + struct.pack("!HHHHH", flags | 0x0200, 1 if question else 0, 0, 0, 0) + question


def _response(query: Query, rcode: int, answers: list[bytes]) -> bytes:
    flags = _RESPONSE | _AUTHORITATIVE | query.flags & _RECURSION | _AVAILABLE | rcode
    head = _HEADER.pack(query.id, flags, 1, len(answers), 0, 0)
    return head + query.question + b"".join(answers)


def _record(kind: int, data: bytes) -> bytes:
    return struct.pack("!HHHIH", 0xC00C, kind, _IN, TTL, len(data)) + data  # 0xc00c: the question's name


def encode_name(name: str) -> bytes:
    """ValueError if it cannot be one."""
    labels = [label.encode("ascii") for label in name.split(".") if label]
    if any(len(label) > 63 for label in labels) or sum(map(len, labels)) + len(labels) > 254:
        raise ValueError(f"{name!r} is too long for a name")
    return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


class Zone:
    """`forward(name)`: the addresses of a bare name, None if it is nobody's. `reverse(address)`: a bare name or "";
    None if the address is outside of our network."""

    def __init__(
        self,
        domain: str,
        forward: Callable[[str], list[bytes] | None],
        reverse: Callable[[bytes], str | None],
        *,
        local_only: bool = True,
        forward_plain: bool = False,
    ) -> None:
        """`local_only`: what is unknown in our domain is nowhere. `forward_plain`: names without a dot may be known
        outside."""
        self.domain = domain
        self._local_only = local_only
        self._forward_plain = forward_plain
        self._forward = forward
        self._reverse = reverse

    def answer(self, query: Query) -> bytes | None:
        """None: not ours, ask outside."""
        labels = query.labels
        if labels[-2:] == (b"in-addr", b"arpa") and len(labels) == 6:
            return self._backwards(query)
        name = query.name
        suffix = f".{self.domain}" if self.domain else ""
        inside = bool(suffix) and (name.endswith(suffix) or name == self.domain)
        addresses = self._forward(name)
        if addresses is None and inside and name != self.domain:
            addresses = self._forward(name[: -len(suffix)])
        if addresses is not None:
            records = [_record(_A, address) for address in addresses[:16]] if query.kind in (_A, _ANY) else []
            return _response(query, NOERROR, records)
        # A bare name means nothing outside of this network, and nobody outside should hear of it unless told to.
        plain = len(labels) == 1 and not self._forward_plain
        return _response(query, NXDOMAIN, []) if plain or (inside and self._local_only) else None

    def _backwards(self, query: Query) -> bytes | None:
        octets = [label.decode("ascii", "replace") for label in reversed(query.labels[:4])]
        if not all(octet.isdigit() and octet.isascii() and len(octet) <= 3 and int(octet) < 256 for octet in octets):
            return None
        name = self._reverse(bytes(map(int, octets)))
        if name is None:
            return None
        if not name:
            return _response(query, NXDOMAIN, [])
        full = name if "." in name or not self.domain else f"{name}.{self.domain}"
        records = [_record(_PTR, encode_name(full))] if query.kind in (_PTR, _ANY) else []
        return _response(query, NOERROR, records)
