"""Hostile qcow2 images: headers, tables, snapshot tables, bitmap directories that were turned about.

    fuzz/run qcow2 --operations 1000000 --seed 5

Whatever a file says, reading it gives bytes or a `KvikError`, and so does every change of it: never another exception,
never an allocation that the file's numbers chose, never a file that grows beyond what was written.
"""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kvik.errors import KvikError
from kvik.image.commit import commit
from kvik.image.create import create
from kvik.image.info import info
from kvik.image.qcow2.amend import amend
from kvik.image.qcow2.bitmap_changes import BitmapChanges
from kvik.image.qcow2.check import check
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.image.qcow2.repair import repair
from kvik.image.qcow2.snapshotting import apply_snapshot, create_snapshot, delete_snapshot
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.image.rebase import copy_up
from kvik.image.resize import resize

ImageType = TypeVar("ImageType", bound=Qcow2Reader)
TARGETS = ("qcow2",)
SIZE = 1 << 18
KINDS: tuple[dict[str, object], ...] = (
    {"cluster_size": 512},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 4096, "refcount_bits": 64},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 1024},  # without snapshots
)
NUMBERS = (
    0,
    1,
    2,
    3,
    512,
    4096,
    65536,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 55,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)


def seeds() -> list[tuple[bytes, list[int]]]:
    """Valid images with everything in them, and where their tables are."""
    found = []
    for options in KINDS:
        fd = os.memfd_create("seed")
        create(fd, "qcow2", SIZE, **options)
        with Qcow2Writer(os.dup(fd), "seed", barriers=False) as image:
            image.write(0, b"\1" * 40000)
            if options is not KINDS[-1]:
                create_snapshot(image, "one")
                image.write(5000, b"\2" * 9000)
                create_snapshot(image, "two")
            image.write_zeroes(20000, 20000)
            if image.header.version > 2 and options is not KINDS[-1]:
                changes = BitmapChanges(image)
                changes.add("b", 512)
                changes.add("c")
                changes.store()
            image.write(100000, b"\3" * 9000)
        with Qcow2Reader(os.dup(fd), "seed") as image:
            header = image.header
            places = [0, 0, 0, header.l1_offset, header.refcount_table_offset, header.snapshots_offset]
            places += [one.l1_offset for one in image.snapshots] + [entry & (1 << 56) - 512 for entry in image.l1]
            places += [entry for entry in image.refcounts.table if entry]
            if header.bitmaps is not None:
                places += [header.bitmaps[2], *(one.table_offset for one in image.bitmaps)]
        found.append((os.pread(fd, 64 << 20, 0), [place for place in places if place or not places.index(place)]))
        os.close(fd)
    return found


def mutated(data: bytes, places: list[int], dice: random.Random) -> bytes:
    """Some numbers of the tables changed: to extremes, to each other's places, by a bit; perhaps the end cut off."""
    out = bytearray(data)
    for _ in range(dice.randrange(1, 5)):
        size = dice.choice((1, 2, 4, 8, 8))
        at = dice.choice(places) + dice.randrange(0, dice.choice((8, 64, 128))) // size * size
        if at + size > len(out):
            continue
        value = dice.choice((*NUMBERS, dice.choice(places), dice.choice(places) | 1 << 63, dice.getrandbits(64)))
        if dice.random() < 0.3:
            value = int.from_bytes(out[at : at + size], "big") ^ 1 << dice.randrange(8 * size)
        out[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "big")
    if dice.random() < 0.05:
        del out[dice.randrange(len(out)) :]
    return bytes(out)


def opened(kind: type[ImageType], fd: int, **options: bool) -> ImageType:
    """An image; where it is none the descriptor is closed."""
    try:
        return kind(fd, "x", **options)
    except BaseException:
        os.close(fd)
        raise


def _read(fd: int) -> None:
    with opened(Qcow2Reader, fd) as image:
        info(image)
        length = min(image.size, SIZE)
        image.read(0, length)
        sum(extent.length for extent in image.map(0, length))
        for snapshot in image.snapshots[:4]:
            image.use_snapshot(snapshot)
            image.read(0, min(image.size, SIZE))


def _check(fd: int) -> None:
    with opened(Qcow2Reader, fd) as image:
        check(image)


def changing(change: Callable[[Qcow2Writer], object], *, repairing: bool = False) -> Callable[[int], None]:
    def run(fd: int) -> None:
        with opened(Qcow2Writer, fd, barriers=False, repairing=repairing) as image:
            change(image)

    return run


def _write(image: Qcow2Writer) -> None:
    image.write(5000, b"\5" * 30000)
    image.write_zeroes(60000, 30000, discard=True)
    image.write(100, b"\6" * 10)


def _bitmaps(image: Qcow2Writer) -> None:
    changes = BitmapChanges(image)
    for bitmap in image.bitmaps[:2]:
        changes.remove(bitmap.name)
    changes.add("new")
    changes.store()


def _merge(image: Qcow2Writer) -> None:
    changes = BitmapChanges(image)
    changes.merge("b", "c")
    changes.store()


def _commit(image: Qcow2Writer) -> None:
    base = os.memfd_create("base")
    create(base, "qcow2", SIZE)
    if image.size <= 1 << 24:
        with Qcow2Writer(base, "base", barriers=False) as below:
            commit(image, below)
        image.make_empty()
    else:
        os.close(base)


VERBS: dict[str, Callable[[int], None]] = {
    "read": _read,
    "check": _check,
    "write": changing(_write),
    "snapshot -c": changing(lambda image: create_snapshot(image, "new")),
    "snapshot -a": changing(lambda image: apply_snapshot(image, "one")),
    "snapshot -d": changing(lambda image: delete_snapshot(image, image.snapshots[0]) if image.snapshots else None),
    "commit": changing(_commit),
    "rebase": changing(lambda image: copy_up(image, None) if image.size <= 1 << 24 else None),
    "amend": changing(lambda image: amend(image, compat="1.1", refcount_bits=32)),
    "downgrade": changing(lambda image: amend(image, compat="0.10") if image.size <= 1 << 24 else None),
    "bitmap": changing(_bitmaps),
    "bitmap --merge": changing(_merge),
    "resize": changing(lambda image: resize(image, 2 * SIZE, shrink=True)),
    "repair": changing(lambda image: repair(image, everything=True), repairing=True),
}


def attempt(verb: str, data: bytes) -> bool:
    """One verb on one file; whether it was refused."""
    fd = os.memfd_create("hostile")
    try:
        os.pwrite(fd, data, 0)
        try:
            VERBS[verb](os.dup(fd))
        except KvikError as error:
            assert str(error)
            return True
        finally:
            used = os.fstat(fd).st_blocks * 512
            assert used < 4 * len(data) + (8 << 20), f"{verb}: the file takes {used} bytes now"
    finally:
        os.close(fd)
    return False


def fuzz(name: str, operations: int, seed: int) -> int:
    """How many attempts were refused."""
    dice, images, verbs = random.Random(seed), seeds(), list(VERBS)
    refused = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), hard))
    try:
        for _ in range(operations):
            data = mutated(*dice.choice(images), dice)
            refused += attempt(dice.choice(verbs), data)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return refused
