"""Images that rest on one another, as snapshots of machines need them: looked at, laid on top, merged.

A merge never changes what any image but the one that goes shows, whatever instant it is stopped at: data is copied to
where it is hidden (or equal) until one write of a header makes it the only copy. All functions block.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from kvik.errors import ConfigUnsupported, HostError, ImageError
from kvik.host.files import fsync_directory, host_error
from kvik.host.reach import about
from kvik.image.base import HOLE, Image
from kvik.image.commit import commit
from kvik.image.create import create
from kvik.image.lock import check_image, lock_image
from kvik.image.opening import open_image
from kvik.image.qcow2 import header as qcow2_header
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.image.rebase import change_backing, copy_up
from kvik.storage import overlay_bitmaps
from kvik.storage.encryption import payload_offset

__all__ = [
    "Facts",
    "check_reusable",
    "create_overlay",
    "digest",
    "is_empty",
    "join_bitmaps",
    "look",
    "merge_back",
    "merge_forward",
    "rebase",
]

STEP = 1 << 20  # bytes copied at once
MAX_CHAIN = 200
NOTHING: Mapping[str, bool] = {}

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Facts(NamedTuple):
    """Of one image: sizes in bytes; `allocated` is what the file takes on its file system; `internal` the number of
    snapshots inside it; `locked`: its data is encrypted (of format "luks" all of the file)."""

    path: str
    format: str
    size: int
    allocated: int
    backing: str | None
    backing_format: str | None
    internal: int
    locked: bool = False


def look(path: str, format: str) -> Facts:
    """The facts of an image whose format is known. Raises `HostError`, `ImageError`, `ConfigUnsupported`."""
    fd = _open(path, writable=False)
    try:
        status = os.fstat(fd)
        allocated = status.st_blocks * 512
        if format == "raw":
            return Facts(path, "raw", os.lseek(fd, 0, os.SEEK_END), allocated, None, None, 0)
        if format == "luks":
            offset = payload_offset(fd)
            return Facts(path, "luks", os.lseek(fd, 0, os.SEEK_END) - offset, allocated, None, None, 0, True)
        if format != "qcow2":
            raise ConfigUnsupported(f"{path}: images of format {format} cannot be snapshotted", remedy="raw or qcow2")
        header = qcow2_header.parse(fd, path)
        if header.data_file is not None:
            raise ConfigUnsupported(f"{path} keeps its data in another file, which is not supported")
        below = header.backing_file
        if below is not None:
            if below.startswith("json:") or ":" in below.split("/", 1)[0]:
                raise ConfigUnsupported(f"{path} rests on {below}, which is no plain file")
            if header.backing_format is None:
                raise ConfigUnsupported(
                    f"{path} does not say which format its backing file {below} has",
                    remedy=f"say it: kvik img rebase -u -b {below} -F FORMAT {path}",
                )
            below = os.path.normpath(os.path.join(os.path.dirname(path), below))  # noqa: PTH118, PTH120
        kind, locked = header.backing_format, bool(header.crypt_method)
        return Facts(path, "qcow2", header.size, allocated, below, kind, header.nb_snapshots, locked)
    finally:
        os.close(fd)


def check_reusable(path: str, below: Facts) -> None:
    """Whether an image that somebody else made can go on top of `below`: it is to be written to at once. Raises
    `ConfigUnsupported`, `ResourceBusy`, `HostError`, `ImageError`."""
    fd = _open(path, writable=False)
    try:
        header = qcow2_header.parse(fd, path)
        check_image(fd, path, write=True)
    finally:
        os.close(fd)
    facts = look(path, "qcow2")
    try:
        right = facts.backing is not None and os.path.samefile(facts.backing, below.path)  # noqa: PTH121
    except OSError as error:
        raise host_error("look at", f"{facts.backing}, on which {path} rests", error) from error
    if not right:
        raise ConfigUnsupported(
            f"{path} does not rest on {below.path}: the disk would be another",
            remedy=f"make it: kvik img create -f qcow2 -b {below.path} -F {below.format} {path}",
        )
    mend = f"kvik img check -r all {path}"
    if header.incompatible & qcow2_header.CORRUPT:
        raise ConfigUnsupported(f"{path} is marked as damaged", remedy=mend)
    if header.incompatible & qcow2_header.DIRTY:
        raise ConfigUnsupported(
            f"{path} was not closed by whoever wrote to it last (its dirty bit is set)",
            remedy=f"{mend}, if nobody has it open",
        )
    if facts.size != below.size:
        raise ConfigUnsupported(
            f"{path} has {facts.size} bytes, and the disk that it is to go on with {below.size}",
            remedy=f"kvik img resize {path} {below.size}, or make it anew",
        )


def create_overlay(
    path: str,
    below: Facts,
    make: Callable[[int, str, int, str, str], None] | None = None,
    *,
    tracked: bool = False,
) -> None:
    """A new, empty qcow2 image on `below`, with that file's owner and mode; durable when this returns. `make`: what
    writes it, if it is to be encrypted (descriptor, format, size, backing file, its format). `tracked`: the bitmaps of
    `below` go on in it (else whoever puts it on top sees to that).

    Raises `HostError` (EEXIST where there is a file already); then nothing is left.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise host_error("make", path, error) from error
    try:
        try:
            if make is not None:
                make(fd, "qcow2", below.size, below.path, below.format)
            else:
                create(fd, "qcow2", below.size, backing_file=below.path, backing_format=below.format)
            if tracked and below.format == "qcow2":
                _go_on(fd, path, below)
            like = os.stat(below.path)  # noqa: PTH116
            if stat.S_ISREG(like.st_mode):
                if (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(fd, like.st_uid, like.st_gid)
                os.fchmod(fd, stat.S_IMODE(like.st_mode) | 0o600)
            os.fsync(fd)
        finally:
            os.close(fd)
        fsync_directory(os.path.dirname(path) or ".")  # noqa: PTH120
    except BaseException as error:
        os.unlink(path)  # noqa: PTH108
        if isinstance(error, OSError):
            raise host_error("make", path, error) from error
        raise


def _go_on(fd: int, path: str, below: Facts) -> None:
    with (
        open_image(os.dup(fd), format="qcow2", writable=True, path=path) as image,
        _opened(below, alone=True) as under,
    ):
        assert isinstance(image, Qcow2Writer)
        overlay_bitmaps.go_on(image, under)


def rebase(path: str, backing: Facts | None) -> None:
    """Let a qcow2 image rest on another one, or on none; its own data stays. Durable when this returns."""
    with _told(path), _writer(look(path, "qcow2"), alone=True) as image:
        change_backing(image, backing.path if backing else None, backing.format if backing else None)


def merge_back(
    top: Facts, below: Facts, progress: Progress | None = None, *, tracked: Mapping[str, bool] = NOTHING
) -> None:
    """Write what `top` has of its own into `below`, on which it rests. `top` shows the same before, amid and after.
    `tracked`: bitmaps that somebody asks for, and whether its tracking began in `top`.

    Raises `HostError` (ENOSPC among them), `ImageError`, `ResourceBusy`; then it can be done again from the start.
    """
    with _told(below.path), _opened(below, writable=True) as target, _opened(top, alone=True) as source:
        commit(source, target, progress=progress)
    join_bitmaps(top, below, tracked)


def join_bitmaps(top: Facts, below: Facts, tracked: Mapping[str, bool]) -> None:
    """The data of `top` is in `below`, whoever wrote it there: what bitmaps tell of it as well."""
    if any(tracked.values()) and below.format == "qcow2":
        with _told(below.path), _writer(below, alone=True) as image, _opened(top, alone=True) as gone:
            overlay_bitmaps.join_back(image, gone, tracked)


def merge_forward(
    top: Facts, below: Facts, progress: Progress | None = None, *, tracked: Mapping[str, bool] = NOTHING
) -> None:
    """Copy into `top` what it shows of `below`'s own data, then let it rest on what `below` rests on. `tracked`:
    as in `merge_back`.

    `top` shows the same before, amid and after; what else rests on `below` is not touched. Raises as `merge_back`.
    """
    if tracked:
        with _told(top.path), _writer(top, alone=True) as image, _opened(below, alone=True) as gone:
            overlay_bitmaps.join_forward(image, gone, tracked)
    with _told(top.path), ExitStack() as stack:
        image = stack.enter_context(_writer(top))
        under = look(below.backing, below.backing_format or "raw") if below.backing else None
        copy_up(image, stack.enter_context(_opened(under)) if under else None, progress)
        change_backing(image, under.path if under else None, under.format if under else None)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """What the kernel refuses, in words that name the file."""
    try:
        yield
    except OSError as error:
        raise host_error("write", path, error) from error


def _writer(facts: Facts, *, alone: bool = False) -> Qcow2Writer:
    image = _opened(facts, writable=True, alone=alone)
    assert isinstance(image, Qcow2Writer)
    return image


def is_empty(path: str) -> bool:
    """Whether a qcow2 image has nothing of its own."""
    with _opened(look(path, "qcow2"), alone=True) as image:
        return all(kind == HOLE for kind, _, _, _ in image.runs(0, image.size))


def digest(path: str, format: str) -> str:
    """SHA-256 of what an image shows through its whole chain: for tests and for who wants to be sure."""
    import hashlib

    found = hashlib.sha256()
    with _opened(look(path, format)) as image:
        for offset in range(0, image.size, STEP):
            found.update(image.read(offset, min(STEP, image.size - offset)))
    return found.hexdigest()


def _open(path: str, *, writable: bool) -> int:
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        about(path)
        fd = os.open(path, flags)
    except OSError as error:
        raise host_error("open", path, error) from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise HostError(f"{path} is neither a file nor a block device")
    return fd


def _opened(facts: Facts, *, writable: bool = False, alone: bool = False, depth: int = 0) -> Image:
    """An image with its chain (or `alone`: its own layer only), every file of it locked as QEMU would."""

    def below(name: str, stated: str | None) -> Image:
        if facts.backing is None or depth > MAX_CHAIN:
            raise ImageError(f"its chain is longer than {MAX_CHAIN} images, or a loop", file=facts.path)
        return _opened(look(facts.backing, facts.backing_format or "raw"), depth=depth + 1)

    fd = _open(facts.path, writable=writable)
    try:
        lock_image(fd, facts.path, write=writable)
        return open_image(fd, format=facts.format, writable=writable, path=facts.path, backing=None if alone else below)
    except BaseException:
        os.close(fd)
        raise
