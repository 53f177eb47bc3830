"""Internal snapshots made, applied and deleted; each happens as a whole or not at all (`switch.py`).

What QEMU put into a snapshot stays as it is: the state of the machine, which lies in the snapshot's own tables behind
the disk's end, its clock, and its instruction count. Reference: QEMU's docs/interop/qcow2.rst, "Snapshots".
"""

from __future__ import annotations

from kvik.errors import OperationUnsupported
from kvik.image.qcow2.header import MAX_SNAPSHOTS
from kvik.image.qcow2.snapshots import Snapshot, find
from kvik.image.qcow2.switch import Switch
from kvik.image.qcow2.tables import read_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.image.qcow2.writer import Qcow2Writer

__all__ = ["apply_snapshot", "create_snapshot", "delete_snapshot"]


def create_snapshot(image: Qcow2Writer, name: str, *, date_nsec: int | None = None) -> Snapshot:
    """The disk as it is now under `name` (which need not be the only one of this name); its id is the next number.

    `date_nsec` is the time since the epoch, by default now. Raises `ImageError`; then nothing changed.
    """
    import time

    if image.has_data_file:
        raise OperationUnsupported(
            f"{image.path} has an external data file: it cannot have internal snapshots",
            remedy="use an overlay instead: kvik img create -f qcow2 -b IMAGE -F qcow2 NEW",
        )
    if len(name.encode(errors="surrogateescape")) > 255:
        raise image.fault("the snapshot's name is longer than 255 bytes")
    if len(image.snapshots) >= MAX_SNAPSHOTS:
        raise image.fault(f"has {MAX_SNAPSHOTS} snapshots already, which is the most", remedy="delete some")
    numbers = [int(one.id) for one in image.snapshots if one.id.isascii() and one.id.isdigit()]
    now = time.time_ns() if date_nsec is None else date_nsec
    with Switch(image, image.l1) as change:
        change.count(image.l1, 1)
        snapshot = Snapshot(
            str(max(numbers, default=0) + 1),
            name,
            # The table until now becomes the snapshot's; the disk goes on with a copy.
            l1_offset=image.header.l1_offset,
            l1_size=image.header.l1_size,
            date_sec=now // 1_000_000_000,
            date_nsec=now % 1_000_000_000,
            disk_size=image.size,
        )
        change.commit(image.l1, [*image.snapshots, snapshot], keep_l1=True)
    return snapshot


def apply_snapshot(image: Qcow2Writer, key: str) -> Snapshot:
    """The disk becomes what it was in a snapshot (by id, else by name), which stays. What it was until now is gone.

    Raises `NoSnapshot`, `ImageError`; then nothing changed.
    """
    snapshot = find(image.snapshots, key, image.path)
    if image.bitmaps:
        raise image.fault(
            "has bitmaps, which would not know what changed",
            remedy=f"remove them first: kvik img bitmap --remove {image.path} {image.bitmaps[0].name}",
        )
    size = image.size if snapshot.disk_size is None else snapshot.disk_size
    l1 = read_table(image.fd, image.path, snapshot.l1_offset, snapshot.l1_size, "snapshot's L1 table")
    needed = image.header.l1_needed(size)
    if len(l1) < needed:
        l1.frombytes(bytes((needed - len(l1)) * 8))
    with Switch(image, l1) as change:
        change.count(image.l1, -1)  # first, so that narrow refcounts have room
        change.count(l1, 1)
        change.commit(l1, image.snapshots, size=size)
    return snapshot


def delete_snapshot(image: Qcow2Writer, snapshot: Snapshot) -> None:
    """A snapshot of `image.snapshots` goes, and the room that nothing else needs. `ImageError`: nothing changed."""
    l1 = read_table(image.fd, image.path, snapshot.l1_offset, snapshot.l1_size, "snapshot's L1 table")
    with Switch(image, image.l1) as change:
        change.count(l1, -1)
        change.free(snapshot.l1_offset, snapshot.l1_size * 8)
        change.commit(image.l1, [one for one in image.snapshots if one is not snapshot])
