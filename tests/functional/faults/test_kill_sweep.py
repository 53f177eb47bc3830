"""The daemon is killed at every step of a machine's life, while another machine runs.

After each kill the next daemon is there in seconds; the other machine never noticed; the one that was worked on is as
it was before or as it was to be, and its definition is whole; no process, file, socket or directory is left that no
machine owns. KVIK_SWEEP=full in the environment tries every call; otherwise those that weigh most and some others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from fault_harness import Host, alive, children, command_of, disk_xml, eventually, machine_xml
from fault_harness import host as new_host
from kill_points import Point, points_of, share, traced

from kvik.client import Domain, connect
from kvik.conf.domain import parse_domain
from kvik.errors import HypervisorError, KvikError

pytestmark = [
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (apt install strace)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to trace a daemon that runs"),
]
UUID = "7e0c5b4a-0000-4000-8000-00000000000a"
LIVE, CONFIG = 1, 2
WHOLE = os.environ.get("KVIK_SWEEP") == "full"
BACK = 15.0  # seconds until the next daemon has everything again: a third of one, but other tests run beside


@dataclass
class Sweep:
    host: Host
    other: int  # pid of the machine that nobody touches

    def domain(self) -> Domain:
        return self.host.connection.domain("m")

    def xml(self, title: str = "old") -> str:
        image = self.host.root / "m.img"
        devices = disk_xml(image) + "<serial type='pty'/>"
        devices += "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        return machine_xml("m", devices, uuid=UUID, before=f"<title>{title}</title>")

    def names(self) -> set[str]:
        return {domain.name for domain in self.host.connection.domains()}

    # into the state that an operation begins in

    def absent(self) -> None:
        for name in self.names() - {"other"}:
            domain = self.host.connection.domain(name)
            with contextlib.suppress(KvikError):
                domain.destroy()
            with contextlib.suppress(KvikError):
                domain.undefine()

    def defined(self) -> None:
        self.absent()
        self.host.connection.define(self.xml())

    def linked(self) -> None:
        self.defined()
        self.domain().set_autostart(True)

    def running(self) -> None:
        self.linked()
        self.domain().start()

    def paused(self) -> None:
        self.running()
        self.domain().suspend()

    # what may be found after a kill

    def title(self) -> str:
        return parse_domain(self.domain().xml(CONFIG)).title or ""

    def run_state(self) -> str:
        """The daemon's view, once it agrees with QEMU's own."""

        def agreed() -> str:
            state = self.host.state("m")
            if state == "shut off":
                return state
            try:
                said = self.domain().monitor_command('{"execute": "query-status"}')
            except HypervisorError:  # a monitor that was lost is connected again in a moment
                return ""
            return state if f'"status": "{state}"' in said or f'"status":"{state}"' in said else ""

        return eventually(agreed, "daemon and VMM agree on the run state")


@dataclass(frozen=True)
class Operation:
    before: Callable[[Sweep], None]
    act: Callable[[Sweep], object]
    check: Callable[[Sweep], bool]


def _extra_disk(sweep: Sweep) -> str:
    return disk_xml(sweep.host.root / "extra.img", "vdb")


def _attached(sweep: Sweep) -> bool:
    """It is there, or it can be attached now."""

    def there() -> bool:
        with contextlib.suppress(HypervisorError):  # a monitor that was lost is connected again in a moment
            if "extra.img" not in sweep.domain().xml():
                sweep.domain().attach_device(_extra_disk(sweep), LIVE)
            return True
        return False

    eventually(there, "the disk is attached", patience=2)
    return "virtio-disk1" in sweep.domain().monitor_command("info block", hmp=True)


OPERATIONS = {
    "define": Operation(
        Sweep.absent,
        lambda sweep: sweep.host.connection.define(sweep.xml()),
        lambda sweep: sweep.names() == {"other"} or sweep.title() == "old",
    ),
    "redefine": Operation(
        Sweep.linked,
        lambda sweep: sweep.host.connection.define(sweep.xml("new")),
        lambda sweep: sweep.title() in ("old", "new") and sweep.domain().autostart(),
    ),
    "set memory": Operation(
        Sweep.defined,
        lambda sweep: sweep.domain().set_memory(8 << 10, CONFIG),
        lambda sweep: parse_domain(sweep.domain().xml(CONFIG)).current_memory in (8 << 10, 16 << 10),
    ),
    "autostart": Operation(
        Sweep.defined,
        lambda sweep: sweep.domain().set_autostart(True),
        lambda sweep: sweep.domain().autostart() in (True, False),
    ),
    "rename": Operation(
        Sweep.linked,
        lambda sweep: sweep.domain().rename("n"),
        lambda sweep: (
            len(names := sweep.names() - {"other"}) == 1
            and names <= {"m", "n"}
            and (domain := sweep.host.connection.domain(next(iter(names)))).autostart()
            and domain.uuid == UUID
            and parse_domain(domain.xml(CONFIG)).name == domain.name
        ),
    ),
    "start": Operation(
        Sweep.linked,
        lambda sweep: sweep.domain().start(),
        lambda sweep: sweep.run_state() in ("shut off", "running"),
    ),
    "create": Operation(
        Sweep.absent,
        lambda sweep: sweep.host.connection.create(sweep.xml()),
        lambda sweep: sweep.names() == {"other"} or sweep.run_state() == "running",
    ),
    "suspend": Operation(
        Sweep.running,
        lambda sweep: sweep.domain().suspend(),
        lambda sweep: sweep.run_state() in ("running", "paused"),
    ),
    "resume": Operation(
        Sweep.paused,
        lambda sweep: sweep.domain().resume(),
        lambda sweep: sweep.run_state() in ("running", "paused"),
    ),
    "attach": Operation(
        Sweep.running,
        lambda sweep: sweep.domain().attach_device(_extra_disk(sweep), LIVE | CONFIG),
        lambda sweep: sweep.run_state() == "running" and _attached(sweep),
    ),
    "reset": Operation(
        Sweep.running,
        lambda sweep: sweep.domain().reset(),
        lambda sweep: sweep.run_state() == "running",
    ),
    "reboot": Operation(
        Sweep.running,
        lambda sweep: sweep.domain().reboot(),
        lambda sweep: sweep.run_state() == "running",
    ),
    "destroy": Operation(
        Sweep.running,
        lambda sweep: sweep.domain().destroy(),
        lambda sweep: sweep.run_state() in ("running", "shut off"),
    ),
    "undefine": Operation(
        Sweep.linked,
        lambda sweep: sweep.domain().undefine(),
        lambda sweep: sweep.names() == {"other"} or sweep.title() == "old",
    ),
    "undefine a running one": Operation(
        Sweep.running,
        lambda sweep: sweep.domain().undefine(),
        lambda sweep: sweep.run_state() == "running",
    ),
}


def tried(sweep: Sweep, operation: Operation, point: Point) -> bool:
    """One operation with one kill. True if the daemon was hit."""
    host = sweep.host
    operation.before(sweep)
    with traced(host.daemon, point):
        done = False
        with contextlib.suppress(KvikError, OSError):
            operation.act(sweep)
            done = True
        if not done:  # else the kill, if there is one, comes after the answer: soon, or never
            eventually(lambda: not alive(host.daemon) or _answers(host), "the daemon is dead, or refused")
        else:
            time.sleep(0.02)
    # The tracer is gone: a kill that was on its way arrives before the daemon has answered a few times more.
    for _ in range(3):
        eventually(lambda: not alive(host.daemon) or _answers(host), "the daemon is dead, or goes on")
    return not alive(host.daemon)


def _answers(host: Host) -> bool:
    with contextlib.suppress(KvikError, OSError):
        host.connection.domains()
        return True
    return False


def checked(sweep: Sweep, operation: Operation) -> None:
    host = sweep.host
    assert host.connection.domain("other").is_active()
    assert host.pid("other") == sweep.other and alive(sweep.other)
    assert host.connection.domain("other").state().state == 1  # running
    assert operation.check(sweep)
    eventually(lambda: not host.trouble(), "files and processes are right", patience=5)


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at(name: str) -> None:
    operation = OPERATIONS[name]
    with new_host() as host:
        host.start()
        host.image("m.img")
        host.image("extra.img")
        host.define("other")
        host.connection.domain("other").start()
        sweep = Sweep(host, host.pid("other"))
        operation.before(sweep)
        with traced(host.daemon) as trace:
            operation.act(sweep)
            time.sleep(0.1)
        points = share(points_of(trace[0]), WHOLE)
        assert points
        hit = 0
        slowest = 0.0
        failures = []
        for point in points:
            if tried(sweep, operation, point):
                hit += 1
                begun = time.monotonic()
                host.start()
                slowest = max(slowest, time.monotonic() - begun)
            try:
                checked(sweep, operation)
            except (AssertionError, KvikError) as error:
                failures.append(f"{name}, killed at {point}: {error} {host.trouble()}")
                if len(failures) > 3:
                    break
        print(f"{name}: {len(points)} points, {hit} kills, back after at most {slowest:.2f} s")
        assert not failures, "\n".join(failures)
        assert hit >= len(points) // 2, "most of the points are reached again"
        assert slowest < BACK
        sweep.absent()


# Calls that fail ----------------------------------------------------------------------------------------------------

# Not write: the event loop's own wake-ups are such calls. test_space has those that find no room.
FAILING = {"rename", "symlink", "unlink", "mkdir", "fsync", "vfork", "bind", "listen", "sendmsg"}


@pytest.mark.parametrize("name", ["define", "redefine", "rename", "start", "attach", "destroy", "undefine"])
def test_a_call_fails(name: str) -> None:
    """An error of the kernel's at any step: refused with its reason or carried out; the same daemon goes on."""
    operation = OPERATIONS[name]
    with new_host() as host:
        host.start()
        host.image("m.img")
        host.image("extra.img")
        host.define("other")
        host.connection.domain("other").start()
        sweep = Sweep(host, host.pid("other"))
        operation.before(sweep)
        with traced(host.daemon) as trace:
            operation.act(sweep)
            time.sleep(0.1)
        refused = 0
        failures = []
        points = [point for point in share(points_of(trace[0]), WHOLE) if point.call in FAILING]
        for point in points:
            operation.before(sweep)
            try:
                with traced(host.daemon, point, "error=ENOMEM" if point.call == "vfork" else "error=EIO"):
                    operation.act(sweep)
            except KvikError as error:
                refused += 1
                if not str(error).strip() or "unexpectedly" in str(error):
                    failures.append(f"{name}, {point} failed: {error!r}")
            assert alive(host.daemon), (point, host.messages())
            if point.call == "unlink" and host.trouble():
                host.restart()  # what cannot be removed is removed by the next daemon
            try:
                checked(sweep, operation)
            except (AssertionError, KvikError) as error:
                failures.append(f"{name}, {point} failed: {error} {host.trouble()}")
        print(f"{name}: {len(points)} calls failed, {refused} times the operation with them")
        assert not failures, "\n".join(failures)
        sweep.absent()


