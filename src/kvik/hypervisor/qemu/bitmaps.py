"""Dirty bitmaps of a running machine's images: what changed since a checkpoint.

Each image of a chain has bitmaps of its own. One that is persistent and recording goes on in the image that is put on
top, under the same name; together, from the top down, they tell what changed. QEMU loads them with an image and writes
them into it when it lets go of it, or opens it for reading only; after a crash they are marked inconsistent.

Reference: QEMU's docs/interop/bitmaps.rst and qapi/block-core.json (BlockDirtyInfo).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import Disk
from kvik.errors import KvikError, MonitorError
from kvik.hypervisor.driver import Bitmap
from kvik.hypervisor.layers import layers
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.qemu.argv import disks
from kvik.hypervisor.qemu.argv.options import Files, Props, node_name
from kvik.hypervisor.qemu.hotplug import node_key

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = ["add", "bitmaps_of", "by_node", "carry", "count", "inherited", "merge_actions", "remove"]

_DEADLINE = 30.0
_COUNTED = "kvik-counted"  # a bitmap that exists while something is counted


def _node(disk: Disk, image: int) -> str:
    return node_name(alias_of(disk), image, "format")


def _top(disk: Disk) -> int:
    return disk.source.index or 0 if disk.source is not None else 0


def _bitmap(item: dict[str, Any]) -> Bitmap:
    granularity, dirty = item.get("granularity"), item.get("count")
    return Bitmap(
        granularity=granularity if isinstance(granularity, int) else 0,
        count=dirty if isinstance(dirty, int) else 0,
        recording=item.get("recording") is True,
        persistent=item.get("persistent") is True,
        inconsistent=item.get("inconsistent") is True,
    )


async def _nodes(machine: QemuMachine) -> list[dict[str, Any]]:
    reply = await machine.execute("query-named-block-nodes", {"flat": True})
    return [item for item in reply if isinstance(item, dict)] if isinstance(reply, list) else []


def _bitmaps_in(item: dict[str, Any]) -> dict[str, Bitmap]:
    known = item.get("dirty-bitmaps")
    return {
        entry["name"]: _bitmap(entry)
        for entry in (known if isinstance(known, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }


async def by_node(machine: QemuMachine) -> dict[str, dict[str, Bitmap]]:
    """All there are, by the nodes that have any, and their names."""
    return {str(item.get("node-name")): found for item in await _nodes(machine) if (found := _bitmaps_in(item))}


async def bitmaps_of(machine: QemuMachine, disk: Disk) -> dict[int, dict[str, Bitmap]]:
    """Those of every image of the disk, and of a copy of it, by the image's number and their names."""
    alias = alias_of(disk)
    found: dict[int, dict[str, Bitmap]] = {}
    for item in await _nodes(machine):
        name = item.get("node-name")
        key = node_key(alias, name)
        if key is None or not str(name).endswith("-format"):
            continue
        found[key] = _bitmaps_in(item)
    return found


def add_action(node: str, name: str, **options: Any) -> Props:
    return {"type": "block-dirty-bitmap-add", "data": {"node": node, "name": name, **options}}


def merge_actions(disk: Disk, into: str, name: str, sources: Iterable[tuple[int, str]]) -> Props:
    """Bitmap `name` of node `into` gets what is marked in others of the disk (image's number, name)."""
    merged = [{"node": _node(disk, image), "name": source} for image, source in sources]
    return {"type": "block-dirty-bitmap-merge", "data": {"node": into, "target": name, "bitmaps": merged}}


async def transaction(machine: QemuMachine, actions: Sequence[Props]) -> None:
    if actions:
        await machine.execute("transaction", {"actions": list(actions)}, deadline=_DEADLINE)


async def add(machine: QemuMachine, new: Sequence[tuple[Disk, str]]) -> None:
    """A persistent bitmap on the top image of each disk, from one moment on: all or none. Raises `MonitorError`."""
    await transaction(machine, [add_action(_node(disk, _top(disk)), name, persistent=True) for disk, name in new])


