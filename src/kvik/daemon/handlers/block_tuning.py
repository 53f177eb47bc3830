"""Limits of a disk's requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.daemon.handlers.common import STRING, ULLONG, check_flags, params, take_params
from kvik.errors import InvalidArgument
from kvik.manager import block_tuning

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

LIVE, CONFIG, STRING_OK = 1, 2, 4  # virDomainModificationImpact; VIR_TYPED_PARAM_STRING_OKAY


def get_block_io_tune(connection: Connection, args: Any) -> tuple[list[Any], int]:
    reference, name, wanted, flags = args
    check_flags(flags, LIVE | CONFIG | STRING_OK, "block I/O tuning")
    document = connection.domain(reference).document(flags & (LIVE | CONFIG))
    told = [field for field in block_tuning.FIELDS if field != "group_name" or flags & STRING_OK]
    if wanted == 0:  # how many there are; which disk is meant is not looked at yet, as in libvirt
        return ([], len(told))
    found = block_tuning.parameters(document, name or "")
    rows = ((field, STRING if field == "group_name" else ULLONG, found[field]) for field in told)
    return take_params(params(*rows), wanted)


async def set_block_io_tune(connection: Connection, args: Any) -> None:
    reference, name, given, flags = args
    check_flags(flags, LIVE | CONFIG, "block I/O tuning")
    values: dict[str, int | str] = {}
    for field, kind, value in given:
        if field not in block_tuning.FIELDS:
            raise InvalidArgument(f"a disk has no parameter {field!r}", remedy=", ".join(block_tuning.FIELDS))
        if kind != (STRING if field == "group_name" else ULLONG) or field in values:
            raise InvalidArgument(f"parameter {field!r} is given once, as an unsigned long long (the name: a string)")
        values[field] = value
    await connection.domain(reference).set_block_io_tune(name, values, flags)
