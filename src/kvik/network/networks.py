"""All virtual networks of one scope: who they are, where they are kept, and how they come back with the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from kvik.conf.enums import NetworkEventLifecycleType
from kvik.conf.network import Network, complete_network, format_network, parse_network
from kvik.conf.network_status import NetworkStatus
from kvik.conf.network_validate import validate_network
from kvik.conf.prepare import located
from kvik.errors import AlreadyExists, HostError, KvikError, NoNetwork, OperationInvalid
from kvik.host.netlink import Netlink
from kvik.host.packages import how_to_install
from kvik.host.process import find_program
from kvik.network import recover
from kvik.network.dnsmasq import Dnsmasq
from kvik.network.network import NetworkObject
from kvik.network.runtime import Runtime
from kvik.network.store import Store, check_name
from kvik.network.switch.document import switch_settings
from kvik.network.switch.runtime import SwitchRuntime
from kvik.network.switch.session import SessionNetworks
from kvik.network.watch import Watch
from kvik.network.zones import ZoneWatch
from kvik.paths import Paths

__all__ = ["NetworkObject", "Networks"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Callback = Callable[[NetworkObject, int, int], None]

THREADS = 4
CHECK_DELAY = 0.02  # seconds after a change of the host's networks until ours are looked at
CLOSE_WAIT = 5.0  # seconds for what runs beside to end


class Networks:
    """`open` it once, in the loop that it is used from; its threads work in the network namespace of that thread."""

    def __init__(
        self,
        paths: Paths,
        *,
        probing: bool = True,
        rules_gone: Callable[[], None] = lambda: None,
        switches: SessionNetworks | None = None,
    ) -> None:
        """`probing`: each network is walked through after its start, and what is in the way is warned of. `rules_gone`
        is called too when a table of the packet filter was deleted: somebody else's rules may be in it. `switches`:
        networks are switches in user space, as in a session."""
        self.paths = paths
        self.switches = switches
        self.store = Store(paths)
        self.warnings: list[str] = []  # what `open` had to put right or set aside
        self._names: dict[str, NetworkObject] = {}
        self._uuids: dict[bytes, NetworkObject] = {}
        self._callbacks: dict[int, Callback] = {}
        self._next = 0
        self.probing = probing
        self.probes = asyncio.Semaphore(1)  # one at a time: it may wait for seconds, and the threads are few
        self._changing = asyncio.Lock()  # of the set of networks
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: Watch | None = None
        self._zones: ZoneWatch | None = None  # from the first active network on that is in a zone
        self._rules_gone = rules_gone
        self._checking = False
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="kvik-network")

    async def open(self) -> None:
        """Load definitions, find active networks again, take away what a killed daemon left, start what starts with
        the host. `HostError` if the directories cannot be had; anything smaller is put right and warned of."""
        await recover.recover(self)
        if self.switches is not None:
            await self.run(self.switches.sweep)
        self._watch = Watch(self._link_gone, self._table_gone)
        await recover.autostart(self)

    async def close(self) -> None:
        """Let go. Networks stay as they are."""
        if self._watch is not None:
            self._watch.close()
        if self._zones is not None:
            self._zones.close()
        for network in self.list():
            network.let_go()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=CLOSE_WAIT)
        self._executor.shutdown(wait=True)

    def runtime(
        self, document: Network, *, persistent: bool, status: NetworkStatus | None = None
    ) -> Runtime | SwitchRuntime:
        """What makes the network of this document active."""
        if self.switches is not None:
            return SwitchRuntime(self.store, self.switches, document, persistent=persistent, status=status)
        return Runtime(self.store, document, persistent=persistent, status=status)

    def complete(self, document: Network, taken_bridges: Collection[str] = ()) -> None:
        """Fill in what was left out, and refuse what makes no sense or cannot be here. Raises ConfigError."""
        complete_network(document, taken_bridges)
        self.validate(document)
        if self.switches is not None:
            document.bridge = None

    def validate(self, document: Network) -> None:
        """Raises ConfigError for a complete document that makes no sense or cannot be here."""
        validate_network(document)
        if self.switches is not None:
            switch_settings(document)

    def lacks(self, document: Network) -> str:
        """What keeps a network from being of use to machines that did not ask for it; "": nothing."""
        if self.switches is not None and document.mode is not None and find_program("passt") is None:
            return f"passt is not installed: machines could not leave it ({how_to_install('passt')})"
        return ""

    # looking up

    def list(self) -> list[NetworkObject]:
        return [*self._names.values()]

    def lookup_name(self, name: str) -> NetworkObject:
        try:
            return self._names[name]
        except KeyError:
            raise NoNetwork(
                f"no network with name {name!r}", remedy="see which there are: kvik net-list --all"
            ) from None

    def lookup_uuid(self, uuid: bytes) -> NetworkObject:
        try:
            return self._uuids[uuid]
        except KeyError:
            text = str(UUID(bytes=uuid)) if len(uuid) == 16 else repr(uuid)
            raise NoNetwork(f"no network with UUID {text}") from None

    # defining

    async def define(self, xml: str) -> NetworkObject:
        """Define a network, or change the definition of one; an active one goes on as it is. Raises ConfigError,
        AlreadyExists, HostError."""
        async with self._changing:
            document, known = await self._prepare(xml)
            await self.run(self.store.save, document.name, format_network(document, inactive=True))
            if known is None:
                known = NetworkObject(self, document, persistent=True)
                self.add(known)
            else:
                known.definition = document
                known.persistent = True
                if known.runtime is not None and not known.runtime.persistent:
                    known.runtime.persistent = True
                    await self.run(known.runtime.note)
        self.emit(known, NetworkEventLifecycleType.DEFINED)
        return known

    async def create_xml(self, xml: str) -> NetworkObject:
        """Start a transient network; or, with this document, a defined one of the same name that is inactive."""
        async with self._changing:
            document, network = await self._prepare(xml)
            if network is not None and network.is_active:
                raise OperationInvalid(f"network {network.name!r} is active already")
            before = network.definition if network is not None else None
            if network is None:
                network = NetworkObject(self, document, persistent=False)
                self.add(network)
            try:
                network.definition = document
                await network.start()
            except BaseException:
                if before is None and not network.is_active:
                    await self.run(self._remove_files, network.name)
                    self.forget(network)
                raise
            finally:
                if before is not None:
                    network.definition = before
        return network

    async def undefine(self, network: NetworkObject) -> None:
        """Forget the definition; an active network goes on, transient. OperationInvalid for a transient one."""
        async with self._changing, network.job("undefine"):
            if not network.persistent:
                raise OperationInvalid(f"network {network.name!r} is transient: it has no definition")
            await self.run(self.store.remove, network.name)
            network.persistent = network.autostart = False
            if network.runtime is not None:
                network.definition = network.runtime.document.copy()
                network.runtime.persistent = False
                await self.run(network.runtime.note)
            else:
                await self.run(self._remove_files, network.name)
                self.forget(network)
        self.emit(network, NetworkEventLifecycleType.UNDEFINED)

    async def _prepare(self, xml: str) -> tuple[Network, NetworkObject | None]:
        """The document, complete and valid beside all others, and the network that it is already."""
        document = parse_network(xml)
        with located(xml):
            check_name(document.name)
            same = self._names.get(document.name)
            if same is not None and document.uuid is None:
                document.uuid = same.uuid_text
            if same is not None and document.mac is None:
                document.mac = same.definition.copy().mac
            if same is not None and document.bridge is None and document.owns_bridge and same.definition.owns_bridge:
                document.bridge = same.definition.copy().bridge
            self.complete(document, await self._taken_bridges(same) if self.switches is None else ())
        known = self._uuids.get(UUID(document.uuid).bytes)
        if same is not None and known is not same:
            raise AlreadyExists(f"network {document.name!r} already exists with uuid {same.uuid_text}")
        if known is not None and known is not same:
            raise AlreadyExists(f"network {known.name!r} is already defined with uuid {known.uuid_text}")
        for other in self._names.values():
            if other is not same and document.owns_bridge and document.bridge_name:
                for theirs in (other.definition, other.document):
                    if theirs.owns_bridge and theirs.bridge_name == document.bridge_name:
                        raise AlreadyExists(
                            f"bridge name {document.bridge_name!r} already exists: network {other.name!r} has it",
                            remedy="name another, or leave the name out",
                        )
        return document, same

    async def _taken_bridges(self, besides: NetworkObject | None) -> set[str]:
        def of_host() -> set[str]:
            with Netlink() as netlink:
                return {link.name for link in netlink.links()}

        taken = await self.run(of_host)
        for network in self._names.values():
            if network is not besides:
                taken |= {name for name in (network.definition.bridge_name, network.bridge_name) if name}
        return taken

    def _remove_files(self, name: str) -> None:
        """What its dnsmasq was told, and its leases: nobody comes back for them. Blocks."""
        with contextlib.suppress(HostError):
            Dnsmasq(name, self.store.data, self.store.status).forget()

    # what networks tell of themselves

    def add(self, network: NetworkObject) -> None:
        self._names[network.name] = network
        self._uuids[network.uuid] = network

    def forget(self, network: NetworkObject) -> None:
        """It is neither defined nor active: nothing of it stays."""
        if self._names.get(network.name) is network:
            del self._names[network.name]
        if self._uuids.get(network.uuid) is network:
            del self._uuids[network.uuid]

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Call `callback(network, event, detail)` with libvirt's numbers from now on, in the loop, in order; the
        returned function ends that."""
        key = self._next
        self._next += 1
        self._callbacks[key] = callback
        return lambda: self._callbacks.pop(key, None) and None

    def emit(self, network: NetworkObject, event: int, detail: int = 0) -> None:
        for callback in list(self._callbacks.values()):
            try:
                callback(network, event, detail)
            except Exception:
                logger.exception("a subscriber failed on event %s of network %s", event, network.name)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        logger.warning("%s", text)

    # what the kernel tells, and the D-Bus

    def watch_zones(self) -> None:
        """A network that is in a zone of firewalld is active."""
        if self._zones is None:
            self._zones = ZoneWatch(self._table_gone)

    def _link_gone(self, name: str) -> None:
        if not name or any(network.stands_on(name) for network in self.list()):
            self._check_soon()

    def _table_gone(self) -> None:
        self._rules_gone()
        if any(network.is_active for network in self.list()):
            self._check_soon()

    def _check_soon(self) -> None:
        """Look at all active networks, once for many changes together."""
        if not self._checking:
            self._checking = True
            self.spawn(self._check())

    async def _check(self) -> None:
        await asyncio.sleep(CHECK_DELAY)
        self._checking = False
        for network in self.list():
            if network.is_active:
                try:
                    await network.check()
                except KvikError as error:  # it is held by a job, say: the others are looked at all the same
                    network.warn(f"it could not be checked after a change on this host: {error}")

    # work

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a blocking function in a thread. A caller that is cancelled is held until it has returned: what it
        asked for is done or not, and nothing of it can come after what the next one asks for."""
        call = functools.partial(function, *args, **kwargs)
        future = asyncio.get_running_loop().run_in_executor(self._executor, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            raise

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run beside everything else; cancelled by `close`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_report)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("a task of the networks failed", exc_info=task.exception())
