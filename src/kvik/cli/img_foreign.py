"""kvik img: images of other programs' formats, which a confined qemu-img reads for us.

What it makes of one is a raw image in a file without a name, and that is what is looked at and copied from. It can open
nothing but the image itself: what the image refers to (extents, parents) is not found, and that is an error.
"""

from __future__ import annotations

import os

from kvik.errors import ImageError, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.host.tools import Completed
    from kvik.image.base import Image

__all__ = ["Foreign", "info"]

LARGEST = 64 << 40  # bytes of a disk
TEMPORARY = "/var/tmp"  # as big as disks may be, where /tmp may be memory


class Foreign:
    """Opens such images, as `Opener` asks for them. `directory` is where the raw image may be; `member` names the disk
    of an OVA that has several."""

    def __init__(self, directory: str = "", member: str | None = None) -> None:
        self.directory = directory or os.environ.get("TMPDIR") or TEMPORARY
        self.member = member
        self.used = False

    def __call__(self, fd: int, path: str, format: str) -> Image:
        """`fd` becomes the image's."""
        from kvik.image.raw import RawImage

        self.used = True
        words = self._words(fd, path, format)
        facts = _facts(_qemu_img(fd, path, ["info", "--output=json", *words]), path)
        size = facts.get("virtual-size")
        if type(size) is not int or not 0 <= size <= LARGEST:
            raise ImageError(f"its size is out of bounds: {size!r}", file=path)
        copy = _nameless(self.directory)
        try:
            os.ftruncate(copy, size)
            target = ["--target-is-zero", "-n", "-O", "raw", *words, f"/proc/self/fd/{copy}"]
            _qemu_img(fd, path, ["convert", *target], copy, size)
            if os.fstat(copy).st_size != size:
                raise ImageError("qemu-img did not make of it what it said", file=path)
            image = RawImage(copy, path)
        except BaseException:
            os.close(copy)
            raise
        os.close(fd)
        return image

    def _words(self, fd: int, path: str, format: str) -> list[str]:
        """How qemu-img is told of the file."""
        if format != "ova":
            return ["-f", format, f"/proc/self/fd/{fd}"]
        from kvik.image.opening import probe_format
        from kvik.image.ova import disks

        found = disks(fd, path)
        if self.member is not None:
            found = [one for one in found if one.name == self.member]
        if len(found) != 1:
            names = ", ".join(one.name for one in disks(fd, path)) or "none"
            raise InvalidArgument(
                f"{path} has not one disk, or not the one wanted: it has {names}", remedy="choose one with -l NAME"
            )
        disk = found[0]
        inner = probe_format(fd, disk.offset, disk.size)
        if inner not in ("vmdk", "vdi", "vpc", "vhdx", "raw"):
            raise ImageError(f"its disk {disk.name} is of format {inner}, which is not read here", file=path)
        place = f"file.driver=raw,file.offset={disk.offset},file.size={disk.size}"
        return [
            "--image-opts",
            f"driver={inner},{place},file.file.driver=file,file.file.filename=/proc/self/fd/{fd}",
        ]


def info(fd: int, path: str, format: str, *, as_json: bool, member: str | None) -> str | dict[str, Any]:
    """What qemu-img tells of an image: its text, or its facts, with the image's own name."""
    words = Foreign(member=member)._words(fd, path, format)
    if not as_json:
        done = _qemu_img(fd, path, ["info", *words])
        return done.out.decode("utf-8", "replace").replace(f"/proc/self/fd/{fd}", path)
    facts = _facts(_qemu_img(fd, path, ["info", "--output=json", *words]), path)
    renamed = _renamed(facts, f"/proc/self/fd/{fd}", path)
    assert isinstance(renamed, dict)
    return renamed


def _renamed(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {name: _renamed(one, old, new) for name, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, old, new) for one in value]
    return value.replace(old, new) if isinstance(value, str) else value


def _facts(done: Completed, path: str) -> dict[str, Any]:
    import json

    try:
        facts = json.loads(done.out)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise ImageError("qemu-img's answer about it makes no sense", file=path)
    return facts


def _qemu_img(fd: int, path: str, words: list[str], copy: int = -1, size: int = 0) -> Completed:
    from kvik.host.jail import run_qemu_img

    done = run_qemu_img(
        words,
        readable=[fd],
        writable=[copy] if copy >= 0 else [],
        seconds=60 + (size >> 24),  # 16 MiB a second at the least
        size=size,
    )
    if done.code:
        what = done.message.replace(f"/proc/self/fd/{fd}", path).replace("qemu-img: ", "")
        raise ImageError(
            f"qemu-img, which reads it confined, failed: {what or f'it ended with {done.code}'}",
            file=path,
            remedy="only images in a single file are read: what they refer to is not opened",
        )
    return done


def _nameless(directory: str) -> int:
    """A file without a name: it is gone when it is closed."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        from tempfile import mkstemp

        fd, name = mkstemp(dir=directory)
        os.unlink(name)  # noqa: PTH108
        return fd
