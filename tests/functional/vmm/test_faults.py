"""What goes wrong on the host, and what becomes of the machine: a clear error, or one part that is out of order."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guests import machine_with, needs_kvm
from restored import booted_only, either_way
from running import ROOT, Running
from tiny_kernel import COM1, IDLE, elf, out, say

from kvik.errors import HostError
from kvik.kvm.descriptor import KvmError
from kvik.kvm.system import System
from kvik.kvm.vm import Vm
from kvik.vmm.device import PortDevice
from kvik.vmm.machine import Machine

pytestmark = [needs_kvm, either_way]
UP = say(b"up\n") + IDLE
# 1: mov $'x',%al; mov $COM1,%dx; out; jmp 1b - it never looks whether there is room
FLOOD = out(COM1, ord("x")) + b"\xeb" + bytes((256 - 2 - len(out(COM1, 0)),))


def kvik_vmm(*options: str, limits: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvik.vmm.main", *options],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, preexec_fn=limits, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It ended with 1 and one line that has these words; no traceback."""
    assert done.returncode == 1, done
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("kvik-vmm: "), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


# What it starts from -------------------------------------------------------------------------------------------------


@booted_only
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("is empty", "fetch or build")),
        (b"#!/bin/sh\n" * 100, ("neither a bzImage nor an ELF", "give the file of a kernel")),
        (elf(UP)[:0x1A0], ("damaged", "outside the file")),
        (elf(UP)[:70], ("damaged",)),
        (elf(UP).replace(b"Xen\0", b"Yen\0"), ("no PVH entry", "CONFIG_PVH")),
    ],
    ids=["empty", "a script", "cut off", "cut off early", "no entry"],
)
def test_a_kernel_that_is_none(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(content)
    refused(kvik_vmm("--kernel", str(kernel), "--qmp", str(tmp_path / "qmp")), str(kernel), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["kernel"]


@booted_only
def test_files_that_are_not_there_or_no_files(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(elf(UP))
    refused(kvik_vmm("--kernel", str(tmp_path / "none")), "does not exist", str(tmp_path / "none"))
    refused(kvik_vmm("--kernel", str(tmp_path)), "no regular file")
    refused(kvik_vmm("--kernel", str(tmp_path / "kernel"), "--initrd", str(tmp_path / "none")), "initrd", "not exist")
    refused(kvik_vmm("--kernel", str(tmp_path / "kernel"), "--disk", str(tmp_path / "none")), "disk", "not exist")
    with (tmp_path / "initrd").open("wb") as initrd:
        initrd.truncate(1 << 30)
    done = kvik_vmm("--kernel", str(tmp_path / "kernel"), "--initrd", str(tmp_path / "initrd"), "--memory", "64M")
    refused(done, "initrd", "does not fit", "at least")


def test_a_kernel_that_vanishes_is_still_there_at_the_reset(start: Callable[..., Running], tmp_path: Path) -> None:
    vm = start(UP)
    vm.until(lambda: vm.said(b"up"))
    (tmp_path / "kernel").unlink()
    vm.connect()
    vm.ask("system_reset")
    vm.until(lambda: vm.said(b"up", 2))
    vm.ask("quit")
    assert vm.wait() == 0


def test_a_kernel_that_was_cut_off_meanwhile_stops_the_machine_at_its_reset(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    vm = start(UP)
    vm.until(lambda: vm.said(b"up"))
    vm.connect()
    os.truncate(tmp_path / "kernel", 100)
    with pytest.raises(AssertionError, match="damaged"):
        vm.ask("system_reset")
    assert vm.ask("query-status")["status"] == "internal-error"
    (tmp_path / "kernel").write_bytes(elf(UP))  # the same file, mended
    vm.ask("system_reset")
    assert vm.ask("query-status")["status"] == "paused"
    vm.ask("cont")
    vm.until(lambda: vm.said(b"up", 2))
    vm.ask("quit")
    assert vm.wait() == 0


# What the host lacks -------------------------------------------------------------------------------------------------


@booted_only
def test_too_little_memory(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(elf(UP))
    kernel = ("--kernel", str(tmp_path / "kernel"))

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))

    refused(kvik_vmm(*kernel, "--memory", "4G", limits=little), "cannot map", "less memory")
    refused(kvik_vmm(*kernel, "--memory", "64M,hugepages=1G"), "no multiple of huge pages")
    if "HugePages_Free:        0" in Path("/proc/meminfo").read_text():
        refused(kvik_vmm(*kernel, "--memory", "64M,hugepages=2M,prealloc"), "64 MiB", "huge pages")


@booted_only
@pytest.mark.parametrize("number", range(7, 24, 2))
def test_too_few_descriptors(tmp_path: Path, number: int) -> None:
    (tmp_path / "kernel").write_bytes(elf(say(b"up\n") + out(0x600, 0x20 | 5 << 2) + IDLE))
    (tmp_path / "disk").write_bytes(bytes(4096))

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))

    done = kvik_vmm("--kernel", str(tmp_path / "kernel"), "--disk", str(tmp_path / "disk"), "--rng", limits=few)
    if done.returncode:
        refused(done, "oo many open files")


@booted_only
@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOTTY, errno.ENOMEM])
@pytest.mark.parametrize(
    ("where", "name"), [(Vm, "create_irqchip"), (Vm, "create_vcpu"), (Vm, "set_tss_addr"), (System, "create_vm")]
)
def test_a_kvm_that_cannot(monkeypatch: pytest.MonkeyPatch, where: type, name: str, number: int) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KvmError(number, name.upper())

    monkeypatch.setattr(where, name, fails)
    gc.collect()  # what earlier tests left is not let go of meanwhile
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="cannot make a machine") as caught:
        machine_with(b"\xf4")
    assert caught.value.errno == number and "kvik doctor" in str(caught.value)
    del caught
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_kvm_without_read_only_slots_is_slower_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vm, "check_extension", lambda self, capability: 0)
    machine = machine_with(b"\xf4\xeb\xfd")
    machine.loop.call_later(0.01, machine.quit)
    assert machine.run() == "host-qmp-quit"


