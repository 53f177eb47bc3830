"""Whole machines inside the sandbox, and what one gets that was taken over."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import needs_kvm
from restored import booted_only, either_way
from running import ROOT, Running
from tiny_kernel import IDLE, POWER_OFF, out, say

from kvik.vmm import confinement
from kvik.vmm.config import DiskConfig, MachineConfig, NetConfig
from kvik.vmm.options import parse

pytestmark = either_way


def confined(process: subprocess.Popen[bytes]) -> list[str]:
    """Which threads have a filter: the field Seccomp of each (2), and no_new_privs."""
    lines = []
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        fields = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        lines.append(f"{fields['Seccomp']}{fields['NoNewPrivs']} {fields['CapEff']}")
    return lines


@needs_kvm
def test_a_whole_life_inside_the_sandbox(start: Callable[..., Running], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    vm = start(say(b"up\n") + IDLE, "--cpus", "2,maximum=3", "--disk", f"{disk},iothread=on")
    vm.until(lambda: vm.said(b"up"), "the guest")
    vm.connect()
    vm.until(lambda: vm.ask("query-status")["running"])
    assert set(confined(vm.process)) == {"21 " + "0" * 16}, confined(vm.process)
    vm.ask("stop")
    assert vm.ask("query-status")["status"] == "paused"
    vm.ask("human-monitor-command", command_line="info registers")
    vm.ask("cont")
    vm.ask("system_reset")
    vm.until(lambda: vm.said(b"up", 2), "the reset")

    with (tmp_path / "other").open("w+b") as other:
        other.truncate(1 << 20)
        number = vm.ask("add-fd", fds=(other.fileno(),), fdset_id=1)["fdset-id"]
        vm.ask(
            "blockdev-add", driver="raw", node_name="n1", file={"driver": "file", "filename": f"/dev/fdset/{number}"}
        )
        vm.ask("device_add", driver="virtio-blk-pci", id="disk9", drive="n1")
    assert any("disk9" in item["qdev"] for item in vm.ask("query-block"))
    place = next(place for place in vm.ask("query-hotpluggable-cpus") if "qom-path" not in place)
    props = {name.replace("-", "_"): value for name, value in place["props"].items()}
    vm.ask("device_add", driver=place["type"], id="cpu2", **props)
    assert len(vm.ask("query-cpus-fast")) == 3
    ours, theirs = socket.socketpair()
    vm.ask("getfd", fds=(theirs.fileno(),), fdname="net")
    vm.ask("netdev_add", type="stream", id="net9", addr={"type": "fd", "str": "net"})
    vm.ask("device_add", driver="virtio-net-pci", id="card9", netdev="net9")
    ours.close()
    theirs.close()

    with (tmp_path / "core").open("w+b") as core:
        vm.ask("getfd", fds=(core.fileno(),), fdname="core")
        vm.ask("dump-guest-memory", paging=False, protocol="fd:core")
        core.seek(0)
        assert core.read(4) == b"\x7fELF"
    vm.ask("x-kvik-metrics")
    assert set(confined(vm.process)) == {"21 " + "0" * 16}, confined(vm.process)
    assert vm.ask("query-status")["status"] == "running"
    vm.ask("quit")
    assert vm.wait() == 0
    assert not vm.qmp_path.exists()
    assert vm.process.stderr is not None and vm.process.stderr.read() == b""


@needs_kvm
@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_confined_machine(start: Callable[..., Running], ends: signal.Signals) -> None:
    vm = start(say(b"up\n") + IDLE)
    vm.until(lambda: vm.said(b"up"))
    vm.until(vm.qmp_path.exists)
    vm.process.send_signal(ends)
    assert vm.wait() == 0


@needs_kvm
def test_the_guest_powers_off_and_the_trace_is_written(start: Callable[..., Running], tmp_path: Path) -> None:
    vm = start(say(b"up\n") + POWER_OFF + IDLE, "--trace", str(tmp_path / "trace"))
    assert vm.wait() == 0 and b"up" in vm.text
    assert '"exit": "IO"' in (tmp_path / "trace").read_text()


ATTACKED = """
    import ctypes, errno, os, socket, sys, mmap, _thread
    from kvik.vmm import build, main
    from kvik.vmm.device import PortDevice
    from kvik.vmm.options import parse

    parent, libc = os.getppid(), ctypes.CDLL(None, use_errno=True)

    def call(number, *arguments):
        if libc.syscall(number, *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]) < 0:
            raise OSError(ctypes.get_errno(), "refused")

    ATTACKS = {
        "read a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "write a file": lambda: os.open("/tmp/kvik-taken", os.O_WRONLY | os.O_CREAT),
        "stat a file": lambda: os.stat("/etc/passwd"),
        "old open": lambda: call(2, b"/etc/passwd", 0, 0),
        "openat2": lambda: call(437, -100, b"/etc/passwd", bytes(24), 24),
        "read the kernel's image again": lambda: os.open(sys.argv[2], os.O_RDONLY),
        "its own memory as a file": lambda: os.open("/proc/self/mem", os.O_RDWR),
        "remove a file elsewhere": lambda: os.unlink("/etc/hostname"),
        "a unix socket": lambda: socket.socket(socket.AF_UNIX),
        "an internet socket": lambda: socket.socket(socket.AF_INET),
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "a program": lambda: os.execv("/bin/true", ["true"]),
        "execveat": lambda: call(322, -100, b"/bin/true", 0, 0, 0),
        "a process": os.fork,
        "vfork": lambda: call(58),
        "trace the parent": lambda: call(101, 16, parent, 0, 0),
        "read the parent": lambda: call(310, parent, 0, 0, 0, 0, 0),
        "kill the parent": lambda: os.kill(parent, 0),
        "tgkill the parent": lambda: call(234, parent, parent, 0),
        "pidfd of the parent": lambda: call(434, parent, 0),
        "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
        "another user": lambda: call(105, 1),
        "namespaces": lambda: call(272, 0x10000000),
        "mount": lambda: call(165, b"x", b"/mnt", b"tmpfs", 0, 0),
        "chroot": lambda: os.chroot("/"),
        "a kernel module": lambda: call(175, b"", 0, b""),
        "bpf": lambda: call(321, 0, bytes(64), 64),
        "perf": lambda: call(298, bytes(64), 0, -1, -1, 0),
        "a new io_uring": lambda: call(425, 8, bytes(120)),
        "keys": lambda: call(250, 0, 0),
        "type for the user": lambda: call(16, 0, 0x5412, b"x"),
        "raise its limits": lambda: call(302, 0, 7, bytes(16), 0),
        "32-bit calls": None,
    }
    del ATTACKS["32-bit calls"]  # int 0x80: the filter ends the process, as the unit tests show

    def attack(where):
        for name, attempt in ATTACKS.items():
            try:
                attempt()
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EACCES):
                    continue
                os.write(1, f"{where}: {name}: odd {error}\\n".encode())
            except RuntimeError:
                continue
            else:
                os.write(1, f"{where}: {name}: WENT THROUGH\\n".encode())
        os.write(1, f"{where}: tried {len(ATTACKS)}\\n".encode())

    class Hole(PortDevice):
        kind, base, size = "hole", 0x5F0, 1

        def attach(self, machine):
            super().attach(machine)
            self.machine = machine

        def write(self, offset, size, value):
            attack("vcpu")
            self.machine.loop.call_soon(lambda: attack("main"))
            self.machine.io_threads["disk0"].loop.call_soon(lambda: attack("io"))

    usual = build._add_platform
    def more(machine):
        usual(machine)
        machine.add(Hole("hole"))
    build._add_platform = more
    sys.exit(main.run(parse(sys.argv[1:])))
