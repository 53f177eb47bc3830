"""A raw image file or block device, opened for a machine's disk.

Cache modes are QEMU's: `writeback` (host page cache, the guest's flushes are fdatasync), `none` (O_DIRECT),
`writethrough` and `directsync` (every write waits for the medium), `unsafe` (flushes are ignored).

What is likely done without waiting is done at once, on the calling thread: a read that the page cache holds
(RWF_NOWAIT, preadv2(2)), and a buffered write when the thread serves this disk alone. That saves a hand-over for each
request, which is most of what a small request costs. Everything else goes to an engine: io_uring, else threads.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat

from kvik.errors import AccessDenied, HostError, ImageError, InvalidArgument, NotFound, OperationUnsupported
from kvik.image.lock import lock_image
from kvik.vmm.backends.pool import ThreadPool
from kvik.vmm.backends.request import FLUSH, READ, WRITE, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.vmm.backends.io_uring import Uring
    from kvik.vmm.loop import EventLoop

__all__ = ["CACHE_MODES", "BlockImage"]

# mode: (O_DIRECT, each write waits, flushes are ignored)
CACHE_MODES = {
    "writeback": (False, False, False),
    "none": (True, False, False),
    "writethrough": (False, True, False),
    "directsync": (True, True, False),
    "unsafe": (False, False, True),
}
RWF_DSYNC, RWF_NOWAIT = 0x02, 0x08  # preadv2(2)
BLKSSZGET, BLKGETSIZE64, BLKPBSZGET = 0x1268, 0x80081272, 0x127B  # linux/fs.h
TMPFS_MAGIC, RAMFS_MAGIC = 0x01021994, 0x858458F6  # statfs(2)
SECTOR = 512
INLINE_WRITE = 1 << 20  # bytes; above, a hand-over costs nothing beside the copy
_MAGIC = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"QED\0": "qed", b"vhdxfile": "vhdx", b"conectix": "vpc"}


class BlockImage:
    """`source` is a path, or a descriptor that the caller opened (kept, and closed with the image).

    `image_format` is "raw", or "" for a file that is not recognisably something else: the format is never guessed from
    what a guest could have written. Its methods are not for two threads at once: its device holds a lock.
    """

    def __init__(
        self,
        source: str | int,
        *,
        image_format: str = "",
        read_only: bool = False,
        cache: str = "writeback",
        aio: str = "auto",
        locking: bool = True,
        share_write: bool = False,
        discard: bool = True,
        name: str = "",
    ) -> None:
        if cache not in CACHE_MODES:
            raise InvalidArgument(f"cache mode {cache!r} is none of {', '.join(CACHE_MODES)}")
        if aio not in ("auto", "io_uring", "threads"):
            raise InvalidArgument(f"aio={aio!r} is none of auto, io_uring, threads")
        self.name = name or (source if isinstance(source, str) else f"descriptor {source}")
        if image_format not in ("", "raw"):
            raise _unsupported(self.name, image_format)
        self.read_only = read_only
        self.cache = cache
        self.locking = locking
        self.direct, self.sync, self.ignore_flush = CACHE_MODES[cache]
        self.can_discard = discard and not read_only
        self.fd = self._open(source)
        self._buffered = -1
        self._engine: ThreadPool | Uring | None = None
        self._loop: EventLoop | None = None
        self._aio = aio
        # Whether a device may read and write `fd` without asking `now`: a class made from this one wants to be asked.
        self.plain = type(self) is BlockImage
        self.mapped = False  # or it wants to be asked where in which file a range lies: `place`, `place_to_write`
        self.inline_write_limit = 0  # bytes; a write of no more is done at once
        self.read_flags = 0 if self.direct else RWF_NOWAIT  # of a read that shall not wait
        self._nowait = not self.direct
        self._cold = self._skip = 0
        try:
            status = os.fstat(self.fd)
            self.is_device = stat.S_ISBLK(status.st_mode)
            if not self.is_device and not stat.S_ISREG(status.st_mode):
                raise ImageError(f"disk {self.name} is neither a file nor a block device")
            if _lies_in_memory(self.fd):
                self.read_flags = 0  # before Linux 6.6 tmpfs has no RWF_NOWAIT, and it needs none
            if not image_format:
                self._refuse_other_formats()
            self.end = self.size = 0
            self.refresh_size()
            if locking:
                lock_image(self.fd, self.name, write=not read_only, share_write=share_write)
            self.alignment = self._set_direct() if self.direct else 1
            self.block_size = self._device_word(BLKSSZGET, SECTOR) if self.is_device else SECTOR
            self.physical_block_size = self._device_word(BLKPBSZGET, SECTOR) if self.is_device else SECTOR
        except BaseException:
            self.close()
            raise

    # Opening -----------------------------------------------------------------------------------------------------

    def _open(self, source: str | int) -> int:
        if isinstance(source, int):
            try:
                mode = fcntl.fcntl(source, fcntl.F_GETFL) & os.O_ACCMODE
            except OSError as error:
                raise InvalidArgument(f"disk descriptor {source} is not open") from error
            if mode == os.O_WRONLY or (mode == os.O_RDONLY and not self.read_only):
                raise InvalidArgument(
                    f"disk descriptor {source} was not opened for {'reading' if self.read_only else 'writing'}",
                    remedy="open it with O_RDWR, or give the disk as read-only",
                )
            os.set_inheritable(source, False)
            return source
        try:
            return os.open(source, (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"disk {source} does not exist") from error
        except PermissionError as error:
            remedy = "give the disk as read-only, or change the file's mode" if not self.read_only else ""
            raise AccessDenied(f"disk {source} may not be opened", remedy=remedy) from error
        except OSError as error:
            raise HostError(f"disk {source} cannot be opened: {error.strerror}", errno=error.errno or 0) from error

    def _refuse_other_formats(self) -> None:
        head = os.pread(self.fd, 8, 0)
        for magic, name in _MAGIC.items():
            if head.startswith(magic):
                raise _unsupported(self.name, name)

    def _device_word(self, command: int, default: int) -> int:
        word = bytearray(4)
        try:
            fcntl.ioctl(self.fd, command, word)
        except OSError:
            return default
        return int.from_bytes(word, "little") or default

    def _set_direct(self) -> int:
        """O_DIRECT on our descriptor, and a second, buffered one for requests that are not aligned. The kernel keeps
        the two coherent: direct I/O writes back and drops what the page cache holds of its range (open(2), NOTES)."""
        self._buffered = self._open_buffered()
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError as error:
            raise OperationUnsupported(
                f"disk {self.name}: its file system has no O_DIRECT", remedy="use cache=writeback"
            ) from error
        probe = mmap.mmap(-1, 4096)
        for size in (512, 1024, 2048, 4096):
            try:
                os.preadv(self.fd, [memoryview(probe)[:size]], 0)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    continue
                raise HostError(f"disk {self.name} cannot be read: {error.strerror}", errno=error.errno or 0) from error
            return size
        return 4096

    def _open_buffered(self) -> int:
        """Another open file, without O_DIRECT."""
        return os.open(f"/proc/self/fd/{self.fd}", (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC)

    # Size --------------------------------------------------------------------------------------------------------

    def refresh_size(self) -> bool:
        """Look at the size again; whether it changed. A last partial sector counts, as if padded with zeros."""
        end = os.lseek(self.fd, 0, os.SEEK_END)
        size = -(-end // SECTOR) * SECTOR
        changed = size != self.size
        self.end, self.size = end, size
        return changed

    def resize(self, size: int) -> None:
        """Make the file `size` bytes long. A block device is resized by its owner: then this only looks again."""
        if size < 0 or size % SECTOR:
            raise InvalidArgument(f"a disk cannot have {size} bytes", remedy="give a multiple of 512")
        if self.read_only:
            raise InvalidArgument(f"disk {self.name} is read-only")
        if not self.is_device:
            try:
                os.ftruncate(self.fd, size)
            except OSError as error:
                raise HostError(
                    f"disk {self.name} cannot be resized: {error.strerror}", errno=error.errno or 0
                ) from error
        self.refresh_size()
        if self.size < size:
            raise InvalidArgument(f"block device {self.name} has {self.size} bytes, not {size}")

    # I/O ---------------------------------------------------------------------------------------------------------

    def start(self, loop: EventLoop, *, private: bool, on_ready: Callable[[], None] | None = None) -> None:
        """Let `loop` call `on_ready`, which shall call `reap`, when results wait. `private`: the loop serves nothing
        else, so a write may hold it up."""
        self.inline_write_limit = INLINE_WRITE if private and not self.direct and not self.sync else 0
        self._loop = loop
        engine = self._engine = self._make_engine()
        for fd in engine.fds:
            loop.add_reader(fd, on_ready or self.reap)

    def _make_engine(self) -> ThreadPool | Uring:
        if self._aio != "threads":
            from kvik.vmm.backends.io_uring import Uring

            try:
                return Uring()
            except OSError as error:
                if self._aio == "io_uring":
                    raise HostError(
                        f"this kernel gives no io_uring: {error.strerror}",
                        errno=error.errno or 0,
                        remedy="use aio=threads, or see sysctl kernel.io_uring_disabled",
                    ) from error
        return ThreadPool()

    def take_over(self, other: BlockImage) -> None:
        """Serve with the engine of another image, which has nothing in flight and serves no more. A process that may
        make no other goes on so when its disk's storage changes."""
        assert self._engine is None and not other.in_flight
        self._engine, other._engine = other._engine, None
        self._loop, self.inline_write_limit = other._loop, other.inline_write_limit

    @property
    def aio(self) -> str:
        return self._engine.name if self._engine is not None else self._aio

    @property
    def in_flight(self) -> int:
        return self._engine.in_flight if self._engine is not None else 0

    def submit(self, request: Request, *, write_through: bool = False) -> bool:
        """True: complete, `request.result` is set. False: `request.done` is called later, `flush` sends it off.
        For reads and writes `now` should have been asked before."""
        engine = self._engine
        assert engine is not None, "not started"
        request.fd = self.fd
        request.end = self.end
        request.is_device = self.is_device
        op = request.op
        if op == FLUSH:
            if self.ignore_flush or self.read_only:
                request.result = 0
                return True
        elif op != READ and (self.sync or write_through):
            request.flags = RWF_DSYNC
        if self.direct and op <= WRITE:
            request.buffered_fd = self._buffered
            if (request.offset | request.length) % self.alignment:
                request.fd = self._buffered
        engine.submit(request)
        return False

    @property
    def may_read_now(self) -> bool:
        """Whether a read is worth a try at the page cache."""
        return self._nowait and not self._skip

    def hit(self) -> None:
        """Such a read was answered by the page cache."""
        self._cold = 0

    def now(self, op: int, buffers: list[memoryview], offset: int, length: int, write_through: bool = False) -> bool:
        """Read or write at once, if that takes no more than a copy. False: it may be half done, `submit` it as a whole
        (errors too come from there)."""
        if op == READ:
            if not self._nowait:
                return False
            if self._skip:
                self._skip -= 1
                return False
            try:
                if os.preadv(self.fd, buffers, offset, self.read_flags) == length:
                    self._cold = 0
                    return True
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    # Not cached. After misses this is tried ever more rarely, up to once in 64 reads.
                    self._cold = self._skip = min(2 * self._cold + 1, 63)
                elif error.errno != errno.EINVAL:  # more than IOV_MAX buffers
                    self._nowait = False  # EOPNOTSUPP: a file system without it
            return False
        if write_through or length > self.inline_write_limit:
            return False
        try:
            return os.pwritev(self.fd, buffers, offset) == length
        except OSError:
            return False

    def place(self, offset: int, length: int) -> tuple[int, int]:
        """Where to read a range with one call: descriptor and offset; (-1, -1) where it does not lie in one place."""
        return self.fd, offset

    def place_to_write(self, offset: int, length: int) -> tuple[int, int]:
        """The same for a write that changes nothing but those bytes."""
        return self.fd, offset

    def flush(self) -> None:
        """Send off what `submit` queued."""
        if self._engine is not None:
            self._engine.flush()

    def reap(self) -> None:
        """Call `done` of what is complete."""
        if self._engine is not None:
            self._engine.reap()

    def drain(self, seconds: float) -> bool:
        """Wait until nothing is in flight. False: something still is, and nothing ended for that long."""
        engine = self._engine
        while engine is not None and engine.in_flight:
            if not engine.wait(seconds):
                return False
        return True

    def close(self) -> None:
        """Waits for what is in flight, then gives the image and its lock back."""
        engine, self._engine = self._engine, None
        if engine is not None:
            if self._loop is not None:
                for fd in engine.fds:
                    self._loop.remove_reader(fd)
            engine.close()
        for fd in (self.fd, self._buffered):
            if fd >= 0:
                os.close(fd)
        self.fd = self._buffered = -1


_libc = ctypes.CDLL(None)


def _lies_in_memory(fd: int) -> bool:
    """Whether the file system has no medium below the page cache."""
    statfs = ctypes.create_string_buffer(256)  # struct statfs: f_type comes first, a long
    return not _libc.fstatfs(fd, statfs) and int.from_bytes(statfs.raw[:8], "little") in (TMPFS_MAGIC, RAMFS_MAGIC)


def _unsupported(name: str, image_format: str) -> OperationUnsupported:
    return OperationUnsupported(
        f"disk {name} has the format {image_format}, which kvik-vmm does not read by itself",
        remedy=f"serve it with qemu-storage-daemon --export vhost-user-blk and give --disk vhost-user=SOCKET,"
        f" convert it to raw, or say format=raw if its bytes are meant (not {image_format})",
    )
