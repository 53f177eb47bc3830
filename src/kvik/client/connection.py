"""The connection: `connect(uri)`, host-wide calls, look-ups, events."""

from __future__ import annotations

from kvik.client.handle import uuid_bytes, uuid_text
from kvik.client.link import Link
from kvik.client.transport import open_transport
from kvik.client.uri import default_uri, parse_uri
from kvik.errors import AuthenticationFailed, NoDomain, NoNetwork, NoSupport, OperationInvalid
from kvik.named import NamedTuple
from kvik.rpc.program import kvik, remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Any

    from kvik.client.domain import Domain
    from kvik.client.events import AnyEvent
    from kvik.client.network import Network, NetworkFacts
    from kvik.client.secret import Secret
    from kvik.client.storage import StoragePool
    from kvik.rpc.xdr_types import Record

__all__ = ["Connection", "NodeInfo", "OverviewRow", "connect"]

CONNECT_READONLY = 1
AUTH_NONE = 0


class NodeInfo(NamedTuple):
    """virNodeInfo: model of the CPU, memory in KiB, logical CPUs, MHz, and the topology."""

    model: str
    memory: int
    cpus: int
    mhz: int
    nodes: int
    sockets: int
    cores: int
    threads: int


class OverviewRow(NamedTuple):
    """One machine as `list`, `ps` and `top` show it; `cpu_time` in ns, `id` -1 when off, `uuid` dashed."""

    name: str
    uuid: str
    id: int
    state: int
    reason: int
    accelerator: str
    vcpus: int
    mem_kib: int
    cpu_time: int
    address: str | None
    ready: bool
    persistent: bool
    autostart: bool
    title: str | None
    uptime: float = 0.0  # seconds since the start; 0 when off, or not told


class DaemonStatus(NamedTuple):
    """The daemon behind the connection; `uptime` in seconds."""

    version: str
    pid: int
    scope: str
    uptime: float
    machines: int
    running: int
    clients: int
    hypervisors: list[str]


class DomainStats(NamedTuple):
    domain: Domain
    stats: dict[str, Any]


def connect(uri: str | None = None, *, readonly: bool = False, autostart: bool = True) -> Connection:
    """Open a connection (see `kvik.client.uri`). ConnectError if nobody answers; InvalidArgument for a bad URI."""
    address = parse_uri(uri or default_uri())
    link = Link(open_transport(address, autostart=autostart))
    connection = Connection(link)
    try:
        connection.open(address.name, readonly=readonly)
    except BaseException:
        link.close()
        raise
    return connection


def version_text(number: int) -> str:
    """libvirt's version number, such as 9000000 -> "9.0.0"."""
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"