async def remove(machine: QemuMachine, disk: Disk, name: str) -> None:
    """From every image of the disk that has it. Raises `MonitorError`, `HostError`."""
    known = await bitmaps_of(machine, disk)
    images = [layer.key for layer in layers(disk) if name in known.get(layer.key, {})]
    async with _writable(machine, disk, [image for image in images if image != _top(disk)]):
        for image in images:
            await machine.execute(
                "block-dirty-bitmap-remove", {"node": _node(disk, image), "name": name}, deadline=_DEADLINE
            )


async def count(machine: QemuMachine, disk: Disk, sources: Sequence[tuple[int, str]]) -> int:
    """How many bytes are marked in any of these bitmaps of the disk."""
    node = _node(disk, _top(disk))
    with contextlib.suppress(MonitorError):  # one that a daemon before us could not take away
        await machine.execute("block-dirty-bitmap-remove", {"node": node, "name": _COUNTED})
    await transaction(
        machine, [add_action(node, _COUNTED, disabled=True), merge_actions(disk, node, _COUNTED, sources)]
    )
    try:
        known = await bitmaps_of(machine, disk)
        return known[_top(disk)][_COUNTED].count
    finally:
        await machine.execute("block-dirty-bitmap-remove", {"node": node, "name": _COUNTED})


def inherited(known: dict[str, Bitmap], node: str) -> list[Props]:
    """What makes the bitmaps of an image go on in the one that is put on top of it, which is `node`."""
    return [
        add_action(node, name, persistent=True, granularity=bitmap.granularity)
        for name, bitmap in known.items()
        if bitmap.usable
    ]


async def carry(
    machine: QemuMachine, disk: Disk, images: Collection[int], into: int, *, new: bool, written: bool = False
) -> None:
    """What the bitmaps of `images` tell is told by those of image `into` too, which is about to get their data.

    `new`: names that it does not have are added (else only those it has are merged). `written`: a job writes to it now.
    """
    known = await bitmaps_of(machine, disk)
    if into not in known:
        return
    node = _node(disk, into)
    below = {layer.key for layer in layers(disk) if layer.number}
    sources: dict[str, list[int]] = {}
    for image in images:
        for name, bitmap in known.get(image, {}).items():
            if bitmap.persistent and not bitmap.inconsistent:
                sources.setdefault(name, []).append(image)
    actions = []
    for name, found in sources.items():
        if name not in known[into]:
            if not new:
                continue
            granularity = min(known[image][name].granularity for image in found)
            actions.append(add_action(node, name, persistent=True, granularity=granularity))
        elif known[into][name].inconsistent:
            continue
        actions.append(merge_actions(disk, node, name, [(image, name) for image in found]))
    if not actions:
        return
    async with _writable(machine, disk, [into] if into in below and not written else []):
        await transaction(machine, actions)


@contextlib.asynccontextmanager
async def _writable(machine: QemuMachine, disk: Disk, images: Sequence[int]) -> AsyncIterator[None]:
    """Images below the top are open for reading; for the block they can be written to, and bitmaps in them change."""
    jobs = machine.disk_jobs
    opened: list[tuple[int, int]] = []
    again: list[Props] = []
    paths = {layer.key: layer.source.location for layer in layers(disk) if layer.type in ("file", "block")}
    try:
        for image in images:
            path = paths.get(image)
            if path is None:
                continue
            opened.append(await jobs.add_writable(alias_of(disk), image, path))
            node = _format_node(disk, image)
            await machine.execute("blockdev-reopen", {"options": [node | {"read-only": False}]}, deadline=_DEADLINE)
            again.append(node | {"read-only": True})
        yield
    finally:
        for node in reversed(again):  # which writes the bitmaps into the image
            with contextlib.suppress(KvikError):
                await machine.execute("blockdev-reopen", {"options": [node]}, deadline=_DEADLINE)
        for fdset, fd in opened:
            with contextlib.suppress(KvikError):
                await machine.execute("remove-fd", {"fdset-id": fdset, "fd": fd})


def _format_node(disk: Disk, image: int) -> Props:
    """The options it was opened with: reopening takes what is left out for QEMU's defaults."""
    wanted = _node(disk, image)
    return next(node for node in disks.block_nodes(Files(), disk) if node["node-name"] == wanted)
