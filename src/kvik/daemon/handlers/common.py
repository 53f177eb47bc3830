"""What several groups of handlers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import pack
from typing import TYPE_CHECKING, Any

from kvik.errors import InvalidArgument, OperationInvalid
from kvik.rpc.program import remote
from kvik.rpc.xdr_types import Encoded, TypedParam

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = [
    "LIST_MAX",
    "bitmap",
    "check_flags",
    "named",
    "params",
    "reference",
    "references",
    "require_active",
    "take_params",
    "told",
]

LIST_MAX = 16384  # REMOTE_DOMAIN_LIST_MAX: beyond it clients cannot decode a list

INT, UINT, LLONG, ULLONG, DOUBLE, BOOLEAN, STRING = range(1, 8)


def reference(domain: DomainObject) -> tuple[str, bytes, int]:
    """How the wire names a machine."""
    return (domain.name, domain.uuid, domain.id)


def named(domain: DomainObject, name: str) -> tuple[str, tuple[str, bytes, int]]:
    """How the wire names a snapshot or a checkpoint of a machine."""
    return (name, reference(domain))


def told(domain: DomainObject, names: Sequence[str], need_results: int) -> tuple[list[Any], int]:
    """Those of a list, or how many there are."""
    return ([named(domain, name) for name in names] if need_results else [], len(names))


def references(domains: Sequence[DomainObject]) -> Encoded:
    """A list of machines, put together from what each was encoded to last: four times as fast as encoding it anew."""
    parts = [pack(">I", len(domains))]
    for domain in domains:
        known = domain.encoded
        if known is None or known[1] != domain.id or known[0] != domain.name:
            data = remote().struct("domain").encode((domain.name, domain.uuid, domain.id))
            known = domain.encoded = (domain.name, domain.id, data)
        parts.append(known[2])
    return Encoded(b"".join(parts))


def check_flags(flags: int, known: int, what: str) -> None:
    """Refuse flags we do not know: ignoring one could do the opposite of what the caller relies on."""
    if flags & ~known:
        raise InvalidArgument(f"unsupported flags (0x{flags & ~known:x}) in {what}")


def require_active(domain: DomainObject) -> None:
    if domain.id < 0:
        raise OperationInvalid(f"machine '{domain.name}' is not running")


def params(*rows: tuple[str, int, Any]) -> list[TypedParam]:
    """Typed parameters from (name, virTypedParameterType, value)."""
    return [TypedParam(*row) for row in rows]


def take_params(values: list[TypedParam], wanted: int) -> tuple[list[TypedParam], int]:
    """(parameters, count) as the calls with `nparams` answer: a client that asks for 0 wants the count only."""
    if wanted < 0:
        raise InvalidArgument(f"a negative number of parameters ({wanted}) was asked for")
    return ([], len(values)) if wanted == 0 else (values[:wanted], 0)


def bitmap(numbers: Iterable[int], size: int) -> bytes:
    """CPU numbers -> libvirt's map of `size` bytes, least significant bit first; what does not fit is left out."""
    bits = 0
    for number in numbers:
        if number < size * 8:
            bits |= 1 << number
    return bits.to_bytes(size, "little")
