"""A connection that answers from a table and remembers what it was asked, with the real client's signatures."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvik as package
from kvik.cli.context import Context
from kvik.cli.main import load, main, parse_globals, run_verb
from kvik.cli.options import parse
from kvik.client import Connection, Domain, Network, connect
from kvik.client.connection import DaemonStatus, DomainStats, NodeInfo, OverviewRow
from kvik.client.domain import (
    BlockInfo,
    ControlInfo,
    DomainInfo,
    DomainState,
    ExecResult,
    InterfaceAddress,
    InterfaceStats,
    Readiness,
    Stage,
    VcpuInfo,
)
from kvik.client.network import DhcpLease, NetworkFacts, NetworkPort
from kvik.errors import KvikError, NoDomain, NoMetadata, NoNetwork, OperationUnsupported

UUID1 = "11111111-2222-3333-4444-555555555555"
UUID2 = "99999999-8888-7777-6666-555555555555"

NETWORK_XML = """\
<network>
  <name>lan</name>
  <bridge name='virbr7'/>
</network>
"""

XML = """\
<domain type='qemu' id='3'>
  <name>tiny-1</name>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/images/a.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <source file='/images/a.iso'/>
      <target dev='sda' bus='sata'/>
      <readonly/>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='sdb' bus='sata'/>
      <readonly/>
    </disk>
    <interface type='bridge'>
      <mac address='52:54:00:aa:bb:cc'/>
      <source bridge='br0'/>
      <target dev='vnet0'/>
      <model type='virtio'/>
    </interface>
    <interface type='user'>
      <mac address='52:54:00:aa:bb:cd'/>
      <link state='down'/>
    </interface>
    <console type='pty' tty='/dev/pts/7'/>
    <graphics type='vnc' port='5901' listen='127.0.0.1' passwd='pw'/>
    <graphics type='spice' port='5902' tlsPort='5903' listen='0.0.0.0'/>
  </devices>
</domain>
"""


FILTER = ("mail", bytes(range(16)))


def row(name: str, uuid: str, number: int, **fields: Any) -> OverviewRow:
    facts = {
        "state": 1 if number > 0 else 5,
        "reason": 1,
        "accelerator": "tcg" if number > 0 else "",
        "vcpus": 2,
        "mem_kib": 1 << 20,
        "cpu_time": 5_000_000_000,
        "address": "10.0.2.15" if number > 0 else None,
        "ready": number > 0,
        "persistent": True,
        "autostart": False,
        "title": None,
        "uptime": 61.0 if number > 0 else 0.0,
        **fields,
    }
    return OverviewRow(name=name, uuid=uuid, id=number, **facts)


class FakeDomain:
    def __init__(self, connection: FakeConnection, name: str, uuid: str, number: int) -> None:
        self.connection = connection
        self.name = name
        self.uuid = uuid
        self.uuid_bytes = bytes.fromhex(uuid.replace("-", ""))
        self.id = number
        self.ref = (name, self.uuid_bytes, number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeDomain) and other.uuid == self.uuid

    def __hash__(self) -> int:
        return hash(self.uuid)

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def __getattr__(self, name: str) -> Any:
        return self.connection.method(Domain, name, self)


class FakeNetwork:
    """Its calls are remembered, and its replies found, under `net_` and the method's name."""

    def __init__(self, connection: FakeConnection, name: str, uuid: str) -> None:
        self.connection = connection
        self.name = name
        self.uuid = uuid

    def __getattr__(self, name: str) -> Any:
        return self.connection.method(Network, name, self, "net_")


class FakePort:
    def __init__(self, connection: FakeConnection, uuid: str) -> None:
        self.connection = connection
        self.name = self.uuid = uuid

    def __getattr__(self, name: str) -> Any:
        return self.connection.method(NetworkPort, name, self, "port_")


