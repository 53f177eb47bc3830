"""Images of raw format below others, opened anew where a commit of the top is to change over to them.

An image below the top is passed for reading, and its storage node goes over to a descriptor for writing by itself when
a job asks for that (auto-read-only). QEMU locks both descriptors for that moment and closes its duplicate of the one
it leaves; but locks belong to the open file, which the fdset keeps (raw_check_perm in QEMU's block/file-posix.c). For
qcow2, which always keeps other writers out, that is of no account. A raw image is then found locked by somebody else
when the guest's drive takes it at the end of an active commit, and QEMU (7.2) aborts. So such an image gets a storage
node that has one descriptor and keeps it.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import Disk
from kvik.errors import HypervisorError, MonitorError
from kvik.host.reach import open_file
from kvik.hypervisor.layers import Layer, layers
from kvik.hypervisor.names import alias_of, image_name
from kvik.hypervisor.qemu import host_io
from kvik.hypervisor.qemu.argv import disks
from kvik.hypervisor.qemu.argv.options import Files, node_name

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = ["open_anew", "settle"]

_DEADLINE = 30.0


async def open_anew(machine: QemuMachine, disk: Disk, layer: Layer, *, writable: bool) -> None:
    """Another storage node of the same name, by way of a spare one. Raises `HostError`, `MonitorError`."""
    await _exchange(machine, disk, layer, "spare", writable=writable)
    await _exchange(machine, disk, layer, "storage", writable=writable)


async def settle(machine: QemuMachine, disk: Disk) -> None:
    """After a job, whatever became of it: storage nodes have their own names, and those of images below the top are for
    reading again."""
    alias = alias_of(disk)
    known = await _nodes(machine)
    for layer in layers(disk):
        spare = node_name(alias, layer.key, "spare")
        if spare in known:
            with contextlib.suppress(MonitorError):
                await _remove(machine, spare, known[spare])
        if spare in await _nodes(machine):  # in use: a daemon was killed half-way
            await _exchange(machine, disk, layer, "storage", writable=not layer.number)
        elif layer.number and _anew(alias, layer.key) in await _names_of(machine, known, layer, alias):
            await open_anew(machine, disk, layer, writable=False)


async def _exchange(machine: QemuMachine, disk: Disk, layer: Layer, kind: str, *, writable: bool) -> None:
    """The image's format node gets a new storage node, named `kind`, and the one that it had goes."""
    alias, path = alias_of(disk), layer.source.location or ""
    before = await _nodes(machine)
    name, other = (node_name(alias, layer.key, which) for which in (kind, "storage" if kind == "spare" else "spare"))
    if name in before:  # left behind by a daemon that was killed before it was used
        await _remove(machine, name, before[name])
    own = image_name(alias, layer.number)
    opaque = _anew(alias, layer.key) if writable else own
    fdset, files = await _pass(machine, path, own, opaque, writable=writable)
    added = False
    try:
        nodes = disks.block_nodes(files, disk)
        storage, image = (
            next(node for node in nodes if node["node-name"] == node_name(alias, layer.key, which))
            for which in ("storage", "format")
        )
        storage |= {"node-name": name}
        if writable:
            storage.pop("auto-read-only", None)
            storage["read-only"] = False
        await machine.execute("blockdev-add", storage, deadline=_DEADLINE)
        added = True
        await machine.execute("blockdev-reopen", {"options": [image | {"file": name}]}, deadline=_DEADLINE)
    except BaseException:
        for command, arguments in ((("blockdev-del", {"node-name": name}),) if added else ()) + (
            ("remove-fd", {"fdset-id": fdset}),
        ):
            with contextlib.suppress(HypervisorError):
                await machine.execute(command, arguments)
        raise
    if other in before:
        await _remove(machine, other, before[other])


async def _pass(machine: QemuMachine, path: str, name: str, opaque: str, *, writable: bool) -> tuple[int, Files]:
    """The fdset that QEMU has the file in, and the files to make nodes with, where the image is `name`."""
    fd = await open_file(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK)
    try:
        reply = await machine.execute("add-fd", {"opaque": opaque}, fds=[fd])
        number = reply.get("fdset-id") if isinstance(reply, dict) else None
        if not isinstance(number, int):
            raise HypervisorError(f"{machine.name}: the reply to add-fd is malformed")
        return number, host_io.files(machine.capabilities, {name: fd}, {name: f"/dev/fdset/{number}"})
    finally:
        os.close(fd)


async def _remove(machine: QemuMachine, name: str, place: str) -> None:
    """A node that nothing uses, with its descriptors."""
    await machine.execute("blockdev-del", {"node-name": name})
    number = place.removeprefix("/dev/fdset/")
    if number.isdecimal():
        with contextlib.suppress(MonitorError):
            await machine.execute("remove-fd", {"fdset-id": int(number)})


async def _nodes(machine: QemuMachine) -> dict[str, str]:
    """Nodes, and the file of each."""
    reply: Any = await machine.execute("query-named-block-nodes", {"flat": True})
    items = [item for item in reply if isinstance(item, dict)] if isinstance(reply, list) else []
    return {str(item.get("node-name", "")): str(item.get("file", "")) for item in items}


async def _names_of(machine: QemuMachine, known: dict[str, str], layer: Layer, alias: str) -> set[str]:
    """What was said of the descriptors of an image's storage node."""
    place = known.get(node_name(alias, layer.key, "storage"), "")
    reply: Any = await machine.execute("query-fdsets")
    found: set[str] = set()
    for item in reply if isinstance(reply, list) else ():
        if isinstance(item, dict) and place == f"/dev/fdset/{item.get('fdset-id')}":
            found |= {str(entry.get("opaque", "")) for entry in item.get("fds", [])}
    return found


def _anew(alias: str, key: int) -> str:
    return f"disk:{alias}:{key}:anew"
