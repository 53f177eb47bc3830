"""Host devices: none yet, said in the way clients expect.

Lists are empty, looking one up says which kind of thing was not found, and events can be subscribed to: clients such
as virt-manager do all that before they show the first machine.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from kvik.daemon.errors import NoNodeDevice
from kvik.errors import InvalidArgument

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection


def none(connection: Connection, args: Any) -> tuple[int]:
    """NUM_OF_...: zero."""
    return (0,)


def no_names(connection: Connection, args: Any) -> tuple[list[str]]:
    """LIST_...: no names."""
    return ([],)


def empty_list(connection: Connection, args: Any) -> tuple[list[Any], int]:
    """LIST_ALL_...: nothing, whether results or only their number are wanted."""
    return ([], 0)


def _uuid(value: bytes) -> str:
    text = value.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _what(args: Any) -> str:
    """What was looked up, as the caller wrote it."""
    first = args[0]
    while isinstance(first, tuple):  # an object's reference starts with its name
        first = first[0]
    return _uuid(first) if isinstance(first, bytes) else str(first)


def no_node_device(connection: Connection, args: Any) -> None:
    raise NoNodeDevice(f"no node device '{_what(args)}'")


CALLBACKS_MAX = 1024  # of one connection
_callbacks = itertools.count(1)


def register(connection: Connection, args: Any) -> tuple[int]:
    """Accept a subscription to events of things that do not exist: nothing will fire."""
    if args[0] < 0:
        raise InvalidArgument(f"event {args[0]} is unknown")
    if len(connection.silent_callbacks) >= CALLBACKS_MAX:
        raise InvalidArgument(f"too many event callbacks on one connection (at most {CALLBACKS_MAX})")
    callback = next(_callbacks)
    connection.silent_callbacks.add(callback)
    return (callback,)


def deregister(connection: Connection, args: Any) -> None:
    if args[0] not in connection.silent_callbacks:
        raise InvalidArgument(f"callback {args[0]} is not registered")
    connection.silent_callbacks.discard(args[0])
