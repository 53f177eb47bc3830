"""A new image on top of the disk's, while it is served: a snapshot of a machine that runs.

added    the new image is open, locked and found to fit; the guest still has the old one, most of which was written out
on top   what was asked for is answered, the old image is whole on disk, and all else goes to the new one. As long as
         the VMM has started no ring since (kvik-blk), or the device has not gone on (kvik-vmm's own disk), nothing was
         written there, and it can be dropped again
kept     the old image is read through a descriptor that cannot write, and locked as one that is read

A machine's disks are kvik-vmm's own (raw) and those of processes beside it. All of them or none have a new image, for
its guest stands still between the first "on top" and the last: who is told amid that to go on asks them all (`group`),
and drops or keeps.
"""

from __future__ import annotations

import fcntl
import os

from kvik.errors import (
    ImageError,
    InvalidArgument,
    KvikError,
    OperationInvalid,
    OperationTimeout,
)
from kvik.image.lock import lock_image, stop_writing
from kvik.image.opening import open_image
from kvik.image.qcow2.redo import identity, mark
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.vmm.blk.bitmaps import go_on
from kvik.vmm.blk.chain import check_can_open
from kvik.vmm.blk.image import FormatImage, flush

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.image.base import Image
    from kvik.image.qcow2.redo import Redo
    from kvik.vmm.backends.block import BlockImage
    from kvik.vmm.virtio.blk import Blk

__all__ = ["Overlays"]

SETTLES = 10.0  # seconds for requests that are under way


