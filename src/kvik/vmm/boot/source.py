"""A file that the machine starts from: opened by us or handed over as a descriptor, read into guest memory."""

from __future__ import annotations

import os
import stat

from kvik.errors import HostError, ImageError, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from kvik.vmm.memory import GuestMemory


class Source:
    """An open regular file of known size. `what` is the word for messages: "kernel", "initrd"."""

    __slots__ = ("_owned", "fd", "name", "size", "what")

    def __init__(self, what: str, file: str | int) -> None:
        """Raises `NotFound`, `HostError`, or `ImageError` for something that is no file."""
        self.what = what
        self._owned = isinstance(file, str)
        self.name = repr(file) if isinstance(file, str) else f"in descriptor {file}"
        try:
            self.fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC) if isinstance(file, str) else file
            status = os.fstat(self.fd)
        except FileNotFoundError:
            raise NotFound(f"the {what} {self.name} does not exist", remedy="check the path") from None
        except OSError as error:
            raise HostError(
                f"the {what} {self.name} cannot be opened: {error.strerror}",
                errno=error.errno or 0,
                remedy="make it readable for the user that runs the machine",
            ) from None
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ImageError(f"the {what} {self.name} is no regular file", remedy=f"give the file of the {what}")
        if not self.size:
            self.close()
            raise ImageError(f"the {what} {self.name} is empty", remedy="fetch or build it again")

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes: fewer only at the end of the file."""
        return os.pread(self.fd, size, offset)

    def load(self, memory: GuestMemory, address: int, offset: int, size: int) -> None:
        """Read straight into guest memory. Raises `ImageError` when the file ends early."""
        view = memory.view(address, size)
        done = 0
        while done < size:
            got = os.preadv(self.fd, [view[done:]], offset + done)
            if not got:
                raise ImageError(
                    f"the {self.what} {self.name} ends at byte {offset + done}, {size - done} bytes early",
                    remedy="it was cut off, or is being written: fetch or build it again",
                )
            done += got
        memory.touched(address, size)

    def close(self) -> None:
        if self._owned and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