class Connection:
    """An open connection to the daemon. Blocking; for one thread at a time; a context manager."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.timeout: float | None = None  # seconds, for calls that name none themselves

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self, name: str, *, readonly: bool = False) -> None:
        """The opening sequence on a fresh link."""
        (types,) = self.call("AUTH_LIST")
        if types and AUTH_NONE not in types:
            raise AuthenticationFailed(
                f"the daemon wants authentication of type {types}, which this client does not have",
                remedy="connect through its Unix socket or ssh",
            )
        self.call("CONNECT_OPEN", name, CONNECT_READONLY if readonly else 0)

    def close(self) -> None:
        """Say goodbye and close. Machines go on. Never raises; may be called again."""
        if self.link.closed:
            return
        try:
            self.link.send(remote()["CONNECT_CLOSE"])
        except Exception:  # the daemon is gone: then there is nobody to say goodbye to
            pass
        self.link.close()

    # --- any call ---

    def call(self, procedure: str, *values: Any, timeout: float | None = None) -> Record:
        """Any procedure of libvirt's remote program by name, such as `call("DOMAIN_GET_INFO", domain.ref)`."""
        return self.link.call(remote()[procedure], values, timeout=self.timeout if timeout is None else timeout)

    def call_kvik(self, procedure: str, *values: Any, timeout: float | None = None) -> Record:
        """Any procedure of our own program. NoSupport from a daemon that is not ours (or older)."""
        return self.link.call(kvik()[procedure], values, timeout=self.timeout if timeout is None else timeout)

    def call_many(self, procedure: str, arguments: Sequence[Sequence[Any]]) -> list[Record]:
        """The same procedure for many arguments, sent ahead of the answers. The first error is raised."""
        one = remote()[procedure]
        results: list[Record] = []
        for start in range(0, len(arguments), 64):  # bounded: neither side's socket buffer may fill up both ways
            tokens = [self.link.send(one, values) for values in arguments[start : start + 64]]
            results += [self.link.wait(token, self.timeout).decode() for token in tokens]
        return results

    # --- the host ---

    def type(self) -> str:
        return str(self.call("CONNECT_GET_TYPE")[0])

    def version(self) -> str:
        """The hypervisor's version, "7.2.0"."""
        return version_text(self.call("CONNECT_GET_VERSION")[0])

    def lib_version(self) -> str:
        """The version of libvirt whose protocol the daemon speaks."""
        return version_text(self.call("CONNECT_GET_LIB_VERSION")[0])

    def hostname(self) -> str:
        return str(self.call("CONNECT_GET_HOSTNAME")[0])

    def uri(self) -> str:
        return str(self.call("CONNECT_GET_URI")[0])

    def sysinfo(self, flags: int = 0) -> str:
        return str(self.call("CONNECT_GET_SYSINFO", flags)[0])

    def capabilities(self) -> str:
        """The host's capabilities document (XML)."""
        return str(self.call("CONNECT_GET_CAPABILITIES")[0])

    def domain_capabilities(
        self,
        emulator: str | None = None,
        arch: str | None = None,
        machine: str | None = None,
        virttype: str | None = None,
        flags: int = 0,
    ) -> str:
        """What machines of a kind can have (XML)."""
        return str(self.call("CONNECT_GET_DOMAIN_CAPABILITIES", emulator, arch, machine, virttype, flags)[0])

    def max_vcpus(self, kind: str | None = None) -> int:
        return int(self.call("CONNECT_GET_MAX_VCPUS", kind)[0])

    def node_info(self) -> NodeInfo:
        model, *numbers = self.call("NODE_GET_INFO")
        text = bytes(char & 0xFF for char in model).split(b"\0")[0].decode(errors="replace")
        return NodeInfo(text, *numbers)

    def cpu_stats(self, cpu: int = -1) -> dict[str, int]:
        """CPU times of the host in ns: kernel, user, idle, iowait. -1: all CPUs together."""
        # Zero parameters asks how many there are; then the same call again fetches them.
        count = self.call("NODE_GET_CPU_STATS", cpu, 0, 0)[1]
        return dict(self.call("NODE_GET_CPU_STATS", cpu, count, 0)[0])

    def memory_stats(self, cell: int = -1) -> dict[str, int]:
        """Memory of the host in KiB: total, free, buffers, cached. -1: all NUMA cells."""
        count = self.call("NODE_GET_MEMORY_STATS", 0, cell, 0)[1]
        return dict(self.call("NODE_GET_MEMORY_STATS", count, cell, 0)[0])

    def free_memory(self) -> int:
        """Bytes."""
        return int(self.call("NODE_GET_FREE_MEMORY")[0])

    def supports_feature(self, feature: int) -> bool:
        return bool(self.call("CONNECT_SUPPORTS_FEATURE", feature)[0])

    def status(self) -> DaemonStatus:
        return DaemonStatus(*self.call_kvik("DAEMON_STATUS"))

    def shutdown_daemon(self) -> None:
        """Ask the daemon to end. Machines go on without it."""
        self.call_kvik("DAEMON_SHUTDOWN")

    # --- domains ---

    def _domain(self, reference: Sequence[Any]) -> Domain:
        from kvik.client.domain import Domain  # not at the top: `list` makes none, and it costs 3 ms

        return Domain(self, *reference)

    def domains(self, flags: int = 0) -> list[Domain]:
        """All domains, or those that virConnectListAllDomainsFlags select (1 active, 2 inactive, 4 persistent...)."""
        return [self._domain(ref) for ref in self.call("CONNECT_LIST_ALL_DOMAINS", 1, flags)[0]]

    def overview(self, flags: int = 0) -> list[OverviewRow]:
        """What a list of machines shows, in one call. Also from a daemon that is not ours, then with many calls."""
        try:
            rows = self.call_kvik("DOMAIN_OVERVIEW", flags)[0]
        except NoSupport:
            return self._overview_from_libvirt(flags)
        return [
            OverviewRow._make(
                (name, uuid_text(uuid), *rest, bool(ready), bool(persistent), bool(autostart), title, uptime)
            )
            for name, uuid, *rest, ready, persistent, autostart, title, uptime in rows
        ]

    def _overview_from_libvirt(self, flags: int) -> list[OverviewRow]:
        domains = self.domains(flags)
        refs = [(domain.ref,) for domain in domains]
        states = self.call_many("DOMAIN_GET_STATE", [(domain.ref, 0) for domain in domains])
        infos = self.call_many("DOMAIN_GET_INFO", refs)
        persistent = self.call_many("DOMAIN_IS_PERSISTENT", refs)
        return [
            OverviewRow(
                domain.name, domain.uuid, domain.id, state[0], state[1], "", info[3], info[2], info[4], None, False,
                bool(kept[0]), False, None,
            )
            for domain, state, info, kept in zip(domains, states, infos, persistent, strict=True)
        ]  # fmt: skip

    def domain(self, key: str | int) -> Domain:
        """The domain of an id, UUID or name, tried in this order as virsh does. NoDomain if there is none."""
        text = str(key)
        if text.isascii() and text.isdigit() and len(text) < 10:
            try:
                return self.lookup_id(int(text))
            except NoDomain:
                pass
        if (raw := uuid_bytes(text)) is not None:
            try:
                return self.lookup_uuid(raw)
            except NoDomain:
                pass
        return self.lookup_name(text)

    def lookup_name(self, name: str) -> Domain:
        return self._domain(self.call("DOMAIN_LOOKUP_BY_NAME", name)[0])

    def lookup_uuid(self, uuid: bytes | str) -> Domain:
        raw = uuid_bytes(uuid) if isinstance(uuid, str) else uuid
        if raw is None:
            raise NoDomain(f"{uuid!r} is not a UUID")
        return self._domain(self.call("DOMAIN_LOOKUP_BY_UUID", raw)[0])

    def lookup_id(self, number: int) -> Domain:
        return self._domain(self.call("DOMAIN_LOOKUP_BY_ID", number)[0])

    def define(self, xml: str, flags: int = 0) -> Domain:
        """Make or replace a persistent definition. `flags`: 1 validates against the schema."""
        return self._domain(self.call("DOMAIN_DEFINE_XML_FLAGS", xml, flags)[0])

    def create(self, xml: str, flags: int = 0) -> Domain:
        """Start a transient machine. `flags`: virDomainCreateFlags (1 paused, 2 destroyed with this connection)."""
        return self._domain(self.call("DOMAIN_CREATE_XML", xml, flags)[0])

    def all_stats(self, domains: Sequence[Domain] = (), stats: int = 0, flags: int = 0) -> list[DomainStats]:
        """Statistics of the given (none: all) domains; `stats` is virDomainStatsTypes (0: all groups)."""
        from kvik.rpc.typed_params import to_dict

        records = self.call("CONNECT_GET_ALL_DOMAIN_STATS", [domain.ref for domain in domains], stats, flags)[0]
        return [DomainStats(self._domain(ref), to_dict(params)) for ref, params in records]

    def domxml_to_native(self, xml: str, native_format: str = "qemu-argv", flags: int = 0) -> str:
        """The command line that a document would become."""
        return str(self.call("CONNECT_DOMAIN_XML_TO_NATIVE", native_format, xml, flags)[0])

    # --- networks ---

    def _network(self, reference: Sequence[Any]) -> Network:
        from kvik.client.network import Network

        return Network(self, *reference)

    def networks(self, flags: int = 0) -> list[Network]:
        """All virtual networks, or those that virConnectListAllNetworksFlags select (1 inactive, 2 active...)."""
        return [self._network(ref) for ref in self.call("CONNECT_LIST_ALL_NETWORKS", 1, flags)[0]]

    def network_facts(self, flags: int = 0) -> list[NetworkFacts]:
        """What a list of networks shows; the questions about all of them are sent together."""
        from kvik.client.network import NetworkFacts

        names = ("NETWORK_IS_ACTIVE", "NETWORK_GET_AUTOSTART", "NETWORK_IS_PERSISTENT")
        for last in (False, False, True):
            networks = self.networks(flags)
            refs = [(network.ref,) for network in networks]
            try:
                answers = [[bool(answer[0]) for answer in self.call_many(name, refs)] for name in names]
            except NoNetwork:  # one went away since the list was made: look again
                if last:
                    raise
            else:
                break
        rows = zip(networks, *answers, strict=True)
        return [NetworkFacts(network.name, network.uuid, *facts) for network, *facts in rows]

    def network(self, key: str) -> Network:
        """The network of a UUID or name, tried in this order as virsh does. NoNetwork if there is none."""
        if (raw := uuid_bytes(key)) is not None:
            try:
                return self.lookup_network_uuid(raw)
            except NoNetwork:
                pass
        return self.lookup_network_name(key)

    def lookup_network_name(self, name: str) -> Network:
        return self._network(self.call("NETWORK_LOOKUP_BY_NAME", name)[0])

    def lookup_network_uuid(self, uuid: bytes | str) -> Network:
        raw = uuid_bytes(uuid) if isinstance(uuid, str) else uuid
        if raw is None:
            raise NoNetwork(f"{uuid!r} is not a UUID")
        return self._network(self.call("NETWORK_LOOKUP_BY_UUID", raw)[0])

    def define_network(self, xml: str, flags: int = 0) -> Network:
        """Make or replace a persistent definition. `flags`: 1 refuses what is not understood."""
        return self._network(self.call("NETWORK_DEFINE_XML_FLAGS", xml, flags)[0])

    def create_network(self, xml: str, flags: int = 0) -> Network:
        """Start a transient network. `flags`: 1 refuses what is not understood."""
        return self._network(self.call("NETWORK_CREATE_XML_FLAGS", xml, flags)[0])

    # --- events ---

    def register(self, kind: str = "lifecycle", domain: Domain | None = None) -> int:
        """Ask for events of a kind (`kvik.client.events.EVENT_IDS`), of one domain or all. The number ends it again."""
        from kvik.client.events import EVENT_IDS
        from kvik.errors import InvalidArgument

        if kind not in EVENT_IDS:
            raise InvalidArgument(f"unknown kind of event {kind!r}", remedy=f"there are {', '.join(EVENT_IDS)}")
        ref = domain.ref if domain is not None else None
        return int(self.call("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", EVENT_IDS[kind], ref)[0])

    def register_pool(self, kind: str = "lifecycle", pool: StoragePool | None = None) -> int:
        """Ask for events of storage pools (`kvik.client.events.POOL_EVENT_IDS`), of one or all."""
        from kvik.client.events import POOL_EVENT_IDS
        from kvik.errors import InvalidArgument

        if kind not in POOL_EVENT_IDS:
            raise InvalidArgument(f"unknown kind of event {kind!r}", remedy=f"there are {', '.join(POOL_EVENT_IDS)}")
        ref = pool.ref if pool is not None else None
        return int(self.call("CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY", POOL_EVENT_IDS[kind], ref)[0])

    def deregister_pool(self, callback: int) -> None:
        self.call("CONNECT_STORAGE_POOL_EVENT_DEREGISTER_ANY", callback)

    def register_secret(self, kind: str = "lifecycle", secret: Secret | None = None) -> int:
        """Ask for events of secrets (`kvik.client.events.SECRET_EVENT_IDS`), of one or all."""
        from kvik.client.events import SECRET_EVENT_IDS
        from kvik.errors import InvalidArgument

        if kind not in SECRET_EVENT_IDS:
            raise InvalidArgument(f"unknown kind of event {kind!r}", remedy=f"there are {', '.join(SECRET_EVENT_IDS)}")
        ref = secret.ref if secret is not None else None
        return int(self.call("CONNECT_SECRET_EVENT_REGISTER_ANY", SECRET_EVENT_IDS[kind], ref)[0])

    def register_network(self, kind: str = "lifecycle", network: Network | None = None) -> int:
        """Ask for events of networks (`kvik.client.events.NETWORK_EVENT_IDS`), of one or all."""
        from kvik.client.events import NETWORK_EVENT_IDS
        from kvik.errors import InvalidArgument

        if kind not in NETWORK_EVENT_IDS:
            raise InvalidArgument(f"unknown kind of event {kind!r}", remedy=f"there are {', '.join(NETWORK_EVENT_IDS)}")
        ref = network.ref if network is not None else None
        return int(self.call("CONNECT_NETWORK_EVENT_REGISTER_ANY", NETWORK_EVENT_IDS[kind], ref)[0])

    def deregister_network(self, callback: int) -> None:
        self.call("CONNECT_NETWORK_EVENT_DEREGISTER_ANY", callback)

    def deregister(self, callback: int) -> None:
        self.call("CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY", callback)

    def next_event(self, timeout: float | None = None) -> AnyEvent | None:
        """The next event of any registered kind; None after `timeout` seconds without one."""
        import time

        from kvik.client.events import decode_event
        from kvik.rpc.message import Event

        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            message = self.link.next_event(remaining)
            if message is None:
                return None
            assert isinstance(message, Event)
            event = decode_event(message)
            if event is not None:
                return event

    def events(
        self, kinds: Sequence[str] = ("lifecycle",), domain: Domain | None = None, timeout: float | None = None
    ) -> Iterator[AnyEvent]:
        """Register `kinds` and yield their events; ends when `timeout` seconds passed without one."""
        callbacks = [self.register(kind, domain) for kind in kinds]
        try:
            while (event := self.next_event(timeout)) is not None:
                yield event
        finally:
            if not self.link.closed:
                for callback in callbacks:
                    self.deregister(callback)

    def stat_names(self) -> Mapping[str, int]:
        """Groups of statistics by virsh's option names -> virDomainStatsTypes."""
        return STATS_GROUPS


STATS_GROUPS = {
    "state": 1, "cpu-total": 2, "balloon": 4, "vcpu": 8, "interface": 16, "block": 32, "perf": 64, "iothread": 128,
    "memory": 256, "dirtyrate": 512, "vm": 1024,
}  # fmt: skip


def require_running(domain: Domain) -> None:
    """OperationInvalid unless the machine runs: for verbs that have nothing to say about one that is off."""
    if not domain.is_active():
        raise OperationInvalid(f"domain {domain.name!r} is not running", remedy=f"start it: kvik start {domain.name}")
