"""One domain: libvirt's verbs in snake_case, each one call to the daemon.

`flags` are libvirt's of the procedure; 0 means what virsh does without options. For settings they are
virDomainModificationImpact: 0 current, 1 live, 2 config, 3 both.
"""

from __future__ import annotations

from kvik.client.handle import Handle
from kvik.client.stream import Stream
from kvik.errors import NoSupport
from kvik.named import NamedTuple
from kvik.rpc.program import qemu, remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from kvik.client.connection import Connection

SCREENSHOT_MAX = 256 * 1024 * 1024
_REPLY_SLACK = 10.0  # seconds beyond a deadline that the daemon keeps itself


class DomainInfo(NamedTuple):
    """virDomainInfo: memory in KiB, CPU time in ns."""

    state: int
    max_memory: int
    memory: int
    vcpus: int
    cpu_time: int


class DomainState(NamedTuple):
    state: int
    reason: int


class BlockInfo(NamedTuple):
    """Bytes: what the guest may use, what is allocated on the host, the size of the file there."""

    capacity: int
    allocation: int
    physical: int


class BlockStats(NamedTuple):
    rd_req: int
    rd_bytes: int
    wr_req: int
    wr_bytes: int
    errs: int


class InterfaceStats(NamedTuple):
    rx_bytes: int
    rx_packets: int
    rx_errs: int
    rx_drop: int
    tx_bytes: int
    tx_packets: int
    tx_errs: int
    tx_drop: int


class InterfaceAddress(NamedTuple):
    """One address of a guest's interface; `family` is "ipv4" or "ipv6"."""

    interface: str
    mac: str | None
    family: str
    address: str
    prefix: int


class VcpuInfo(NamedTuple):
    """`state`: 0 offline, 1 running, 2 blocked; `cpu_time` in ns; `cpu`: the host's, -1 when unknown."""

    number: int
    state: int
    cpu_time: int
    cpu: int
    affinity: bytes


class ControlInfo(NamedTuple):
    """The monitor's state (0 ok, 1 job, 2 occupied, 3 error), and ms since it entered it."""

    state: int
    details: int
    state_time: int


class JobInfo(NamedTuple):
    """virDomainJobInfo: times in ms, sizes in bytes; `type` 0 is no job."""

    type: int
    time_elapsed: int
    time_remaining: int
    data_total: int
    data_processed: int
    data_remaining: int
    mem_total: int
    mem_processed: int
    mem_remaining: int
    file_total: int
    file_processed: int
    file_remaining: int


class Stage(NamedTuple):
    """A step from start to ready. `state`: 0 waiting, 1 done, 2 stalled, 3 not expected; `seconds` since the start."""

    name: str
    seconds: float
    state: int
    detail: str


class Readiness(NamedTuple):
    ready: bool
    stages: list[Stage]


class ExecResult(NamedTuple):
    """A command's end. `signal` 0: it exited by itself; `truncated`: output was cut at the agent's limit."""

    exitcode: int
    signal: int
    stdout: bytes
    stderr: bytes
    truncated: bool


# virDomainMemoryStatTags, by virsh's names.
MEMORY_TAGS = (
    "swap_in", "swap_out", "major_fault", "minor_fault", "unused", "available", "actual", "rss", "usable",
    "last_update", "disk_caches", "hugetlb_pgalloc", "hugetlb_pgfail",
)  # fmt: skip