class FakeConnection:
    """`calls`: every call as (name, arguments...). `replies[name]`: a value, a callable, or an exception."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.running = FakeDomain(self, "tiny-1", UUID1, 3)
        self.off = FakeDomain(self, "web", UUID2, -1)
        self.lan = FakeNetwork(self, "lan", UUID1)
        self.lab = FakeNetwork(self, "lab", UUID2)
        self.port = FakePort(self, UUID2)
        self.rows = [row("web", UUID2, -1, title="The web"), row("tiny-1", UUID1, 3)]
        self.replies: dict[str, Any] = {
            "domains": lambda flags=0: [self.off] if flags & 256 else [self.running, self.off],
            "domain": self.find,
            "overview": lambda flags=0: list(self.rows),
            "xml": XML,
            "info": DomainInfo(1, 1 << 20, 1 << 20, 2, 1_500_000_000),
            "state": DomainState(1, 1),
            "os_type": "hvm",
            "is_persistent": True,
            "autostart": False,
            "has_managed_save": False,
            "is_active": True,
            "control_info": ControlInfo(0, 0, 0),
            "messages": [],
            "metadata": "words",
            "vcpus": 2,
            "vcpu_info": [VcpuInfo(0, 1, 2_000_000_000, 1, b"\x03"), VcpuInfo(1, 1, 0, -1, b"\x01")],
            "memory_stats": lambda *args: {"total": 100, "free": 50} if args else {"actual": 1048576, "rss": 4096},
            "interface_stats": InterfaceStats(1, 2, 3, 4, 5, 6, 7, 8),
            "interface_parameters": {"inbound.average": 100, "inbound.peak": 0, "outbound.average": 50},
            "interface_addresses": [
                InterfaceAddress("eth0", "52:54:00:aa:bb:cc", "ipv4", "10.0.2.15", 24),
                InterfaceAddress("eth0", "52:54:00:aa:bb:cc", "ipv6", "fe80::1", 64),
            ],
            "block_info": BlockInfo(1 << 30, 1 << 20, 2 << 20),
            "stats": {
                "block.count": 1,
                "block.0.name": "vda",
                "block.0.path": "/images/a.qcow2",
                "block.0.rd.reqs": 10,
                "block.0.rd.bytes": 5120,
            },
            "all_stats": lambda domains=(), stats=0, flags=0: [
                DomainStats(self.running, {"state.state": 1, "state.on": True})
            ],
            "scheduler_parameters": {"cpu_shares": 1024},
            "screenshot": ("image/png", b"\x89PNG"),
            "hostname": "guest-1",
            "time": 0.0,
            "guest_info": {"os.name": "Debian"},
            "agent_command": '{"return": {}}',
            "monitor_command": '{"return": {"status": "running"}}',
            "job_stats": (0, {}),
            "exec": ExecResult(3, 0, b"out\n", b"err\n", False),
            "wait_ready": KvikError("no diagnosis here"),
            "stages": Readiness(True, [Stage("started", 0.05, 1, ""), Stage("ready", 1.25, 1, "agent answers")]),
            "define": self.off,
            "create": self.running,
            "capabilities": "<capabilities/>\n",
            "domain_capabilities": "<domainCapabilities><cpu><mode name='custom'><model usable='no'>a</model>"
            "<model usable='yes'>b</model></mode></cpu></domainCapabilities>\n",
            "sysinfo": "<sysinfo/>\n",
            "uri": "kvik:///session",
            "type": "QEMU",
            "version": "7.2.0",
            "lib_version": "9.0.0",
            "status": DaemonStatus("0.1.0", 1, "session", 1.0, 2, 1, 1, ["qemu"]),
            "max_vcpus": 288,
            "node_info": NodeInfo("x86_64", 1 << 20, 2, 2000, 1, 1, 2, 1),
            "cpu_stats": {"kernel": 1, "user": 2, "idle": 3, "iowait": 4},
            "free_memory": 1 << 20,
            "domxml_to_native": "qemu-system-x86_64 -S\n",
            "next_event": None,
            "register": 1,
            "call": self.low_level,
            "call_kvik": lambda procedure, *values, **options: self.own[procedure],
        }
        self.replies |= {
            "networks": lambda flags=0: {0: [self.lan, self.lab], 1: [self.lab], 2: [self.lan]}.get(
                flags & 3, [self.lan, self.lab]
            ),
            "network": lambda key: self.find_network(key, "name", "uuid"),
            "lookup_network_name": lambda key: self.find_network(key, "name"),
            "lookup_network_uuid": lambda key: self.find_network(key, "uuid"),
            "network_facts": [
                NetworkFacts("lan", UUID1, True, True, False),
                NetworkFacts("lab", UUID2, False, False, True),
            ],
            "define_network": self.lan,
            "create_network": self.lan,
            "register_network": 1,
            "net_xml": NETWORK_XML,
            "net_is_active": True,
            "net_is_persistent": False,
            "net_autostart": True,
            "net_bridge_name": "virbr7",
            "net_messages": [],
            "net_metadata": "words",
            "net_leases": [
                DhcpLease("virbr7", 0, "ipv6", "52:54:00:00:00:09", "7", "fd00::9", 64, None, "00:01"),
                DhcpLease("virbr7", 86400, "ipv4", "52:54:00:00:00:01", None, "10.0.0.5", 24, "web", None),
            ],
            "net_ports": [self.port],
            "net_port": self.port,
            "net_create_port": self.port,
            "port_xml": "<networkport><uuid>x</uuid></networkport>\n",
        }
        self.low: dict[str, Any] = {
            "DOMAIN_SET_BLOCK_THRESHOLD": (),
            "DOMAIN_GET_DISK_ERRORS": ([("vda", 2)], 1),
            "DOMAIN_GET_FSINFO": ([("/", "vda1", "ext4", ["vda"])], 1),
            "DOMAIN_GET_SCHEDULER_TYPE": ("posix", 9),
            "DOMAIN_SET_MEMORY_STATS_PERIOD": (),
            "DOMAIN_ABORT_JOB_FLAGS": (),
            "CONNECT_GET_CPU_MODEL_NAMES": (["486", "qemu64"], 2),
            "NODE_GET_CELLS_FREE_MEMORY": ([2048 << 10, 1024 << 10],),
            "NODE_GET_CPU_MAP": (None, 2, 2),
            "CONNECT_LIST_ALL_NWFILTERS": ([FILTER], 1),
            "NWFILTER_LOOKUP_BY_NAME": (FILTER,),
            "NWFILTER_GET_XML_DESC": ("<filter name='mail'>\n  <rule action='drop'/>\n</filter>\n",),
            "NWFILTER_DEFINE_XML": (FILTER,),
            "NWFILTER_UNDEFINE": (),
            "CONNECT_LIST_ALL_NWFILTER_BINDINGS": ([("vnet0", "mail")], 1),
            "NWFILTER_BINDING_LOOKUP_BY_PORT_DEV": (("vnet0", "mail"),),
            "NWFILTER_BINDING_GET_XML_DESC": ("<filterbinding>\n  <portdev name='vnet0'/>\n</filterbinding>\n",),
            "NWFILTER_BINDING_CREATE_XML": (("vnet0", "mail"),),
            "NWFILTER_BINDING_DELETE": (),
            "NODE_GET_SECURITY_MODEL": OperationUnsupported("no confinement"),
            "CONNECT_LIST_ALL_INTERFACES": ([("br0", "52:54:00:00:00:01"), ("lo", "00:00:00:00:00:00")], 2),
            "INTERFACE_LOOKUP_BY_NAME": (("br0", "52:54:00:00:00:01"),),
            "INTERFACE_LOOKUP_BY_MAC_STRING": (("br0", "52:54:00:00:00:01"),),
            "INTERFACE_GET_XML_DESC": ("<interface type='bridge' name='br0'>\n  <bridge/>\n</interface>\n",),
            "INTERFACE_DEFINE_XML": (("br0", "52:54:00:00:00:01"),),
            "INTERFACE_UNDEFINE": (),
            "INTERFACE_CREATE": (),
            "INTERFACE_DESTROY": (),
            "INTERFACE_CHANGE_BEGIN": (),
            "INTERFACE_CHANGE_COMMIT": (),
            "INTERFACE_CHANGE_ROLLBACK": (),
        }
        bridge = (
            "br0", "52:54:00:00:00:01", 1, 1, 1500, 1, 32768, 15.0, 2.0, 20.0, 300.0, 1, 1, 1,
            "8000.525400000001", "1000.525400000009", 1, 100, 0, 1, 0, ["192.0.2.1/24"], ["eth0", "vnet0"],
            1, 2, 3, 4, 5, 6,
        )  # fmt: skip
        designated = ("1000.525400000009", 0x8001, 0)
        ports = [
            ("eth0", "52:54:00:00:00:01", 1, "forwarding", 1, None, 100, 32, 0, 1, 1, 0, 0, 0, 0, *designated,
             123456, 2, 0, 4, 5, 0),
            ("vnet0", "fe:54:00:00:00:02", 2, "blocking", 1, "tiny-1", 2, 32, 1, 1, 0, 0, 1, 0, 0, *designated,
             0, 0, 0, 0, 0, 7),
        ]  # fmt: skip
        self.own: dict[str, Any] = {
            "BRIDGE_LIST": ([bridge],),
            "BRIDGE_SHOW": (bridge, ports),
            "BRIDGE_FDB": ([("52:54:00:00:00:07", "vnet0", 0, "dynamic", 12.0)],),
            "BRIDGE_VLAN": ([("vnet0", 1, 1, 1, 1), ("vnet0", 100, 199, 0, 0)],),
            "INTERFACE_BRIDGE": (["the configuration is netplan's"],),
            "INTERFACE_UNBRIDGE": ([],),
            "DNS_STATUS": (1, "dnsmasq", "/etc/dnsmasq.d/kvik.conf", [
                ("lan", "lab", ["10.0.0.1", "fd00::1"], ""), ("lab", "", [], "it is not active"),
            ]),
            "DNS_ENABLE": ("dnsmasq",),
            "DNS_DISABLE": (1,),
            "INTERFACE_PENDING": ("open", "eth0 into bridge br0", 59.6, ""),
            **dict.fromkeys(
                ("BRIDGE_ADD", "BRIDGE_DELETE", "BRIDGE_ADD_PORT", "BRIDGE_DELETE_PORT", "BRIDGE_SET",
                 "BRIDGE_SET_PORT", "BRIDGE_CHANGE_FDB", "BRIDGE_FLUSH_FDB", "BRIDGE_CHANGE_VLAN", "INTERFACE_BEGIN"),
                (),
            ),
        }  # fmt: skip

    def find(self, key: str) -> FakeDomain:
        for domain in (self.running, self.off):
            if str(key) in (domain.name, domain.uuid, str(domain.id)):
                return domain
        raise NoDomain(f"no domain with the name '{key}'")

    def find_network(self, key: str, *by: str) -> FakeNetwork:
        for network in (self.lan, self.lab):
            if key in [getattr(network, attribute) for attribute in by]:
                return network
        raise NoNetwork(f"no network '{key}'")

    def low_level(self, procedure: str, *values: Any, timeout: float | None = None) -> Any:
        found = self.low[procedure]
        if isinstance(found, Exception):
            raise found
        return found

    def __getattr__(self, name: str) -> Any:
        return self.method(Connection, name, None)

    def close(self) -> None:
        self.calls.append(("close",))

    def method(
        self, owner: type, name: str, thing: FakeDomain | FakeNetwork | FakePort | None, prefix: str = ""
    ) -> Any:
        real = getattr(owner, name)  # AttributeError: the real client has no such method either

        def call(*args: Any, **kwargs: Any) -> Any:
            inspect.signature(real).bind(None, *args, **kwargs)
            record = (prefix + name, *((thing.name,) if thing else ()), *args, *(kwargs.values()))
            self.calls.append(record)
            reply = self.replies.get(prefix + name)
            if isinstance(reply, BaseException) or (isinstance(reply, type) and issubclass(reply, BaseException)):
                raise reply
            if callable(reply):
                return reply(*args, **kwargs)
            return reply

        return call

    def made(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Pipe(io.TextIOWrapper):
    """A text stream over bytes, as stdout is."""

    def __init__(self, data: bytes = b"") -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", write_through=True)

    def getvalue(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()


class Runner:
    """`kvik("list", "--all")` gives the exit code; `out` and `err` hold what was printed."""

    def __init__(self) -> None:
        self.connection = FakeConnection()
        self.out = ""
        self.err = ""
        self.context: Context | None = None

    def __call__(self, *words: str, stdin: str | bytes = b"", tty: bool = False, typed: str | None = None) -> int:
        """`tty`: standard output is a terminal; `typed`: standard input is one, where somebody types that."""
        data = stdin.encode() if isinstance(stdin, str) else stdin
        out: Any = Tty() if tty else Pipe()
        err = Pipe()
        context = Context(
            connector=lambda uri, readonly: self.connection,
            stdout=out,
            stderr=err,
            stdin=Pipe(data) if typed is None else Tty(typed),
        )
        self.context = context
        rest, answer = parse_globals(list(words), context)
        code = answer if answer is not None else run_verb(context, rest)
        self.out, self.err = out.getvalue(), err.getvalue()
        if answer is None and rest:
            try:
                verb = load(rest[0])
                parsed = parse(rest[0], verb, rest[1:])
            except Exception:
                return code
            seen.update((rest[0], name) for name in parsed.given())
        return code


seen: set[tuple[str, str]] = set()


@pytest.fixture
def kvik() -> Runner:
    return Runner()


@pytest.fixture
def tty() -> type[Tty]:
    return Tty


@pytest.fixture
def no_metadata() -> NoMetadata:
    return NoMetadata("no metadata")


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    """A daemon of its own with machines in memory."""
    with tempfile.TemporaryDirectory(prefix="ks") as directory:
        socket = Path(directory, "s")
        argv = [sys.executable, "-m", "kvik.daemon", "--system", "--root", directory, "--driver", "test"]
        environ = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parent.parent)}
        daemon = subprocess.Popen([*argv, "--socket", str(socket)], env=environ, stderr=subprocess.DEVNULL)
        try:
            uri = f"qemu+unix:///system?socket={socket}"
            end = time.monotonic() + 30
            while True:
                try:
                    connect(uri).close()
                    break
                except KvikError:
                    assert daemon.poll() is None and time.monotonic() < end
                    time.sleep(0.05)
            yield uri
        finally:
            daemon.terminate()
            daemon.wait(30)


@pytest.fixture
def kvik_(uri: str) -> Callable[..., tuple[int, str, str]]:
    """Runs a command on it: its exit code and what it said."""

    def run(*words: str) -> tuple[int, str, str]:
        out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = main(["-c", uri, *words])
        for stream in (out, errors):
            stream.seek(0)
        return code, out.read(), errors.read()

    return run
