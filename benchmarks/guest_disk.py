"""A guest's disk with kvik's defaults beside QEMU command lines tuned by hand: same guest, program and image content.

    PYTHONPATH=src python benchmarks/guest_disk.py [--rounds 5] [--seconds 2] [--format qcow2] [--directory DIR]

Two machines of kvik's daemon, one with a plain <disk> and one whose disk has an I/O thread, and a QEMU for each way of
serving a disk, all running; the load goes from one to the next, in turn. What differs is the disk alone: its host I/O
(threads, io_uring, native with O_DIRECT) and whether an I/O thread serves it. Images are written once over before, and
lie in the page cache where that is used. Guests run under software emulation, which bounds all of them: only ratios
mean something. As root.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import network_guests as guests
import peer
from report import Report

from functional.network.guests import Guest

LOADS = [("randread", 4096, depth) for depth in (1, 32)] + [("randwrite", 4096, depth) for depth in (1, 32)]
LOADS += [("seqread", 1 << 20, 4), ("seqwrite", 1 << 20, 4)]
RESULT = re.compile(r"RESULT (\w+) (\d+) (\d+) ([\d.]+)")
# name: (direct, aio, an I/O thread)
TUNED = {
    "the same by hand": (False, "threads", False),
    "io_uring": (False, "io_uring", False),
    "I/O thread": (False, "threads", True),
    "I/O thread, io_uring": (False, "io_uring", True),
    "I/O thread, O_DIRECT, native": (True, "native", True),
}


def load_program() -> Path:
    """`vmm_disk_guest.c`, built: static."""
    out = Path(tempfile.mkdtemp(prefix="kv-bench-")) / "load"
    subprocess.run(["gcc", "-O2", "-static", "-o", out, guests.HERE / "vmm_disk_guest.c"], check=True)
    return out


def make_disk(path: Path, form: str, size: int) -> Path:
    """`size` MiB, all of it written."""
    with tempfile.NamedTemporaryFile(dir=path.parent) as content:
        subprocess.run(
            ["dd", "if=/dev/urandom", f"of={content.name}", "bs=1M", f"count={size}", "status=none"], check=True
        )
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, content.name, path], check=True)
    return path


def tuned(argv: list[str], disk: Path, form: str, way: tuple[bool, str, bool]) -> list[str]:
    """A command line with its disk served in this way."""
    direct, aio, thread = way
    cache = {"direct": direct, "no-flush": False}
    words = ["-object", "iothread,id=disk-thread"] if thread else []
    file = {"driver": "file", "filename": str(disk), "aio": aio, "node-name": "f", "cache": cache, "discard": "unmap"}
    node = {"driver": form, "file": "f", "node-name": "q", "cache": cache, "discard": "unmap"}
    words += ["-blockdev", json.dumps(file), "-blockdev", json.dumps(node)]
    made: list[str] = []
    rest = iter(argv)
    for option in rest:
        if option in ("-no-user-config", "-nodefaults") or option == argv[0]:
            made.append(option)
            continue
        value = next(rest)
        if option == "-blockdev":
            continue
        if option == "-device" and '"virtio-blk-pci"' in value:
            device = {**json.loads(value), "drive": "q", **({"iothread": "disk-thread"} if thread else {})}
            words += [option, json.dumps(device)]
            continue
        made += [option, value]
    return made + words


class HandMade:
    """A QEMU that nobody manages."""

    def __init__(self, argv: list[str], directory: Path, name: str) -> None:
        with (directory / f"{name}.log").open("wb") as log:
            # A session of its own: see `network_guests.HandMade`.
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.guest = Guest(directory, name)

    def sh(self, script: str) -> str:
        return self.guest.shell(script)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(rounds: int, seconds: float, form: str, size: int, place: str | None) -> list[Report]:
    load = load_program()
    with ExitStack() as close:
        close.callback(subprocess.run, ["rm", "-rf", load.parent], check=True)
        directory = Path(close.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        disks = Path(close.enter_context(tempfile.TemporaryDirectory(dir=place)))
        for path in (directory, disks):
            path.chmod(0o755)
        image = guests.Image(directory, load)
        daemon = close.enter_context(peer.kvikd(own_network=True))
        machines: dict[str, guests.KvikMachine | HandMade] = {}
        for name, thread in (("plain", ""), ("threaded", " iothread='1'")):
            disk = make_disk(disks / f"{name}.{form}", form, size)
            document = image.document(name, "").replace(
                "<devices>",
                f"<devices><disk type='file' device='disk'><driver name='qemu' type='{form}'{thread}/>"
                f"<source file='{disk}'/><target dev='vda' bus='virtio'/></disk>",
            )
            if thread:
                document = document.replace("<os>", "<iothreads>1</iothreads><os>")
            machines[name] = guests.KvikMachine(daemon, name, document)
            close.callback(machines[name].close)
        qemu = guests.qemu_of("plain")
        for number, (name, way) in enumerate(TUNED.items()):
            own = make_disk(disks / f"{number}.{form}", form, size)
            argv = tuned(guests.by_hand(qemu, image, directory, f"tap{number}"), own, form, way)
            machines[name] = HandMade(argv, directory, f"tap{number}")
            close.callback(machines[name].close)
        for machine in machines.values():
            guests.until(
                machine, "modprobe virtio_blk 2>&1; ls /dev/vda 2>&1; cat /sys/block/vda/size", f"{size * 2048}"
            )
        figures: dict[tuple[str, tuple[str, int, int]], list[float]] = {}
        for number in range(rounds):
            for key in LOADS:
                for name in machines if number % 2 else reversed(machines):
                    mode, block, depth = key
                    said = machines[name].sh(f"/load /dev/vda {mode} {block} {depth} {seconds}")
                    found = RESULT.search(said)
                    if found is None:
                        raise RuntimeError(f"{name}, {key}: {said}")
                    figures.setdefault((name, key), []).append(float(found[4]))
    reports = []
    for mine, name in [("plain", name) for name in TUNED] + [("threaded", "I/O thread")]:
        report = Report(f"kvik's {mine} {form} disk beside QEMU by hand: {name}")
        for key in LOADS:
            mode, block, depth = key
            scale, unit = (1.0, "IOPS") if block == 4096 else (block / 1e6, "MB/s")
            ours, theirs = ([scale * rate for rate in figures[side, key]] for side in (mine, name))
            report.more(f"{mode} {block >> 10}k, depth {depth}", ours, theirs, unit, 1)
        reports.append(report)
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--format", default="qcow2", choices=["qcow2", "raw"])
    parser.add_argument("--size", type=int, default=64, help="of each disk, in MiB")
    parser.add_argument("--directory", default=None, help="where the images lie (default: the temporary directory)")
    options = parser.parse_args()
    guests.need_root()
    for report in measure(options.rounds, options.seconds, options.format, options.size, options.directory):
        report.show()


if __name__ == "__main__":
    main()