class Domain(Handle):
    """A handle: name, UUID and id at the time it was made. Comparing compares UUIDs."""

    __slots__ = ("id",)

    def __init__(self, connection: Connection, name: str, uuid: bytes, id: int) -> None:
        super().__init__(connection, name, uuid)
        self.id = id  # -1: was not running

    def __repr__(self) -> str:
        return f"<Domain {self.name} {self.uuid} id {self.id}>"

    @property
    def ref(self) -> tuple[str, bytes, int]:
        """How procedures name the domain."""
        return (self.name, self.uuid_bytes, self.id)

    def _call(self, procedure: str, *values: Any, timeout: float | None = None) -> Any:
        return self.connection.call(procedure, self.ref, *values, timeout=timeout)

    # --- life cycle ---

    def start(self, flags: int = 0) -> None:
        """virDomainCreateFlags: 1 paused, 2 destroyed with this connection, 8 forget a saved state."""
        self.id = self._call("DOMAIN_CREATE_WITH_FLAGS", flags)[0][2]

    def shutdown(self, flags: int = 0) -> None:
        """Ask the guest to power off; returns at once. virDomainShutdownFlagValues: 1 ACPI, 2 agent."""
        self._call("DOMAIN_SHUTDOWN_FLAGS", flags)

    def reboot(self, flags: int = 0) -> None:
        self._call("DOMAIN_REBOOT", flags)

    def reset(self) -> None:
        """As the reset button."""
        self._call("DOMAIN_RESET", 0)

    def suspend(self) -> None:
        self._call("DOMAIN_SUSPEND")

    def resume(self) -> None:
        self._call("DOMAIN_RESUME")

    def destroy(self, flags: int = 0) -> None:
        """Pull the plug. `flags` 1: gracefully (the VMM may flush first)."""
        self._call("DOMAIN_DESTROY_FLAGS", flags)
        self.id = -1

    def undefine(self, flags: int = 0) -> None:
        """virDomainUndefineFlagsValues: 1 managed save, 2 snapshots' metadata, 4 NVRAM, 8 keep NVRAM."""
        self._call("DOMAIN_UNDEFINE_FLAGS", flags)

    def rename(self, name: str) -> None:
        self._call("DOMAIN_RENAME", name, 0)
        self.name = name

    # --- what it is ---

    def xml(self, flags: int = 0) -> str:
        """virDomainXMLFlags: 1 secure, 2 inactive, 8 migratable."""
        return str(self._call("DOMAIN_GET_XML_DESC", flags)[0])

    def info(self) -> DomainInfo:
        return DomainInfo(*self._call("DOMAIN_GET_INFO"))

    def state(self) -> DomainState:
        return DomainState(*self._call("DOMAIN_GET_STATE", 0))

    def is_active(self) -> bool:
        return bool(self._call("DOMAIN_IS_ACTIVE")[0])

    def is_persistent(self) -> bool:
        return bool(self._call("DOMAIN_IS_PERSISTENT")[0])

    def is_updated(self) -> bool:
        return bool(self._call("DOMAIN_IS_UPDATED")[0])

    def has_managed_save(self) -> bool:
        return bool(self._call("DOMAIN_HAS_MANAGED_SAVE_IMAGE", 0)[0])

    def os_type(self) -> str:
        return str(self._call("DOMAIN_GET_OS_TYPE")[0])

    def control_info(self) -> ControlInfo:
        return ControlInfo(*self._call("DOMAIN_GET_CONTROL_INFO", 0))

    def messages(self, flags: int = 0) -> list[str]:
        """Warnings: of the document (flag 1), why the machine is as it is (flag 2), or both (0)."""
        return list(self._call("DOMAIN_GET_MESSAGES", flags)[0])

    def autostart(self) -> bool:
        return bool(self._call("DOMAIN_GET_AUTOSTART")[0])

    def set_autostart(self, on: bool) -> None:
        self._call("DOMAIN_SET_AUTOSTART", int(on))

    def metadata(self, kind: int, uri: str | None = None, flags: int = 0) -> str:
        """virDomainMetadataType: 0 description, 1 title, 2 element (its namespace in `uri`). NoMetadata if unset."""
        return str(self._call("DOMAIN_GET_METADATA", kind, uri, flags)[0])

    def set_metadata(
        self, kind: int, value: str | None, key: str | None = None, uri: str | None = None, flags: int = 0
    ) -> None:
        """None removes it."""
        self._call("DOMAIN_SET_METADATA", kind, value, key, uri, flags)

    # --- CPUs and memory ---

    def vcpus(self, flags: int = 0) -> int:
        """virDomainVcpuFlags: 1 live, 2 config, 4 maximum, 8 as the guest sees it."""
        return int(self._call("DOMAIN_GET_VCPUS_FLAGS", flags)[0])

    def set_vcpus(self, count: int, flags: int = 0) -> None:
        self._call("DOMAIN_SET_VCPUS_FLAGS", count, flags)

    def max_vcpus(self) -> int:
        return int(self._call("DOMAIN_GET_MAX_VCPUS")[0])

    def vcpu_info(self, host_cpus: int) -> list[VcpuInfo]:
        """Each vCPU, with an affinity map for `host_cpus` CPUs (least significant bit first)."""
        length = (host_cpus + 7) // 8
        rows, maps = self._call("DOMAIN_GET_VCPUS", self.info().vcpus, length)
        cut = range(0, len(maps), length)
        return [VcpuInfo._make((*row, maps[at : at + length])) for row, at in zip(rows, cut, strict=False)]

    def iothreads(self, flags: int = 0) -> list[tuple[int, bytes]]:
        """(number, map of the host CPUs that it may run on, least significant bit first)."""
        return [(int(number), bytes(cpumap)) for number, cpumap in self._call("DOMAIN_GET_IOTHREAD_INFO", flags)[0]]

    def pin_iothread(self, number: int, cpumap: bytes, flags: int = 0) -> None:
        self._call("DOMAIN_PIN_IOTHREAD", number, cpumap, flags)

    def add_iothread(self, number: int, flags: int = 0) -> None:
        self._call("DOMAIN_ADD_IOTHREAD", number, flags)

    def delete_iothread(self, number: int, flags: int = 0) -> None:
        self._call("DOMAIN_DEL_IOTHREAD", number, flags)

    def set_iothread(self, number: int, values: Mapping[str, int], flags: int = 0) -> None:
        """By libvirt's names, such as "poll_max_ns", "thread_pool_min"."""
        from kvik.rpc.typed_params import INT, UINT, ULLONG
        from kvik.rpc.xdr_types import TypedParam

        kinds = {"poll_max_ns": ULLONG, "thread_pool_min": INT, "thread_pool_max": INT}
        params = [TypedParam(name, kinds.get(name, UINT), value) for name, value in values.items()]
        self._call("DOMAIN_SET_IOTHREAD_PARAMS", number, params, flags)

    def max_memory(self) -> int:
        """KiB."""
        return int(self._call("DOMAIN_GET_MAX_MEMORY")[0])

    def set_memory(self, kib: int, flags: int = 0) -> None:
        """virDomainMemoryModFlags: 1 live, 2 config, 4 the maximum instead."""
        self._call("DOMAIN_SET_MEMORY_FLAGS", kib, flags)

    def set_max_memory(self, kib: int, flags: int = 0) -> None:
        self.set_memory(kib, flags | 4)

    def scheduler_parameters(self, flags: int = 0) -> dict[str, Any]:
        from kvik.rpc.typed_params import to_dict

        count = self._call("DOMAIN_GET_SCHEDULER_TYPE")[1]
        return to_dict(self._call("DOMAIN_GET_SCHEDULER_PARAMETERS_FLAGS", count, flags)[0])

    def set_scheduler_parameters(self, values: Mapping[str, int], flags: int = 0) -> None:
        from kvik.rpc.typed_params import LLONG, ULLONG
        from kvik.rpc.xdr_types import TypedParam

        # libvirt's own types: shares and periods unsigned, quotas signed.
        params = [TypedParam(name, LLONG if name.endswith("quota") else ULLONG, n) for name, n in values.items()]
        self._call("DOMAIN_SET_SCHEDULER_PARAMETERS_FLAGS", params, flags)

    def block_io_tune(self, disk: str, flags: int = 0) -> dict[str, Any]:
        """Limits of its requests by libvirt's names, such as "total_bytes_sec"; 0 no limit. `disk` is its target or
        the path of its image."""
        from kvik.rpc.typed_params import to_dict

        flags |= 4  # VIR_TYPED_PARAM_STRING_OKAY: without it the group's name is left out
        count = self._call("DOMAIN_GET_BLOCK_IO_TUNE", disk, 0, flags)[1]
        return to_dict(self._call("DOMAIN_GET_BLOCK_IO_TUNE", disk, count, flags)[0])

    def set_block_io_tune(self, disk: str, values: Mapping[str, int | str], flags: int = 0) -> None:
        from kvik.rpc.typed_params import STRING, ULLONG
        from kvik.rpc.xdr_types import TypedParam

        params = [TypedParam(name, STRING if isinstance(v, str) else ULLONG, v) for name, v in values.items()]
        self._call("DOMAIN_SET_BLOCK_IO_TUNE", disk, params, flags)

    def interface_parameters(self, interface: str, flags: int = 0) -> dict[str, Any]:
        """Its bandwidth by libvirt's names, such as "inbound.average": kilobytes a second, burst KiB, 0 no bound.
        `interface` is a MAC address or the name of the host's side."""
        from kvik.rpc.typed_params import to_dict

        count = self._call("DOMAIN_GET_INTERFACE_PARAMETERS", interface, 0, flags)[1]
        return to_dict(self._call("DOMAIN_GET_INTERFACE_PARAMETERS", interface, count, flags)[0])

    def set_interface_parameters(self, interface: str, values: Mapping[str, int], flags: int = 0) -> None:
        from kvik.rpc.typed_params import UINT
        from kvik.rpc.xdr_types import TypedParam

        params = [TypedParam(name, UINT, number) for name, number in values.items()]
        self._call("DOMAIN_SET_INTERFACE_PARAMETERS", interface, params, flags)

    # --- devices ---

    def attach_device(self, xml: str, flags: int = 0) -> None:
        self._call("DOMAIN_ATTACH_DEVICE_FLAGS", xml, flags)

    def detach_device(self, xml: str, flags: int = 0) -> None:
        self._call("DOMAIN_DETACH_DEVICE_FLAGS", xml, flags)

    def detach_device_alias(self, alias: str, flags: int = 0) -> None:
        self._call("DOMAIN_DETACH_DEVICE_ALIAS", alias, flags)

    def update_device(self, xml: str, flags: int = 0) -> None:
        self._call("DOMAIN_UPDATE_DEVICE_FLAGS", xml, flags)

    def screenshot(self, screen: int = 0) -> tuple[str, bytes]:
        """(MIME type, image)."""
        link = self.connection.link
        key, result = link.open_stream(remote()["DOMAIN_SCREENSHOT"], (self.ref, screen, 0), self.connection.timeout)
        return result[0] or "application/octet-stream", Stream(link, key).read_all(SCREENSHOT_MAX)

    def send_key(self, keycodes: Sequence[int], codeset: int = 0, holdtime: int = 0) -> None:
        """Press keys together for `holdtime` ms. `codeset` is virKeycodeSet, 0: Linux."""
        self._call("DOMAIN_SEND_KEY", codeset, holdtime, list(keycodes), 0)

    def inject_nmi(self) -> None:
        self._call("DOMAIN_INJECT_NMI", 0)

    def console(self, device: str | None = None, flags: int = 0) -> Stream:
        """A serial console (`device`: its alias; the first one). Flags: 1 take it from its user, 2 only safely."""
        link = self.connection.link
        key, _ = link.open_stream(remote()["DOMAIN_OPEN_CONSOLE"], (self.ref, device, flags), self.connection.timeout)
        return Stream(link, key)

    def channel(self, name: str | None = None, flags: int = 0) -> Stream:
        """A virtio channel by its target name or alias."""
        link = self.connection.link
        key, _ = link.open_stream(remote()["DOMAIN_OPEN_CHANNEL"], (self.ref, name, flags), self.connection.timeout)
        return Stream(link, key)

    # --- figures ---

    def block_info(self, disk: str) -> BlockInfo:
        """`disk`: its target (vda) or its source's path."""
        allocation, capacity, physical = self._call("DOMAIN_GET_BLOCK_INFO", disk, 0)
        return BlockInfo(capacity, allocation, physical)

    def block_stats(self, disk: str) -> BlockStats:
        return BlockStats(*self._call("DOMAIN_BLOCK_STATS", disk))

    def interface_stats(self, interface: str) -> InterfaceStats:
        return InterfaceStats(*self._call("DOMAIN_INTERFACE_STATS", interface))

    def memory_stats(self) -> dict[str, int]:
        """By virsh's names; memory in KiB. What the guest does not report is absent."""
        rows = self._call("DOMAIN_MEMORY_STATS", len(MEMORY_TAGS), 0)[0]
        return {MEMORY_TAGS[tag] if 0 <= tag < len(MEMORY_TAGS) else f"tag{tag}": value for tag, value in rows}

    def stats(self, stats: int = 0, flags: int = 0) -> dict[str, Any]:
        """Statistics of this domain alone; `stats` is virDomainStatsTypes, 0: all groups."""
        return self.connection.all_stats([self], stats, flags)[0].stats

    def interface_addresses(self, source: int = 0) -> list[InterfaceAddress]:
        """virDomainInterfaceAddressesSource: 0 DHCP leases, 1 the guest's agent, 2 ARP and ND.

        With 2 comes what was heard on its interfaces, last heard first, and what the host's own neighbour tables have;
        no prefix is known then."""
        return [
            InterfaceAddress(name, mac, "ipv6" if family else "ipv4", address, prefix)
            for name, mac, addresses in self._call("DOMAIN_INTERFACE_ADDRESSES", source, 0)[0]
            for family, address, prefix in addresses
        ]

    # --- jobs ---

    def job_info(self) -> JobInfo:
        return JobInfo(*self._call("DOMAIN_GET_JOB_INFO"))

    def job_stats(self, flags: int = 0) -> tuple[int, dict[str, Any]]:
        """(virDomainJobType, figures)."""
        from kvik.rpc.typed_params import to_dict

        kind, params = self._call("DOMAIN_GET_JOB_STATS", flags)
        return kind, to_dict(params)

    def abort_job(self) -> None:
        self._call("DOMAIN_ABORT_JOB")

    # --- the guest, from inside ---

    def agent_command(self, command: str, timeout: int = -2) -> str | None:
        """A JSON command to the guest agent. `timeout` in s; -2: wait for ever, -1: the default, 0: do not wait."""
        result = self.connection.link.call(qemu()["DOMAIN_AGENT_COMMAND"], (self.ref, command, timeout, 0))[0]
        return None if result is None else str(result)

    def monitor_command(self, command: str, *, hmp: bool = False) -> str:
        """A command to the VMM itself: QMP (JSON), or its human monitor's."""
        values = (self.ref, command, 1 if hmp else 0)
        return str(self.connection.link.call(qemu()["DOMAIN_MONITOR_COMMAND"], values)[0])

    def hostname(self, flags: int = 0) -> str:
        return str(self._call("DOMAIN_GET_HOSTNAME", flags)[0])

    def time(self) -> float:
        """The guest's clock, seconds since the epoch."""
        seconds, nanoseconds = self._call("DOMAIN_GET_TIME", 0)
        return float(seconds + nanoseconds / 1e9)

    def set_time(self, seconds: int, nanoseconds: int = 0, flags: int = 0) -> None:
        self._call("DOMAIN_SET_TIME", seconds, nanoseconds, flags)

    def guest_info(self, types: int = 0, flags: int = 0) -> dict[str, Any]:
        from kvik.rpc.typed_params import to_dict

        return to_dict(self._call("DOMAIN_GET_GUEST_INFO", types, flags)[0])

    def set_user_password(self, user: str, password: str, flags: int = 0) -> None:
        self._call("DOMAIN_SET_USER_PASSWORD", user, password, flags)

    def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        environment: Sequence[str] = (),
        timeout: float | None = None,
    ) -> ExecResult:
        """Run a command in the guest through its agent and wait for its end. OperationTimeout after `timeout` s."""
        milliseconds = 0 if timeout is None else max(1, int(timeout * 1000))
        (result,) = self.connection.call_kvik(
            "DOMAIN_EXEC", self.ref, list(argv), list(environment), stdin, milliseconds,
            timeout=None if timeout is None else timeout + _REPLY_SLACK,
        )  # fmt: skip
        exitcode, signal, stdout, stderr, truncated = result
        return ExecResult(exitcode, signal, stdout, stderr, bool(truncated))

    def wait_ready(self, timeout: float | None = None) -> Readiness:
        """Wait until the machine is booted, its address known, its agent answers; or `timeout` s have passed."""
        milliseconds = 0 if timeout is None else max(1, int(timeout * 1000))
        ready, stages = self.connection.call_kvik(
            "DOMAIN_WAIT_READY", self.ref, milliseconds, timeout=None if timeout is None else timeout + _REPLY_SLACK
        )
        return Readiness(bool(ready), [Stage(*stage) for stage in stages])

    def stages(self) -> Readiness:
        """The stages so far, without waiting. From a daemon that is not ours: none, and not ready."""
        try:
            ready, stages = self.connection.call_kvik("DOMAIN_STAGES", self.ref)
        except NoSupport:
            return Readiness(False, [])
        return Readiness(bool(ready), [Stage(*stage) for stage in stages])
