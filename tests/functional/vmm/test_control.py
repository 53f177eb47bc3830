"""The monitor, dumps and figures of a real machine on the host's KVM."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guest import CODE, COUNTING, DATA, PML4, machine, run_until
from restored import either_way

from kvik.vmm.machine import Machine
from kvik.vmm.metrics import MetricsServer
from kvik.vmm.monitor.server import MonitorServer

pytestmark = either_way


class Monitor:
    """A client on the loop's own thread."""

    def __init__(self, made: Machine, path: Path) -> None:
        self.machine = made
        self.server = MonitorServer(made)
        self.server.listen(str(path / "qmp"))
        made.on_close.append(self.server.close)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path / "qmp"))
        self.sock.setblocking(False)
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self._line()
        self.ask("qmp_capabilities")

    def _line(self) -> dict[str, Any]:
        def more() -> bool:
            try:
                self.buffer += self.sock.recv(1 << 20)
            except BlockingIOError:
                pass
            return b"\n" in self.buffer

        run_until(self.machine, more)
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, command: str, fds: tuple[int, ...] = (), **arguments: Any) -> Any:
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        socket.send_fds(self.sock, [json.dumps({"execute": command, "arguments": named}).encode() + b"\n"], list(fds))
        while "event" in (message := self._line()):
            self.events.append(message)
        assert "return" in message, message
        return message["return"]

    def event(self, name: str) -> dict[str, Any]:
        while not any(event["event"] == name for event in self.events):
            message = self._line()
            assert "event" in message, message
            self.events.append(message)
        return next(event for event in self.events if event["event"] == name)


@pytest.fixture
def made() -> Iterator[Machine]:
    with machine(vcpus=2) as built:
        yield built


@pytest.fixture
def monitor(made: Machine, tmp_path: Path) -> Iterator[Monitor]:
    client = Monitor(made, tmp_path)
    made.start()
    yield client
    client.sock.close()


def test_the_guest_stands_still_between_stop_and_cont(monitor: Monitor) -> None:
    memory = monitor.machine.memory
    monitor.ask("stop")
    assert monitor.ask("query-status")["status"] == "paused"
    before = memory.read(DATA, 8)
    for _ in range(20):
        monitor.machine.loop.run_once(0.005)
    assert memory.read(DATA, 8) == before
    monitor.ask("cont")
    run_until(monitor.machine, lambda: memory.read(DATA, 8) != before)
    assert [event["event"] for event in monitor.events if event["event"] in ("STOP", "RESUME")][-2:] == [
        "STOP",
        "RESUME",
    ]


def test_vcpus_are_told_with_their_threads(monitor: Monitor) -> None:
    listed = monitor.ask("query-cpus-fast")
    assert [item["cpu-index"] for item in listed] == [0, 1]
    for item in listed:
        assert Path(f"/proc/self/task/{item['thread-id']}").exists()


def test_people_can_look_at_registers_and_memory(monitor: Monitor) -> None:
    text = monitor.ask("human-monitor-command", command_line="info registers", cpu_index=1)
    assert "CPU#1" in text and f"RBX={DATA + 0x1000:016x}" in text and f"CR3={PML4:016x}" in text
    assert monitor.ask("human-monitor-command", command_line=f"x/8xb {CODE:#x}").split() == [
        f"{CODE:016x}:",
        *(f"0x{byte:02x}" for byte in COUNTING),
    ]
    assert "Cannot access" in monitor.ask("human-monitor-command", command_line="x/4xg 0x40000000")
    assert monitor.ask("human-monitor-command", command_line="info status") == "VM status: running\r\n"
    assert monitor.machine.status == "running"


def test_an_nmi_reaches_every_vcpu_and_none_waits(monitor: Monitor) -> None:
    assert monitor.ask("inject-nmi") == {}  # without an IDT it ends the guest; the monitor goes on
    assert monitor.ask("query-name") == {"name": "tiny"}


def test_exits_are_counted_by_kind(monitor: Monitor) -> None:
    monitor.ask("stop")  # an interrupted KVM_RUN for each
    figures = monitor.ask("query-stats", target="vcpu")
    assert [item["qom-path"] for item in figures] == [item["qom-path"] for item in monitor.ask("query-cpus-fast")]
    for item in figures:
        told = {entry["name"]: entry["value"] for entry in item["stats"]}
        assert told["exits"] >= told["intr"] >= 1
    monitor.ask("cont")


