"""Daemon and machine die, or the host loses power, while a disk of a running machine changes over to another image.

Whatever the order, the machine never starts again on an image that its guest did not write to last: it starts on the
right one, or says which two it may be, and starts on the one that it is then told. KVIK_SWEEP=full in the environment
tries every step of the daemon, otherwise some.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe import Axe
from fault_harness import Host, alive, eventually
from test_block_job_kills import (
    BLOCK,
    COMMIT_ACTIVE,
    DISK_ONLY,
    PIVOT,
    Bench,
    Operation,
    bench_with_axe,
    deleted,
    settled,
    start,
)

from kvik.client import snapshot
from kvik.errors import KvikError

WHOLE = os.environ.get("KVIK_SWEEP") == "full"
UNSURE = "which of the two its guest wrote to last cannot be known"


def committing(bench: Bench) -> None:
    bench.call("DOMAIN_BLOCK_COMMIT", "vda", None, None, 0, COMMIT_ACTIVE)


def copying(bench: Bench) -> None:
    bench.copy_to("copy")


JOBS: dict[str, Callable[[Bench], None]] = {"commit": committing, "copy": copying}
NEW = {"commit": "base", "copy": "copy"}


def told_to_pivot(bench: Bench) -> None:
    bench.call("DOMAIN_BLOCK_JOB_ABORT", "vda", PIVOT)


def attempted(act: Callable[[], object]) -> bool:
    with contextlib.suppress(KvikError, OSError):
        act()
        return True
    return False


class Monitor:
    """QEMU's own, when there is no daemon."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            reply = json.loads(self._lines.readline())
            if "event" not in reply:
                return reply["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def write_alone(bench: Bench, block: int, pattern: int) -> None:
    """The guest goes on while there is no daemon."""
    monitor = Monitor(Path(bench.host.status("m").attrib["directory"]) / "monitor.sock")
    qdev = "/machine/peripheral/virtio-disk0/virtio-backend"
    for command in (f"write -P {pattern} {block * BLOCK} {BLOCK}", "flush"):
        said = monitor("human-monitor-command", **{"command-line": f'qemu-io -d {qdev} "{command}"'})
        assert not said or "bytes" in said, said
    bench.held[block] = pattern
    monitor.close()


def end_machine(host: Host, pid: int, *, power: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid), "the machine is dead")
    if power:  # what is below /run goes with it
        host.enter("find", str(host.paths.status), "-mindepth", "1", "-delete")


def started_right(bench: Bench, old: str, new: str, said: str) -> bool:
    """Whether it started at once; in the end it runs, and its disk shows what its guest wrote."""
    domain = bench.host.connection.domain("m")
    try:
        domain.start()
        sure = True
    except KvikError as error:
        sure = False
        told = f"{error} {getattr(error, 'remedy', '')}"
        assert UNSURE in told and all(str(bench.place / name) in told for name in (old, new)), (said, told)
        right = [name for name in (old, new) if bench.digest(bench.place / name) == bench.expected()]
        assert right, said
        assert attempted(lambda: bench.host.kvik("start", "m", fails=UNSURE))
        bench.host.kvik("blockjob", "m", "vda", "--pivot" if right[0] == new else "--abort")
        assert bench.chain(2)[0] == right[0], said
        domain.start()
    top = bench.chain()[0]
    assert bench.digest(bench.place / top) == bench.expected(), (said, top)
    assert not list(bench.host.paths.pivots.iterdir()), said
    return sure


def swept(bench: Bench, axe: Axe, act: Callable[[Bench], object], before: Callable[[Bench], None], new: str) -> None:
    """Killed at each step from the one that writes down what is about to be done until it is done and written."""
    host, sure = bench.host, 0

    def again(step: int) -> str:
        if host.connection.domains():  # what goes on by itself ends first
            settled(bench, Operation(act, (), pivot=True))
        bench.fresh()
        before(bench)
        axe.set(step, first="/pivot/")
        return bench.chain()[0]

    again(0)
    act(bench)
    eventually(lambda: bench.chain()[0] == new, "it has changed over")
    eventually(lambda: not list(host.paths.pivots.iterdir()), "that is in the definition")
    count = axe.steps
    axe.set()
    assert count > 10, f"only {count} steps: the axe sees nothing"
    steps = range(1, count + 2 if WHOLE else 15)
    for step in steps:
        old = again(step)
        pid = host.pid("m")
        attempted(lambda: act(bench))
        if step < 13:
            eventually(lambda: not alive(host.daemon), f"the daemon is dead at step {step}: {axe.last}")
        host.kill_daemon(signal.SIGKILL)
        said = f"killed at step {step} of {count}: {axe.last}"
        write_alone(bench, 7, 77)  # where the old image has something else
        axe.set()
        end_machine(host, pid, power=bool(step % 2))
        start(host, axe)
        sure += started_right(bench, old, new, said)
    assert 0 < sure < len(steps)  # both have been seen


@pytest.mark.parametrize("name", JOBS)
def test_daemon_and_machine_die_at(name: str) -> None:
    def ready(bench: Bench) -> None:
        bench.write(7, 107)
        JOBS[name](bench)
        bench.wait_ready()

    with bench_with_axe() as (bench, axe):
        swept(bench, axe, told_to_pivot, ready, NEW[name])


def test_a_merge_of_a_snapshot_is_not_done_again_from_an_image_that_is_history() -> None:
    """Its own image went into the one below, where the guest wrote on: what is merged when the machine is off must not
    be the image that it left."""

    def taken(bench: Bench) -> None:
        domain = bench.host.connection.domain("m")
        snapshot.create(domain, "<domainsnapshot><name>s1</name></domainsnapshot>", DISK_ONLY)
        bench.write(7, 107)

    with bench_with_axe() as (bench, axe):
        swept(bench, axe, deleted("s1"), taken, "top")
        bench.host.connection.domain("m").destroy()
        eventually(lambda: not (bench.place / "top.s1").exists(), "what no snapshot needs is gone")
        assert bench.digest(bench.place / "top") == bench.expected()
