"""vol-upload, vol-download: the bytes of a volume from a file and into one."""

from __future__ import annotations

import errno
import os

from kvik.cli.options import DATA, FLAG, NUMBER, Option, UsageError, Verb
from kvik.cli.pool_common import OF_POOL, VOLUME, volume_of
from kvik.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.stream import Stream

PIECE = 4 << 20  # bytes
OPTIONS = (
    VOLUME,
    Option("file", DATA, "file", complete="file"),
    OF_POOL,
)


def _place(options: Options) -> tuple[int, int]:
    offset, length = options.number("offset") or 0, options.number("length") or 0
    if offset < 0 or length < 0:
        raise UsageError("--offset and --length are not negative")
    return offset, length


def vol_upload(ctx: Context, options: Options) -> int:
    offset, length = _place(options)
    volume = volume_of(ctx, options)
    path, sparse = options.data("file"), options.flag("sparse")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot read {path}", errno=error.errno or 0, remedy=error.strerror or "") from error
    ctx.doing = f"cannot upload to volume {volume.name}"
    try:
        if os.path.isdir(f"/proc/self/fd/{fd}"):  # noqa: PTH112
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        with volume.upload(offset, length, sparse=sparse) as stream:
            ctx.doing = f"cannot send data to volume {volume.name}"
            _send(stream, fd, length, sparse)
            ctx.doing = f"cannot close volume {volume.name}"
            stream.finish(None)  # the daemon answers when all is on disk, however long that takes
    finally:
        os.close(fd)
    return 0


def _send(stream: Stream, fd: int, length: int, sparse: bool) -> None:
    """`length` bytes (0: all), or up to the file's end."""
    left = length or 1 << 63
    while left:
        hole = _hole(fd, left) if sparse else 0
        if hole:
            stream.send_hole(hole)
            left -= hole
            continue
        data = os.read(fd, min(PIECE, left if not sparse else min(left, _data(fd))))
        if not data:
            return
        stream.send(data)
        stream.check()
        left -= len(data)


def _hole(fd: int, left: int) -> int:
    """Length of the hole at the file's position, which moves beyond it."""
    here = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        data = os.lseek(fd, here, os.SEEK_DATA)
    except OSError:  # a hole up to the end, or a file that knows none
        data = os.lseek(fd, 0, os.SEEK_END) if os.path.isfile(f"/proc/self/fd/{fd}") else here  # noqa: PTH113
    length = min(data - here, left)
    os.lseek(fd, here + length, os.SEEK_SET)
    return length


def _data(fd: int) -> int:
    """Length of the data at the file's position, which stays."""
    here = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        end = os.lseek(fd, here, os.SEEK_HOLE)
    except OSError:
        end = here + PIECE
    os.lseek(fd, here, os.SEEK_SET)
    return max(end - here, 1)


def vol_download(ctx: Context, options: Options) -> int:
    offset, length = _place(options)
    volume = volume_of(ctx, options)
    path, sparse = options.data("file"), options.flag("sparse")
    try:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            new = True
        except FileExistsError:
            fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
            new = False
    except OSError as error:
        raise HostError(f"cannot create {path}", errno=error.errno or 0, remedy=error.strerror or "") from error
    done = False
    try:
        ctx.doing = f"cannot download from volume {volume.name}"
        with volume.download(offset, length, sparse=sparse) as stream:
            ctx.doing = f"cannot receive data from volume {volume.name}"
            _receive(stream, fd, path)
        done = True
    finally:
        os.close(fd)
        if new and not done:
            os.unlink(path)  # noqa: PTH108 - pathlib costs 4 ms of start
    return 0


def _receive(stream: Stream, fd: int, path: str) -> None:
    try:
        while piece := stream.recv_piece():
            if isinstance(piece, int):
                os.ftruncate(fd, os.lseek(fd, piece, os.SEEK_CUR))
                continue
            view = memoryview(piece)
            while view:
                view = view[os.write(fd, view) :]
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", errno=error.errno or 0) from error


COMMANDS = {
    "vol-upload": Verb(
        vol_upload,
        "Upload file contents to a volume",
        *OPTIONS,
        Option("offset", NUMBER, "volume offset to upload to"),
        Option("length", NUMBER, "amount of data to upload"),
        Option("sparse", FLAG, "preserve sparseness of volume"),
    ),
    "vol-download": Verb(
        vol_download,
        "Download volume contents to a file",
        *OPTIONS,
        Option("offset", NUMBER, "volume offset to download from"),
        Option("length", NUMBER, "amount of data to download"),
        Option("sparse", FLAG, "preserve sparseness of volume"),
    ),
}