# While it runs -------------------------------------------------------------------------------------------------------


class Broken(PortDevice):
    kind, base, size = "broken", 0x5F0, 2

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.machine = machine

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            raise ZeroDivisionError("a bug of this device")
        self.machine.loop.call_soon(lambda: {}["a bug"])

    def close(self) -> None:
        super().close()
        raise LookupError("cannot be closed")


def out16(port: int) -> bytes:
    return b"\xba" + port.to_bytes(2, "little") + b"\xee"


def states(machine: Machine) -> list[str]:
    """The events until the machine stops, at which it is ended."""
    seen: list[str] = []

    def listen(name: str, data: dict[str, Any]) -> None:
        seen.append(name)
        if name == "STOP":
            seen.append(machine.status)
            machine.quit()

    machine.listeners.append(listen)
    machine.loop.call_later(20, lambda: machine.quit("took too long"))
    machine.run()
    return seen


def test_a_device_that_raises_stops_the_machine_and_tells(capfd: pytest.CaptureFixture[str]) -> None:
    machine = machine_with(out16(0x5F0) + b"\xf4\xeb\xfd")
    machine.add(Broken("broken0"))
    assert states(machine)[-3:] == ["STOP", "internal-error", "SHUTDOWN"]
    told = capfd.readouterr().err
    assert "vCPU 0 cannot go on" in told and "a bug of this device" in told
    assert "cannot be closed" in told  # and yet all else was


def test_a_callback_that_raises_harms_nobody_else(capfd: pytest.CaptureFixture[str]) -> None:
    machine = machine_with(out16(0x5F1) + b"\xf4\xeb\xfd")
    machine.add(Broken("broken0"))
    machine.loop.call_later(0.2, machine.quit)
    assert machine.run() == "host-qmp-quit"
    assert "KeyError" in capfd.readouterr().err


def test_a_vcpu_whose_kvm_run_fails_stops_the_machine() -> None:
    machine = machine_with(b"\xeb\xfe")
    vcpu = machine.vcpus[0].vcpu
    vcpu.enter = lambda: (_ for _ in ()).throw(KvmError(errno.EFAULT, "RUN"))
    assert "internal-error" in states(machine)


def test_a_vcpu_thread_that_cannot_be_confined_does_not_run() -> None:
    def refuses() -> None:
        raise OSError(errno.EPERM, "seccomp")

    machine = machine_with(b"\xeb\xfe")
    machine.vcpus[0].on_start = refuses
    with pytest.raises(HostError, match=r"vCPU 0 cannot start: .*seccomp"):
        machine.run()
    assert sum(machine.vcpus[0].exits) == 0


