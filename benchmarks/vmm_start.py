"""How long a machine takes from exec, or from a request to a zygote, to its first instruction; what each vCPU, device
and GiB adds to that; and what memory of its own it has beside its guest's.

The guest is a kernel of a few instructions, whose first is a byte to COM1: when that comes out at the other end of a
pipe the vCPU runs. So this measures the product as it is, on any KVM. The peer is `python -I -S -c pass`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pvh_kernel
from report import Report

SOURCE = Path(__file__).resolve().parent.parent / "src"
SETTLE = 0.15  # seconds: a machine that ends keeps KVM busy for the next one
VMM = [sys.executable, "-I", "-S", str(SOURCE / "kvik/vmm/__main__.py")]


class Sample:
    """`first` and `whole`: ms to the guest's first byte and to the process's end; `cpu`: ms of CPU time."""

    def __init__(self, first: float, whole: float, cpu: float) -> None:
        self.first, self.whole, self.cpu = first, whole, cpu


def bare(command: Sequence[str]) -> Sample:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    whole = 1e3 * (time.perf_counter() - begun)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(whole, whole, 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))


def start(arguments: Sequence[str]) -> Sample:
    """One machine, from exec to its end."""
    reader, writer = os.pipe()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    process = subprocess.Popen([*VMM, *arguments, "--serial", f"fd={writer}"], pass_fds=(writer,))
    os.close(writer)
    came = os.read(reader, 1)
    first = 1e3 * (time.perf_counter() - begun)
    code = process.wait()
    whole = 1e3 * (time.perf_counter() - begun)
    os.close(reader)
    if came != b"!" or code:
        raise RuntimeError(f"the machine did not run: {came!r}, exit code {code}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(first, whole, 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))


class Zygote:
    """One that forks machines for us."""

    def __init__(self) -> None:
        self.channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen([*VMM, "--zygote", str(other.fileno())], pass_fds=(other.fileno(),))
        other.close()
        self.channel.recv(4096)  # it can fork

    def start(self, arguments: Sequence[str]) -> Machine:
        reader, writer = os.pipe()
        listener, null = listening(), os.open(os.devnull, os.O_RDWR)
        argv = ["kvik-vmm", *arguments, "--serial", "fd=10", "--qmp", "fd=11"]
        begun = time.perf_counter()
        request = {"argv": argv, "env": {"HOME": "/"}, "fds": [0, 1, 2, 10, 11], "cwd": "/"}
        socket.send_fds(self.channel, [json.dumps(request).encode()], [null, null, 2, writer, listener.fileno()])
        answer, fds, _, _ = socket.recv_fds(self.channel, 4096, 1)
        os.close(writer)
        if os.read(reader, 1) != b"!":
            raise RuntimeError(f"the machine did not run: {answer!r}")
        first = 1e3 * (time.perf_counter() - begun)
        listener.close()
        os.close(null)
        os.close(reader)
        return Machine(json.loads(answer)["pid"], fds[0], first)

    def close(self) -> None:
        self.channel.close()
        self.process.wait()


class Machine:
    """One that runs; `first`: ms to its guest's first byte."""

    def __init__(self, pid: int, pidfd: int, first: float) -> None:
        self.pid, self.pidfd, self.first = pid, pidfd, first

    def private(self, ram: int) -> float:
        """MiB of memory that it shares with nobody, but for the mapping of `ram` bytes that is its guest's."""
        total, counts = 0, True
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                counts = int(found[2], 16) - int(found[1], 16) != ram
            elif counts and line.startswith("Private_"):
                total += int(line.split()[1])
        return total / 1024

    def end(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        select.select([self.pidfd], [], [])
        os.close(self.pidfd)
        time.sleep(SETTLE)


def listening() -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind("")
    made.listen()
    return made


def execute(arguments: Sequence[str]) -> Machine:
    """What `Zygote.start` starts, by exec."""
    reader, writer = os.pipe()
    listener = listening()
    options = [*arguments, "--serial", f"fd={writer}", "--qmp", f"fd={listener.fileno()}"]
    begun = time.perf_counter()
    process = subprocess.Popen([*VMM, *options], pass_fds=(writer, listener.fileno()))
    os.close(writer)
    if os.read(reader, 1) != b"!":
        raise RuntimeError("the machine did not run")
    first = 1e3 * (time.perf_counter() - begun)
    listener.close()
    os.close(reader)
    return Machine(process.pid, os.pidfd_open(process.pid), first)


def both_ways(rounds: int) -> None:
    """Fork and exec of the same machine, sandboxed and with a monitor."""
    ram = 256 << 20
    with tempfile.TemporaryDirectory() as directory:
        kernel = pvh_kernel.write(Path(directory, "kernel"), power_off=False)
        arguments = ["--kernel", str(kernel), "--memory", "256M", "--pvpanic", "off"]
        zygote = Zygote()
        first: dict[str, list[float]] = {"fork": [], "exec": [], "bare": []}
        private: dict[str, list[float]] = {"fork": [], "exec": []}
        for _ in range(rounds):
            first["bare"].append(bare([sys.executable, "-I", "-S", "-c", "pass"]).first)
            for way, begin in (("fork", zygote.start), ("exec", execute)):
                machine = begin(arguments)
                time.sleep(SETTLE)  # until it has confined itself and waits
                first[way].append(machine.first)
                private[way].append(machine.private(ram))
                machine.end()
        zygote.close()
    report = Report("to the guest's first instruction, beside a bare interpreter; memory, fork beside exec")
    report.below("exec", first["exec"], "ms", 20, first["bare"])
    report.below("fork of a zygote", first["fork"], "ms", 8, first["bare"])
    report.below("private memory of a fork", private["fork"], "MiB", 4, private["exec"])
    report.show()
    print(f"  fastest: exec {min(first['exec']):.1f}, fork {min(first['fork']):.1f}, bare {min(first['bare']):.1f} ms")


def restored(rounds: int) -> None:
    """The same from a snapshot: to the guest's first byte, and until its monitor answers; sandboxed."""
    with tempfile.TemporaryDirectory() as directory:
        kernel = pvh_kernel.write(Path(directory, "kernel"), again=True)
        place, control = Path(directory, "saved"), Path(directory, "qmp")
        options = ["--kernel", str(kernel), "--memory", "256M", "--serial", "null", "--snapshots", directory]
        with subprocess.Popen([*VMM, *options, "--qmp", str(control)]) as process:
            while not control.exists():
                time.sleep(SETTLE)
            ask(control, "x-kvik-snapshot-save", directory=str(place))
            process.kill()
        taken: dict[str, list[float]] = {"first": [], "answer": [], "cpu": [], "bare": []}
        for _ in range(rounds):
            taken["bare"].append(bare([sys.executable, "-I", "-S", "-c", "pass"]).first)
            control.unlink(missing_ok=True)
            begun = time.perf_counter()
            machine = execute(["--restore", str(place), "--qmp", str(control)])
            taken["first"].append(machine.first)
            while not control.exists():
                time.sleep(0.001)
            ask(control, "query-status")
            taken["answer"].append(1e3 * (time.perf_counter() - begun))
            nanoseconds = Path(f"/proc/{machine.pid}/task/{machine.pid}/schedstat").read_text().split()[0]
            taken["cpu"].append(int(nanoseconds) / 1e6)
            machine.end()
    report = Report("restored from a snapshot, beside a bare interpreter")
    for key, what in (
        ("first", "exec to the guest's first byte"),
        ("answer", "exec to the monitor's first answer"),
        ("cpu", "processor time until then, main thread"),
    ):
        report.told(what, taken[key], taken["bare"], "ms")
    report.show()


def ask(path: Path, command: str, **arguments: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile() as lines:
        sock.connect(str(path))
        lines.readline()
        for name, values in (("qmp_capabilities", {}), (command, arguments)):
            sock.sendall(json.dumps({"execute": name, "arguments": values}).encode())
            while "event" in (answer := json.loads(lines.readline())):
                pass
            if "return" not in answer:
                raise RuntimeError(f"{name}: {answer}")


def cases(kernel: Path, disk: Path) -> dict[str, list[str]]:
    """Command lines by name."""
    plain = ["--kernel", str(kernel), "--pvpanic", "off"]
    base = [*plain, "--memory", "256M"]

    def disks(count: int) -> list[str]:
        return [word for _ in range(count) for word in ("--disk", f"{disk},lock=off,readonly=on")]

    return {
        "1 vCPU, 256 MiB, no device": base,
        **{f"{count} vCPUs": [*base, "--cpus", str(count)] for count in (2, 4, 8, 16, 32, 64)},
        **{f"{count} disks": [*base, *disks(count)] for count in (1, 2, 4, 8, 16)},
        **{f"{count} GiB": [*plain, "--memory", f"{count}G"] for count in (1, 4, 16, 64, 256)},
    }


def measure(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        kernel = pvh_kernel.write(Path(directory, "kernel"))
        disk = Path(directory, "disk")
        with disk.open("wb") as file:
            file.truncate(1 << 20)
        wanted = cases(kernel, disk)
        taken: dict[str, list[Sample]] = {name: [] for name in ("python -I -S -c pass", *wanted)}
        for _ in range(rounds):  # interleaved: what else the host does hits all alike
            taken["python -I -S -c pass"].append(bare([sys.executable, "-I", "-S", "-c", "pass"]))
            for name, arguments in wanted.items():
                taken[name].append(start(arguments))
    peer = [sample.first for sample in taken["python -I -S -c pass"]]
    report = Report("exec to the guest's first instruction, ms, beside an interpreter that does nothing")
    report.below("1 vCPU, 256 MiB, no device", [s.first for s in taken["1 vCPU, 256 MiB, no device"]], "ms", 20, peer)
    report.show()
    print(f"\n  {'':28}{'first byte':>12}{'fastest':>10}{'ended':>10}{'CPU time':>10}  (ms, medians)")
    for name, samples in taken.items():
        first = [sample.first for sample in samples]
        middle = [statistics.median(getattr(sample, field) for sample in samples) for field in ("whole", "cpu")]
        print(f"  {name:28}{statistics.median(first):12.1f}{min(first):10.1f}{middle[0]:10.1f}{middle[1]:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--short", action="store_true", help="fork beside exec, and restoring, only")
    options = parser.parse_args()
    both_ways(options.rounds)
    restored(options.rounds)
    if not options.short:
        measure(options.rounds)


if __name__ == "__main__":
    main()
