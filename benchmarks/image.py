"""kvik img beside qemu-img: the same images, the same options, interleaved, each a whole command.

    PYTHONPATH=src python benchmarks/image.py [--rounds 5] [--data MiB] [--only convert,start] [DIRECTORY]

The image has 4 GiB of which 1 GiB is data: random, text and half zero stretches, and holes. DIRECTORY (default: a
temporary one) says what the images lie on; a tmpfs shows the programs, a disk the writeback behind them, too. What a
sparse copy of the same data takes is the limit of the machine. Wall and processor time stand beside each other, since
the wall's is worth nothing on a busy host. Bytecode must be compiled, as an installation has it.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import io
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "src"
sys.path[:0] = [str(SOURCES)]

from report import Report  # noqa: E402

KVIK = [sys.executable, "-c", "from kvik.cli.img import main; main()"]
QEMU = ["qemu-img"]


class Spent:
    """What one run took: seconds of wall and processor, MiB of memory at most."""

    def __init__(self, wall: float, cpu: float, memory: float) -> None:
        self.wall, self.cpu, self.memory = wall, cpu, memory


def run(*command: str | Path) -> Spent:
    start = time.perf_counter()
    process = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return Spent(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def mixed(path: Path, data: int) -> None:
    """`data` bytes in four times as much."""
    chance = random.Random(1)
    words = [bytes(chance.choices(b"abcdefghij klmnopqrstuvwxyz\n", k=chance.randint(3, 12))) for _ in range(4000)]
    text = b" ".join(chance.choices(words, k=400_000))[: 2 << 20]
    with path.open("wb") as stream:
        stream.truncate(4 * data)
        at = left = 0
        left = data
        while left > 0:
            size = min(left, chance.choice([64 << 10, 256 << 10, 1 << 20, 4 << 20]))
            kind = chance.random()
            if kind < 0.4:
                block = os.urandom(size)
            elif kind < 0.9:
                start = chance.randrange(0, 1 << 20)
                block = (text[start : start + (1 << 20)] * (size // (1 << 20) + 1))[: size - 8] + os.urandom(8)
            else:
                block = os.urandom(size // 2) + bytes(size - size // 2)
            os.pwrite(stream.fileno(), block, at)
            left -= size
            at = min(at + size + chance.choice([0, 64 << 10, 1 << 20, 6 << 20]), 4 * data - left)


Sides = dict[str, list[Spent]]


def rounds(count: int, sides: dict[str, Callable[[], Spent]]) -> Sides:
    """In another order each time: what comes and goes (a host that takes free pages back makes the next gigabyte cost
    twice as much) must not always meet the same side."""
    found: Sides = {name: [] for name in sides}
    chance = random.Random(count)
    for _ in range(count):
        for name in chance.sample(list(sides), len(sides)):
            found[name].append(sides[name]())
    return found


def wall(spent: list[Spent]) -> list[float]:
    return [one.wall for one in spent]


def cpu(spent: list[Spent]) -> list[float]:
    return [one.cpu for one in spent]


def memory(report: Report, what: str, spent: list[Spent]) -> None:
    report.below(f"{what}: memory", [max(one.memory for one in spent)], "MiB", 100)


def convert(place: Path, raw: Path, count: int) -> Report:
    report = Report("Conversion and comparison")
    qcow2, out, copy = place / "a.qcow2", place / "out", place / "copy"
    run(*QEMU, "convert", "-O", "qcow2", raw, qcow2)

    def fresh(*command: str | Path) -> Callable[[], Spent]:
        def once() -> Spent:
            out.unlink(missing_ok=True)
            copy.unlink(missing_ok=True)
            return run(*command)

        return once

    for what, words in (
        ("raw to qcow2", ["convert", "-f", "raw", "-O", "qcow2", raw, out]),
        ("qcow2 to raw", ["convert", "-f", "qcow2", "-O", "raw", qcow2, out]),
    ):
        found = rounds(
            count,
            {
                "kvik": fresh(*KVIK, *words),
                "qemu": fresh(*QEMU, *words),
                "copy": fresh("cp", "--sparse=always", raw, copy),
            },
        )
        report.within(f"{what}", wall(found["kvik"]), wall(found["qemu"]), "s", 1.0)
        report.within(f"{what}, processor", cpu(found["kvik"]), cpu(found["qemu"]), "s", 1.0)
        report.within(f"{what}, beside a sparse copy", wall(found["kvik"]), wall(found["copy"]), "s", 1.3)
        report.within(f"{what}, beside it, processor", cpu(found["kvik"]), cpu(found["copy"]), "s", 1.3)
        memory(report, what, found["kvik"])
    out.unlink(missing_ok=True)
    copy.unlink(missing_ok=True)
    words = ["compare", "-f", "qcow2", "-F", "raw", qcow2, raw]
    found = rounds(count, {"kvik": lambda: run(*KVIK, *words), "qemu": lambda: run(*QEMU, *words)})
    report.within("compare", wall(found["kvik"]), wall(found["qemu"]), "s", 1.0)
    report.within("compare, processor", cpu(found["kvik"]), cpu(found["qemu"]), "s", 1.0)
    return report


def compress(place: Path, raw: Path, count: int) -> Report:
    report = Report("Compressed conversion")
    for kind in ("zlib", "zstd"):
        sizes: dict[str, int] = {}

        def once(name: str, command: list[str], kind: str = kind, sizes: dict[str, int] = sizes) -> Spent:
            out = place / "out"
            out.unlink(missing_ok=True)
            spent = run(*command, "convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", raw, out)
            sizes[name] = out.stat().st_size
            out.unlink()
            return spent

        found = rounds(count, {"kvik": lambda: once("kvik", KVIK), "qemu": lambda: once("qemu", QEMU)})
        report.faster(f"convert -c, {kind}", wall(found["kvik"]), wall(found["qemu"]), "s", 2)
        report.told(f"convert -c, {kind}, processor", cpu(found["kvik"]), cpu(found["qemu"]), "s")
        report.within(f"convert -c, {kind}, size", [sizes["kvik"] / 2**20], [sizes["qemu"] / 2**20], "MiB", 1.02)
        memory(report, f"convert -c, {kind}", found["kvik"])
    return report


def start(place: Path, count: int) -> Report:
    """Of every command on an image with next to nothing in it; and info without a process."""
    report = Report("Start-up")
    empty, new = place / "empty.qcow2", place / "new"
    run(*QEMU, "create", "-f", "qcow2", empty, "1G")
    for words in (
        ["info", empty],
        ["create", "-f", "qcow2", new, "1G"],
        ["check", empty],
        ["map", empty],
        ["resize", empty, "1G"],
        ["snapshot", "-l", empty],
        ["compare", empty, empty],
        ["measure", "-O", "qcow2", empty],
        ["convert", "-O", "raw", empty, new],
    ):
        found = rounds(count, {"kvik": lambda: run(*KVIK, *words), "qemu": lambda: run(*QEMU, *words)})  # noqa: B023
        more = [(a - b) * 1000 for a, b in zip(wall(found["kvik"]), wall(found["qemu"]), strict=True)]
        report.below(f"{words[0]}: more than qemu-img's", more, "ms", 40)
        spent = [(a - b) * 1000 for a, b in zip(cpu(found["kvik"]), cpu(found["qemu"]), strict=True)]
        report.below(f"{words[0]}: the same, processor", spent, "ms", 40)
        new.unlink(missing_ok=True)
    from kvik.image.info import info
    from kvik.image.opening import Opener

    def inside() -> float:
        begin = time.perf_counter()
        with Opener().open(str(empty), "qcow2", chain=False) as image:
            info(image)
        return (time.perf_counter() - begin) * 1000

    inside()
    ours = [sorted(inside() for _ in range(100))[50] for _ in range(count)]
    report.faster("info in process", ours, [run(*QEMU, "info", empty).wall * 1000 for _ in range(count)], "ms", 20)
    return report


def tables(place: Path, count: int) -> Report:
    """Costs per GiB of tables: a disk of 1 TiB that is all preallocated, with 128 MiB of tables, and an empty one."""
    report = Report("Tables of a disk of 1 TiB")
    image, other = place / "tables.qcow2", place / "other.qcow2"
    for what, words in (
        ("create", ["create", "-f", "qcow2", "-o", "preallocation=metadata", image, "1T"]),
        ("check", ["check", image]),
        ("map", ["map", "--output=json", image]),
    ):
        found = rounds(count, {"kvik": lambda: run(*KVIK, *words), "qemu": lambda: run(*QEMU, *words)})  # noqa: B023
        report.within(what, wall(found["kvik"]), wall(found["qemu"]), "s", 2)
        report.within(f"{what}, processor", cpu(found["kvik"]), cpu(found["qemu"]), "s", 2)
        memory(report, what, found["kvik"])

    def shrink(command: list[str]) -> Spent:
        run(*QEMU, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", other, "256G")
        return run(*command, "resize", "--shrink", other, "1G")

    found = rounds(count, {"kvik": lambda: shrink(KVIK), "qemu": lambda: shrink(QEMU)})
    report.within("resize --shrink from 256 GiB", wall(found["kvik"]), wall(found["qemu"]), "s", 2)
    report.within("the same, processor", cpu(found["kvik"]), cpu(found["qemu"]), "s", 2)
    other.unlink()
    image.unlink()
    with (place / "sparse").open("wb") as stream:
        stream.truncate(1 << 40)
        for at in range(0, 1 << 40, 1 << 30):
            os.pwrite(stream.fileno(), b"x" * 4096, at)
    words = ["convert", "-f", "raw", "-O", "qcow2", place / "sparse", other]
    found = rounds(count, {"kvik": lambda: run(*KVIK, *words), "qemu": lambda: run(*QEMU, *words)})
    report.within("convert of 1 TiB with 4 KiB a GiB", wall(found["kvik"]), wall(found["qemu"]), "s", 2)
    memory(report, "the same", found["kvik"])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="where the images are made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=int, default=1024, help="MiB of data in the image")
    parser.add_argument("--only", default="start,convert,compress,tables")
    options = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):
        compileall.compile_dir(SOURCES / "kvik", quiet=2)
    wanted = options.only.split(",")
    print(f"load at the start {os.getloadavg()[0]:.1f}; {os.cpu_count()} CPUs", flush=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        place = Path(directory)
        raw = place / "mixed.raw"
        if {"convert", "compress"} & set(wanted):
            mixed(raw, options.data << 20)
        if "start" in wanted:
            start(place, 3 * options.rounds).show()
        if "convert" in wanted:
            convert(place, raw, options.rounds).show()
        if "compress" in wanted:
            compress(place, raw, max(1, options.rounds // 2)).show()
        if "tables" in wanted:
            tables(place, max(1, options.rounds // 2)).show()


if __name__ == "__main__":
    main()