class Overlays:
    """Of one disk. `locking`: whether its images are locked."""

    def __init__(
        self,
        device: Blk,
        *,
        locking: bool = True,
        log: Callable[[str], object] = lambda text: None,
        redo: Redo | None = None,
        top: str = "",
    ) -> None:
        self._device, self.locking, self._log, self._redo = device, locking, log, redo
        self._added: FormatImage | None = None
        self._below = -1  # to read the image that is on top now, when it is below
        self._old: BlockImage | None = None  # below the one on top, as long as that can be dropped
        self._node = self._group = ""  # of the image that is added, or that can be dropped
        self._mark = -1  # where it is noted which image the guest writes to; in kvik-blk that is `redo`
        self._top = self._before = top  # the node of the image that the guest writes to; "": the one it started with

    def report(self) -> dict[str, str]:
        state = "added" if self._added is not None else "on-top" if self._old is not None else "none"
        told = {"state": state, "top": self._top}
        return told if state == "none" else told | {"node-name": self._node, "group": self._group}

    def add(self, fd: int, below: int, data: int, *, node: str, group: str, name: str) -> None:
        """Takes over the descriptors: `fd` of the new image, `below` to read the present one, `data` (-1: none) another
        open file of the new one, for caches that want O_DIRECT. Raises `KvikError`, OSError; then they are closed, and
        nothing has changed."""
        owned = [item for item in (fd, below, data) if item >= 0]
        try:
            if self._added is not None:
                raise OperationInvalid(f"disk {self._device.name}: image {self._node} waits to be put on top already")
            self.keep()
            old = self._device.image
            self._check(old, fd, below, data)
            check_can_open(fd, name)
            with self._device.lock:
                flush(self._device)  # what is left for the standstill is little then
            image = open_image(fd, format="qcow2", writable=True, path=name)
            owned = [below]  # the others are the image's
            new = FormatImage(
                image,
                data if data >= 0 else os.dup(fd),
                cache=old.cache,
                discard=old.can_discard,
                locking=self.locking,
                name=name,
                log=self._log,
            )
            try:
                _check_fits(image, new, old)
                go_on(image, old)
            except BaseException:
                new.close()
                raise
        except BaseException:
            for item in owned:
                os.close(item)
            raise
        self._added, self._below, self._node, self._group = new, below, node, group

    def _check(self, old: BlockImage, fd: int, below: int, data: int) -> None:
        name = self._device.name
        if old.read_only:
            raise OperationInvalid(f"disk {name} is read-only")
        if isinstance(old, FormatImage) and old.backup is not None:
            raise OperationInvalid(f"disk {name} has a backup under way", remedy="wait for its end")
        if isinstance(old, FormatImage) and old.job is not None:
            raise OperationInvalid(f"disk {name} has a block job under way", remedy="wait for its end")
        if (data >= 0) != old.direct:
            raise InvalidArgument(f"disk {name}: cache={old.cache} and the descriptors do not agree")
        for item, wanted in ((fd, os.O_RDWR), (data, os.O_RDWR), (below, os.O_RDONLY)):
            if item >= 0 and fcntl.fcntl(item, fcntl.F_GETFL) & os.O_ACCMODE != wanted:
                raise InvalidArgument(f"disk {name}: a descriptor was not opened as it has to be")
        if identity(below) != identity(old.fd):
            raise InvalidArgument(
                f"disk {name}: {old.name} is another file by now than the one that the guest writes to",
                remedy="its file was replaced while the machine ran: bring the old one back",
            )

    def put(self) -> None:
        """On top, at once: see `keep` and `drop`. Raises `KvikError`, OSError; then nothing has changed."""
        device, new = self._device, self._added
        if new is None:
            raise OperationInvalid(f"disk {device.name}: no image was added")
        with device.lock:
            old = device.image
            if not old.drain(SETTLES):
                raise OperationTimeout(f"disk {device.name}: the host's storage does not answer")
            device._publish()
            flush(device)
            inner: Image | None = getattr(old, "image", None)
            reader = open_image(self._below, format=inner.format if inner is not None else "raw", path=old.name)
            reader.backing = inner.backing if inner is not None else None
            new.image.backing = reader
            new.take_over(old)
            device.image, self._old, self._added, self._below = new, old, None, -1
            self._before, self._top = self._top, self._node
            if device.active and not device.paused:  # from here on there are writes that nobody may take back
                self.keep()

    def drop(self) -> None:
        """The image that was added goes, also from the top if no ring was started since. Else nothing happens."""
        new, below, old = self._added, self._below, self._old
        self._added, self._below, self._old = None, -1, None
        if new is not None:
            new.close()
            os.close(below)
        elif old is not None:
            with self._device.lock:
                top = self._device.image
                old.take_over(top)
                self._device.image, self._top = old, self._before
                reader = top.image.backing if isinstance(top, FormatImage) else None
                if reader is not None:
                    reader.backing = None  # those are the old image's
                top.close()

    def keep(self) -> None:
        """The image on top stays there; the one below is written no more. What goes wrong with that is in the log."""
        old, self._old = self._old, None
        top = self._device.image
        if old is None or not isinstance(top, FormatImage):
            return
        with self._device.lock:
            reader, inner = top.image.backing, getattr(old, "image", None)
            if self._redo is not None:  # nothing was written to the one on top until now, nor to the old one since
                if isinstance(inner, Qcow2Writer):
                    inner.redo = None
                self._redo.begin(top.image.fd)
                if isinstance(top.image, Qcow2Writer):
                    top.image.redo = self._redo
            try:
                if self.locking and reader is not None:
                    stop_writing(old.fd)
                    lock_image(reader.fd, old.name, write=False)
            except (KvikError, OSError) as error:
                self._log(f"{old.name} is not locked any more: {error}")
            if inner is not None:
                inner.backing = None  # the reader has those
            try:
                old.close()
            except (KvikError, OSError) as error:  # its bitmaps; all else was written before
                self._log(f"{old.name} was not closed in order: {error}")

    def pivot(self, new: FormatImage, node: str) -> None:
        """The guest goes on in `new`, which lay below and holds the same. The device's lock is held, nothing is in
        flight, and both are on the medium."""
        device, old = self._device, self._device.image
        if self._mark >= 0:
            mark(self._mark, new.image.fd, alone=True)
        new.take_over(old)
        if self._redo is not None:
            inner = getattr(old, "image", None)
            if isinstance(inner, Qcow2Writer):
                inner.redo = None
            self._redo.begin(new.image.fd, alone=True)
            if isinstance(new.image, Qcow2Writer):
                new.image.redo = self._redo
        device.image, self._top = new, node

    def note_in(self, fd: int) -> None:
        """Takes over `fd`, a file that outlives this process: it says which image the guest writes to, from now on and
        after `pivot`. Raises OSError; then it is closed."""
        old, self._mark = self._mark, -1
        if old >= 0:
            os.close(old)
        try:
            mark(fd, self._device.image.fd)
        except BaseException:
            os.close(fd)
            raise
        self._mark = fd

    def close(self) -> None:
        """An image that was added is let go; the device closes what is on top."""
        if self._added is not None:
            self.drop()
        self.keep()
        if self._mark >= 0:
            os.close(self._mark)
            self._mark = -1


def _check_fits(image: Image, new: BlockImage, old: BlockImage) -> None:
    header = getattr(image, "header", None)
    assert header is not None
    if header.crypt_method:
        raise image.fault("is encrypted, which is not supported", 32)
    if image.data_fd < 0:
        raise image.fault("keeps its data in another file, which is not supported", 72)
    if header.backing_file is None:
        raise image.fault("rests on no other image", 8)
    if new.size != old.size:
        raise ImageError(f"has {new.size} bytes, and the disk {old.size}", file=image.path)