"""


@needs_kvm
def test_a_machine_that_was_taken_over_gets_nothing(start: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    vm = start(
        out(0x5F0, 1) + say(b"up\n") + IDLE,
        *("--disk", f"{tmp_path / 'disk'},iothread=on"),
        program=ATTACKED,
    )
    vm.until(lambda: vm.said(rb"tried \d+", 3), "the attacks")
    vm.connect()
    vm.ask("quit")
    assert vm.wait() == 0
    text = vm.text.decode()
    assert "WENT THROUGH" not in text and "odd" not in text, text
    assert {f"{where}: tried" in text for where in ("vcpu", "io", "main")} == {True}
    assert not Path("/tmp/kvik-taken").exists()


SAVES = """
    import os, sys
    from kvik.vmm import build, main
    from kvik.vmm.device import PortDevice
    from kvik.vmm.options import parse

    class Saver(PortDevice):
        kind, base, size = "saver", 0x5F0, 1

        def attach(self, machine):
            super().attach(machine)
            self.machine = machine

        def write(self, offset, size, value):
            self.machine.loop.call_soon(self.save)

        def save(self):
            config = self.machine.config
            self.machine.save(config.snapshots + "/one")
            try:
                self.machine.save(os.path.dirname(config.snapshots) + "/elsewhere")
            except Exception as error:
                os.write(1, f"refused: {error}\\n".encode())

    usual = build._add_platform
    def more(machine):
        usual(machine)
        machine.add(Saver("saver"))
    build._add_platform = more
    sys.exit(main.run(parse(sys.argv[1:])))
