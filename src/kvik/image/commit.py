"""Commit: what layers of a chain hold is written into the image below them, as `qemu-img commit` does it.

Nothing is taken from the upper layers before everything is on disk below, so that power lost at any moment loses
nothing: the same commit can be made again.
"""

from __future__ import annotations

from kvik.errors import ImageError
from kvik.image.base import HOLE, Image
from kvik.image.layers import CHUNK, identity, own_parts
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.image.qcow2.writer import Qcow2Writer
from kvik.image.resize import resize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.image.layers import Progress

__all__ = ["commit", "empty"]


def commit(top: Image, base: Image, *, layers: int = 1, progress: Progress | None = None) -> None:
    """Write what the upper `layers` images of `top`'s chain hold into `base`, which is open for writing and grows to
    `top`'s size if it is smaller; afterwards it is flushed. Both upper and lower image then read alike, as far as
    `top` goes.

    The upper layers are not changed: `empty` gives their room back. `base` may be the image in `top`'s own chain, or
    the same file opened apart from it. Raises `ImageError`, `OSError`; also where an internal snapshot of an upper
    layer needs what `base` has now.
    """
    chain = top.chain()
    if layers < 1 or layers > len(chain):
        raise ImageError(f"has no {layers} layers to commit", file=top.path)
    if identity(base) in [identity(layer) for layer in chain[:layers]]:
        raise ImageError("an image cannot be committed into itself", file=base.path)
    for layer in chain[:layers]:
        _spare_snapshots(layer, top, layers)
    if top.size > base.size:
        resize(base, (top.size + 511) & -512)
    buffer = bytearray(CHUNK)
    for start, length, zero in own_parts(top, layers, 0, top.size):
        if zero:
            base.write_zeroes(start, length)
        for at in range(start, start + length, CHUNK) if not zero else ():
            part = memoryview(buffer)[: min(CHUNK, start + length - at)]
            top.read_into(at, part)
            base.write(at, part)
        if progress is not None:
            progress(start + length, top.size)
    base.finish()
    base.flush()
    if progress is not None:
        progress(top.size, top.size)


def _spare_snapshots(layer: Image, top: Image, layers: int) -> None:
    """An internal snapshot has holes of its own: what it reads there would change with the image below."""
    if not isinstance(layer, Qcow2Reader) or not layer.snapshots:
        return
    for snapshot, view in layer.snapshot_views():
        for start, length, _ in own_parts(top, layers, 0, min(top.size, view.size)):
            for kind, at, _, _ in view.runs(start, length):
                if kind == HOLE:
                    raise ImageError(
                        f"its snapshot '{snapshot.name}' reads disk offset {at:#x} from the image below, which the "
                        "commit would change",
                        file=layer.path,
                        remedy=f"delete the snapshot first: kvik img snapshot -d {snapshot.id} {layer.path}",
                    )


def empty(image: Image) -> None:
    """Every cluster leaves the layer, whose room is given back: it reads as the image below it."""
    if not isinstance(image, Qcow2Writer):
        raise ImageError(f"images of format {image.format} cannot be emptied", file=image.path)
    image.make_empty()
    image.finish()
