"""The monitor's sockets: negotiation, errors in QEMU's words, clients that are rude, descriptors, events."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import HostError
from kvik.vmm.monitor import server as module
from kvik.vmm.monitor.events import RateLimiter
from kvik.vmm.monitor.server import MAX_SESSIONS, MonitorServer
from kvik.vmm.monitor.table import Command

Connect = Callable[..., Any]

# What QEMU 7.2 answers (qemu-system-x86_64 -M none -qmp), word for word.
QEMU_SAYS = [
    ({"execute": "nonsense"}, "CommandNotFound", "The command nonsense has not been found"),
    ({"execute": "stop", "arguments": {"x": 1}}, "GenericError", "Parameter 'x' is unexpected"),
    ([1], "GenericError", "QMP input must be a JSON object"),
    ({"execute": 1}, "GenericError", "QMP input member 'execute' must be a string"),
    ({}, "GenericError", "QMP input lacks member 'execute'"),
    ({"execute": "stop", "foo": 1}, "GenericError", "QMP input member 'foo' is unexpected"),
    ({"execute": "stop", "arguments": 3}, "GenericError", "QMP input member 'arguments' must be an object"),
    ({"execute": "stop", "exec-oob": "stop"}, "GenericError", "QMP input member 'exec-oob' clashes with 'execute'"),
    ({"exec-oob": "stop"}, "GenericError", "The command stop does not support OOB"),
    ({"execute": "balloon"}, "GenericError", "Parameter 'value' is missing"),
    (
        {"execute": "balloon", "arguments": {"value": "a"}},
        "GenericError",
        "Invalid parameter type for 'value', expected: integer",
    ),
    (
        {"execute": "balloon", "arguments": {"value": 1}},
        "DeviceNotActive",
        "No balloon device has been activated",
    ),
    ({"execute": "query-balloon"}, "DeviceNotActive", "No balloon device has been activated"),
    ({"execute": "device_add"}, "GenericError", "Parameter 'driver' is missing"),
    (
        {"execute": "device_add", "arguments": {"driver": "nope", "id": "x"}},
        "GenericError",
        "'nope' is not a valid device model name",
    ),
    ({"execute": "device_del", "arguments": {"id": "nope"}}, "DeviceNotFound", "Device 'nope' not found"),
    ({"execute": "getfd", "arguments": {"fdname": "a"}}, "GenericError", "No file descriptor supplied via SCM_RIGHTS"),
    ({"execute": "add-fd"}, "GenericError", "No file descriptor supplied via SCM_RIGHTS"),
    (
        {"execute": "closefd", "arguments": {"fdname": "1a"}},
        "GenericError",
        "File descriptor named '1a' not found",
    ),
    (
        {"execute": "remove-fd", "arguments": {"fdset-id": 1}},
        "GenericError",
        "File descriptor named 'fdset-id:1' not found",
    ),
    (
        {"execute": "set-action", "arguments": {"reboot": "x"}},
        "GenericError",
        "Parameter 'reboot' does not accept value 'x'",
    ),
    (
        {"execute": "netdev_add", "arguments": {"type": "zz", "id": "a"}},
        "GenericError",
        "Parameter 'type' does not accept value 'zz'",
    ),
    ({"execute": "netdev_del", "arguments": {"id": "a"}}, "DeviceNotFound", "Device 'a' not found"),
    (
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "a"}},
        "GenericError",
        "Parameter 'file' is missing",
    ),
    (
        {"execute": "blockdev-del", "arguments": {"node-name": "a"}},
        "GenericError",
        "Failed to find node with node-name='a'",
    ),
    (
        {"execute": "qom-get", "arguments": {"path": "/nope", "property": "foo"}},
        "DeviceNotFound",
        "Device '/nope' not found",
    ),
    ({"execute": "qom-list", "arguments": {"path": "/nope"}}, "DeviceNotFound", "Device '/nope' not found"),
    ({"execute": "set_link", "arguments": {"name": "a", "up": True}}, "DeviceNotFound", "Device 'a' not found"),
    ({"execute": "chardev-remove", "arguments": {"id": "a"}}, "GenericError", "Chardev 'a' not found"),
    ({"execute": "job-cancel", "arguments": {"id": "a"}}, "GenericError", "Job not found"),
    (
        {"execute": "screendump", "arguments": {"filename": "/nowhere"}},
        "GenericError",
        "There is no console to take a screendump from",
    ),
    (
        {"execute": "query-rx-filter", "arguments": {"name": "a"}},
        "GenericError",
        "invalid net client name: a",
    ),
    (
        {"execute": "dump-guest-memory", "arguments": {"paging": False, "protocol": "xx"}},
        "GenericError",
        "Invalid parameter 'protocol'",
    ),
    (
        {"execute": "block_resize", "arguments": {"device": "a", "size": 1}},
        "GenericError",
        "Cannot find device='a' nor node-name=''",
    ),
    ({"execute": "object-del", "arguments": {"id": "a"}}, "GenericError", "object 'a' not found"),
]


@pytest.mark.parametrize(("message", "kind", "text"), QEMU_SAYS, ids=lambda value: str(value)[:60])
def test_mistakes_are_answered_in_qemus_words(connect: Connect, message: Any, kind: str, text: str) -> None:
    client = connect(enable=("oob",))
    client.send(json.dumps(message).encode() + b"\n")
    error = client.reply()["error"]
    if "clashes" in text:  # which of the two QEMU names depends on the order of its hash table
        assert "clashes with" in error["desc"]
    else:
        assert (error["class"], error["desc"]) == (kind, text)


def test_nothing_but_the_negotiation_before_the_negotiation(connect: Connect) -> None:
    client = connect(negotiate=False)
    greeting = client.line()["QMP"]
    assert greeting["version"]["qemu"]["major"] == 7 and greeting["capabilities"] == ["oob"]
    assert client.error("query-status")[0] == "CommandNotFound"
    assert client.get("qmp_capabilities") == {}
    assert client.get("query-status") == {"status": "running", "running": True, "singlestep": False}
    assert client.error("qmp_capabilities")[0] == "CommandNotFound"


def test_the_id_comes_back_whatever_it_is(client: Any) -> None:
    for identity in (0, "x", [1, {"a": None}], {"deep": [[[]]]}, 2**80):
        assert client.ask("query-name", id=identity) == {"return": {"name": "fake"}, "id": identity}


def test_commands_in_one_write_are_answered_in_order(client: Any) -> None:
    client.send(b"".join(b'{"execute": "query-name", "id": %d}\n' % number for number in range(50)))
    assert [client.reply()["id"] for _ in range(50)] == list(range(50))


def test_a_command_that_lasts_holds_up_only_its_own_session(
    connect: Connect, server: MonitorServer, machine: Any
) -> None:
    go: list[bool] = []

    def lasting(context: Any, arguments: Any) -> Any:
        while not go:
            yield
        return "done"

    server.commands = {**server.commands, "lasting": Command("lasting", lasting)}
    server.commands["ping"] = Command("ping", lambda context, arguments: "pong", out_of_band=True)
    first, second = connect(enable=("oob",)), connect()
    first.send(b'{"execute": "lasting", "id": 1}\n{"execute": "query-name", "id": 2}\n')
    assert second.get("query-name") == {"name": "fake"}
    first.send(b'{"exec-oob": "ping", "id": 3}\n')
    assert first.reply() == {"return": "pong", "id": 3}
    go.append(True)
    assert [first.reply()["id"] for _ in range(2)] == [1, 2]


def test_a_handler_that_breaks_breaks_nothing_else(client: Any, server: MonitorServer) -> None:
    def broken(context: Any, arguments: Any) -> Any:
        return {}["nothing"]

    server.commands = {**server.commands, "broken": Command("broken", broken)}
    kind, text = client.error("broken")
    assert kind == "GenericError" and "internal error: KeyError" in text
    assert client.get("query-name") == {"name": "fake"}


def test_a_client_that_does_not_read_its_replies_is_not_served_on(client: Any, server: MonitorServer) -> None:
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.sock.setblocking(False)
    line = b'{"execute": "query-qmp-schema"}\n'
    sent = 0
    for _ in range(2000):
        try:
            sent += client.sock.send(line * 100)
        except BlockingIOError:
            break
        server.machine.loop.run_once(0)
    for _ in range(50):
        server.machine.loop.run_once(0)
    (session,) = server.sessions
    assert len(session._output) < module.HIGH_WATER + 1_000_000  # one reply beyond the mark, not thousands
    assert len(session._waiting) <= 16384 // len(line) + module.MAX_WAITING


def test_a_client_that_lets_events_pile_up_is_cut_off(client: Any, server: MonitorServer, machine: Any) -> None:
    for _ in range(module.MAX_OUTPUT // 50):
        machine.emit("RESET", {"guest": True, "reason": "x" * 100})
    assert not server.sessions


def test_a_line_without_end_ends_the_session_and_nothing_else(connect: Connect, server: MonitorServer) -> None:
    rude, other = connect(), connect()
    for _ in range(module.MAX_LINE // 16384 + 8):
        try:
            rude.sock.send(b"x" * 16384)
        except (BlockingIOError, BrokenPipeError):
            pass
        server.machine.loop.run_once(0)
    assert len(server.sessions) == 1
    assert other.get("query-name") == {"name": "fake"}


def test_deep_nesting_is_an_error_not_a_crash(client: Any) -> None:
    client.send(b'{"execute": ' + b"[" * 100_000 + b"\n")
    assert "JSON parse error" in client.reply()["error"]["desc"]


def test_sessions_are_bounded(connect: Connect, server: MonitorServer) -> None:
    for _ in range(MAX_SESSIONS):
        connect()
    late = connect(negotiate=False)
    for _ in range(20):
        if not late.pump():
            break
    else:
        pytest.fail("one too many was let in")
    assert len(server.sessions) == MAX_SESSIONS


def test_replies_still_come_after_the_client_ended_its_side(client: Any) -> None:
    client.send(b'{"execute": "query-name"}\n')
    client.sock.shutdown(socket.SHUT_WR)
    assert client.reply() == {"return": {"name": "fake"}}


def test_descriptors_travel_and_are_closed(client: Any, server: MonitorServer, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"hello")
    with file.open("rb") as stream:
        made = client.get("add-fd", {"opaque": "disk:a"}, fds=(stream.fileno(),))
        assert client.get("query-fdsets") == [
            {"fdset-id": made["fdset-id"], "fds": [{"fd": made["fd"], "opaque": "disk:a"}]}
        ]
        fd = server.fdsets.open(f"/dev/fdset/{made['fdset-id']}", os.O_RDONLY)
        assert os.read(fd, 10) == b"hello"
        os.close(fd)
        assert client.get("getfd", {"fdname": "n"}, fds=(stream.fileno(),)) == {}
        assert client.error("getfd", {"fdname": "1n"}, fds=(stream.fileno(),))[0] == "GenericError"
    before = len(os.listdir("/proc/self/fd"))
    assert client.get("remove-fd", {"fdset-id": made["fdset-id"]}) == {}
    assert client.get("closefd", {"fdname": "n"}) == {}
    assert len(os.listdir("/proc/self/fd")) == before - 2


def test_descriptors_that_nobody_takes_are_few_and_go_with_the_session(client: Any, server: MonitorServer) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        client.get("query-name", fds=(0,) * 10)
    (session,) = server.sessions
    assert len(session._fds) == module.MAX_FDS
    client.sock.close()
    for _ in range(10):
        server.machine.loop.run_once(0.01)
    assert not server.sessions
    assert len(os.listdir("/proc/self/fd")) == before - 2  # the two ends of the connection


def test_the_socket_is_private_replaced_when_stale_and_removed(machine: Any, tmp_path: Path) -> None:
    path = tmp_path / "monitor"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    server = MonitorServer(machine)
    server.listen(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(HostError):
        server.listen(str(path))  # somebody answers there
    server.close()
    assert not path.exists()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(HostError):
        server.listen(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


def test_inherited_descriptors(machine: Any) -> None:
    ours, theirs = socket.socketpair()
    server = MonitorServer(machine)
    server.adopt(theirs.detach())
    machine.loop.run_once(0.01)
    assert b"QMP" in ours.recv(1000)
    server.close()
    with pytest.raises(HostError):
        server.adopt(os.open("/dev/null", os.O_RDONLY))
    ours.close()


def test_events_carry_the_time_and_come_only_after_negotiation(connect: Connect, machine: Any) -> None:
    silent, client = connect(negotiate=False), connect()
    machine.emit("RESET", {"guest": True, "reason": "guest-reset"})
    event = client.line()
    assert event["event"] == "RESET" and event["data"] == {"guest": True, "reason": "guest-reset"}
    assert abs(event["timestamp"]["seconds"] - time.time()) < 60 and 0 <= event["timestamp"]["microseconds"] < 10**6
    assert "QMP" in silent.line()
    assert b"RESET" not in silent.buffer


class Clock:
    """A loop whose time the test moves."""

    def __init__(self) -> None:
        self.now, self.due = 0.0, []  # type: float, list[tuple[float, Callable[[], None]]]

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.due.append((self.now + seconds, callback))

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        ready = [item for item in self.due if item[0] <= self.now]
        self.due = [item for item in self.due if item[0] > self.now]
        for _, callback in ready:
            callback()


def test_of_a_guests_events_the_first_and_each_seconds_last_are_told() -> None:
    clock, sent = Clock(), []  # type: Clock, list[tuple[str, Any]]
    limiter = RateLimiter(clock, lambda name, data, when: sent.append((name, data)), lambda: clock.now)
    for number in range(100):
        limiter.event("BALLOON_CHANGE", {"actual": number})
        limiter.event("VSERPORT_CHANGE", {"id": f"port{number % 2}", "open": bool(number & 2)})
        limiter.event("STOP", {})
    assert [data["actual"] for name, data in sent if name == "BALLOON_CHANGE"] == [0]
    assert [data["id"] for name, data in sent if name == "VSERPORT_CHANGE"] == ["port0", "port1"]
    assert sum(name == "STOP" for name, _ in sent) == 100
    clock.pass_(1.0)
    assert [data["actual"] for name, data in sent if name == "BALLOON_CHANGE"] == [0, 99]
    clock.pass_(1.0)
    limiter.event("BALLOON_CHANGE", {"actual": 5})
    assert [data["actual"] for name, data in sent if name == "BALLOON_CHANGE"] == [0, 99, 5]


def test_a_guest_that_invents_things_to_tell_of_fills_no_memory() -> None:
    clock, sent = Clock(), []  # type: Clock, list[str]
    limiter = RateLimiter(clock, lambda name, data, when: sent.append(name), lambda: clock.now)
    for number in range(100_000):
        limiter.event("VSERPORT_CHANGE", {"id": str(number), "open": True})
    assert len(sent) == len(limiter._pending) == 1024
