"""Machines that a daemon forks from its zygote: tiny guests on the host's own KVM, killed and found again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from guests import needs_kvm

import kvik
from kvik.client import connect
from kvik.errors import KvikError

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import pvh_kernel

pytestmark = needs_kvm

PACKAGE = Path(kvik.__file__).parent
DEADLINE = 60.0
DOMAIN = """<domain type='kvm'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type>hvm</type><kernel>{kernel}</kernel></os><on_poweroff>destroy</on_poweroff>
<devices><emulator>kvik-vmm</emulator>
<disk type='file'><driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda'/></disk>
<serial type='file'><source path='{output}'/></serial>
</devices></domain>"""


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def children(pid: int, name: str) -> list[int]:
    """Pids of the processes called `name` whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                head, _, tail = (entry / "stat").read_text().rpartition(")")
            except OSError:
                continue
            if head.partition("(")[2] == name and int(tail.split()[1]) == pid and tail.split()[0] != "Z":
                found.append(int(entry.name))
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Host:
    """A daemon of its own root directory and, for `copied`, of a copy of the package that tests may change."""

    def __init__(self, *options: str, copied: bool = False) -> None:
        self.options = options
        self.root = Path(tempfile.mkdtemp(prefix="kz"))
        self.source = PACKAGE.parent
        if copied:
            self.source = self.root / "src"
            shutil.copytree(PACKAGE, self.source / "kvik", ignore=shutil.ignore_patterns("__pycache__"))
        self.uri = f"qemu+unix:///system?socket={self.root / 's'}"
        self.kernel = pvh_kernel.write(self.root / "kernel", power_off=False)
        self.pids: list[int] = []
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("any_kvm.py")), "daemon", "--system"]
        command += ["--root", str(self.root), "--socket", str(self.root / "s"), "--log-level", "debug", *self.options]
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(self.source)}, stderr=log)
        until(lambda: self.process.poll() is not None or self._answers())
        assert self.process.poll() is None, self.log()

    def _answers(self) -> bool:
        try:
            self.connection = connect(self.uri)
        except KvikError:
            return False
        return True

    def log(self) -> str:
        return (self.root / "log").read_text()

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()

    def define(self, name: str, kernel: Path | None = None) -> Any:
        disk = self.root / f"{name}.raw"
        disk.write_bytes(bytes(1 << 20))
        text = DOMAIN.format(name=name, kernel=kernel or self.kernel, disk=disk, output=self.output(name))
        return self.connection.define(text)

    def output(self, name: str) -> Path:
        return self.root / f"{name}.out"

    def ran(self, name: str) -> bool:
        return self.output(name).exists() and self.output(name).read_bytes().startswith(b"!")

    def begin(self, name: str, **options: Any) -> Any:
        """A machine whose guest has run."""
        domain = self.define(name, **options)
        domain.start()
        until(lambda: self.ran(name))
        return domain

    def pid(self, name: str) -> int:
        """Of the machine's process, by its command line."""
        for entry in Path("/proc").iterdir():
            try:
                if (
                    entry.name.isdigit()
                    and f"\0--name\0{name}\0".encode() in (entry / "cmdline").read_bytes()
                    and f"HOME={self.root}/".encode() in (entry / "environ").read_bytes()
                ):
                    return int(entry.name)
            except OSError:
                continue
        raise AssertionError(f"no process of machine {name}")

    def zygotes(self) -> list[int]:
        return children(self.process.pid, "kvik-zygote")

    def ready(self) -> int:
        """The zygote's pid, once it forks machines."""
        self.define("first")
        until(lambda: "are forks of process" in self.log())
        return self.zygotes()[0]

    def end(self) -> None:
        try:
            if self.process.poll() is not None:
                self.start()
            for domain in self.connection.domains(1):
                domain.destroy()
            self.connection.close()
            self.process.terminate()
            assert self.process.wait(DEADLINE) == 0
            assert "failed unexpectedly" not in self.log(), self.log()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.end()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descriptors(pid: int) -> list[str]:
    return [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]


def test_a_machine_is_a_fork_of_the_zygote_and_confined_like_any(host: Host) -> None:
    zygote = host.ready()
    host.begin("a")
    pid = host.pid("a")
    assert parent(pid) == zygote
    assert os.getsid(pid) == pid
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    assert len(threads) >= 2
    until(lambda: all("\nSeccomp:\t2" in (thread / "status").read_text() for thread in threads))
    status = Path(f"/proc/{pid}/status").read_text()
    assert "\nCapEff:\t0000000000000000" in status
    assert "\nNoNewPrivs:\t1" in status
    assert "\nNoNewPrivs:\t1" in Path(f"/proc/{zygote}/status").read_text()
    # What it says goes where an executed machine's words go, and it has a log and a monitor of its own.
    assert "starting up, kvik-vmm" in (host.root / "var/log/kvik/qemu/a.log").read_text()
    assert os.readlink(f"/proc/{pid}/fd/2") == str(host.root / "var/log/kvik/qemu/a.log")
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"


