"""All machines of one scope: who they are, where they are kept, and how they come back after the daemon was away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Hashable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from kvik.conf.domain import Domain
from kvik.conf.enums import DomainEventDefinedDetailType, DomainEventType
from kvik.errors import AlreadyExists, ConfigUnsupported, KvikError, NoDomain, OperationInvalid
from kvik.host.files import Identity
from kvik.hypervisor.driver import Driver
from kvik.manager import figures, filtering, host_names, ports, prepare, recover, renaming, starting, undefining
from kvik.manager.backup import job as backups
from kvik.manager.checkpoints import resume as checkpoints
from kvik.manager.definition import Definition
from kvik.manager.disks import Use
from kvik.manager.domain import DomainObject
from kvik.manager.events import EventHub
from kvik.manager.interfaces import look_after_networks
from kvik.manager.jobs import LIMIT
from kvik.manager.log import cut
from kvik.manager.networks import Networks, ensure_default
from kvik.manager.pivots import Pivots
from kvik.manager.saved import machine as saved_machine
from kvik.manager.saved.machine import Saved
from kvik.manager.secrets import Secrets
from kvik.manager.snapshots import resume
from kvik.manager.states import needs_daemon
from kvik.manager.storage import Pools, users
from kvik.manager.store import Store, check_name
from kvik.network import bridges
from kvik.network.filters.filters import Filters
from kvik.network.host_names import HostNames
from kvik.network.interfaces.interfaces import Interfaces
from kvik.network.switch.session import SessionNetworks
from kvik.network.tap_watch import TapWatch
from kvik.paths import Paths

logger = logging.getLogger(__name__)

LOG_INTERVAL = 5.0  # seconds between looks at the size of running machines' logs
DEFAULT_NETWORK_WAIT = 2.0  # seconds until clients are served without it
LIBVIRT_IMAGES = "/var/lib/libvirt/images"  # machines that were defined there keep their disks
CLOSE_WAIT = 5.0  # seconds for the last files to be written


class Manager:
    """`drivers` are named by the emulator they alone serve ("kvik-vmm": a file name), by domain type ("test") or VMM
    ("qemu", which serves every other type)."""

    def __init__(self, paths: Paths, drivers: Mapping[str, Driver], *, default_network: bool = False) -> None:
        """`default_network`: make the network `default` if there never was one."""
        self.paths = paths
        self.drivers = drivers
        self.default_network = default_network
        self.events = EventHub()
        self.filters = Filters(paths)
        self.taps = TapWatch()
        self.host_names = HostNames(paths)
        self.session_networks = SessionNetworks(paths) if paths.scope == "session" else None
        self.networks = Networks(paths, rules_gone=self._rules_gone, switches=self.session_networks)
        self.pools = Pools(paths)
        self.pools.users = lambda: users(self)
        for driver in drivers.values():
            driver.bases = self.bases
        self.store = Store(paths)
        self.pivots = Pivots(paths.pivots, self.store)
        self.secrets = Secrets(paths, self.store)
        self.pools.secret = lambda kind, which: self.secrets.value(kind, uuid=which.uuid, usage=which.usage)
        self.pools.secret_for = self.secrets.for_volume
        self.interfaces = Interfaces(paths)
        self.bridges = bridges
        self.warnings: list[str] = []  # what `open` had to put right or set aside
        self.autostarting: asyncio.Task[None] | None = None
        self._names: dict[str, DomainObject] = {}
        self._uuids: dict[bytes, DomainObject] = {}
        self._ids: dict[int, DomainObject] = {}
        self._last_id = 0
        self._claims: dict[str | bytes, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._removing: list[tuple[str, Sequence[Use]]] = []

    async def open(self) -> None:
        """Load definitions, find running machines again, then start (beside all else) what starts with the host.

        `HostError` if the state directories cannot be had; anything smaller is put right or set aside and warned of.
        """
        await self.store.run(self.filters.open)
        self.warnings += self.filters.warnings
        await self.secrets.open()
        self.warnings += self.secrets.warnings
        await self.networks.open()
        if self.default_network:  # a slow host is not made to wait for it: clients give a daemon seconds to listen
            await asyncio.wait([self.spawn(self._make_default_network())], timeout=DEFAULT_NETWORK_WAIT)
        self.warnings += self.networks.warnings
        await self.pools.open()
        self.warnings += self.pools.warnings
        await recover.recover(self)
        await saved_machine.load(self)
        await self._load_checkpoints()  # before images are merged, whose bitmaps they ask for
        await resume.load(self)
        await ports.settle(self)
        ports.watch(self)
        host_names.watch(self)
        self.warnings += await self.interfaces.open()
        self.autostarting = self.spawn(recover.autostart(self))
        self.spawn(self._watch_logs())
        self.spawn(look_after_networks(self))

    async def _load_checkpoints(self) -> None:
        """Of machines that run they are known already."""
        await backups.sweep(self)
        if await self.store.run(self.paths.checkpoints.is_dir):
            for domain in self.domains():
                if domain.run is None:
                    await checkpoints.load(domain)

    async def _make_default_network(self) -> None:
        try:
            await ensure_default(self.networks)
        except KvikError as error:  # machines can do without
            self.networks.warn(f"the network 'default' could not be made: {error}")

    async def close(self) -> None:
        """Let go. Machines go on."""
        cleaning = [domain.cleaning for domain in self._names.values() if domain.cleaning]
        if cleaning:
            await asyncio.wait(cleaning, timeout=CLOSE_WAIT)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=CLOSE_WAIT)
        for domain in self._names.values():
            if domain.run is not None and domain.run.machine is not None:
                domain.run.machine.detach()
        for driver in {id(driver): driver for driver in self.drivers.values()}.values():
            await driver.close()
        await self.networks.close()
        self.pools.close()
        self.interfaces.close()
        self.filters.close()
        self.taps.close()
        self.store.close()
        if self.session_networks is not None:
            self.session_networks.close()

    def _rules_gone(self) -> None:
        self.spawn(filtering.repair(self))

    # looking up

    def lookup_name(self, name: str) -> DomainObject:
        try:
            return self._names[name]
        except KeyError:
            raise NoDomain(f"no machine with name {name!r}") from None

    def lookup_uuid(self, uuid: bytes) -> DomainObject:
        try:
            return self._uuids[uuid]
        except KeyError:
            text = str(UUID(bytes=uuid)) if len(uuid) == 16 else repr(uuid)
            raise NoDomain(f"no machine with UUID {text}") from None

    def lookup_id(self, id: int) -> DomainObject:
        try:
            return self._ids[id]
        except KeyError:
            raise NoDomain(f"no running machine with id {id}") from None

    def domains(self) -> list[DomainObject]:
        return list(self._names.values())

    @property
    def running(self) -> int:
        return len(self._ids)

    @property
    def needed_by(self) -> str:
        """The name of a running machine whose <on_...> policy this process has to carry out, or ""."""
        for domain in self._ids.values():
            live = domain.live
            if live is not None and needs_daemon(live.on_poweroff, live.on_reboot, live.on_crash):
                return domain.name
        return ""

    def driver_of(self, document: Domain) -> Driver:
        """Raises `ConfigUnsupported`."""
        return self.driver_for(document.type, document.devices.emulator or "")

    def driver_for(self, type_: str, emulator: str = "") -> Driver:
        """By the last part of the emulator's path, where that names a driver; else by domain type."""
        driver = self.drivers.get(emulator.rsplit("/", 1)[-1])
        driver = driver or self.drivers.get(type_) or self.drivers.get("qemu")
        if driver is None and len(self.drivers) == 1:
            driver = next(iter(self.drivers.values()))
        if driver is None:
            raise ConfigUnsupported(f"no hypervisor driver for domain type {type_!r}", path="/domain/@type")
        return driver

    # what domains tell of themselves

    def next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def skip_ids(self, id_: int) -> None:
        """Ids below a running machine's are not given again."""
        self._last_id = max(self._last_id, id_)

    def known_uuid(self, uuid: bytes) -> DomainObject | None:
        return self._uuids.get(uuid)

    def has_name(self, name: str) -> bool:
        return name in self._names

    def renamed(self, domain: DomainObject, new: str) -> None:
        """Its files have the new name already."""
        del self._names[domain.name]
        domain.name = domain.jobs.owner = new
        self._names[new] = domain

    def activated(self, domain: DomainObject) -> None:
        self._ids[domain.id] = domain

    def deactivated(self, domain: DomainObject, id_: int) -> None:
        if self._ids.get(id_) is domain:
            del self._ids[id_]

    def add(self, domain: DomainObject) -> None:
        self._names[domain.name] = domain
        self._uuids[domain.uuid] = domain

    def forget(self, domain: DomainObject) -> None:
        if self._names.get(domain.name) is domain:
            del self._names[domain.name]
        if self._uuids.get(domain.uuid) is domain:
            del self._uuids[domain.uuid]

    def disk_uses(self, besides: DomainObject) -> Iterator[tuple[str, Sequence[Use]]]:
        """Images in use by machines that run or are about to, but for one of them."""
        for domain in self._names.values():
            if domain.run is not None and domain is not besides and domain.run.uses:
                yield domain.name, domain.run.uses
        yield from self._removing

    def bases(self) -> set[str]:
        """Where an image may lie that another one rests on although no document says so: pools, as far as they are
        directories, volumes that are devices, where images are kept by custom, and what snapshots of ours rest on."""
        found = {str(self.paths.images), *([LIBVIRT_IMAGES] if self.paths.scope == "system" else [])}
        for pool in self.pools.list():
            if not pool.document.path.startswith("/dev"):
                found.add(pool.document.path)
            elif pool.is_active:
                found.update(volume.path for volume in pool.volumes())
        for domain in self._names.values():
            found |= domain.snapshots.originals | domain.snapshots.made
        return found - {""}

    @contextlib.contextmanager
    def removing(self, identity: Identity, path: str, owner: str) -> Iterator[None]:
        """Nobody starts to use a file of machine `owner` that is about to be removed."""
        entry = (owner, (Use(identity, path, shareable=False, readonly=False),))
        self._removing.append(entry)
        try:
            yield
        finally:
            self._removing.remove(entry)

    def spawn(
        self, work: Coroutine[Any, Any, None], group: set[asyncio.Task[None]] | None = None
    ) -> asyncio.Task[None]:
        """Run beside everything else; cancelled by `close`. `group` lets the caller end it earlier."""
        task = asyncio.get_running_loop().create_task(work)
        for tasks in (self._tasks, group):
            if tasks is not None:
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        task.add_done_callback(_report)
        return task

    # defining

    @asynccontextmanager
    async def _claim(self, *keys: str | bytes) -> AsyncIterator[None]:
        """Sole right to change what is defined under these names and UUIDs; held for file operations only."""
        while taken := [key for key in keys if key in self._claims]:
            await self._claims[taken[0]].wait()
        freed = asyncio.Event()
        for key in keys:
            self._claims[key] = freed
        try:
            yield
        finally:
            for key in keys:
                self._claims.pop(key, None)  # a key may be given twice
            freed.set()

    @asynccontextmanager
    async def editing(self, domain: DomainObject) -> AsyncIterator[Domain]:
        """Change the definition in the block; at its end it is checked and written, on an error it stays as it was."""
        async with self._claim(domain.name, domain.uuid):
            document = domain.config.parse()
            yield document
            prepare.fill(document)
            await self.driver_of(document).validate(document)
            await domain.save_config(document)

    async def _prepare(self, xml: str) -> tuple[Domain, Definition]:
        document = prepare.parse(xml)
        await prepare.complete(document, self.driver_of(document), xml)
        self._give_variables(document)
        return document, Definition(document)

    def _give_variables(self, document: Domain) -> None:
        """A machine that was renamed keeps its firmware's variables by its old name: another one of that name, for
        which that place was chosen, has its own."""
        nvram, usual = document.os.nvram, str(self.paths.nvram / f"{document.name}_VARS.fd")
        if nvram is None or nvram.value != usual:
            return
        if any(usual in other.config.text for other in self.domains() if other.uuid_text != document.uuid):
            nvram.value = str(self.paths.nvram / f"{document.name}-{(document.uuid or '')[:8]}_VARS.fd")

    def _check_unique(self, config: Definition) -> DomainObject | None:
        """The machine that this would redefine. `AlreadyExists` if name or UUID belong to another."""
        by_uuid, by_name = self._uuids.get(config.uuid), self._names.get(config.name)
        if by_uuid is not None and by_uuid.name != config.name:
            raise AlreadyExists(f"machine {by_uuid.name!r} is already defined with UUID {by_uuid.uuid_text}")
        if by_name is not None and by_name.uuid != config.uuid:
            raise AlreadyExists(
                f"machine {config.name!r} already exists with UUID {by_name.uuid_text}",
                remedy=f"to replace its definition, the document must say <uuid>{by_name.uuid_text}</uuid>",
            )
        return by_uuid

    async def define(self, xml: str, *, validate: bool = False) -> DomainObject:
        """Keep a definition, new or in place of one with the same name and UUID. Durable when this returns."""
        document, config = await self._prepare(xml)
        if validate:
            _refuse_unknown(document)
        async with self._claim(config.name, config.uuid):
            domain = self._check_unique(config)
            await self.store.save_definition(config.name, config.text)
            if domain is None:
                domain = DomainObject(self, config, persistent=True)
                self.add(domain)
                detail = DomainEventDefinedDetailType.ADDED
            else:
                detail = (
                    DomainEventDefinedDetailType.UPDATED if domain.persistent else DomainEventDefinedDetailType.ADDED
                )
                domain.config = config
                domain.persistent = True
                domain.updated = domain.is_active
                with contextlib.suppress(KvikError):  # a status that says "transient" only costs a definition's link
                    await domain.save_status()
            domain.emit("lifecycle", event=DomainEventType.DEFINED, detail=detail)
            return domain

    async def create_xml(
        self,
        xml: str,
        *,
        paused: bool = False,
        validate: bool = False,
        files: Mapping[str, int] | None = None,
        autodestroy: Hashable | None = None,
        saved: Saved | None = None,
        reset_nvram: bool = False,
    ) -> DomainObject:
        """Start a machine that is forgotten when it ends; or run a defined one for once by this document. `saved`: what
        it goes on from instead of booting. `reset_nvram`: its firmware's variables are made anew."""
        document, config = await self._prepare(xml)
        if validate:
            _refuse_unknown(document)
        async with self._claim(config.name, config.uuid):
            domain = self._check_unique(config)
            if domain is None:
                domain = DomainObject(self, config, persistent=False)
                self.add(domain)
            elif domain.is_active or domain.starting:
                raise OperationInvalid(
                    f"machine {domain.name!r} is already running", remedy="give the document another <name> and <uuid>"
                )
        saved_machine.check_no_managed_save(domain, "running it by another document")
        try:
            async with domain.jobs.hold("start", limit=starting.LONG if saved is not None else LIMIT):
                await starting.boot(
                    domain, paused, files or {}, autodestroy, config=config, saved=saved, reset_nvram=reset_nvram
                )
        except BaseException:
            if not domain.persistent and not domain.is_active:
                self.forget(domain)
            raise
        return domain

    async def undefine(self, domain: DomainObject, flags: int) -> None:
        """Forget the definition; a machine that runs goes on as a transient one."""
        async with self._claim(domain.name, domain.uuid):
            await undefining.undefine(self, domain, flags)

    async def rename(self, domain: DomainObject, new: str) -> None:
        check_name(new)
        async with domain.jobs.hold("rename"), self._claim(domain.name, domain.uuid, new):
            await renaming.rename(self, domain, new)

    # everything at once

    async def client_gone(self, client: Hashable) -> None:
        """End the machines that were started with `autodestroy=client`."""
        mine = [domain for domain in self._ids.values() if domain.run and domain.run.autodestroy == client]
        for result in await asyncio.gather(*(domain.destroy() for domain in mine), return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, OperationInvalid):
                logger.warning("a machine of a client that is gone was not ended: %s", result)

    async def all_stats(
        self, domains: Sequence[DomainObject], groups: frozenset[str] = frozenset(), *, nowait: bool = False
    ) -> list[dict[str, int | str]]:
        """In the order given. Stuck machines are answered for from memory, within one short deadline for all."""
        return await figures.all_stats(domains, groups, nowait)

    async def _watch_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_INTERVAL)
            for domain in list(self._ids.values()):
                await self.store.run(domain.log.rotate)
                for path in domain.output_logs():
                    await self.store.run(cut, path)


def _refuse_unknown(document: Domain) -> None:
    """Strict validation: nothing in the document may be left unread."""
    warnings = document.warnings()
    if warnings:
        raise ConfigUnsupported("; ".join(warnings[:5]))


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a background task failed: %s", error, exc_info=error)
