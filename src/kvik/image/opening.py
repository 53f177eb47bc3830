"""Opening images: by a descriptor and a stated format, and the backing chains of a local user's own files.

A library's caller passes descriptors and says what a header's references may lead to. The command line opens files by
name as qemu-img does, with `Opener`: references that are no plain files are refused, loops and deep chains too.
"""

from __future__ import annotations

import os
import stat

from kvik.errors import ImageError, InvalidArgument
from kvik.image.base import KEY_WANTED, LOCKED, Image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.image.base import BackingOpener, DataOpener
    from kvik.image.qcow2.redo import Redo

    # (descriptor, which becomes the image's; path; format): an image of a format that is not read here
    ForeignOpener = Callable[[int, str, str], Image]

__all__ = ["FOREIGN", "FORMATS", "Opener", "open_image", "plain_file", "probe_format"]

FORMATS = ("raw", "qcow2")
FOREIGN = ("vmdk", "vdi", "vpc", "vhdx", "ova")  # read by others
MAX_CHAIN = 128  # as deep as a chain may be; a loop by names that differ ends here, too


def probe_format(fd: int, offset: int = 0, size: int = 4096) -> str:
    """The format by the first bytes: for files of those who ask, never for a machine's disk (a guest writes its raw
    disk's first bytes). `offset` and `size` are those of an image within a file."""
    head = os.pread(fd, min(size, 4096), offset)
    if head[:4] == b"QFI\xfb":
        return "qcow2"
    for magic, name in (
        (b"KDMV", "vmdk"),
        (b"COWD", "vmdk"),
        (b"# Disk DescriptorFile", "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (b"QED\0", "qed"),
        (b"LUKS\xba\xbe", "luks"),
    ):
        if head.startswith(magic):
            return name
    if head[64:68] == b"\x7f\x10\xda\xbe":
        return "vdi"
    if head.startswith((b"WithoutFreeSpace", b"WithouFreSpacExt")):
        return "parallels"
    if head[257:262] == b"ustar":
        from kvik.image.ova import looks_like

        if looks_like(head):
            return "ova"
    return "raw"


def open_image(
    fd: int,
    *,
    format: str,
    writable: bool = False,
    backing: BackingOpener | None = None,
    data_file: DataOpener | None = None,
    path: str = "",
    repairing: bool = False,
    barriers: bool = True,
    redo: Redo | None = None,
) -> Image:
    """An image over an open descriptor, which becomes the image's. `format` is one of `FORMATS`; it is never guessed.

    `backing` and `data_file` open what the header refers to; without them such an image can be looked at, but what lies
    there cannot be read. An image that is marked as damaged is opened for writing only with `repairing`. Without
    `barriers` nothing is flushed, for an image that is worthless until it is whole. `redo` is for a process that may
    have to go on where another was killed (`qcow2/redo.py`). Raises `ImageError`; `InvalidArgument` for a
    format that is not known here.
    """
    if format == "raw":
        from kvik.image.raw import RawImage

        return RawImage(fd, path, writable=writable, barriers=barriers)
    if format == "qcow2":
        if writable:
            from kvik.image.qcow2.writer import Qcow2Writer

            return Qcow2Writer(
                fd, path, backing=backing, data_file=data_file, repairing=repairing, barriers=barriers, redo=redo
            )
        from kvik.image.qcow2.reader import Qcow2Reader

        return Qcow2Reader(fd, path, backing=backing, data_file=data_file)
    if format == "luks":
        from kvik.image.luks import LuksImage

        if writable:
            raise ImageError(LOCKED, file=path, offset=0, remedy=KEY_WANTED)
        return LuksImage(fd, path)
    raise InvalidArgument(f"unknown disk image format '{format}'", remedy=f"known here: {', '.join(FORMATS)}")


def plain_file(name: str, what: str, image: str) -> str:
    """`name` if it means a file: no `json:`, no `nbd:`, no URL. Raises `ImageError`."""
    if name.startswith("file:") and not name.startswith("file://"):
        name = name[5:]
    elif ":" in name.split("/", 1)[0] or name.startswith("//"):
        raise ImageError(
            f"its {what} is {name!r}, which is no plain file and is not opened",
            file=image,
            remedy="point it to a file: kvik img rebase -u -b FILE -F FORMAT IMAGE",
        )
    return name


class Opener:
    """Opens a local user's own images with all they refer to, as qemu-img does.

    `foreign` opens images of the formats in `FOREIGN`, to be read; none of them can be another's backing file. With
    `alone` nothing that an image refers to is opened: such an image can be looked at, but what lies there not be read.
    """

    def __init__(
        self, *, share: bool = False, lock: bool = True, foreign: ForeignOpener | None = None, alone: bool = False
    ) -> None:
        self._share = share
        self._lock = lock
        self._foreign = foreign
        self._alone = alone

    def open(
        self,
        path: str,
        format: str | None = None,
        *,
        writable: bool = False,
        chain: bool = True,
        repairing: bool = False,
        write_layer: int = 0,
        above: tuple[tuple[int, int], ...] = (),
    ) -> Image:
        """The image at `path`; without `chain` its backing file is left alone.

        `write_layer` is how deep below it a layer is opened for writing, too (0: none); `above` tells the files
        (device, inode) that are to be on top of it, and cannot be in its chain.
        """
        return self._open(
            path,
            format,
            writable,
            chain,
            above,
            repairing=repairing,
            write_layer=write_layer and write_layer + len(above),
        )

    def adopt(self, fd: int, path: str, format: str) -> Image:
        """A new image, open for writing in a descriptor that becomes the image's."""
        return self._image(fd, path, format, (), writable=True, barriers=False)

    def _open(
        self,
        path: str,
        format: str | None,
        writable: bool,
        chain: bool,
        above: tuple[tuple[int, int], ...],
        *,
        repairing: bool = False,
        write_layer: int = 0,
    ) -> Image:
        writable = writable or bool(write_layer and len(above) == write_layer)
        fd = open_file(path, writable=writable)
        try:
            return self._image(
                fd, path, format, above, writable=writable, chain=chain, repairing=repairing, write_layer=write_layer
            )
        except BaseException:
            os.close(fd)
            raise

    def _image(
        self,
        fd: int,
        path: str,
        format: str | None,
        above: tuple[tuple[int, int], ...],
        *,
        writable: bool,
        chain: bool = True,
        repairing: bool = False,
        write_layer: int = 0,
        barriers: bool = True,
    ) -> Image:
        status = os.fstat(fd)
        identity = status.st_dev, status.st_ino
        if identity in above:
            raise ImageError("is its own backing file: the chain is a loop", file=path)
        if len(above) >= MAX_CHAIN:
            raise ImageError(f"the backing chain is deeper than {MAX_CHAIN} images", file=path)
        from kvik.image.lock import lock_image

        if self._lock:
            lock_image(fd, path, write=writable, share_write=self._share)

        def below(name: str, stated: str | None) -> Image:
            there = beside(path, plain_file(name, "backing file", path))
            try:
                return self._open(there, stated, False, True, (*above, identity), write_layer=write_layer)
            except OSError as error:
                raise ImageError(
                    f"its backing file {there} cannot be opened: {error.strerror}",
                    file=path,
                    remedy="put it there, or say where it is: kvik img rebase -u -b FILE -F FORMAT IMAGE",
                ) from error

        def data(name: str) -> int:
            there = beside(path, plain_file(name, "data file", path))
            try:
                fd = open_file(there, writable=writable)
            except OSError as error:
                raise ImageError(f"its data file {there} cannot be opened: {error.strerror}", file=path) from error
            if self._lock:
                try:
                    lock_image(fd, there, write=writable, share_write=self._share)
                except BaseException:
                    os.close(fd)
                    raise
            return fd

        format = format or probe_format(fd)
        if format in FOREIGN and self._foreign is not None and not above and not writable:
            return self._foreign(fd, path, format)
        return open_image(
            fd,
            format=format,
            writable=writable,
            backing=below if chain and not self._alone else None,
            data_file=None if self._alone else data,
            path=path,
            repairing=repairing,
            barriers=barriers,
        )


def beside(image: str, name: str) -> str:
    """`name` seen from where `image` is."""
    return name if name.startswith("/") else os.path.join(os.path.dirname(image), name)  # noqa: PTH118, PTH120


def open_file(path: str, *, writable: bool) -> int:
    """A regular file or block device: never a FIFO that would block, a terminal or a directory."""
    flags = os.O_RDWR if writable else os.O_RDONLY
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise ImageError("is neither a file nor a block device", file=path)
    return fd
