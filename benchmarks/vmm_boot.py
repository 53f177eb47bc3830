"""From exec to the guest's userspace, from a saved state to a running guest, and the memory that takes: kvik-vmm beside
QEMU's microvm and q35. Same kernel, same initramfs, same KVM, in the lab, interleaved.

    PYTHONPATH=src python benchmarks/vmm_boot.py [--runs 5] [--memory 256]

Memory is what a machine's process holds beside the guest's RAM: resident, and private to it. Figures are ratios: the
lab is an emulated host.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "src")]

APPEND = "console=ttyS0 quiet panic=-1 pci=noearly"  # see lab.vmm_guest
WORD = b"--- the guest begins"
DIRECTORY = Path("/tmp/boot")
PEERS = ("microvm", "q35")
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+")


def command(name: str, kernel: str, initrd: str, memory: int) -> list[str]:
    """One serial line, one disk, one vCPU."""
    boot = [kernel, initrd, APPEND]
    disk = str(DIRECTORY / "disk")
    if name == "kvik-vmm":
        program = [sys.executable, "-I", "-S", str(HERE.parent / "src/kvik/vmm/__main__.py")]
        options = [word for pair in zip(("--kernel", "--initrd", "--append"), boot, strict=True) for word in pair]
        return [*program, *options, "--memory", f"{memory}M", "--disk", disk]
    machine = "microvm,pcie=on,acpi=on" if name == "microvm" else "q35"
    options = [word for pair in zip(("-kernel", "-initrd", "-append"), boot, strict=True) for word in pair]
    return [
        *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-M", machine, "-m", str(memory), "-nodefaults"),
        *(
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            *options,
            "-drive",
            f"if=none,id=d,file={disk},format=raw",
        ),
        *("-device", "virtio-blk-pci,drive=d"),
    ]


# In the lab -----------------------------------------------------------------------------------------------------------


def beside_ram(pid: int, memory: int) -> tuple[int, int]:
    """KiB (resident, private) of a process in mappings that are not the guest's RAM. That is the run of adjoining
    mappings that is exactly as large."""
    rows: list[dict[str, int]] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if found := MAPPING.match(line):
            rows.append({"start": int(found[1], 16), "end": int(found[2], 16)})
        elif line.startswith(("Rss:", "Private_")):
            key, value = line.split()[:2]
            rows[-1][key] = int(value)
    ram: set[int] = set()
    for first, row in enumerate(rows):
        last = first
        while last + 1 < len(rows) and rows[last + 1]["start"] == rows[last]["end"]:
            if rows[last]["end"] - row["start"] >= memory << 20:
                break
            last += 1
        if rows[last]["end"] - row["start"] == memory << 20:
            ram = set(range(first, last + 1))
            break
    assert ram, "the guest's RAM was not found among the mappings"
    rest = [row for number, row in enumerate(rows) if number not in ram]
    return (
        sum(row["Rss:"] for row in rest),
        sum(row["Private_Clean:"] + row["Private_Dirty:"] for row in rest),
    )


def boot(words: list[str], serial: list[str], memory: int) -> dict[str, float]:
    began = time.monotonic()
    with subprocess.Popen([*words, *serial], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(WORD):
                    break
            else:
                raise SystemExit(f"it ended before its userspace: {words}")
            seconds = time.monotonic() - began
            time.sleep(1)
            resident, private = beside_ram(process.pid, memory)
        finally:
            process.kill()
    return {"seconds": seconds, "resident": resident / 1024, "private": private / 1024}


class Monitor:
    """A QMP connection that waits for its server."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self.sock.connect(str(path))
                break
            except OSError:
                assert process.poll() is None, "it ended before anybody spoke to it"
                time.sleep(0.01)
        self.lines = self.sock.makefile()
        self.lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, name: str, **arguments: Any) -> Any:
        self.sock.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        while "event" in (message := json.loads(self.lines.readline())):
            pass
        if "error" in message:
            raise SystemExit(f"{name}: {message}")
        return message["return"]

    def until(self, wanted: Callable[[dict[str, Any]], bool], question: str = "query-status") -> None:
        while not wanted(self.ask(question)):
            time.sleep(0.01)


@contextlib.contextmanager
def running(words: list[str], path: Path) -> Iterator[Monitor]:
    path.unlink(missing_ok=True)
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield Monitor(process, path)
    finally:
        process.kill()
        process.wait()


class Started:
    """A machine that restores a guest which prints. When its first byte came (`first`) is noted beside all else."""

    def __init__(self, words: list[str], path: Path) -> None:
        path.unlink(missing_ok=True)
        self.began, self.first = time.monotonic(), 0.0
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.path = path

    def _read(self) -> None:
        assert self.process.stdout is not None
        if os.read(self.process.stdout.fileno(), 1):
            self.first = time.monotonic() - self.began

    def measure(self) -> dict[str, float]:
        """Seconds from exec: to the guest's first byte, to the monitor's word that it runs; the processor time until
        then."""
        try:
            monitor = Monitor(self.process, self.path)
            monitor.until(lambda info: info["running"])
            answered = time.monotonic() - self.began
            used = float(Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11])
            used += float(Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[12])
            self._reader.join(60)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()
        return {"first": self.first, "answered": answered, "cpu": used / os.sysconf("SC_CLK_TCK")}


