"""From the networks' events to the clients that asked for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.daemon.subscriptions import Subscriptions

if TYPE_CHECKING:
    from kvik.manager.networks import NetworkObject, Networks

__all__ = ["LIFECYCLE", "METADATA_CHANGE", "NetworkEvents"]

LIFECYCLE, METADATA_CHANGE = 0, 1  # virNetworkEventID


class NetworkEvents(Subscriptions):
    def __init__(self, networks: Networks) -> None:
        super().__init__("networks", (LIFECYCLE, METADATA_CHANGE))
        self._unsubscribe = networks.subscribe(self._lifecycle)

    def close(self) -> None:
        self._unsubscribe()

    def metadata_changed(self, network: NetworkObject, kind: int, uri: str | None) -> None:
        procedure = "NETWORK_EVENT_CALLBACK_METADATA_CHANGE"
        self.deliver(network.name, network.uuid, METADATA_CHANGE, procedure, kind, uri)

    def _lifecycle(self, network: NetworkObject, event: int, detail: int) -> None:
        self.deliver(network.name, network.uuid, LIFECYCLE, "NETWORK_EVENT_LIFECYCLE", event, detail)
