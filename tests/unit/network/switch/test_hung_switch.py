"""A switch that is stopped, hangs, or is killed at any step: its own network alone suffers, and comes back."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvik.conf.enums import NetworkUpdateCommand, NetworkUpdateFlags, NetworkUpdateSection
from kvik.errors import KvikError, OperationTimeout
from kvik.host import process
from kvik.host.process import find_program
from kvik.network.networks import Networks
from kvik.network.switch import control
from kvik.network.switch.control import Switch
from kvik.network.switch.session import SessionNetworks
from unit.network.switch.guest import Guest
from unit.network.switch.session import Session, inside, session
from unit.network.switch.test_session_networks import ONE, TWO, answering, started
from unit.network.switch.wire import SETTINGS

DEADLINE = 0.5  # seconds that a switch which is stopped has for an answer, here; others have the usual ones


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Session]:
    with session(tmp_path) as made:
        yield made


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until_state(pid, "T")


@contextlib.contextmanager
def waited_for(switches: SessionNetworks, *names: str) -> Iterator[None]:
    """The switches of these networks, of which no answer is expected, are waited for shortly."""
    known = [switches._switches[name] for name in names]
    for switch in known:
        switch.deadline = DEADLINE
    try:
        yield
    finally:
        for switch in known:
            switch.deadline = control.DEADLINE


def until_state(pid: int, wanted: str) -> None:
    for _ in range(1000):
        stat = process.read_stat(pid)
        if stat is not None and stat.state in wanted:
            return
        time.sleep(0.01)
    raise AssertionError(f"{pid} is not in state {wanted}")


def look_until(home: Session, switches: SessionNetworks, wanted: str) -> list[str]:
    """Look as the daemon does until it says that; everything said."""
    said: list[str] = []
    end = time.monotonic() + 60.0
    while time.monotonic() < end:
        said += switches.look_after(home.cards)
        if any(wanted in text for text in said):
            return said
        time.sleep(0.02)
    raise AssertionError(f"never said {wanted!r}: {said}")


def test_one_that_is_stopped_is_said_once_and_other_networks_go_on(home: Session) -> None:
    async def work(networks: Networks, switches: SessionNetworks) -> None:
        for name, number in (("red", 1), ("blue", 2)):
            await started(networks, inside(name, number))
        red, blue = home.plug(switches, "left", "red", ONE), home.plug(switches, "right", "blue", TWO)
        address = red.boot()
        blue.boot()
        pid = home.pid("red")
        assert pid is not None
        stop(pid)
        with waited_for(switches, "red"), contextlib.ExitStack() as go_on:
            go_on.callback(os.kill, pid, signal.SIGCONT)
            (said,) = switches.look_after(home.cards)
            assert "network red" in said and f"process {pid}" in said and f"kill -CONT {pid}" in said
            for _ in range(3):
                assert switches.look_after(home.cards) == []  # once is enough
            with pytest.raises(OperationTimeout, match="has not answered"):  # at once: who waits says "did not answer"
                networks.lookup_name("red").leases()
            assert blue.boot()
            assert len(networks.lookup_name("blue").leases()) == 1
            home.plug(switches, "third", "blue", ONE).boot()
            # What is asked of it meanwhile is refused, and stays so when it has done it late.
            live = NetworkUpdateFlags.LIVE
            host = "<host ip='10.1.0.90'><hostname>printer</hostname></host>"
            with pytest.raises(OperationTimeout):
                await networks.lookup_name("red").update(
                    NetworkUpdateCommand.ADD_LAST, NetworkUpdateSection.DNS_HOST, -1, host, live
                )
            assert "printer" not in networks.lookup_name("red").xml()
        said = look_until(home, switches, "answers again")[-1]
        assert home.pid("red") == pid
        assert red.ask("printer") == []
        assert red.boot() == address
        assert [lease.address for lease in networks.lookup_name("red").leases()] == [address]

    home.turn(work)


def test_a_late_answer_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    switch = Switch.start(tmp_path / "control", SETTINGS)
    try:
        assert switch.call("hello")["pid"] == switch.process.pid
        switch.deadline = DEADLINE
        stop(switch.process.pid)
        assert switch.stopped
        with pytest.raises(OperationTimeout, match="did not answer 'hello'"):
            switch.call("hello")
        with pytest.raises(OperationTimeout, match="has not answered") as caught:
            switch.ports()
        assert caught.value.remedy == f"it is stopped: let it go on (kill -CONT {switch.process.pid})"
        assert switch.silence >= DEADLINE
        os.kill(switch.process.pid, signal.SIGCONT)
        while switch.silence:
            time.sleep(0.01)
        switch.deadline = control.DEADLINE
        assert switch.ports() == []  # and not the answer to "hello"
        assert switch.call("hello")["network"] == "default"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(switch.process.pid, signal.SIGCONT)
        switch.stop()


def test_a_stopped_one_ends_with_its_network_and_the_next_start_has_a_new_one(home: Session) -> None:
    async def work(networks: Networks, switches: SessionNetworks) -> None:
        await started(networks, inside("red", 1))
        guest = home.plug(switches, "left", "red", ONE)
        address = guest.boot()
        pid = home.pid("red")
        assert pid is not None
        stop(pid)
        network = networks.lookup_name("red")
        with waited_for(switches, "red"):
            await network.destroy()
        assert process.read_stat(pid) is None
        await network.start()
        look_until(home, switches, "connected again")
        guest.plug()
        assert guest.boot() == address

    home.turn(work)


def test_one_that_hangs_for_long_is_ended_and_its_machines_are_on_a_new_one(home: Session) -> None:
    home.patience["hung"] = 2 * DEADLINE

    async def work(networks: Networks, switches: SessionNetworks) -> None:
        await started(networks, inside("red", 1))
        guest = home.plug(switches, "left", "red", ONE)
        address = guest.boot()
        pid = home.pid("red")
        assert pid is not None
        stop(pid)
        with waited_for(switches, "red"):
            for _ in range(3):
                switches.look_after(home.cards)
                time.sleep(DEADLINE)
        assert home.pid_of_file("red") == pid  # whoever has stopped it is not thwarted
        # A debugger that holds it is gone, but it does not answer: as if it had gone round in circles.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Switch, "stopped", False)
            said = look_until(home, switches, "is ended")
        assert any("started again" in text for text in said)
        assert process.read_stat(pid) is None
        guest.plug()
        assert guest.boot() == address

    home.turn(work)


def test_a_new_daemon_finds_one_that_hangs_and_replaces_it(home: Session) -> None:
    async def first(networks: Networks, switches: SessionNetworks) -> tuple[Guest, str]:
        for name, number in (("red", 1), ("blue", 2)):
            await started(networks, inside(name, number))
        home.plug(switches, "right", "blue", TWO).boot()
        guest = home.plug(switches, "left", "red", ONE)
        return guest, guest.boot()

    guest, address = home.turn(first)
    pids = [home.pid("red"), home.pid("blue")]
    for pid in pids:
        assert pid is not None
        stop(pid)
    home.patience["deadline"] = DEADLINE  # a new daemon's, for those that it finds
    (home.paths.run / "network/blue.xml").unlink()  # and of one network nothing is known any more

    async def second(networks: Networks, switches: SessionNetworks) -> None:
        home.cards = [card for card in home.cards if card.network == "red"]
        look_until(home, switches, "connected again")
        assert all(process.read_stat(pid) is None for pid in pids if pid is not None)
        guest.plug()
        assert guest.boot() == address

    home.turn(second)


# Killed at every step ---------------------------------------------------------------------------------------------

# What a switch asks of the kernel on its way to a machine's port, with how many of each are tried.
CALLS = {"listen": 1, "epoll_ctl": 4, "accept4": 1, "recvmsg": 2, "setsockopt": 2, "sendto": 6, "recvfrom": 4}


class Deadly:
    """Has the next switch killed at one of its system calls; it has not been made then."""

    def __init__(self, call: str, number: int) -> None:
        self.inject = f"inject={call}:signal=KILL:when={number}"
        self.pids: list[int] = []

    def spawn(self, words: Sequence[str], **how: Any) -> process.ProcessHandle:
        if not self.pids:
            words = ["strace", "-D", "-o", "/dev/null", "-e", self.inject, *words]
        handle = process.spawn(words, **how)
        self.pids.append(handle.pid)
        return handle


@pytest.mark.skipif(find_program("strace") is None, reason="needs strace")
@pytest.mark.parametrize("point", [(call, number) for call, most in CALLS.items() for number in range(1, most + 1)])
def test_killed_at_any_step_it_is_had_again_and_nothing_stays(
    home: Session, monkeypatch: pytest.MonkeyPatch, point: tuple[str, int]
) -> None:
    deadly = Deadly(*point)

    async def work(networks: Networks, switches: SessionNetworks) -> None:
        await started(networks, inside("red", 1))
        monkeypatch.setattr("kvik.network.switch.control.process", Spawning(deadly))
        guests = [plug(home, switches, name, mac) for name, mac in (("left", ONE), ("right", TWO))]
        addresses = [boot(home, switches, guest) for guest in guests]
        assert len(set(addresses)) == 2
        boot(home, switches, guests[0])  # the switch may have died after the first guest had its address
        answering(guests[1])
        guests[0].ping(addresses[1])
        assert len(deadly.pids) == 2, "it was not killed"
        assert {lease.address for lease in networks.lookup_name("red").leases()} == set(addresses)

    home.turn(work)
    assert [path.name for path in (home.paths.run / "network").glob("*.switch")] == ["red.switch"]


class Spawning:
    """The module `process`, with another `spawn`."""

    def __init__(self, deadly: Deadly) -> None:
        self.spawn = deadly.spawn

    def __getattr__(self, name: str) -> Any:
        return getattr(process, name)


def plug(home: Session, switches: SessionNetworks, name: str, mac: str) -> Guest:
    """A machine's start, which fails as a whole if the switch is not there, and then is tried again."""
    try:
        return home.plug(switches, name, "red", mac)
    except KvikError:
        return home.plug(switches, name, "red", mac)


def boot(home: Session, switches: SessionNetworks, guest: Guest) -> str:
    for _ in range(10):
        try:
            return guest.boot()
        except OSError:
            for _ in range(500):
                switches.look_after(home.cards)
                if select.select([guest.listener], [], [], 0.02)[0]:
                    break
            guest.plug()
    raise AssertionError("no address")