def test_twenty_at_once_share_nothing_and_leave_nothing(host: Host) -> None:
    zygote = host.ready()
    before = len(descriptors(zygote)), len(descriptors(host.process.pid))
    names = [f"m{number}" for number in range(20)]
    domains = [host.define(name) for name in names]

    def start(name: str) -> None:
        connection = connect(host.uri)
        connection.lookup_name(name).start()
        connection.close()

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(start, names))
    until(lambda: all(host.ran(name) for name in names))
    pids = {name: host.pid(name) for name in names}
    assert {parent(pid) for pid in pids.values()} == {zygote}
    sockets: set[str] = set()
    for name, pid in pids.items():
        links = descriptors(pid)
        assert str(host.root / f"{name}.raw") in links
        assert not [link for link in links if link.endswith((".raw", ".out")) and f"/{name}." not in link]
        mine = {link for link in links if link.startswith("socket:")}
        assert not mine & sockets
        sockets |= mine
    for domain in domains:
        domain.destroy()
    until(lambda: all(gone(pid) for pid in pids.values()))
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]  # the kernel reaped them
    until(lambda: (len(descriptors(zygote)), len(descriptors(host.process.pid))) == before)


def test_a_killed_zygote_takes_no_machine_with_it_and_is_replaced(host: Host) -> None:
    zygote = host.ready()
    first = host.begin("a")
    pid = host.pid("a")
    time.sleep(1.0)  # the keeper's pause between two of them
    os.kill(zygote, signal.SIGKILL)
    until(lambda: host.zygotes() not in ([], [zygote]))
    assert "the zygote ended (killed by SIGKILL)" in host.log()
    assert not gone(pid)
    until(lambda: host.log().count("are forks of process") == 2)
    host.begin("b")
    assert parent(host.pid("b")) == host.zygotes()[0]
    first.destroy()
    until(lambda: gone(pid))


def test_a_stuck_zygote_costs_time_but_no_machine(host: Host) -> None:
    zygote = host.ready()
    os.kill(zygote, signal.SIGSTOP)
    host.begin("a")
    assert parent(host.pid("a")) == host.process.pid
    assert "machine a is executed, not forked: the zygote did not answer" in host.log()
    until(lambda: gone(zygote))


def test_a_killed_daemon_leaves_its_machines_and_no_zygote(host: Host) -> None:
    zygote = host.ready()
    host.begin("a")
    pid = host.pid("a")
    host.kill()
    until(lambda: gone(zygote))
    assert not gone(pid)
    host.start()
    found = host.connection.lookup_name("a")
    assert found.is_active()
    assert host.pid("a") == pid
    found.destroy()
    until(lambda: gone(pid))
    host.begin("b")


def test_a_machine_that_dies_is_told_with_its_signal(host: Host) -> None:
    host.ready()
    domain = host.begin("a")
    os.kill(host.pid("a"), signal.SIGKILL)
    until(lambda: not domain.is_active())
    text = (host.root / "var/log/kvik/qemu/a.log").read_text()
    known = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 15)
    assert ("ended unasked: killed by SIGKILL" if known else "ended unasked") in text


def test_a_fork_that_cannot_start_says_why(host: Host) -> None:
    host.ready()
    broken = host.root / "broken"
    broken.write_bytes(b"no kernel" * 100)
    with pytest.raises(KvikError, match="neither a bzImage nor an ELF kernel"):
        host.define("a", kernel=broken).start()
    assert "not forked" not in host.log()
    host.begin("b")


def test_a_daemon_that_ends_ends_its_zygote_and_no_machine(host: Host) -> None:
    zygote = host.ready()
    host.begin("a")
    pid = host.pid("a")
    host.connection.close()
    host.process.terminate()
    assert host.process.wait(DEADLINE) == 0
    assert gone(zygote)
    assert not gone(pid)


def test_it_can_be_switched_off() -> None:
    host = Host("--zygote", "off")
    try:
        host.begin("a")
        assert parent(host.pid("a")) == host.process.pid
        assert not host.zygotes()
    finally:
        host.end()


def test_what_was_upgraded_on_disk_is_not_started_from_an_old_zygote() -> None:
    host = Host(copied=True)
    try:
        zygote = host.ready()
        path = host.source / "kvik/vmm/build.py"
        path.write_text(path.read_text() + "\n# new\n")
        host.begin("a")
        assert parent(host.pid("a")) == host.process.pid
        assert "kvik was changed on disk" in host.log()
        until(lambda: host.log().count("are forks of process") == 2)
        assert gone(zygote)
        host.begin("b")
        assert parent(host.pid("b")) == host.zygotes()[0] != zygote
    finally:
        host.end()