def restores(kernel: str, initrd: str, memory: int, runs: int) -> Iterator[dict[str, Any]]:
    """The same kernel, saved while it runs, in either's way, goes on in a new process."""
    socket_path, state, saved = DIRECTORY / "qmp", DIRECTORY / "state", DIRECTORY / "saved"
    theirs = [*command("microvm", kernel, initrd, memory), "-qmp", f"unix:{socket_path},server=on,wait=off"]
    ours = [*command("kvik-vmm", kernel, initrd, memory), "--qmp", str(socket_path)]
    with running([*theirs, "-serial", "null"], socket_path) as monitor:
        time.sleep(15)
        monitor.ask("migrate", uri=f"exec:cat > {state}")
        monitor.until(lambda info: info.get("status") == "completed", "query-migrate")
    with running([*ours, "--serial", "null", "--snapshots", str(DIRECTORY), "--migratable"], socket_path) as monitor:
        time.sleep(15)
        monitor.ask("x-kvik-snapshot-save", directory=str(saved))
    program = ours[: ours.index("--kernel")]
    restoring = [*program, "--restore", str(saved), "--disk", str(DIRECTORY / "disk"), "--qmp", str(socket_path)]
    for number in range(runs + 1):  # the first fills the page cache
        for name, words in (
            ("microvm", [*theirs, "-serial", "stdio", "-incoming", f"exec:cat {state}"]),
            ("kvik-vmm", [*restoring, "--serial", "stdio"]),
        ):
            yield {"what": "restore", "name": name, "counts": number > 0} | Started(words, socket_path).measure()


def inside(what: str, kernel: str, initrd: str, memory: int, runs: int) -> None:
    DIRECTORY.mkdir(exist_ok=True)
    with (DIRECTORY / "disk").open("wb") as file:
        file.truncate(16 << 20)
    for number in range(
        runs + 1 if what != "restores" else 0
    ):  # the first fills the page cache and the cache of kernels
        for name in ("kvik-vmm", *PEERS):
            serial = ["--serial", "stdio"] if name == "kvik-vmm" else ["-serial", "stdio"]
            found = boot(command(name, kernel, initrd, memory), serial, memory)
            print(json.dumps({"what": name, "counts": number > 0} | found), flush=True)
    if what != "boots":
        for row in restores(kernel, initrd, memory, runs):
            print(json.dumps(row), flush=True)


# On the host ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", type=int, default=256, help="MiB of RAM")
    parser.add_argument("--inside", nargs=2, metavar=("KERNEL", "INITRD"), help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("boots", "restores", "all"), default="all")
    options = parser.parse_args()
    if options.inside:
        inside(options.what, *options.inside, options.memory, options.runs)
        return
    from report import Report

    from lab.harness import SHARE, Lab, LabOptions
    from lab.vmm_guest import initramfs

    with Lab(LabOptions()) as lab:
        (lab.share / "initrd").write_bytes(
            initramfs("while :; do echo tick; usleep 10000; done", ("virtio_pci", "virtio_blk"))
        )
        words = [sys.executable, str(Path(__file__).resolve()), "--runs", str(options.runs), "--memory"]
        words += [str(options.memory), "--what", options.what, "--inside", str(lab.kernel.image), f"{SHARE}/initrd"]
        done = lab.run(words, timeout=180 + 90 * options.runs, env={**os.environ, "HOME": "/root"})
    print(done.stdout, file=sys.stderr)
    if done.code:
        sys.exit(done.stderr)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    boots = [row for row in rows if row["what"] != "restore" and row["counts"]]
    restored = [row for row in rows if row["what"] == "restore" and row["counts"]]

    def taken(name: str, key: str) -> list[float]:
        return [row[key] for row in boots if row["what"] == name]

    for peer, target in zip(PEERS, (0.7, 1.0), strict=True) if boots else ():
        report = Report(f"kvik-vmm beside QEMU {peer}, medians of {options.runs}")
        report.within("start to userspace", taken("kvik-vmm", "seconds"), taken(peer, "seconds"), "s", target)
        for key in ("resident", "private"):
            report.within(f"{key} beside RAM", taken("kvik-vmm", key), taken(peer, key), "MiB", 0.3)
        report.show()
    if boots:
        spread = {name: statistics.pstdev(taken(name, "seconds")) for name in ("kvik-vmm", *PEERS)}
        print("  spread of the starts, s:", ", ".join(f"{name} {value:.2f}" for name, value in spread.items()))
    if restored:
        report = Report("a saved guest runs again, beside QEMU microvm's incoming migration")
        for key, text in (("first", "exec to its byte"), ("answered", "exec to `running`"), ("cpu", "processor time")):
            values = {name: [row[key] for row in restored if row["name"] == name] for name in ("kvik-vmm", "microvm")}
            if key == "cpu":
                report.told(text, values["kvik-vmm"], values["microvm"], "s")
            else:
                report.within(text, values["kvik-vmm"], values["microvm"], "s", 0.5)
        report.show()


if __name__ == "__main__":
    main()
