"""From the networks' events to the clients that asked for them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from kvik.errors import InvalidArgument
from kvik.rpc import message as m
from kvik.rpc import program as programs

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection
    from kvik.manager.networks import NetworkObject, Networks

__all__ = ["LIFECYCLE", "METADATA_CHANGE", "NetworkEvents"]

LIFECYCLE, METADATA_CHANGE = 0, 1  # virNetworkEventID
CALLBACKS_MAX = 1024  # of one connection


class _Callback(NamedTuple):
    connection: Connection
    number: int
    uuid: bytes | None  # one network only


class NetworkEvents:
    """Who asked for what. Ids are of the whole daemon, so that no two callbacks are ever mixed up."""

    def __init__(self, networks: Networks) -> None:
        self._ids = itertools.count(1)
        self._callbacks: dict[int, _Callback] = {}
        self._owned: dict[Connection, set[int]] = {}
        self._unsubscribe = networks.subscribe(self._lifecycle)

    def close(self) -> None:
        self._unsubscribe()

    def add(self, connection: Connection, number: int, uuid: bytes | None) -> int:
        if number not in (LIFECYCLE, METADATA_CHANGE):
            raise InvalidArgument(f"event {number} of networks is unknown")
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

    def metadata_changed(self, network: NetworkObject, kind: int, uri: str | None) -> None:
        self._deliver(network, METADATA_CHANGE, "NETWORK_EVENT_CALLBACK_METADATA_CHANGE", kind, uri)

    def _lifecycle(self, network: NetworkObject, event: int, detail: int) -> None:
        self._deliver(network, LIFECYCLE, "NETWORK_EVENT_LIFECYCLE", event, detail)

    def _deliver(self, network: NetworkObject, number: int, name: str, *fields: int | str | None) -> None:
        reference = (network.name, network.uuid)
        for id_, callback in list(self._callbacks.items()):
            if callback.number == number and callback.uuid in (None, network.uuid):
                callback.connection.send_event(m.event(programs.remote()[name], (id_, reference, *fields)))
