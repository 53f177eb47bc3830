"""The file that a copy of a disk goes to: made with the daemon's rights, for nobody else, and removed if it comes to
nothing."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from kvik.conf.devices.disk import BackingStore, Mirror
from kvik.errors import AlreadyExists, ConfigUnsupported, HostError, InvalidArgument
from kvik.host import files
from kvik.host.reach import about
from kvik.image.create import create

__all__ = ["check", "device_size", "make", "remove"]


def check(mirror: Mirror, size: int, below: BackingStore | None) -> str:
    """The file that is to be made for a copy of `size` bytes, on top of `below`; "" for a device, which is there.

    Raises `AlreadyExists`, `ConfigUnsupported`, `HostError`.
    """
    assert mirror.source is not None and mirror.format is not None
    path, kind = mirror.source.location or "", mirror.format.type
    if mirror.type != "file" and mirror.source.encryption is not None:
        raise ConfigUnsupported(
            f"{path or mirror.source.name or 'the destination'} has to be encrypted first",
            remedy="qemu-img create -f luks on it, then give --reuse-external",
        )
    if mirror.type == "block":
        _check_device(path, kind, size)
        return ""
    if mirror.type == "network":
        if kind != "raw":
            place = f"{mirror.source.protocol}:{mirror.source.name or ''}"
            raise ConfigUnsupported(
                f"an image of format {kind} at {place} has to be made first",
                remedy="make it there and give --reuse-external, or --format raw",
            )
        return ""
    _options(kind, below)
    about(path)
    if os.path.lexists(path):
        raise _exists(path)
    return path


def _exists(path: str) -> AlreadyExists:
    return AlreadyExists(
        f"external destination file {path} already exists and is not a block device",
        remedy="remove it, or give --reuse-external to copy into it",
    )


def _options(kind: str, below: BackingStore | None) -> dict[str, str]:
    if below is None or below.source is None or below.format is None:
        return {}
    if kind != "qcow2":
        raise ConfigUnsupported(
            f"a copy of the top image alone lies on those below it, which format {kind} cannot",
            remedy="--format qcow2, or copy without --shallow",
        )
    if below.source.location is None:
        raise ConfigUnsupported(
            "the image below is no file of this host", remedy="make the copy yourself and give --reuse-external"
        )
    format = "luks" if below.format.type == "raw" and below.source.encryption is not None else below.format.type
    return {"backing_file": below.source.location, "backing_format": format}


def make(
    mirror: Mirror,
    size: int,
    below: BackingStore | None,
    encrypted: Callable[[int, str, int, str, str], None] | None = None,
) -> None:
    """An empty image of `size` bytes where `mirror` says, on top of `below`. Raises as `check` does; then nothing is
    left. `encrypted`: what makes one that is (descriptor, format, size, backing file, its format)."""
    assert mirror.source is not None and mirror.format is not None
    path, kind = mirror.source.location or "", mirror.format.type
    options = _options(kind, below)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise files.host_error("make", path, error) from error
    try:
        if encrypted is not None:
            encrypted(fd, kind, size, options.get("backing_file", ""), options.get("backing_format", ""))
        else:
            create(fd, kind, size, **options)
        os.fsync(fd)
    except BaseException as error:
        remove(path)
        if isinstance(error, InvalidArgument):
            raise ConfigUnsupported(error.message, remedy=error.remedy) from error
        if isinstance(error, OSError):
            raise files.host_error("make image", path, error) from error
        raise
    finally:
        os.close(fd)


def _check_device(path: str, kind: str, size: int) -> None:
    if kind != "raw":
        raise ConfigUnsupported(
            f"{path}: an image of format {kind} on a block device has to be made first",
            remedy=f"kvik img create -f {kind} {path} SIZE, then give --reuse-external",
        )
    about(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise files.host_error("open", path, error) from error
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise ConfigUnsupported(f"{path} is no block device", remedy="use a destination of type file")
        if os.lseek(fd, 0, os.SEEK_END) < size:
            raise HostError(f"{path} is smaller than the disk, which has {size} bytes")
    finally:
        os.close(fd)


def device_size(path: str) -> int:
    """Bytes of a block device. Raises `HostError`."""
    about(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise files.host_error("open", path, error) from error
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def remove(path: str) -> None:
    """Nothing is said of a file that is gone already, or cannot be removed: nobody needs it."""
    with contextlib.suppress(OSError):
        Path(path).unlink()
