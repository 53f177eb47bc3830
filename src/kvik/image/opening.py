"""Opening images: by a descriptor and a stated format, and the backing chains of a local user's own files.

A library's caller passes descriptors and says what a header's references may lead to. The command line opens files by
name as qemu-img does, with `Opener`: references that are no plain files are refused, loops and deep chains too.
"""

from __future__ import annotations

import os
import stat

from kvik.errors import ImageError, InvalidArgument
from kvik.image.base import Image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.image.base import BackingOpener, DataOpener

__all__ = ["FORMATS", "Opener", "open_image", "plain_file", "probe_format"]

FORMATS = ("raw", "qcow2")
MAX_CHAIN = 128  # as deep as a chain may be; a loop by names that differ ends here, too


def probe_format(fd: int) -> str:
    """The format by the first bytes: for files of those who ask, never for a machine's disk (a guest writes its raw
    disk's first bytes)."""
    head = os.pread(fd, 4096, 0)
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
) -> Image:
    """An image over an open descriptor, which becomes the image's. `format` is one of `FORMATS`; it is never guessed.

    `backing` and `data_file` open what the header refers to; without them such an image can be looked at, but what lies
    there cannot be read. An image that is marked as damaged is opened for writing only
    with `repairing`. Raises `ImageError`; `InvalidArgument` for a format that is not known here.
    """
    if format == "raw":
        from kvik.image.raw import RawImage

        return RawImage(fd, path, writable=writable)
    if format == "qcow2":
        if writable:
            from kvik.image.qcow2.writer import Qcow2Writer

            return Qcow2Writer(fd, path, backing=backing, data_file=data_file, repairing=repairing)
        from kvik.image.qcow2.reader import Qcow2Reader

        return Qcow2Reader(fd, path, backing=backing, data_file=data_file)
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

    `lock` is called with each descriptor, its path and whether it is written.
    """

    def __init__(self, *, share: bool = False, lock: bool = True) -> None:
        self._share = share
        self._lock = lock

    def open(
        self,
        path: str,
        format: str | None = None,
        *,
        writable: bool = False,
        chain: bool = True,
        repairing: bool = False,
    ) -> Image:
        """The image at `path`; without `chain` its backing file is left alone."""
        return self._open(path, format, writable, chain, (), repairing=repairing)

    def _open(
        self,
        path: str,
        format: str | None,
        writable: bool,
        chain: bool,
        above: tuple[tuple[int, int], ...],
        *,
        repairing: bool = False,
    ) -> Image:
        fd = open_file(path, writable=writable)
        try:
            status = os.fstat(fd)
            identity = status.st_dev, status.st_ino
            if identity in above:
                raise ImageError("is its own backing file: the chain is a loop", file=path)
            if len(above) >= MAX_CHAIN:
                raise ImageError(f"the backing chain is deeper than {MAX_CHAIN} images", file=path)
            if self._lock:
                from kvik.image.lock import lock_image

                lock_image(fd, path, write=writable, share_write=self._share)

            def below(name: str, stated: str | None) -> Image:
                there = beside(path, plain_file(name, "backing file", path))
                try:
                    return self._open(there, stated, False, True, (*above, identity))
                except OSError as error:
                    raise ImageError(
                        f"its backing file {there} cannot be opened: {error.strerror}", file=path
                    ) from error

            def data(name: str) -> int:
                there = beside(path, plain_file(name, "data file", path))
                try:
                    return open_file(there, writable=writable)
                except OSError as error:
                    raise ImageError(f"its data file {there} cannot be opened: {error.strerror}", file=path) from error

            return open_image(
                fd,
                format=format or probe_format(fd),
                writable=writable,
                backing=below if chain else None,
                data_file=data,
                path=path,
                repairing=repairing,
            )
        except BaseException:
            os.close(fd)
            raise


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
