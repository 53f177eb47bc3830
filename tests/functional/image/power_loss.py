"""Power lost at any moment: what was written to files is recorded, and every state that a disk could be in is made.

A disk keeps what was written before a file's last flush. Of what came after, it may have any part, in any order, down
to single sectors of 512 bytes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from kvik.image import fallocate as fallocate_module

SECTOR = 512
PUNCH_HOLE = 2


class Model:
    """What may be read: the disk, and each snapshot by its name; `atomic` if it comes about as a whole."""

    def __init__(self, disk: bytes, snapshots: dict[str, bytes] | None = None, *, atomic: bool = False) -> None:
        self.disk = disk
        self.snapshots = dict(snapshots or {})
        self.atomic = atomic


class Step:
    """Models from here on; `durable` if power lost from now on must not lose them."""

    def __init__(self, model: Model | None, *, durable: bool) -> None:
        self.model = model
        self.durable = durable


class Change:
    """One change of one file."""

    def __init__(self, name: str, what: str, offset: int, data: bytes = b"", length: int = 0) -> None:
        self.name, self.what, self.offset, self.data, self.length = name, what, offset, data, length

    def apply(self, content: bytearray, keep: Callable[[], bool] | None = None) -> None:
        if self.what == "truncate":
            del content[self.offset :]
            content += bytes(self.offset - len(content))
            return
        data = self.data or bytes(self.length)
        end = self.offset + len(data)
        if self.what == "zero":  # which never makes a file longer
            data = data[: max(0, len(content) - self.offset)]
        elif end > len(content):
            content += bytes(end - len(content))
        if keep is None:
            content[self.offset : self.offset + len(data)] = data
            return
        at = self.offset
        while at < self.offset + len(data):
            upto = min(self.offset + len(data), (at & -SECTOR) + SECTOR)
            if keep():
                content[at:upto] = data[at - self.offset : upto - self.offset]
            at = upto


class Recorder:
    """Everything that happens to some files, in its order."""

    def __init__(self, files: dict[str, int]) -> None:
        self.start = {name: read_all(fd) for name, fd in files.items()}
        self.log: list[Change | Step | str] = []  # a name: that file was flushed
        self._names = {os.fstat(fd).st_ino: name for name, fd in files.items()}

    def step(self, model: Model | None, *, durable: bool = True) -> None:
        self.log.append(Step(model, durable=durable))

    def _name(self, fd: int) -> str | None:
        return self._names.get(os.fstat(fd).st_ino)

    @contextmanager
    def recording(self) -> Iterator[None]:
        pwrite, ftruncate, fdatasync, fallocate = os.pwrite, os.ftruncate, os.fdatasync, fallocate_module.fallocate
        pwritev = os.pwritev

        def record(fd: int, what: str, offset: int, data: bytes = b"", length: int = 0) -> None:
            name = self._name(fd)
            if name is not None:
                self.log.append(Change(name, what, offset, data, length))

        def write(fd: int, data: bytes, offset: int) -> int:
            record(fd, "write", offset, bytes(data))
            return pwrite(fd, data, offset)

        def write_many(fd: int, buffers: list[memoryview], offset: int) -> int:
            record(fd, "write", offset, b"".join(buffers))
            return pwritev(fd, buffers, offset)

        def truncate(fd: int, size: int) -> None:
            record(fd, "truncate", size)
            ftruncate(fd, size)

        def allocate(fd: int, mode: int, offset: int, length: int) -> bool:
            done = fallocate(fd, mode, offset, length)
            if done:
                record(fd, "zero", offset, b"", length)
            return done

        def flush(fd: int) -> None:
            name = self._name(fd)
            if name is not None:
                self.log.append(name)
            fdatasync(fd)

        with (
            mock.patch("os.pwrite", write),
            mock.patch("os.pwritev", write_many),
            mock.patch("os.ftruncate", truncate),
            mock.patch("os.fdatasync", flush),
            mock.patch.object(fallocate_module, "fallocate", allocate),
        ):
            yield


class Moment:
    """Power lost behind `count` entries of the log: what is safe, what may be there, and what may then be read."""

    def __init__(self, content: dict[str, bytearray], open_changes: list[Change], models: list[Model | None]) -> None:
        self.content = content
        self.open_changes = open_changes
        self.models = models

    def whole(self) -> dict[str, bytes]:
        return self._with(lambda change, content: change.apply(content))

    def some(self, dice: random.Random) -> dict[str, bytes]:
        likely, torn = dice.choice((0.1, 0.5, 0.9)), dice.random() < 0.5

        def maybe(change: Change, content: bytearray) -> None:
            if torn and change.what == "write":
                change.apply(content, lambda: dice.random() < likely)
            elif dice.random() < likely:
                change.apply(content)

        return self._with(maybe)

    def _with(self, put: Callable[[Change, bytearray], None]) -> dict[str, bytes]:
        made = {name: bytearray(content) for name, content in self.content.items()}
        for change in self.open_changes:
            put(change, made[change.name])
        return {name: bytes(content) for name, content in made.items()}


def moments(recorder: Recorder) -> Iterator[Moment]:
    """Every moment at which power can be lost, from the start to the end."""
    content = {name: bytearray(data) for name, data in recorder.start.items()}
    waiting: list[Change] = []
    models: list[Model | None] = []
    log = recorder.log
    for number in range(len(log) + 1):
        upcoming = next((entry.model for entry in log[number:] if isinstance(entry, Step)), None)
        yield Moment(content, waiting, [*models, *([upcoming] if upcoming is not None else [])])
        if number == len(log):
            return
        entry = log[number]
        if isinstance(entry, Change):
            waiting = [*waiting, entry]
        elif isinstance(entry, Step):
            models = [entry.model] if entry.durable else [*models, entry.model]
        else:
            content = {name: bytearray(data) for name, data in content.items()}
            for change in waiting:
                if change.name == entry:
                    change.apply(content[entry])
            waiting = [change for change in waiting if change.name != entry]


def states(
    recorder: Recorder, count: int, dice: random.Random
) -> Iterator[tuple[dict[str, bytes], list[Model | None]]]:
    """Every prefix of what was written, then `count` states in all with parts of what was not flushed."""
    all_moments = list(moments(recorder))
    seen: set[int] = set()
    for moment in all_moments:
        made = moment.whole()
        seen.add(hash((tuple(made.values()), tuple(map(id, moment.models)))))
        yield made, moment.models
    tempting = [moment for moment in all_moments if moment.open_changes]
    tries = 0
    while len(seen) < count and tries < 4 * count:
        tries += 1
        moment = dice.choice(tempting)
        made = moment.some(dice)
        key = hash((tuple(made.values()), tuple(map(id, moment.models))))
        if key not in seen:
            seen.add(key)
            yield made, moment.models


def is_allowed(disk: bytes, snapshots: dict[str, bytes], models: Sequence[Model | None]) -> bool:
    """Whether that may be read: a model as a whole, or sectors of those that do not come about as a whole."""
    known = [model for model in models if model is not None]
    if any(disk == model.disk and snapshots == model.snapshots for model in known):
        return True
    if any(model.atomic for model in known[1:]) or not any(snapshots == model.snapshots for model in known):
        return False
    if len(disk) not in {len(model.disk) for model in known}:
        return False
    return all(
        any(disk[at : at + SECTOR] == model.disk[at : at + SECTOR] for model in known)
        for at in range(0, len(disk), SECTOR)
    )


def read_all(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def memory_file(content: bytes = b"") -> int:
    fd = os.memfd_create("image")
    os.pwrite(fd, content, 0)
    return fd
