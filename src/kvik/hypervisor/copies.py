"""The images that a copy of a running machine's disk goes to, in its document before the VMM hears of them."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack

from kvik.conf.devices.disk import BackingStore, Disk, Mirror
from kvik.hypervisor.descriptors import Opened, open_disk
from kvik.hypervisor.layers import as_disk

__all__ = ["number_copy"]


async def number_copy(disk: Disk, mirror: Mirror, index: int, *, fresh: bool, bases: Collection[str]) -> None:
    """The images of a copy that is about to begin get their numbers, from `index` on, those below it their place in
    the document: whoever looks after a machine must know what to look for before the VMM is asked. `fresh`: the copy
    is not there yet. Raises `KvikError` for images that cannot be opened."""
    target = as_disk(disk, mirror)
    if fresh:
        assert target.source is not None
        target.source.index, target.backing_store = index, BackingStore()
    else:
        with ExitStack() as close, ExitStack() as undo:
            opened = Opened(close, undo, {}, bases)
            opened.next_index = index
            await opened.beside(open_disk, target)
    mirror.source, mirror.backing_store = target.source, target.backing_store