def test_nobody_reads_what_the_guest_says(start: Callable[..., Running]) -> None:
    """Standard output is a pipe that is full: the guest waits or loses, the machine does neither."""
    vm = start(FLOOD)
    vm.connect()
    time.sleep(0.3)  # more than 128 KiB are said meanwhile, or it is slow and this test easier
    vm.ask("stop")
    vm.ask("cont")
    vm.ask("quit")
    assert vm.wait() == 0


@booted_only
def test_nobody_reads_what_the_machine_logs(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(elf(UP))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    program = (
        "import sys\nfrom kvik.vmm import main\nfrom kvik.vmm.machine import Machine\nusual = Machine.start\n"
        "def start(machine, paused=False):\n    usual(machine, paused)\n"
        "    for number in range(100): machine.log(f'line {number}')\n    machine.loop.call_later(0, machine.quit)\n"
        "Machine.start = start\nsys.exit(main.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--kernel", str(tmp_path / "kernel")],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=writer, timeout=60, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
    )  # fmt: skip
    os.close(reader)
    os.close(writer)
    assert done.returncode == 0


@booted_only
def test_standard_streams_that_are_closed(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(elf(say(b"up\n") + out(0x600, 0x20 | 5 << 2) + IDLE))
    command = f'exec "$0" -m kvik.vmm.main --kernel {tmp_path}/kernel <&- >&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable], timeout=60, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 0


def test_a_monitor_s_client_that_never_reads_keeps_nobody_up(start: Callable[..., Running]) -> None:
    vm = start(UP)
    vm.connect()
    deaf = socket.socket(socket.AF_UNIX)
    deaf.connect(str(vm.qmp_path))
    deaf.setblocking(False)
    asked = b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-qmp-schema"}' * 2000
    try:
        for _ in range(50):
            deaf.send(asked)
    except OSError:
        pass
    for _ in range(20):
        vm.ask("stop")
        vm.ask("cont")
    size = int(Path(f"/proc/{vm.process.pid}/statm").read_text().split()[1]) * 4096
    assert size < 200 << 20
    vm.ask("quit")
    assert vm.wait() == 0
    deaf.close()


def test_no_descriptor_left_while_clients_knock(start: Callable[..., Running]) -> None:
    """The listening socket stays readable: the loop must not spin on it, and serve again when there is room."""
    vm = start(UP)
    vm.connect()
    count = len(os.listdir(f"/proc/{vm.process.pid}/fd"))
    _, most = resource.prlimit(vm.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(vm.process.pid, resource.RLIMIT_NOFILE, (count, most))
    other = socket.socket(socket.AF_UNIX)
    other.connect(str(vm.qmp_path))
    vm.ask("query-status")
    spent = ticks(vm.process.pid)
    time.sleep(1.0)
    assert ticks(vm.process.pid) - spent < 50  # of 100 a second
    vm.ask("query-status")
    resource.prlimit(vm.process.pid, resource.RLIMIT_NOFILE, (most, most))
    other.settimeout(30)
    assert b"QMP" in other.recv(4096)
    other.close()
    vm.ask("quit")
    assert vm.wait() == 0


def ticks(pid: int) -> int:
    """Processor time, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])


def test_stopped_and_continued(start: Callable[..., Running]) -> None:
    vm = start(UP)
    vm.connect()
    vm.process.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    vm.process.send_signal(signal.SIGCONT)
    assert vm.ask("query-status")["status"] == "running"
    vm.ask("quit")
    assert vm.wait() == 0


@pytest.mark.parametrize("milliseconds", [20, 40, 60, 80, 100, 150])
def test_ended_amid_its_start(start: Callable[..., Running], tmp_path: Path, milliseconds: int) -> None:
    vm = start(UP, "--serial", f"unix:{tmp_path}/serial")
    time.sleep(milliseconds / 1000)
    vm.process.terminate()
    assert vm.process.wait(60) in (0, -signal.SIGTERM)  # the latter before the program's first line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel"]
    assert vm.process.stderr is not None and b"Traceback" not in vm.process.stderr.read()
