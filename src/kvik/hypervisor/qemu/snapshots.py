"""New images on top of a running machine's disks, all in one step.

Each new image is passed open, added as a node of its own without anything below it, and then put on top of what the
disk writes to by one `transaction`: QEMU holds the disks' requests back, changes all of them over or none, and goes on.
The guest's processors are not stopped. Reference: QEMU's qapi/block-core.json (blockdev-snapshot) and
qapi/transaction.json.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import Disk
from kvik.errors import ConfigError, HostError, MonitorError
from kvik.hypervisor.descriptors import Opened
from kvik.hypervisor.names import alias_of, image_name
from kvik.hypervisor.qemu import bitmaps, host_io
from kvik.hypervisor.qemu.argv import disks
from kvik.hypervisor.qemu.argv.options import Files, Props, node_name
from kvik.hypervisor.qemu.block_jobs import conclude, dismiss_job, list_jobs, run_job
from kvik.hypervisor.qemu.hotplug import Undo, add_fd, lend
from kvik.hypervisor.secrets import needs

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = ["clear_snapshot", "inside", "put_on_top", "stands"]

_JOB = "kvik-"
_DEADLINE = 30.0  # seconds: the disks' requests are waited for first


def _index(disk: Disk) -> int:
    if disk.source is None or disk.source.index is None:
        raise ConfigError(f"the new image of disk {disk.target.dev} has no number")
    return disk.source.index


def _opaque(disk: Disk) -> str:
    """What QEMU remembers of the passed file: goes with the disk's others, and is no other's."""
    return image_name(alias_of(disk), 0).removesuffix("0") + f"snapshot-{_index(disk)}"


def _image_node(disk: Disk) -> str:
    return node_name(alias_of(disk), _index(disk), "format")


async def put_on_top(
    machine: QemuMachine, new: Sequence[Disk], old: Mapping[str, Disk], secrets: Mapping[str, int]
) -> int:
    """`new`: disks as they are to be, `old`: as they are, by alias; `secrets`: descriptors of what new images need.
    How long their requests were held back at most, in microseconds. Raises `HostError`, `MonitorError`; then nothing
    has changed; `OperationTimeout`: `stands` tells.
    """
    undone = Undo(machine)
    try:
        with ExitStack() as close, ExitStack() as undo:
            opened = Opened(close, undo, secrets)
            actions = []
            for disk in new:
                await _add_image(machine, disk, opened, undone)
                before = old[alias_of(disk)].source
                below = node_name(alias_of(disk), (before.index if before else None) or 0, "format")
                data = {"node": below, "overlay": _image_node(disk)}
                known = await bitmaps.bitmaps_of(machine, old[alias_of(disk)])
                marked = machine.stored_bitmaps.get(below, {}) | known.get((before.index if before else None) or 0, {})
                actions += bitmaps.inherited(marked, _image_node(disk))
                actions.append({"type": "blockdev-snapshot", "data": data})
        began = time.monotonic()
        await machine.execute("transaction", {"actions": actions}, deadline=_DEADLINE)
        return int((time.monotonic() - began) * 1e6)
    except (MonitorError, HostError):  # anything else may come after it was done: its nodes must not be taken away
        await undone.run()
        raise


async def _add_image(machine: QemuMachine, disk: Disk, opened: Opened, undone: Undo) -> None:
    alias, index = alias_of(disk), _index(disk)
    assert disk.source is not None and disk.source.file
    name = _opaque(disk)
    await opened.beside(_open_image, name, disk.source.file)
    fd = opened.fds[name]
    path = await add_fd(machine, fd, name)
    undone.add("remove-fd", fdset_id=int(path.rsplit("/", 1)[-1]))
    await _add_secret(machine, disk, opened, undone)
    storage, image = node_name(alias, index, "storage"), _image_node(disk)
    top = image_name(alias, 0)
    files = host_io.files(machine.capabilities, {top: fd}, {top: path})
    for node in disks.block_nodes(files, disk):
        if node["node-name"] not in (storage, image):
            continue  # what lies below is there already
        if node["node-name"] == image:
            node["backing"] = None
        await machine.execute("blockdev-add", _with_backing(node), deadline=_DEADLINE)
        undone.add("blockdev-del", node_name=node["node-name"])


def _open_image(opened: Opened, name: str, path: str) -> None:
    opened.open(name, path, os.O_RDWR | os.O_NOFOLLOW)


async def _add_secret(machine: QemuMachine, disk: Disk, opened: Opened, undone: Undo) -> None:
    """The passphrase of the new image, if it has one: those of images below are there."""
    for need in needs(disk):
        if need.file not in opened.fds or need.id != f"{alias_of(disk)}-{_index(disk)}-luks":
            continue
        fdset, path = await lend(machine, opened.fds[need.file], need.file)
        try:
            files = Files(opened.fds, {need.file: path})
            (item,) = (item for item in disks.secret_objects(files, disk) if item["id"] == need.id)
            await machine.execute("object-add", item, deadline=_DEADLINE)
            undone.add("object-del", id=need.id)
        finally:
            await machine.execute("remove-fd", {"fdset-id": fdset})


def _with_backing(node: Props) -> Props:
    return {key: value for key, value in node.items() if value is not None or key == "backing"}


async def stands(machine: QemuMachine, new: Sequence[Disk]) -> bool:
    """Whether the machine writes to these images. Raises `HypervisorError` where it does not say."""
    reply: Any = await machine.execute("query-blockstats")
    used = set()
    waiting = reply if isinstance(reply, list) else []
    while waiting:  # a device's own node, and those below it
        item = waiting.pop()
        if isinstance(item, dict):
            used.add(item.get("node-name"))
            waiting += [item.get("parent"), item.get("backing")]
    return all(_image_node(disk) in used for disk in new)


async def clear_snapshot(machine: QemuMachine, new: Sequence[Disk]) -> None:
    """Take away what was added for images that were not put on top."""
    undone = Undo(machine)
    sets: Any = await machine.execute("query-fdsets")
    for disk in new:
        alias, index = alias_of(disk), _index(disk)
        for item in sets if isinstance(sets, list) else []:
            if any(entry.get("opaque") == _opaque(disk) for entry in item.get("fds", [])):
                undone.add("remove-fd", fdset_id=item["fdset-id"])
        if disk.source is not None and disk.source.encryption is not None:
            undone.add("object-del", id=f"{alias}-{index}-luks")
        for kind in ("storage", "format"):
            undone.add("blockdev-del", node_name=node_name(alias, index, kind))
    await undone.run()


async def inside(machine: QemuMachine, command: str, tag: str, disks: Sequence[Disk]) -> None:
    """`snapshot-save`, `snapshot-load` or `snapshot-delete` (qapi/migration.json, since QEMU 6.0): the memory is in the
    first disk's image. QEMU answers nothing else until it is done. Raises `MonitorError`, `OperationFailed`."""
    nodes = [_image_node(disk) for disk in disks]
    for job in (await list_jobs(machine)).values():
        if job.id.startswith(_JOB):  # a daemon before us had asked for it
            await conclude(machine, job.id)
            await dismiss_job(machine, job.id)
    arguments = {"tag": tag, "devices": nodes}
    if command != "snapshot-delete":
        arguments["vmstate"] = nodes[0]
    await run_job(machine, f"{_JOB}{command}", command, arguments)