def parse_core(data: bytes) -> tuple[list[tuple[int, ...]], list[tuple[bytes, int, bytes]]]:
    """(program headers, notes) by the ELF specification alone."""
    assert data[:7] == b"\x7fELF\x02\x01\x01" and struct.unpack_from("<HH", data, 16) == (4, 62)
    offset, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + 56 * number) for number in range(count)]
    notes = []
    for kind, _, at, _, _, size, *_ in headers:
        end = at + size
        while kind == 4 and at < end:
            name, length, number = struct.unpack_from("<III", data, at)
            begin = at + 12 + -(-name // 4) * 4
            notes.append((data[at + 12 : at + 12 + name - 1], number, data[begin : begin + length]))
            at = begin + -(-length // 4) * 4
    return headers, notes


VMCOREINFO = b"OSRELEASE=6.1.0-test\nPAGESIZE=4096\nKERNELOFFSET=1a000000\n"


def test_a_dump_is_a_core_with_all_memory_and_registers(monitor: Monitor, tmp_path: Path) -> None:
    memory = monitor.machine.memory
    memory.write(0x50_0000, b"needle")
    memory.write(0x60_0004, struct.pack("<III", 11, len(VMCOREINFO), 0) + b"VMCOREINFO\0\0" + VMCOREINFO)
    memory.write(0x58_0000, struct.pack("<III", 11, 0xFFFF_FFFF, 0) + b"VMCOREINFO\0\0" + VMCOREINFO)  # a lie
    monitor.ask("stop")
    path = tmp_path / "core"
    monitor.ask("dump-guest-memory", paging=False, protocol=f"file:{path}")
    assert monitor.ask("query-dump") == {"status": "completed", "completed": 16 << 20, "total": 16 << 20}
    assert "error" not in monitor.event("DUMP_COMPLETED")["data"]
    assert [file.name for file in tmp_path.iterdir() if "core" in file.name] == ["core"]
    data = path.read_bytes()
    assert path.stat().st_blocks * 512 < 2 << 20  # holes
    headers, notes = parse_core(data)
    (load,) = [header for header in headers if header[0] == 1]
    assert (load[4], load[5], load[6]) == (0, 16 << 20, 16 << 20)
    assert data[load[2] : load[2] + load[5]] == memory.read(0, 16 << 20)
    assert [(name, number) for name, number, _ in notes] == [(b"CORE", 1), (b"QEMU", 0)] * 2 + [(b"VMCOREINFO", 0)]
    assert notes[-1][2] == VMCOREINFO
    for index in range(2):
        status, state = notes[2 * index][2], notes[2 * index + 1][2]
        registers = monitor.machine.vcpus[index].vcpu.regs()
        assert len(status) == 336 and struct.unpack_from("<Q", status, 112 + 16 * 8)[0] == registers.rip
        assert struct.unpack_from("<Q", status, 112 + 5 * 8)[0] == DATA + 0x1000 * index  # rbx
        version, size = struct.unpack_from("<II", state)
        assert (version, size) == (1, len(state) == 440 and 440)
        assert struct.unpack_from("<Q", state, 8)[0] == registers.rax
        assert struct.unpack_from("<Q", state, 440 - 8 - 16)[0] == PML4  # cr[3]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed: apt-get install gdb")
def test_readelf_and_gdb_read_a_dump(monitor: Monitor, tmp_path: Path) -> None:
    monitor.ask("stop")
    path = tmp_path / "core"
    with path.open("w+b") as stream:
        monitor.ask("getfd", fds=(stream.fileno(),), fdname="d")
        monitor.ask("dump-guest-memory", paging=False, protocol="fd:d")
    told = subprocess.run(
        ["readelf", "-aW", path], capture_output=True, text=True, check=True, env={"LC_ALL": "C", "PATH": "/usr/bin"}
    )
    assert not told.stderr and "CORE (Core file)" in told.stdout and told.stdout.count("NT_PRSTATUS") == 2
    words = ["-ex", "info threads", "-ex", "thread 2", "-ex", "p/x $rbx", "-ex", f"x/8xb {CODE:#x}"]
    gdb = subprocess.run(
        ["gdb", "-nx", "-batch", "-ex", "set architecture i386:x86-64", "-ex", f"core-file {path}", *words],
        capture_output=True, text=True, check=True, env={"LC_ALL": "C", "PATH": "/usr/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert {f"{DATA + 0x1000:#x}", f"{DATA:#x}"} & set(gdb.stdout.split()), gdb.stdout
    assert "0x48\t0xff\t0xc0" in gdb.stdout


def test_a_detached_dump_leaves_the_monitor_free_and_the_guest_running(monitor: Monitor, tmp_path: Path) -> None:
    monitor.ask("dump-guest-memory", paging=False, protocol=f"file:{tmp_path}/core", detach=True)
    assert monitor.ask("query-dump")["status"] in ("active", "completed")
    assert monitor.event("DUMP_COMPLETED")["data"]["result"]["status"] == "completed"
    before = monitor.machine.memory.read(DATA, 8)
    run_until(monitor.machine, lambda: monitor.machine.memory.read(DATA, 8) != before)


def test_a_dump_that_cannot_be_written_is_an_error_and_leaves_nothing(monitor: Monitor, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="No such file"):
        monitor.ask("dump-guest-memory", paging=False, protocol=f"file:{tmp_path}/none/core")
    assert monitor.ask("query-dump")["status"] == "failed"
    with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(AssertionError, match="regular file"):
        monitor.ask("getfd", fds=(full.fileno(),), fdname="d")
        monitor.ask("dump-guest-memory", paging=False, protocol="fd:d")
    assert monitor.machine.status == "running" and not monitor.machine.still


def test_metrics_by_socket_plain_and_http(made: Machine, tmp_path: Path) -> None:
    server = MetricsServer(made, f"unix:{tmp_path}/metrics")
    made.start()
    made.pause()
    for request in (b"", b"GET /metrics HTTP/1.0\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/metrics")
            client.send(request)
            client.setblocking(False)
            got = bytearray()

            def ended(client: socket.socket = client, got: bytearray = got) -> bool:
                try:
                    data = client.recv(1 << 16)
                except BlockingIOError:
                    return False
                got.extend(data)
                return not data

            run_until(made, ended)
        text = got.decode()
        assert text.startswith("HTTP/1.0 200") == bool(request)
        assert 'kvik_vmm_exits_total{machine="tiny",vcpu="0",kind="intr"}' in text
        assert f'kvik_vmm_memory_bytes{{machine="tiny"}} {16 << 20}' in text
    server.close()
