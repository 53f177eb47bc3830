"""A machine's VMM is killed, or its guest panics: told at once, with the reason; on_crash is honoured."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from fault_harness import Host, alive, disk_xml, eventually

from kvik.client import Connection, connect
from kvik.client.events import DomainEvent
from kvik.conf.enums import DomainEventStoppedDetailType, DomainEventType

STOPPED, CRASHED = DomainEventType.STOPPED, DomainEventType.CRASHED

# A boot sector, as SeaBIOS loads it. pvpanic (docs/specs/pvpanic.rst of QEMU): bit 0 written to port 0x505 is a panic.
#   mov dx, 0x505;  mov al, 1;  out dx, al;  hlt: jmp hlt
PANIC = bytes.fromhex("ba0505 b001 ee f4 ebfd")
TRIPLE_FAULT = bytes.fromhex("31c0 0f011e007e cd03")  # lidt of zeroes, then int 3: the machine is reset


def boot_sector(host: Host, code: bytes) -> Path:
    path = host.image("boot.img")
    with path.open("r+b") as file:
        file.write(code.ljust(510, b"\0") + b"\x55\xaa")
    return path


def panicking(host: Host, on_crash: str) -> None:
    disk = disk_xml(boot_sector(host, PANIC), extra="<boot order='1'/>")
    host.define("web", disk + "<panic model='isa'/>", before=f"<on_crash>{on_crash}</on_crash>")


def events_of(host: Host) -> Connection:
    connection = connect(host.uri)
    connection.register("lifecycle")
    return connection


def lifecycle(connection: Connection, wanted: DomainEventType, patience: float = 10) -> list[tuple[int, int]]:
    """The events (type, detail) up to the first that is `wanted`."""
    seen: list[tuple[int, int]] = []
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        event = connection.next_event(1.0)
        if isinstance(event, DomainEvent):
            assert event.domain.name == "web"
            seen.append((event.fields["event"], event.fields["detail"]))
            if seen[-1][0] == wanted:
                return seen
    raise AssertionError(f"no event {wanted!r} among {seen}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_vmm_that_is_killed(host: Host, number: signal.Signals) -> None:
    host.define("web", "<serial type='pty'/>")
    host.define("db")
    host.kvik("start", "web")
    host.kvik("start", "db")
    connection = events_of(host)
    pid = host.pid("web")
    os.kill(pid, number)
    assert lifecycle(connection, STOPPED) == [(STOPPED, DomainEventStoppedDetailType.FAILED)]
    assert host.reason("web") == "shut off (crashed)"
    assert number.name in host.log("web")
    eventually(lambda: not any("web" in path for path in host.files() if "/run/" in path), "its files are gone")
    assert host.state("db") == "running"
    host.kvik("destroy", "web", fails="not running")
    connection.close()
    host.kvik("start", "web")


def test_a_vmm_that_is_killed_while_the_daemon_is_away(host: Host) -> None:
    host.define("web")
    host.kvik("start", "web")
    pid = host.pid("web")
    host.kill_daemon()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid), "death of the machine")
    host.start()
    assert host.reason("web").startswith("shut off (")
    assert "while the daemon was away" in host.log("web")
    host.kvik("start", "web")


def test_panic_destroy(host: Host) -> None:
    panicking(host, "destroy")
    connection = events_of(host)
    host.kvik("start", "web")
    lifecycle(connection, CRASHED)
    assert lifecycle(connection, STOPPED) == [(STOPPED, DomainEventStoppedDetailType.CRASHED)]
    connection.close()
    eventually(lambda: host.reason("web") == "shut off (crashed)", "it is off, and why is known")
    assert "the guest panicked" in host.log("web")
    assert host.processes() == [host.daemon]


def test_panic_preserve(host: Host) -> None:
    """Left for somebody to look at, over a restart of the daemon too, and ended by destroy."""
    panicking(host, "preserve")
    host.kvik("start", "web")
    eventually(lambda: host.reason("web") == "crashed (panicked)", "it is kept")
    pid = host.pid("web")
    host.restart()
    eventually(lambda: host.reason("web") == "crashed (panicked)", "it is still kept")
    assert host.pid("web") == pid and alive(pid)
    assert '"guest-panicked"' in host.kvik("qemu-monitor-command", "web", '{"execute": "query-status"}')
    host.kvik("destroy", "web")
    assert not alive(pid)


def test_panic_restart(host: Host) -> None:
    """Booted again, but not for ever: a guest that panics again and again is left alone after a while."""
    panicking(host, "restart")
    connection = events_of(host)
    host.kvik("start", "web")
    seen = lifecycle(connection, STOPPED, patience=60)
    connection.close()
    assert sum(kind == CRASHED for kind, _ in seen) >= 3
    eventually(lambda: host.state("web") == "shut off", "it is left alone")
    assert "panicked" in host.log("web")


def test_a_guest_that_resets_for_ever(host: Host) -> None:
    """As fast as it can: the daemon and the others go on."""
    host.define("web", disk_xml(boot_sector(host, TRIPLE_FAULT), extra="<boot order='1'/>"))
    host.define("db")
    host.kvik("start", "web")
    begun = time.monotonic()
    for _ in range(5):
        host.kvik("list")
    host.kvik("start", "db")
    assert time.monotonic() - begun < 10
    assert host.state("web") == "running"
