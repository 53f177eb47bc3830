"""Networks in memory, with the real ones' interface: for what the daemon makes of calls, not for what networks do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

from kvik.conf.network import Network, complete_network, format_network, parse_network
from kvik.errors import NoNetwork, OperationInvalid
from kvik.network.dnsmasq import LeaseEntry

DEFINED, UNDEFINED, STARTED, STOPPED = range(4)


class FakeNetwork:
    def __init__(self, networks: FakeNetworks, document: Network, *, persistent: bool) -> None:
        self.networks = networks
        self.definition = document
        self.live: Network | None = None
        self.persistent = persistent
        self.autostart = False
        self.warnings: list[str] = []
        self.updates: list[tuple[Any, ...]] = []
        self.ports: dict[str, str] = {}
        self.lent: list[LeaseEntry] = []
        self.failure: Exception | None = None

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def uuid(self) -> bytes:
        return UUID(self.definition.uuid).bytes

    @property
    def is_active(self) -> bool:
        return self.live is not None

    @property
    def document(self) -> Network:
        return self.live or self.definition

    @property
    def bridge_name(self) -> str | None:
        return self.document.bridge_name

    def xml(self, inactive: bool = False) -> str:
        return format_network(self.definition if inactive else self.document, inactive=inactive)

    async def start(self) -> bool:
        if self.failure is not None:
            raise self.failure
        if self.live is not None:
            return False
        self.live = self.definition.copy()
        self.networks.emit(self, STARTED)
        return True

    async def destroy(self) -> None:
        if self.live is None:
            raise OperationInvalid(f"network {self.name!r} is not active")
        self.live = None
        self.networks.emit(self, STOPPED)
        if not self.persistent:
            self.networks.all.remove(self)

    async def set_autostart(self, on: bool) -> None:
        self.autostart = on

    async def update(self, *arguments: Any) -> None:
        self.updates.append(arguments)

    async def modify(self, change: Callable[[Network], None], *, live: bool, config: bool) -> None:
        if live:
            if self.live is None:
                raise OperationInvalid(f"network {self.name!r} is not active")
            change(self.live)
        if config:
            change(self.definition)

    def messages(self) -> list[str]:
        return [*self.warnings]

    def leases(self, mac: str | None = None) -> list[LeaseEntry]:
        return [lease for lease in self.lent if mac in (None, lease.mac)]


class FakeNetworks:
    def __init__(self) -> None:
        self.all: list[FakeNetwork] = []
        self.callbacks: list[Callable[[Any, int, int], None]] = []

    def list(self) -> list[FakeNetwork]:
        return [*self.all]

    def _find(self, what: object, test: Callable[[FakeNetwork], bool]) -> FakeNetwork:
        for network in self.all:
            if test(network):
                return network
        raise NoNetwork(f"no network {what!r}")

    def lookup_name(self, name: str) -> FakeNetwork:
        return self._find(name, lambda network: network.name == name)

    def lookup_uuid(self, uuid: bytes) -> FakeNetwork:
        return self._find(uuid.hex(), lambda network: network.uuid == uuid)

    def _add(self, xml: str, *, persistent: bool) -> FakeNetwork:
        document = parse_network(xml)
        complete_network(document)
        network = FakeNetwork(self, document, persistent=persistent)
        self.all.append(network)
        return network

    async def define(self, xml: str) -> FakeNetwork:
        network = self._add(xml, persistent=True)
        self.emit(network, DEFINED)
        return network

    async def create_xml(self, xml: str) -> FakeNetwork:
        network = self._add(xml, persistent=False)
        await network.start()
        return network

    async def undefine(self, network: FakeNetwork) -> None:
        network.persistent = False
        if network.live is None:
            self.all.remove(network)
        self.emit(network, UNDEFINED)

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def subscribe(self, callback: Callable[[Any, int, int], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def emit(self, network: FakeNetwork, event: int, detail: int = 0) -> None:
        for callback in self.callbacks:
            callback(network, event, detail)
