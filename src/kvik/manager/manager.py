"""All machines of one scope. SIGNATURES FIRST: bodies follow."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from kvik.hypervisor.driver import Driver
from kvik.manager.domain import DomainObject
from kvik.manager.events import EventHub
from kvik.paths import Paths


class Manager:
    paths: Paths
    drivers: Mapping[str, Driver]
    events: EventHub

    def __init__(self, paths: Paths, drivers: Mapping[str, Driver]) -> None: ...

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    def lookup_name(self, name: str) -> DomainObject: ...  # NoDomain
    def lookup_uuid(self, uuid: bytes) -> DomainObject: ...
    def lookup_id(self, id: int) -> DomainObject: ...
    def domains(self) -> list[DomainObject]: ...
    def active_ids(self) -> list[int]: ...
    @property
    def running(self) -> int: ...  # number of active machines (the session daemon ends when idle)

    async def define(self, xml: str, *, validate: bool = False) -> DomainObject: ...
    async def create_xml(
        self,
        xml: str,
        *,
        paused: bool = False,
        validate: bool = False,
        files: Mapping[str, int] | None = None,
        autodestroy: Hashable | None = None,
    ) -> DomainObject: ...
    async def client_gone(self, client: Hashable) -> None: ...  # ends the machines started with autodestroy=client
    async def all_stats(
        self, domains: Sequence[DomainObject], groups: frozenset[str] = frozenset(), *, nowait: bool = False
    ) -> list[dict[str, int | str]]: ...