"""


@needs_kvm
def test_a_snapshot_is_written_where_that_was_allowed_and_nowhere_else(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    (tmp_path / "snapshots").mkdir()
    vm = start(out(0x5F0, 1) + say(b"up\n") + IDLE, "--snapshots", str(tmp_path / "snapshots"), program=SAVES)
    vm.until(lambda: vm.said(b"refused"), "the snapshot")
    vm.connect()
    vm.ask("quit")
    assert vm.wait() == 0
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["one"]
    assert not [path for path in tmp_path.iterdir() if "elsewhere" in path.name]


@needs_kvm
@pytest.mark.parametrize("postcopy", [False, True], ids=["pre-copy", "post-copy"])
def test_a_machine_migrates_from_sandbox_to_sandbox_over_a_descriptor(tmp_path: Path, postcopy: bool) -> None:
    ours, theirs = socket.socketpair()
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:
        place.mkdir()
    forks = ("--migratable",) if postcopy else ()
    here = Running(places[0], say(b"up\n") + IDLE, "--migratable")
    there = Running(
        places[1], say(b"up\n") + IDLE, "--incoming", f"fd={theirs.fileno()}", *forks, fds=(theirs.fileno(),)
    )
    theirs.close()
    try:
        here.until(lambda: here.said(b"up"), "the guest")
        here.connect()
        there.connect()
        here.ask("getfd", fds=(ours.fileno(),), fdname="there")
        ours.close()
        if postcopy:
            for one in (here, there):
                one.ask("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}])
            here.ask("migrate-set-parameters", max_bandwidth=4096)  # its few pages take seconds
        here.ask("migrate", uri="fd:there")
        if postcopy:
            here.until(lambda: here.ask("query-migrate")["status"] == "active", "the first round")
            here.ask("migrate-start-postcopy")
        here.until(lambda: here.ask("query-migrate")["status"] in ("completed", "failed"), "the migration")
        report = here.ask("query-migrate")
        assert report["status"] == "completed" and bool(report["ram"]["postcopy-bytes"]) == postcopy, report
        there.until(lambda: there.ask("query-status")["status"] == "running", "the guest's arrival")
        there.until(lambda: there.ask("query-migrate")["status"] == "completed", "the rest of its memory")
        assert {line[:2] for line in confined(here.process) + confined(there.process)} == {"21"}
        for one in (here, there):
            one.ask("quit")
            assert one.wait() == 0
        assert not there.said(b"up")  # it went on, it did not start
    finally:
        here.close()
        there.close()


@needs_kvm
def test_post_copy_into_a_sandbox_that_does_not_fork_is_refused_at_once(start: Callable[..., Running]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        vm = start(IDLE, "--incoming", f"fd={theirs.fileno()}", fds=(theirs.fileno(),))
        vm.connect()
        with pytest.raises(AssertionError, match="--migratable"):
            vm.ask("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}])
        vm.ask("quit")
        assert vm.wait() == 0


@needs_kvm
def test_off_means_off_and_the_log_forbids_nothing(start: Callable[..., Running]) -> None:
    vm = start(say(b"up\n") + IDLE, "--sandbox", "off")
    vm.connect()
    assert all(line.startswith("00") for line in confined(vm.process))
    vm.ask("quit")
    assert vm.wait() == 0


@booted_only
def test_descriptors_that_a_configuration_names_are_found() -> None:
    config = MachineConfig(
        qmp=["fd=7", "/run/9"], trace="/dev/fd/13", disks=[DiskConfig(fd=8)], nets=[NetConfig(fds=[11, 12])]
    )
    config.boot.kernel_fd = 5
    assert confinement.descriptors(config) == {5, 7, 8, 11, 12, 13}


@booted_only
def test_only_directories_of_own_sockets_may_lose_files() -> None:
    config = parse(
        ["--qmp", "/run/a/qmp", "--serial", "unix:/run/b/serial", "--serial", "file:/var/log/x", "--kernel", "k"]
    )
    assert confinement._directories(config) == ("/run/a", "/run/b")


@booted_only
def test_whatever_is_imported_late_is_imported_before_the_sandbox() -> None:
    """No function of the package imports what the lists of `confinement` do not name."""
    import ast

    known = {"kvik.vmm", *confinement.LATE, *confinement.LATE_CONTROL, *confinement.OVERLAYS, *confinement.AT_START}
    missing = []
    for path in (ROOT / "kvik" / "vmm").rglob("*.py"):
        if "/sandbox/" in str(path) or "/blk/" in str(path) or path.name.startswith("mock"):
            continue  # kvik-blk has a list of its own (tests/unit/vmm/test_blk.py)
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in names:
                    if name not in known and name not in sys.builtin_module_names and name != "typing":
                        missing.append(f"{path.name}: {name}")
    assert not missing
