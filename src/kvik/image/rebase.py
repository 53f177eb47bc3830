"""Rebase: another backing image under a qcow2 image, as `qemu-img rebase` does it.

Safe: wherever the new chain reads differently, what the old one has is copied up before the header names the new
image, so that the disk stays as it is; every step is on disk before the next. Unsafe: only the header changes.
"""

from __future__ import annotations

from kvik.errors import ImageError, InvalidArgument
from kvik.image.base import HOLE, Image
from kvik.image.layers import CHUNK, differences, identity, own_parts
from kvik.image.opening import Opener, beside, plain_file
from kvik.image.qcow2.reader import SUBCLUSTERS
from kvik.image.qcow2.writer import Qcow2Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvik.image.layers import Part, Progress

__all__ = ["change_backing", "changed", "copy_up", "rebase"]


def rebase(
    path: str,
    backing: str | None,
    backing_format: str | None = None,
    *,
    format: str | None = None,
    safe: bool = True,
    opener: Opener | None = None,
    progress: Progress | None = None,
) -> None:
    """Put the image at `path` on top of `backing`, a name as the header is to state it; None or "": of nothing.

    `format` is the image's own. Without `safe` neither the old nor the new backing image is opened. Raises
    `ImageError`, `InvalidArgument`, `OSError`; then the image reads as before.
    """
    backing = backing or None
    if backing is not None and backing_format is None:
        raise InvalidArgument(
            f"Could not change the backing file to '{backing}': backing format must be specified",
            remedy="state it with -F, such as -F qcow2",
        )
    if backing is None and backing_format is not None:
        raise InvalidArgument("a backing format needs a backing file", remedy="name it with -b")
    opener = opener or Opener()
    with opener.open(path, format, writable=True, chain=safe) as image:
        if not isinstance(image, Qcow2Writer):
            raise ImageError(
                f"images of format {image.format} cannot have a backing file",
                file=path,
                remedy=f"make a qcow2 image on top of it: kvik img create -f qcow2 -b {path} -F {image.format} NEW",
            )
        if not safe or backing is None:
            if safe:
                copy_up(image, None, progress)
            change_backing(image, backing, backing_format)
            return
        with opener.open(
            beside(path, plain_file(backing, "backing file", path)), backing_format, above=(identity(image),)
        ) as new:
            copy_up(image, new, progress)
        change_backing(image, backing, backing_format)


def copy_up(image: Qcow2Writer, new: Image | None, progress: Progress | None = None) -> None:
    """What the chain below `image` has and `new` has not becomes `image`'s own; flushed."""
    _spare_snapshots(image, new)
    image.keep_zeroes = True  # its holes are to read as `new` does
    buffer = bytearray(CHUNK)
    for hole, size in list_holes(image):
        for start, length, zero in changed(image, new, hole, size):
            if zero:
                image.write_zeroes(start, length)
            for at in range(start, start + length, CHUNK) if not zero else ():
                part = memoryview(buffer)[: min(CHUNK, start + length - at)]
                image.read_into(at, part)
                image.write(at, part)
        if progress is not None:
            progress(hole + size, image.size)
    image.flush()
    if progress is not None:
        progress(image.size, image.size)


def list_holes(image: Image) -> Iterator[tuple[int, int]]:
    """(start, length) of what is not in the layer, a piece at a time: writing meanwhile is allowed."""
    at = 0
    while at < image.size:
        size = min(image.size - at, 64 << 20)
        holes = [(start, length) for kind, start, length, _ in image.runs(at, size) if kind == HOLE]
        yield from holes
        at += size


def changed(image: Qcow2Writer, new: Image | None, offset: int, length: int) -> Iterator[Part]:
    """Where a hole of `image` would read differently on top of `new`."""
    old = image.backing
    unit = image.cluster_size // (SUBCLUSTERS if image.extended else 1)
    depth = _depth(old, new)
    if depth is None or old is None:
        yield from differences(old, new, offset, length, unit)
        return
    # The new image is one of the old chain: only the layers between can make a difference.
    inside = max(0, min(length, old.size - offset))
    if depth and inside:
        for start, size, _ in own_parts(old, depth, offset, inside):
            yield from differences(old, new, start, size, unit)
    if inside < length:
        yield from differences(old, new, offset + inside, length - inside, unit)


def _depth(old: Image | None, new: Image | None) -> int | None:
    """How deep in the old chain the new image is."""
    if old is None or new is None:
        return None
    wanted = identity(new)
    for depth, layer in enumerate(old.chain()):
        if identity(layer) == wanted and layer.format == new.format:
            return depth
    return None


def _spare_snapshots(image: Qcow2Writer, new: Image | None) -> None:
    """Internal snapshots have holes of their own: nothing can be copied into them."""
    unit = image.cluster_size
    for snapshot, view in image.snapshot_views():
        for hole, size in list_holes(view):
            for start, _, _ in differences(image.backing, new, hole, size, unit):
                raise image.fault(
                    f"its snapshot '{snapshot.name}' reads disk offset {start:#x} from the old backing file, and would "
                    "read something else",
                    remedy=f"delete the snapshot first (kvik img snapshot -d {snapshot.id} {image.path}), or use -u",
                )


def change_backing(image: Qcow2Writer, backing: str | None, backing_format: str | None) -> None:
    """The header names another backing file; nothing is looked at. `ImageError` if it does not fit."""
    if backing is not None and image.header.autoclear & 2:
        raise image.fault("its external data file is a raw image of its own: it cannot have a backing file")
    header = image.header
    before = header.backing_file, header.backing_format
    header.backing_file, header.backing_format = backing, backing_format
    try:
        header.pack()
    except ImageError:
        header.backing_file, header.backing_format = before
        raise
    image.begin()
    image.flush()
    image.write_header()
    image.flush()
