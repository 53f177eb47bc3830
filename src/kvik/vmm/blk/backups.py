"""The backup of one disk, from its image that was passed to its end; one at a time."""

from __future__ import annotations

import os
import time

from kvik.errors import InvalidArgument, OperationInvalid, OperationTimeout
from kvik.image.lock import lock_image
from kvik.image.opening import open_image
from kvik.vmm.blk import bitmaps
from kvik.vmm.blk.backup import Backup
from kvik.vmm.blk.chain import check_can_open
from kvik.vmm.blk.image import FormatImage, formatted, plain_again
from kvik.vmm.blk.nbd_export import Export
from kvik.vmm.blk.nbd_server import NbdServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from kvik.vmm.blk.bitmaps import Source
    from kvik.vmm.virtio.blk import Blk

__all__ = ["Backups"]

SETTLES = 10.0  # seconds for requests that are under way
HELD = 30.0  # seconds that a guest's requests wait at most
LOOKS = 0.05  # seconds


class Backups:
    """Of one disk. `emit` tells events; `locking`: whether images are locked."""

    def __init__(
        self,
        device: Blk,
        emit: Callable[[str, dict[str, Any]], object],
        *,
        locking: bool = True,
        log: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._device, self._emit, self._locking, self._log = device, emit, locking, log
        self._since: Sequence[Source] = ()
        self._held, self._holds = False, 0
        self._server: NbdServer | None = None
        self.backup: Backup | None = None

    # One moment on several disks ---------------------------------------------------------------------------------

    def hold(self, gone: Callable[[], bool]) -> None:
        """No request is answered until `release`, for at most `HELD` seconds, and not when whoever asked for it is
        `gone`. Raises `OperationTimeout`."""
        if self._held:
            raise OperationInvalid(f"disk {self._device.name} is held already")
        loop, end = self._device.loop, time.monotonic() + HELD
        try:
            self._device.pause()
        except BaseException:
            self._device.resume()
            raise
        self._held = True
        number = self._holds = self._holds + 1

        def look() -> None:
            if self._held and self._holds == number:
                if gone() or time.monotonic() > end:
                    self.release()
                else:
                    loop.call_later(LOOKS, look)

        loop.call_later(LOOKS, look)

    def release(self) -> None:
        if self._held:
            self._held = False
            self._device.resume()

    def _check_held(self, wanted: bool) -> None:
        if wanted and not self._held:
            raise OperationInvalid(
                f"disk {self._device.name} is not held any more: what is of one moment took too long"
            )

    # Bitmaps -----------------------------------------------------------------------------------------------------

    def bitmaps(self) -> list[list[dict[str, Any]]]:
        with self._device.lock:
            return bitmaps.report(self._device.image)

    def track(self, names: Sequence[str], granularity: int | None = None, *, held: bool = False) -> None:
        """`held`: not unless the disk is. Raises `KvikError`, OSError."""
        self._check_held(held)
        with self._device.lock:
            self._settle()
            bitmaps.add(self._device.image, names, granularity)

    def forget(self, name: str, layer: int, fd: int) -> None:
        """Takes over `fd`, of an image that is not on top."""
        with self._device.lock:
            if layer:
                bitmaps.remove_below(self._device.image, layer, fd, name)
            else:
                self._settle()
                bitmaps.remove(self._device.image, name)

    def changed(self, sources: Sequence[Source], shift: int) -> int:
        with self._device.lock:
            return bitmaps.count(self._device.image, sources, shift)

    def merge(self, layers: Sequence[int], into: int, fd: int) -> None:
        """Takes over `fd`, of an image that is not on top."""
        with self._device.lock:
            if into:
                self._settle()
                bitmaps.merge_below(self._device.image, layers, into, fd)
            else:
                bitmaps.merge(self._device.image, layers)

    def _settle(self) -> None:
        """What is in flight is either before or after."""
        if not self._device.image.drain(SETTLES):
            raise OperationTimeout(f"disk {self._device.name}: the host's storage does not answer")
        self._device._publish()

    # A backup ----------------------------------------------------------------------------------------------------

    def report(self) -> list[dict[str, Any]]:
        return [self.backup.report()] if self.backup is not None else []

    def add(
        self, job: str, fd: int, form: str, *, name: str, pull: bool, since: Sequence[Source], incremental: bool
    ) -> None:
        """Takes over the descriptor of the target, or of the scratch image. Raises `KvikError`, OSError."""
        try:
            if self.backup is not None:
                raise OperationInvalid(f"disk {self._device.name} has a backup under way: {self.backup.job}")
            if isinstance(self._device.image, FormatImage) and self._device.image.job is not None:
                raise OperationInvalid(f"disk {self._device.name} has a block job under way", remedy="wait for its end")
            if pull and form != "qcow2":
                raise InvalidArgument(f"disk {self._device.name}: a scratch image is a qcow2 image")
            if self._locking:
                lock_image(fd, name, write=True)
            if form == "qcow2":
                check_can_open(fd, name)
            target = open_image(fd, format=form, writable=True, path=name, barriers=not pull)
        except BaseException:
            os.close(fd)
            raise
        header = getattr(target, "header", None)
        if header is not None and (header.crypt_method or target.data_fd < 0):
            target.release()
            raise target.fault("is encrypted, or keeps its data in another file, which is not supported")
        self._since = since
        device = self._device
        self.backup = Backup(
            job,
            target,
            pull=pull,
            incremental=incremental,
            loop=device.loop,
            lock=device.lock,
            ended=self._concluded,
        )

    def begin(self, job: str, track: Sequence[str], *, held: bool = False) -> None:
        """From this moment on, as are the bitmaps of the names in `track`. Raises `KvikError`, OSError; then nothing
        was begun, but bitmaps may be there."""
        backup = self._named(job)
        if backup is None or backup.state != "added":
            raise OperationInvalid(f"disk {self._device.name}: backup {job} was not added")
        self._check_held(held)
        with self._device.lock:
            self._settle()
            image = formatted(self._device, self._log)
            bits, shift = None, backup.chunk_bits
            if backup.incremental:
                shift = shift if not backup.pull else bitmaps.finest(image, self._since, shift)
                bits = bitmaps.marked(image, self._since, shift, image.image.size)
            if track:
                bitmaps.add(image, track)
            backup.begin(image, bits, shift)

    def _concluded(self) -> None:
        backup = self.backup
        assert backup is not None
        self._emit("JOB_STATUS_CHANGE", {"id": backup.job, "status": backup.state})

    def _named(self, job: str) -> Backup | None:
        return self.backup if self.backup is not None and self.backup.job == job else None

    def serve(
        self, job: str, *, export: str, bitmap: str, names: Sequence[str], listening: int, links: Mapping[str, int]
    ) -> None:
        """The backup becomes readable for NBD clients as `export`: see `NbdServer`, which takes the descriptors. Raises
        `KvikError`, OSError; then they are closed."""
        backup = self._named(job)
        try:
            if backup is None or not backup.pull or backup.state != "running" or self._server is not None:
                raise OperationInvalid(f"disk {self._device.name}: backup {job} is none that can be pulled")
            shown = Export(backup, bitmap, self._device.lock)
            loop = self._device.loop
            server = NbdServer(loop, {export: shown}, names, listening=listening, links=links, log=self._log)
        except BaseException:
            for fd in {listening, *links.values()} - {-1}:
                os.close(fd)
            raise
        self._server = server

    def silence(self, job: str) -> None:
        """No client reads any more."""
        server = self._server
        if server is not None and self._named(job) is not None:
            self._server = None
            server.close()

    def cancel(self, job: str) -> None:
        """One that is over, or not known, is left as it is."""
        backup = self._named(job)
        if backup is not None:
            with self._device.lock:
                backup.cancel()

    def clear(self, job: str) -> None:
        """It is forgotten. Raises `OperationInvalid` while its image is written out."""
        backup = self._named(job)
        if backup is None:
            return
        self.silence(job)
        self.cancel(job)
        if backup.state != "concluded":
            raise OperationInvalid(f"disk {self._device.name}: backup {job} is being written out", remedy="ask again")
        self.backup, self._since = None, ()
        with self._device.lock:
            plain_again(self._device)

    def close(self) -> None:
        """The disk ends. Of what is under way nothing is whole."""
        if self.backup is not None:
            self.silence(self.backup.job)
            self.cancel(self.backup.job)
