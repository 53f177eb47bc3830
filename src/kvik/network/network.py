"""One virtual network: its definition, whether it is active, who is on it, and one job at a time that changes it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import UUID

from kvik.conf.enums import NetworkEventLifecycleType, NetworkUpdateFlags
from kvik.conf.network import Network, format_network
from kvik.conf.network_update import update_network
from kvik.errors import KvikError, OperationInvalid, OperationTimeout, OperationUnsupported
from kvik.network import floors
from kvik.network.address_pool import exhausted
from kvik.network.dnsmasq import LeaseEntry
from kvik.network.probe import Finding, probe
from kvik.network.runtime import Runtime
from kvik.network.switch.runtime import SwitchRuntime

if TYPE_CHECKING:
    from kvik.network.networks import Networks

__all__ = ["NetworkObject"]

logger = logging.getLogger(__name__)

JOB_WAIT = 30.0  # seconds to wait for the present job
JOB_LIMIT = 60.0  # seconds that a job may take
PROBE_DELAY = 0.5  # seconds after a start: who starts and stops in one go is not made to wait
# A dnsmasq that ends by itself is started again: at once, then after a pause that doubles each time, until it has
# served for STEADY seconds. From the RESTARTS-th time on that is said.
PAUSE_FIRST, PAUSE_LAST, STEADY, RESTARTS = 0.5, 60.0, 60.0, 5


class NetworkObject:
    """Made by `Networks`. Reads are answered from memory; what changes it is a coroutine and holds its job."""

    def __init__(self, networks: Networks, definition: Network, *, persistent: bool) -> None:
        self._networks = networks
        self.definition = definition
        self.persistent = persistent
        self.autostart = False
        self.runtime: Runtime | SwitchRuntime | None = None
        self.warnings: list[str] = []  # what was found since the last start: a foreign rule set that drops, ...
        self.ports: dict[str, str] = {}  # of active interfaces: port id -> whose it is
        self._devices: dict[str, str] = {}  # of those on a pool's interface: port id -> which
        self._promised = False  # floors have changed since the kernel was told
        self._lock = asyncio.Lock()
        self._job = ""
        self._unwatch: Callable[[], None] | None = None
        self._deaths = 0  # of its dnsmasq, since that served for long
        self._served = 0.0  # monotonic seconds: since when it serves
        self._ailing = ""  # what is said of it
        self._restarting: Runtime | SwitchRuntime | None = None  # a task sees to it
        self._gone: list[str] = []  # what it stood on, as was said last
        self._exhausted = ""  # what was said of its addresses last

    def __repr__(self) -> str:
        return f"NetworkObject({self.name!r}, {'active' if self.is_active else 'inactive'})"

    # who and what

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def uuid_text(self) -> str:
        return self.definition.uuid or ""

    @property
    def uuid(self) -> bytes:
        return UUID(self.uuid_text).bytes

    @property
    def is_active(self) -> bool:
        return self.runtime is not None

    def stands_on(self, name: str) -> bool:
        """Whether it is active and would miss that interface of the host."""
        return self.runtime is not None and (name == self.bridge_name or name in self.runtime.parts)

    @property
    def document(self) -> Network:
        """The live document of an active network, else the definition."""
        return self.runtime.document if self.runtime is not None else self.definition

    @property
    def bridge_name(self) -> str | None:
        """None where no bridge is involved (macvtap, pool of host devices)."""
        return self.document.bridge_name

    @property
    def devices(self) -> Mapping[str, str]:
        """Of a pool's interfaces or PCI functions those in use: port id -> which."""
        return self._devices

    @property
    def connections(self) -> int:
        return len(self.ports)

    def xml(self, inactive: bool = False) -> str:
        """libvirt's document: of the active network, or of what the next start makes (`inactive`)."""
        if inactive or self.runtime is None:
            return format_network(self.definition, inactive=True)
        return format_network(self.runtime.document, connections=self.connections)

    def leases(self, mac: str | None = None) -> list[LeaseEntry]:
        """Addresses that are lent now; of one MAC address if that is given. OperationInvalid if it is not active."""
        if self.runtime is None:
            raise OperationInvalid(
                f"network {self.name!r} is not active", remedy=f"start it: kvik net-start {self.name}"
            )
        leases = self.runtime.leases()
        said = exhausted(self.runtime.document, leases)
        if said and not self._exhausted:
            logger.warning("network %s: %s", self.name, said)
        self._exhausted = said
        return [lease for lease in leases if mac is None or lease.mac == mac.lower()]

    def messages(self) -> list[str]:
        """What was found since it was started, and holds still. Blocks, as `leases` does."""
        if self.runtime is None:
            return [*self.warnings]
        found = [*self.warnings]
        try:
            found += [text for text in self.runtime.missing() if text not in found]
            if self._ailing and (not self._serves or time.monotonic() < self._served + STEADY):
                found.append(self._ailing)
            self.leases()
        except KvikError as error:
            return [*found, str(error)]
        return [*found, *([self._exhausted] if self._exhausted else [])]

    @property
    def _serves(self) -> bool:
        handle = self.runtime.handle if self.runtime is not None else None
        return handle is not None and handle.alive

    # who is on it

    def connect(self, port: str, owner: str, device: str = "") -> None:
        """Note that an interface (a port id of the caller's choice, such as a UUID) of a machine is on it; of a pool
        on this `device` of it."""
        if self.runtime is None:
            raise OperationInvalid(
                f"network {self.name!r} is not active", remedy=f"start it: kvik net-start {self.name}"
            )
        self.ports[port] = owner
        if device:
            self._devices[port] = device
        self._count_devices()

    def promise(self, port: str, mac: str, floor: int) -> None:
        """Guarantee an interface a part of the network's inbound rate, in kB/s; 0: no more. `keep_promises` makes it
        so. Raises as `floors.promise`."""
        if self.runtime is not None and floors.promise(self.runtime.status, port, mac, floor):
            self._promised = True

    async def keep_promises(self) -> None:
        """After `promise` and `disconnect`: the kernel does as was promised. `HostError` if it refuses."""
        if not self._promised:
            return
        async with self.job("promise bandwidth of"):
            if self.runtime is not None:
                self._promised = False
                await self._networks.run(self.runtime.keep_floors)

    def forget_promises(self) -> None:
        """Those to interfaces that nobody counts here: their machines ended while the daemon was away."""
        for each in list(self.runtime.status.port_floors) if self.runtime is not None else ():
            self._promised = True  # the others' are looked at, too
            if each.port not in self.ports:
                self.disconnect(each.port)

    def disconnect(self, port: str) -> None:
        self.ports.pop(port, None)
        if self.runtime is not None and floors.break_promise(self.runtime.status, port):
            self._promised = True
        self._devices.pop(port, None)
        self._count_devices()

    def _disconnect_all(self) -> None:
        self.ports.clear()
        self._devices.clear()
        self._count_devices()

    def _count_devices(self) -> None:
        """Into the live document, as libvirt shows it: by this the next interface chooses."""
        forward = self.runtime.document.forward if self.runtime is not None else None
        for item in forward.interfaces if forward is not None and not self.document.owns_bridge else ():
            item.connections = sum(device == item.dev for device in self._devices.values()) or None

    # jobs

    @asynccontextmanager
    async def job(self, name: str) -> AsyncIterator[None]:
        """Be the only one to change it. `OperationTimeout` past the deadlines at the top of this file."""
        try:
            async with asyncio.timeout(JOB_WAIT):
                await self._lock.acquire()
        except TimeoutError:
            raise OperationTimeout(
                f"cannot {name} network {self.name!r}: it is held by {self._job or 'others'}, "
                f"and {JOB_WAIT:g} s of waiting are over",
                remedy="try again later",
            ) from None
        self._job = name
        try:
            async with asyncio.timeout(JOB_LIMIT) as timer:
                yield
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise OperationTimeout(f"{name} of network {self.name!r} did not finish within {JOB_LIMIT:g} s") from error
        finally:
            self._job = ""
            self._lock.release()

    async def start(self) -> bool:
        """Make it active. False if it is already, which is no error. On an error nothing of it stays."""
        async with self.job("start"):
            if self.runtime is not None:
                return False
            runtime = self._networks.runtime(self.definition.copy(), persistent=self.persistent)
            try:
                await self._networks.run(runtime.start)
            finally:
                if runtime.active:  # also if whoever asked is gone by now
                    self._disconnect_all()
                    self.warnings.clear()
                    for text in runtime.found:
                        self.warn(text)
                    self.adopt(runtime)
                    self._networks.emit(self, NetworkEventLifecycleType.STARTED)
        if self._networks.probing and isinstance(runtime, Runtime):
            self._networks.spawn(self._prove(runtime))
        return True

    async def probe(self) -> list[Finding]:
        """Walk a DHCP exchange and a packet through the active network; what is found to be in the way."""
        if self.runtime is None:
            raise OperationInvalid(
                f"network {self.name!r} is not active", remedy=f"start it: kvik net-start {self.name}"
            )
        if not isinstance(self.runtime, Runtime):
            raise OperationUnsupported(f"network {self.name!r} is a switch of this session: no rule set is in its way")
        async with self._networks.probes:
            runtime = self.runtime
            return await self._networks.run(probe, runtime.document, runtime.ending) if runtime is not None else []

    async def _prove(self, runtime: Runtime) -> None:
        """After a start: warn of what keeps the network from working."""
        await asyncio.sleep(PROBE_DELAY)
        if self.runtime is not runtime:
            return
        try:
            await self._networks.run(self.leases)
            if self._exhausted:
                return  # nobody would be answered, and why is said
            for finding in await self.probe():
                self.warn(str(finding))
        except KvikError as error:
            logger.info("network %s could not be probed: %s", self.name, error)

    def adopt(self, runtime: Runtime | SwitchRuntime) -> None:
        """Be active with what `runtime` made or found."""
        self.runtime = runtime
        runtime.ending.clear()
        self._deaths, self._ailing, self._gone = 0, "", []
        if runtime.document.bridge is not None and runtime.document.bridge.zone is not None:
            self._networks.watch_zones()
        self._count_devices()  # what an earlier daemon counted is counted anew as machines are found again
        self._watch()

    async def destroy(self) -> None:
        """Make it inactive, whoever is on it. A transient one is forgotten. OperationInvalid if it is not active."""
        async with self.job("destroy"):
            if self.runtime is None:
                raise OperationInvalid(f"network {self.name!r} is not active")
            await self._stop(self.runtime)

    async def _stop(self, runtime: Runtime | SwitchRuntime) -> None:
        self.let_go()
        try:
            await self._networks.run(runtime.stop)
        finally:
            if runtime.active:  # somebody may put right what was in the way, and try again
                runtime.ending.clear()
                if self._serves:
                    self._watch()
            else:  # also if whoever asked is gone by now
                self.runtime = None
                self._disconnect_all()
                self._networks.emit(self, NetworkEventLifecycleType.STOPPED)
                if not self.persistent:
                    self._networks.forget(self)

    async def lost(self, why: str) -> None:
        """Its bridge is gone: somebody deleted it. What is left of the network is taken away."""
        async with self.job("clean"):
            runtime = self.runtime
            if runtime is None:
                return
            logger.warning("network %s is not active any more: %s", self.name, why)
            await self._stop(runtime)

    async def update(self, command: int, section: int, index: int, xml: str, flags: int) -> None:
        """virNetworkUpdate: change one part of the live network, of the definition, or (flags 0) of what it is now."""
        live = bool(flags & NetworkUpdateFlags.LIVE)
        config = bool(flags & NetworkUpdateFlags.CONFIG)
        if not live and not config:
            live, config = self.is_active, not self.is_active

        def change(document: Network) -> None:
            update_network(document, command, section, index, xml)
            self._networks.validate(document)

        await self.modify(change, live=live, config=config)

    async def modify(self, change: Callable[[Network], None], *, live: bool, config: bool) -> None:
        """Apply `change` to the live document, the definition or both: to both or to neither."""
        async with self.job("update"):
            if live and self.runtime is None:
                raise OperationInvalid(f"network {self.name!r} is not active: there is nothing live to change")
            if config and not self.persistent:
                raise OperationInvalid(f"network {self.name!r} is transient: it has no definition to change")
            definition = self.definition.copy()
            if config:
                change(definition)
            if live and self.runtime is not None:
                before = self.runtime.document
                changed = before.copy()
                change(changed)
                await self._change_live(changed)
            if config:
                try:
                    await self._networks.run(
                        self._networks.store.save, self.name, format_network(definition, inactive=True)
                    )
                except KvikError:
                    if live:
                        await self._change_live(before)
                    raise
                self.definition = definition

    async def _change_live(self, document: Network) -> None:
        assert self.runtime is not None
        self.let_go()  # its dnsmasq may be restarted: that is not a death
        try:
            await self._networks.run(self.runtime.change, document)
        finally:
            self.runtime.ending.clear()
            self._watch()

    async def set_autostart(self, on: bool) -> None:
        async with self.job("set autostart of"):
            if not self.persistent:
                raise OperationInvalid(f"network {self.name!r} is transient: it cannot start with the host")
            await self._networks.run(self._networks.store.set_autostart, self.name, on)
            self.autostart = on

    # what happens to it while nobody asks

    def _watch(self) -> None:
        """Be told when its dnsmasq ends; have one started if there is none and should be."""
        handle = self.runtime.handle if self.runtime is not None else None
        if handle is not None and handle.fileno() >= 0:
            self._unwatch = handle.on_exit(self._dnsmasq_ended)
            self._served = time.monotonic()
        elif self.runtime is not None and self.runtime.is_served:
            self._networks.spawn(self._restart_dnsmasq(self.runtime))

    def let_go(self) -> None:
        """Stop looking at it."""
        if self.runtime is not None:
            self.runtime.ending.set()
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def _dnsmasq_ended(self) -> None:
        self._unwatch = None
        if time.monotonic() >= self._served + STEADY:
            self._deaths, self._ailing = 0, ""
        if self.runtime is not None:
            self._networks.spawn(self._restart_dnsmasq(self.runtime))

    async def _restart_dnsmasq(self, runtime: Runtime | SwitchRuntime) -> None:
        """Until it serves, or the network ends. Leases are kept in its file."""
        if self._restarting is runtime:
            return
        self._restarting = runtime
        try:
            await self._restart_until_it_serves(runtime)
        finally:
            if self._restarting is runtime:
                self._restarting = None

    async def _restart_until_it_serves(self, runtime: Runtime | SwitchRuntime) -> None:
        why = "it ended by itself"
        while self.runtime is runtime and self._unwatch is None:
            pause = min(PAUSE_FIRST * 2 ** (self._deaths - 1), PAUSE_LAST) if self._deaths else 0.0
            self._deaths = min(self._deaths + 1, 1000)
            if self._deaths == RESTARTS:
                self._ailing = (
                    f"no DHCP and DNS for now: dnsmasq did not stay {RESTARTS} times ({why}); it is started again and "
                    f"again, at least every {PAUSE_LAST:g} s, and leases are kept"
                )
                logger.warning("network %s: %s", self.name, self._ailing)
            await asyncio.sleep(pause)
            try:
                async with self.job("restart dnsmasq of"):
                    if self.runtime is not runtime or self._unwatch is not None or not runtime.is_served:
                        return
                    if self._deaths < RESTARTS:
                        logger.warning("network %s: dnsmasq is started again: %s", self.name, why)
                    await self._networks.run(runtime.serve)
                    handle = runtime.handle
                    if handle is not None and handle.fileno() >= 0:
                        self._watch()
                        return
                    why = "it ended as soon as it had started"
            except KvikError as error:  # the network is held by a job for long, or dnsmasq says why it does not start
                why = str(error)

    async def check(self) -> None:
        """Put right what somebody took away on this host: the packet filter; without its bridge the network is off."""
        async with self.job("check"):
            if self.runtime is None:
                return
            runtime = self.runtime
            try:
                there = await self._networks.run(runtime.check)
                gone = await self._networks.run(runtime.missing)
            except KvikError as error:
                self.warn(str(error))
                return
            for text in gone:
                if text not in self._gone:
                    logger.warning("network %s: %s", self.name, text)
            self._gone = gone
            if self._unwatch is None:
                self._watch()
        if not there:
            await self.lost("its bridge was deleted")

    def warn(self, text: str) -> None:
        logger.warning("network %s: %s", self.name, text)
        if text not in self.warnings:
            self.warnings.append(text)
