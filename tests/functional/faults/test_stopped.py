"""A QEMU that is stopped (SIGSTOP) answers nothing: that is its own machine's trouble and nobody else's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from fault_harness import Host, alive, eventually, machine_xml

SOON = 3.0  # seconds for a whole command; QEMU's own deadlines begin at 5


@pytest.fixture
def stuck(host: Host) -> Iterator[int]:
    for name in ("stuck", "web", "db"):
        host.define(name)
    host.kvik("start", "stuck")
    host.kvik("start", "web")
    pid = host.pid("stuck")
    os.kill(pid, signal.SIGSTOP)
    yield pid


def soon(host: Host, *arguments: str, fails: str = "") -> str:
    begun = time.monotonic()
    output = host.kvik(*arguments, fails=fails)
    assert time.monotonic() - begun < SOON, arguments
    return output


def everybody_else_goes_on(host: Host) -> None:
    assert "stuck" in soon(host, "list")
    soon(host, "list", "--all")
    soon(host, "ps")
    soon(host, "dominfo", "web")
    soon(host, "dominfo", "stuck")
    soon(host, "domstate", "stuck")
    soon(host, "dumpxml", "stuck")
    assert "'web'" in soon(host, "domstats")
    soon(host, "start", "db")
    soon(host, "suspend", "web")
    soon(host, "resume", "web")
    soon(host, "destroy", "db")
    soon(host, "define", host.document("new", machine_xml("new")))
    soon(host, "undefine", "new")


def test_nobody_else_waits(host: Host, stuck: int) -> None:
    everybody_else_goes_on(host)
    # While somebody does wait for it, too.
    waiting = [
        host.spawn(*cli(host), *command)
        for command in (("suspend", "stuck"), ("setmem", "stuck", "8M", "--live"), ("screenshot", "stuck", "/dev/null"))
    ]
    everybody_else_goes_on(host)
    for pid in waiting:
        assert host.exit_code(pid) == 1
    os.kill(stuck, signal.SIGCONT)
    eventually(lambda: "paused" in host.state("stuck") or "running" in host.state("stuck"), "it is back")
    host.kvik("qemu-monitor-command", "stuck", '{"execute": "query-status"}')


def cli(host: Host) -> list[str]:
    from fault_harness import CLI

    return [*CLI, "-c", host.uri]


def test_it_can_be_destroyed(host: Host, stuck: int) -> None:
    soon(host, "destroy", "stuck")
    assert not alive(stuck)
    assert host.reason("stuck") == "shut off (destroyed)"
    soon(host, "start", "stuck")


def test_a_daemon_comes_back_beside_it(host: Host, stuck: int) -> None:
    """Within seconds, with the machine as it was last known; it is found again once it answers."""
    begun = time.monotonic()
    host.restart()
    assert time.monotonic() - begun < 6
    assert host.state("stuck") == "running" and host.pid("stuck") == stuck
    everybody_else_goes_on(host)
    os.kill(stuck, signal.SIGCONT)
    host.kvik("suspend", "web")

    def suspended() -> bool:
        try:
            host.kvik("suspend", "stuck")
        except AssertionError:
            return False
        return host.state("stuck") == "paused"

    eventually(suspended, "it answers again", 60)


def test_destroyed_after_a_restart(host: Host, stuck: int) -> None:
    host.restart()
    soon(host, "destroy", "stuck")
    assert not alive(stuck)
