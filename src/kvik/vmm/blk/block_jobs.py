"""The block job of one disk, from its start until it is dismissed; one at a time."""

from __future__ import annotations

import os

from kvik.errors import InvalidArgument, OperationInvalid, OperationTimeout
from kvik.image.qcow2.redo import identity
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.vmm.blk.image import SETTLES, FormatImage, formatted, plain_again

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvik.image.base import Image
    from kvik.vmm.blk.backups import Backups
    from kvik.vmm.blk.block_job import BlockJob
    from kvik.vmm.blk.overlay import Overlays
    from kvik.vmm.virtio.blk import Blk

__all__ = ["BlockJobs"]


class BlockJobs:
    """Of one disk. `backups`: in kvik-blk, which makes them. `emit` tells events; `locking`: whether its images are
    locked."""

    def __init__(
        self,
        device: Blk,
        overlays: Overlays,
        backups: Backups | None,
        emit: Callable[[str, dict[str, Any]], object],
        *,
        locking: bool = True,
        log: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._locking, self._log = locking, log
        self._device, self._overlays, self._backups, self._emit = device, overlays, backups, emit
        self.job: BlockJob | None = None

    def chain(self) -> list[dict[str, int]]:
        """Which files the guest's disk is made of, from the one that it writes to down."""
        with self._device.lock:
            image = self._device.image
            fds = [one.fd for one in image.image.chain()] if isinstance(image, FormatImage) else [image.fd]
            return [dict(zip(("device", "inode"), identity(fd), strict=True)) for fd in fds]

    def report(self) -> list[dict[str, Any]]:
        return [self.job.report()] if self.job is not None else []

    def pull(self, job: str, base: int, backing: str | None, speed: int) -> None:
        """`base`: the place from the top down of the image that stays below; 0: none does. Raises `KvikError`."""
        with self._device.lock:
            self._pull(job, base, backing, speed)

    def _pull(self, job: str, base: int, backing: str | None, speed: int) -> None:
        from kvik.vmm.blk.pull import Pull

        device = self._device
        image, top = self._idle()
        chain = top.chain()
        if len(chain) < 2 or not 0 <= base < len(chain) or (backing is None) != (not base):
            raise InvalidArgument(f"disk {device.name} has {len(chain)} images, of which {base} cannot stay below")
        if top.snapshots:
            raise OperationInvalid(
                f"disk {device.name}: snapshots inside {image.name} read from the images below it",
                remedy=f"delete them first, while the machine is off: kvik img snapshot -d NAME {image.name}",
            )
        below = chain[base] if base else None
        self.job = Pull(job, device, image, top, base=below, name=backing, speed=speed, ended=self._concluded)

    def commit(self, job: str, place: int, base: int, *, fds: tuple[int, int], backing: str, speed: int) -> None:
        """The images from `place` on into image `base`. Takes over `fds`, both for writing: of that, and of the image
        above `place`, which is -1 where it is the one on top. Raises `KvikError`, OSError."""
        with self._device.lock:
            self._commit(job, place, base, fds=fds, backing=backing, speed=speed)

    def _commit(self, job: str, place: int, base: int, *, fds: tuple[int, int], backing: str, speed: int) -> None:
        from kvik.vmm.blk.commit import Commit

        device = self._device
        try:
            image, top = self._idle()
            chain = top.chain()
            if not 0 < place < base < len(chain) or (fds[1] < 0) != (place == 1):
                raise InvalidArgument(f"disk {device.name} has {len(chain)} images: {place} cannot go into {base}")
            _check_no_snapshots(device.name, chain[place:base])
        except BaseException:
            for fd in {*fds} - {-1}:
                os.close(fd)
            raise
        self.job = Commit(
            job,
            device,
            image,
            top,
            above=chain[place - 1],
            count=base - place,
            fds=fds,
            name=backing,
            locking=self._locking,
            speed=speed,
            ended=self._concluded,
        )

    def commit_top(self, job: str, base: int, *, fds: tuple[int, int], node: str, speed: int) -> None:
        """The image on top, and those below it, into image `base`, to which the guest changes over when the job is told
        to complete. Takes over `fds`: see `ActiveCommit`. Raises `KvikError`, OSError."""
        with self._device.lock:
            self._commit_top(job, base, fds, node, speed)

    def _commit_top(self, job: str, base: int, fds: tuple[int, int], node: str, speed: int) -> None:
        from kvik.vmm.blk.active_commit import ActiveCommit

        device = self._device
        try:
            image, top = self._idle()
            chain = top.chain()
            if not 0 < base < len(chain) or (fds[1] >= 0) != image.direct:
                raise InvalidArgument(f"disk {device.name} has {len(chain)} images: the first cannot go into {base}")
            _check_no_snapshots(device.name, chain[:base])
            self._settle()
        except BaseException:
            for fd in {*fds} - {-1}:
                os.close(fd)
            raise
        self.job = ActiveCommit(
            job,
            device,
            image,
            top,
            count=base,
            fds=fds,
            node=node,
            overlays=self._overlays,
            locking=self._locking,
            speed=speed,
            ended=self._concluded,
            log=self._log,
        )

    def copy(
        self,
        job: str,
        images: list[tuple[int, str]],
        *,
        data: int,
        shallow: bool,
        shared: bool,
        blank: bool,
        node: str,
        speed: int,
        granularity: int,
        room: int,
    ) -> None:
        """The disk into the first of `images`, (descriptor, format), which rests on the others. Takes over the
        descriptors: see `Copy`. Raises `KvikError`, OSError."""
        from kvik.vmm.blk.block_copy import Copy, open_copy

        device = self._device
        try:
            self._check_idle()
            if (data >= 0) != device.image.direct or (shared and len(images) > 1):
                raise InvalidArgument(
                    f"disk {device.name}: cache={device.image.cache} and the descriptors do not agree"
                )
        except BaseException:
            for fd in {*(fd for fd, _ in images), data} - {-1}:
                os.close(fd)
            raise
        inner: Image | None = getattr(device.image, "image", None)
        below = inner.backing if shared and inner is not None else None
        try:
            target = open_copy(images, below, locking=self._locking)
        except BaseException:
            if data >= 0:
                os.close(data)
            raise
        with device.lock:
            try:
                self._settle()
                image = formatted(device, self._log)
            except BaseException:
                target.release()
                if data >= 0:
                    os.close(data)
                raise
            try:
                self.job = Copy(
                    job,
                    device,
                    image,
                    target,
                    data=data,
                    shallow=shallow,
                    shared=below is not None,
                    blank=blank,
                    node=node,
                    overlays=self._overlays,
                    speed=speed,
                    granularity=granularity,
                    room=room,
                    ended=self._concluded,
                    log=self._log,
                )
            except BaseException:
                plain_again(device)
                raise

    def carry(self, images: list[int]) -> None:
        """What the bitmaps of these images mark is marked in the copy that is being made, once the guest goes there.
        Raises `OperationInvalid` where none is, and for one that keeps no bitmaps."""
        carry = getattr(self.job, "carry", None)
        if carry is None:
            raise OperationInvalid(f"disk {self._device.name} is not being copied")
        carry(images)

    def complete(self, job: str) -> None:
        """One that is ready changes over. Raises `OperationInvalid` for any other."""
        complete = getattr(self.job, "complete", None)
        if self.job is None or self.job.job != job or complete is None or not complete():
            raise OperationInvalid(f"disk {self._device.name}: block job {job} is not ready to change over")

    def _idle(self) -> tuple[FormatImage, Qcow2Writer]:
        """The disk's image and what is in it, when nobody else works on it. Raises `OperationInvalid`."""
        self._check_idle()
        image = self._device.image
        if not isinstance(image, FormatImage) or not isinstance(image.image, Qcow2Writer):
            raise OperationInvalid(f"disk {self._device.name}: {image.name} is no qcow2 image that is written to")
        return image, image.image

    def _settle(self) -> None:
        """What is in flight would be written unmarked."""
        if not self._device.image.drain(SETTLES):
            raise OperationTimeout(f"disk {self._device.name}: the host's storage does not answer")
        self._device._publish()

    def _check_idle(self) -> None:
        """That nobody else works on the disk. Raises `OperationInvalid`."""
        device = self._device
        if self.job is not None:
            raise OperationInvalid(f"disk {device.name} has a block job under way: {self.job.job}")
        if self._backups is not None and self._backups.backup is not None:
            raise OperationInvalid(f"disk {device.name} has a backup under way", remedy="wait for its end")
        if self._overlays.report()["state"] == "added":
            raise OperationInvalid(f"disk {device.name}: an image waits to be put on top of it")
        if device.image.read_only:
            raise OperationInvalid(f"disk {device.name} is read-only")
        self._overlays.keep()

    def _concluded(self) -> None:
        job = self.job
        if job is not None:
            self._emit("JOB_STATUS_CHANGE", {"id": job.job, "status": job.state})

    # One that is not known is left as it is

    def set_speed(self, job: str, speed: int) -> None:
        if self.job is not None and self.job.job == job:
            self.job.set_speed(speed)

    def cancel(self, job: str, *, force: bool = True) -> None:
        """Without `force` a copy that is ready ends as one that is whole."""
        if self.job is not None and self.job.job == job:
            complete = getattr(self.job, "complete", None)
            if not force and complete is not None and complete(apart=True):
                return
            with self._device.lock:
                self.job.cancel()

    def dismiss(self, job: str) -> None:
        """Raises `OperationInvalid` for one that is not over."""
        if self.job is not None and self.job.job == job:
            if self.job.state != "concluded":
                raise OperationInvalid(f"disk {self._device.name}: block job {job} is not over")
            self.job = None
            with self._device.lock:
                plain_again(self._device)

    def close(self) -> None:
        """The disk ends, and a job that is under way with it."""
        if self.job is not None:
            self.cancel(self.job.job)


def _check_no_snapshots(name: str, images: list[Image]) -> None:
    for image in images:
        if getattr(image, "snapshots", ()):
            raise OperationInvalid(
                f"disk {name}: there are snapshots inside {image.path}",
                remedy=f"delete them first, while the machine is off: kvik img snapshot -d NAME {image.path}",
            )