# While it puts things right ---------------------------------------------------------------------------------------

RECOVERY = ("unlink", "unlinkat", "pidfd_send_signal", "bind") + ("mkdir", "rename", "rmdir", "ftruncate") * WHOLE


def disorder(sweep: Sweep) -> None:
    """All that a daemon can leave behind: killed amid a start, a machine that died since, links and files of no use."""
    host = sweep.host
    sweep.running()
    host.connection.define(machine_xml("n"))
    pid = host.pid("m")
    with traced(host.daemon, Point("sendmsg", 2, "the monitor's second command")), contextlib.suppress(KvikError):
        host.connection.domain("n").start()
    eventually(lambda: not alive(host.daemon), "the daemon is dead")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid), "the machine is dead")
    (host.paths.domains / "autostart" / "gone.xml").symlink_to(host.paths.domains / "gone.xml")
    for directory in (host.paths.domains, host.paths.status):
        (directory / ".kvik-1-1-00000000.tmp").write_text("half")
    (host.paths.status / "99-nobody").mkdir()
    (host.paths.status / "99-nobody" / "monitor.sock").write_text("")


def recovery_killed(host: Host, call: str, number: int) -> bool:
    """Start a daemon that is killed at that call of its start. False if it did not get so far."""
    tracer = ("strace", "-f", "-b", "execve", "--seccomp-bpf", "-o", "/dev/null", "-e", f"trace={call}")
    inject = ("-e", f"inject={call}:signal=KILL:when={number}")
    host.close_connection()
    strace = host.spawn(*tracer, *inject, *host.daemon_command())

    def settled() -> bool:
        with contextlib.suppress(KvikError):
            connect(host.uri).close()
            return True
        return not alive(strace)

    eventually(settled, "it answers, or is dead")
    time.sleep(0.05)
    if not alive(strace):
        return True
    for pid in children(strace):
        if "kvik.daemon.main" in command_of(pid):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(strace), "the daemon is dead")
    return False


@pytest.mark.parametrize("call", RECOVERY)
def test_killed_while_recovering(call: str) -> None:
    """Putting things right can be broken off and begun again."""
    with new_host() as host:
        host.start()
        host.image("m.img")
        host.define("other")
        host.connection.domain("other").start()
        sweep = Sweep(host, host.pid("other"))
        number = 1
        while True:
            disorder(sweep)
            hit = recovery_killed(host, call, number)
            begun = time.monotonic()
            host.start()
            assert time.monotonic() - begun < BACK
            assert sweep.names() == {"other", "m", "n"}
            assert host.state("m") == host.state("n") == "shut off"
            assert sweep.domain().autostart()
            assert host.pid("other") == sweep.other and host.state("other") == "running"
            eventually(lambda: not host.trouble(), f"all is right after a kill at {call} {number}", patience=5)
            if not hit:
                break
            number += 1
        print(f"{call}: {number - 1} kills")
        sweep.absent()
