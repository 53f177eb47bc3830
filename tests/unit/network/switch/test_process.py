"""The switch's process, started and spoken to as the daemon does; no machine, no network."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.errors import HostError, OperationFailed
from kvik.network.switch.control import Switch
from unit.network.switch.wire import SETTINGS

ATTEMPTS = """
import os, sys
sys.path[:0] = sys.argv[1:]
from kvik.network.switch.confine import confine
import socket
assert confine()
open("/etc/passwd").close()
socket.socket().close()
for what in (
    lambda: os.fork(), lambda: os.execv("/bin/true", ["true"]), lambda: open("/tmp/kvik-never", "w"),
    lambda: open("/dev/null", "r+b", buffering=0), lambda: os.unlink("/tmp/kvik-never"),
    lambda: os.mkdir("/tmp/kvik-never"),
    lambda: os.kill(os.getpid(), 0), lambda: os.rename("/tmp/kvik-never", "/tmp/kvik-not"),
):
    try:
        what()
    except PermissionError:
        continue
    sys.exit(1)
"""


@pytest.fixture
def switch(tmp_path: Path) -> Iterator[Switch]:
    switch = Switch.start(tmp_path / "control", SETTINGS)
    yield switch
    switch.stop()


def test_it_is_confined_and_works(switch: Switch) -> None:
    card, theirs = socket.socketpair()
    with card, theirs:
        number, address = switch.add_port("one", "52:54:00:aa:00:01", theirs.fileno(), alias="net0")
        assert address.startswith("10.0.0.")
    status = Path(f"/proc/{switch.process.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert os.uname().machine != "x86_64" or "Seccomp:\t2" in status
    switch.remove_port(number)
    assert switch.ports() == switch.leases() == []


def test_a_confined_process_runs_writes_and_kills_nothing() -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the filter is for x86-64")
    source = str(Path(__file__).parents[4] / "src")
    subprocess.run([sys.executable, "-c", ATTEMPTS, source], check=True)


def test_what_is_wrong_is_refused_and_nothing_stays(switch: Switch) -> None:
    descriptors = Path(f"/proc/{switch.process.pid}/fd")
    switch.ports()
    before = len(list(descriptors.iterdir())) if os.geteuid() == 0 else 0
    card, theirs = socket.socketpair()
    other = socket.socket(socket.AF_INET)
    with card, theirs, other:
        for fd, mac in (
            (other.fileno(), "52:54:00:aa:00:01"),
            (theirs.fileno(), "nonsense"),
            (theirs.fileno(), "01:00:00:00:00:00"),
        ):
            with pytest.raises(OperationFailed):
                switch.add_port("one", mac, fd)
    for what, given in (("fly", {}), ("add", {}), ("uplink", {"port": 9}), ("configure", {"settings": []})):
        with pytest.raises(OperationFailed):
            switch.call(what, **given)
    assert switch.ports() == []
    if os.geteuid() == 0:
        assert len(list(descriptors.iterdir())) == before


def test_a_ports_socket_can_be_replaced_and_the_port_stays(switch: Switch) -> None:
    first, theirs = socket.socketpair()
    second, others = socket.socketpair()
    with first, theirs, second, others:
        number, address = switch.add_port("one", "52:54:00:aa:00:01", theirs.fileno(), alias="net0")
        theirs.close()
        first.sendall(b"\0\0\0\x40half")  # nothing of an old stream goes into the new one
        switch.call("replace", (others.fileno(),), port=number)
        others.close()
        second.settimeout(10)
        second.sendall(b"\0\0\0\x3c" + bytes.fromhex("ffffffffffff525400aa0001") + b"\x08\x06" + bytes(46))
        assert [(port["port"], port["ip"]) for port in switch.ports()] == [(number, address)]
        while not (port := switch.ports()[0])["rx"][1]:
            pass
        assert (port["refused"], port["queued"]) == (1, 0)  # that ARP packet is none
        first.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while first.recv(65536):  # what it was sent, then its end
                pass
        with pytest.raises(OperationFailed, match="port is gone"):
            switch.call("replace", (second.fileno(),), port=99)


def test_from_outside_nothing_is_lost_while_a_machine_does_not_read(switch: Switch) -> None:
    header = (1500).to_bytes(4, "big") + bytes.fromhex("525400aa00015254000000010800")
    stream = memoryview(b"".join(header + number.to_bytes(4, "big") + bytes(1482) for number in range(24_000)))
    card, theirs = socket.socketpair()
    outside, uplink = socket.socketpair()
    with card, outside:
        with theirs, uplink:
            number, _ = switch.add_port("one", "52:54:00:aa:00:01", theirs.fileno(), alias="net0")
            switch.call("uplink", (uplink.fileno(),), port=number)
        outside.settimeout(0.2)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < len(stream):
                sent += outside.send(stream[sent : sent + 65536])
        assert 65536 < sent < len(stream)  # it was held back
        card.settimeout(10)
        got, whole = bytearray(), sent // 1504 * 1504
        while header not in got or len(got) - got.index(header) < whole:  # the switch's own greeting comes before
            got += card.recv(1 << 20)
        assert got[got.index(header) :] == stream[:whole]
        assert switch.ports()[0]["dropped"] == 0
        with contextlib.suppress(TimeoutError):
            while sent < len(stream):
                sent += outside.send(stream[sent : sent + 65536])
        card, theirs = socket.socketpair()
        with card, theirs:  # QEMU was connected to anew: what waited for the old socket holds nobody up
            switch.call("replace", (theirs.fileno(),), port=number)
            card.settimeout(10)
            while header not in card.recv(1 << 20):
                pass


def test_a_daemon_finds_it_again_and_notices_when_it_is_gone(switch: Switch) -> None:
    again = Switch.attach(switch.path)
    assert again is not None
    assert again.process.pid == switch.process.pid
    os.kill(switch.process.pid, signal.SIGKILL)
    assert again.process.wait(10) is not None or not again.alive
    with pytest.raises(HostError, match="is gone"):
        again.ports()
    again.close()
    assert Switch.attach(switch.path) is None


def test_one_that_has_only_just_been_started_has_more_time_for_its_first_answer(tmp_path: Path) -> None:
    path = tmp_path / "control"
    switch = Switch.start(path, SETTINGS, deadline=0.001)  # no interpreter starts as fast
    try:
        assert switch.call("hello")["pid"] == switch.process.pid
    finally:
        switch.deadline = 5.0
        switch.stop()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control"
    for _ in range(2):
        switch = Switch.start(path, SETTINGS)
        os.kill(switch.process.pid, signal.SIGKILL)
        switch.process.wait(10)
        switch.close()
    assert path.exists()
