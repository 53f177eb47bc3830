"""Who asked for events of objects of one kind (networks, storage pools, secrets), of one of them or of all."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from kvik.errors import InvalidArgument
from kvik.rpc import message as m
from kvik.rpc import program as programs

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvik.daemon.connection import Connection

__all__ = ["CALLBACKS_MAX", "Subscriptions"]

CALLBACKS_MAX = 1024  # of one connection


class _Callback(NamedTuple):
    connection: Connection
    number: int
    uuid: bytes | None  # one object only


class Subscriptions:
    """Ids are of all objects of the kind, so that no two callbacks are ever mixed up."""

    def __init__(self, what: str, numbers: Collection[int]) -> None:
        """`what` the events are of, in the plural, and the numbers of those that there are."""
        self._what = what
        self._numbers = numbers
        self._ids = itertools.count(1)
        self._callbacks: dict[int, _Callback] = {}
        self._owned: dict[Connection, set[int]] = {}

    def add(self, connection: Connection, number: int, uuid: bytes | None) -> int:
        if number not in self._numbers:
            raise InvalidArgument(f"event {number} of {self._what} is unknown")
        owned = self._owned.setdefault(connection, set())
        if len(owned) >= CALLBACKS_MAX:
            raise InvalidArgument(f"too many event callbacks on one connection (at most {CALLBACKS_MAX})")
        callback = next(self._ids) & 0x7FFFFFFF
        self._callbacks[callback] = _Callback(connection, number, uuid)
        owned.add(callback)
        return callback

    def remove(self, connection: Connection, callback: int) -> None:
        owned = self._owned.get(connection, set())
        if callback not in owned:
            raise InvalidArgument(f"event callback {callback} is not registered")
        owned.discard(callback)
        del self._callbacks[callback]

    def drop(self, connection: Connection) -> None:
        """Forget everything that `connection` asked for."""
        for callback in self._owned.pop(connection, ()):
            del self._callbacks[callback]

    @property
    def count(self) -> int:
        """How many subscriptions there are."""
        return len(self._callbacks)

    def deliver(self, name: str, uuid: bytes, number: int, procedure: str, *fields: int | str | None) -> None:
        """Event `number` of the object with this name and UUID, to all who asked for it."""
        self.send((name, uuid), uuid, number, procedure, *fields)

    def send(
        self, reference: tuple[object, ...], uuid: bytes, number: int, procedure: str, *fields: int | str | None
    ) -> None:
        """The same of an object that the wire names by `reference`."""
        for id_, callback in list(self._callbacks.items()):
            if callback.number == number and callback.uuid in (None, uuid):
                data = m.event(programs.remote()[procedure], (id_, reference, *fields))
                callback.connection.send_event(data)
