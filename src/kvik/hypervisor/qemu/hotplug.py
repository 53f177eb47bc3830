"""Devices of a running machine: attach, detach, update.

A device is described by the same `Parts` as on the command line. Attaching tells QEMU of its parts in order and, if
one fails, takes back those before it. Detaching asks the guest; its parts go when QEMU says that the device is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.chardev import Channel, Chardev
from kvik.conf.devices.controller import Controller
from kvik.conf.devices.disk import Disk
from kvik.conf.devices.display import Graphics, Input
from kvik.conf.devices.hostdev import Hostdev, Redirdev
from kvik.conf.devices.interface import Interface
from kvik.conf.devices.memory import Memballoon, Memory, Shmem
from kvik.conf.devices.other import Rng, Vsock
from kvik.errors import (
    ConfigUnsupported,
    HypervisorError,
    KvikError,
    MonitorError,
    OperationFailed,
    OperationUnsupported,
)
from kvik.host.unix_socket import listens
from kvik.hypervisor.changes import check_disk, check_drive, check_interface, keep_chain
from kvik.hypervisor.consoles import set_pty
from kvik.hypervisor.descriptors import Opened, open_chardev, open_disk, with_paths
from kvik.hypervisor.layers import has_medium, indices
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.qemu import host_io, settings
from kvik.hypervisor.qemu.argv import disks
from kvik.hypervisor.qemu.argv.build import make_context, parts_of
from kvik.hypervisor.qemu.argv.options import Context, Files, Parts, Props, node_name
from kvik.hypervisor.qemu.remedies import remedy_for
from kvik.hypervisor.secrets import SECRET_PREFIX, needs

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = [
    "attach",
    "finish_detach",
    "update",
]

_DEADLINE = 20.0
_TRAY_DEADLINE = 5.0
_LISTEN_DEADLINE = 10.0
SUN_PATH = 107  # bytes of a path in sockaddr_un, without its NUL
_NODE = re.compile(r"-(\d{1,9})-(format|storage|spare|cor|over|overfile)$")  # what `node_name` makes
PLUGGABLE_BUSES = ("virtio", "scsi", "usb")  # of disks
_PLUGGABLE = (Disk, Interface, Hostdev, Redirdev, Channel, Rng, Memory, Shmem, Input, Controller, Vsock)


def _clean(props: Mapping[str, Any]) -> Props:
    """Without what is None, but with `backing: null`."""
    return {key: value for key, value in props.items() if value is not None or key == "backing"}


# -- attach


async def attach(machine: QemuMachine, device: Any, files: Mapping[str, int]) -> None:
    """Raises `OperationUnsupported`, `ConfigUnsupported`, `MonitorError`; then nothing has changed."""
    if not isinstance(device, _PLUGGABLE):
        raise OperationUnsupported(f"QEMU cannot plug a {type(device).__name__.lower()} into a running machine")
    if isinstance(device, Disk) and device.target.bus not in PLUGGABLE_BUSES:
        raise OperationUnsupported(f"disks on bus {device.target.bus} cannot be plugged into a running machine")
    with ExitStack() as close, ExitStack() as undo:
        opened = Opened(close, undo, files, machine.bases())
        if isinstance(device, Disk):
            # Who keeps a record of what is being attached has numbered it already.
            given = device.source.index if device.source is not None else None
            opened.next_index = given or await fresh_index(machine)
            await opened.beside(open_disk, device)
        elif isinstance(device, Chardev):
            await opened.beside(open_chardev, device, machine.directory)
        undone = Undo(machine)
        try:
            await _attach(machine, device, opened, undone)
        except BaseException:
            await asyncio.shield(undone.run())
            raise
        undo.pop_all()  # what was made for it on the host stays as long as it does
        await settings.settle(machine, device)


class Undo:
    """Monitor commands that take back what was done, last first; their own failures are passed over."""

    def __init__(self, machine: QemuMachine) -> None:
        self._machine = machine
        self._steps: list[tuple[str, Props]] = []

    def add(self, command: str, **arguments: Any) -> None:
        self._steps.append((command, {key.replace("_", "-"): value for key, value in arguments.items()}))

    async def run(self) -> None:
        for command, arguments in reversed(self._steps):
            with contextlib.suppress(KvikError):
                await self._machine.execute(command, arguments)


async def _attach(machine: QemuMachine, device: Any, opened: Opened, undone: Undo) -> None:
    paths: dict[str, str] = {}
    lent: list[int] = []
    as_files = ("disk:", "log:", *(["chardev:"] if isinstance(device, Chardev) and device.type == "file" else []))
    for name, fd in opened.fds.items():
        if name.startswith(SECRET_PREFIX):
            number, paths[name] = await lend(machine, fd, name)
            lent.append(number)
        elif name.startswith(as_files):
            paths[name] = await add_fd(machine, fd, name)
            undone.add("remove-fd", fdset_id=int(paths[name].rsplit("/", 1)[-1]))
    files = host_io.files(machine.capabilities, opened.fds, paths)
    context = make_context(machine.domain, machine.capabilities, files)
    if getattr(device, "boot", None) is not None:
        context.boot_index[alias_of(device)] = device.boot.order
    parts = parts_of(context, device)
    if parts.arguments:
        raise OperationUnsupported(f"this {type(device).__name__.lower()} cannot be plugged into a running machine")
    for name, fd in opened.fds.items():
        if name.startswith("switch:"):
            _listen_by_path(machine, parts, name.removeprefix("switch:"))
        elif name not in paths:
            label = files.fd(name)
            await machine.execute("getfd", {"fdname": label}, fds=[fd])
            undone.add("closefd", fdname=label)
    try:
        await _add_parts(machine, device, parts, undone)
    except MonitorError as error:
        images = opened.paths()
        names = {
            int(path.rsplit("/", 1)[-1]): images.get(opened.fds[name], path)
            for name, path in paths.items()
            if not name.startswith(SECRET_PREFIX)
        }
        text = with_paths(error.message, names)
        if names and not any(name in text for name in names.values()):
            text = f"{', '.join(names.values())}: {text}"
        raise MonitorError(text, qmp_class=error.qmp_class, remedy=error.remedy or remedy_for(text)) from error
    finally:  # QEMU has read the secrets, or will not
        for number in lent:
            with contextlib.suppress(KvikError):
                await machine.execute("remove-fd", {"fdset-id": number})


async def lend(machine: QemuMachine, fd: int, name: str) -> tuple[int, str]:
    """A descriptor for something that QEMU opens by itself: its set's number, and the name by which it is opened."""
    reply = await machine.execute("add-fd", {"opaque": name}, fds=[fd])
    number, theirs = (reply.get("fdset-id"), reply.get("fd")) if isinstance(reply, dict) else (None, None)
    if not isinstance(number, int) or not isinstance(theirs, int):
        raise HypervisorError(f"{machine.name}: the reply to add-fd is malformed")
    return number, f"/proc/self/fd/{theirs}"


async def _add_parts(machine: QemuMachine, device: Any, parts: Parts, undone: Undo) -> None:
    for item in parts.objects:
        await machine.execute("object-add", _clean(item), deadline=_DEADLINE)
        undone.add("object-del", id=item["id"])
    for chardev in parts.chardevs:
        backend = {"type": chardev.backend, "data": _clean(chardev.data)}
        reply = await machine.execute("chardev-add", {"id": chardev.id, "backend": backend})
        undone.add("chardev-remove", id=chardev.id)
        if chardev.backend == "pty" and isinstance(reply, dict) and isinstance(device, Chardev):
            set_pty(device, str(reply.get("pty", "")))
    for node in parts.blockdevs:
        await machine.execute("blockdev-add", _clean(node), deadline=_DEADLINE)
        undone.add("blockdev-del", node_name=node["node-name"])
    for netdev in parts.netdevs:
        await machine.execute("netdev_add", _clean(netdev))
        undone.add("netdev_del", id=netdev["id"])
        if netdev["type"] == "stream" and netdev.get("server") and netdev["addr"]["type"] == "unix":
            await _until_it_listens(machine, netdev["addr"]["path"])
    for item in parts.devices:
        await machine.execute("device_add", _clean(item), deadline=_DEADLINE)
        if "id" in item:
            undone.add("device_del", id=item["id"])


def _listen_by_path(machine: QemuMachine, parts: Parts, alias: str) -> None:
    """QEMU (7.2 at least) looks for a passed descriptor's name in a thread that knows no monitor, does not find it, and
    crashes at the guest's first packet. So a card that is plugged gets a socket of QEMU's own making."""
    path = str(machine.directory / f"{alias}.net")
    if len(os.fsencode(path)) > SUN_PATH:
        raise ConfigUnsupported(
            f"{alias} cannot be plugged into running machine {machine.name}: the path of its socket has more than "
            f"{SUN_PATH} bytes: {path}",
            remedy="set a shorter XDG_RUNTIME_DIR, or add the interface to the definition and start the machine again",
        )
    for netdev in parts.netdevs:
        netdev["addr"] = {"type": "unix", "path": path}


async def _until_it_listens(machine: QemuMachine, path: str) -> None:
    """QEMU does it in a thread, and says nothing if it fails. A card without it must not reach the guest."""
    try:
        async with asyncio.timeout(_LISTEN_DEADLINE):
            while not listens(path):
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise HypervisorError(f"{machine.name}: QEMU does not listen on {path}") from None
    # What it does then is done in its main loop, and before the next command's answer.
    await machine.execute("query-status")


async def add_fd(machine: QemuMachine, fd: int, name: str) -> str:
    """Gives QEMU a descriptor; its name there."""
    reply = await machine.execute("add-fd", {"opaque": name}, fds=[fd])
    number = reply.get("fdset-id") if isinstance(reply, dict) else None
    if not isinstance(number, int):
        raise HypervisorError(f"{machine.name}: the reply to add-fd is malformed")
    return f"/dev/fdset/{number}"


# -- detach


async def finish_detach(machine: QemuMachine, device: Any) -> None:
    """The device is gone: its host side goes as well."""
    context = make_context(machine.domain, machine.capabilities, Files({}, {}))
    try:
        parts = parts_of(context, device)
    except KvikError:
        return
    await _remove_host_side(machine, parts)
    await machine.sidecars.end(alias_of(device))
    if isinstance(device, Disk):
        await _remove_images(machine, alias_of(device))
    if isinstance(device, Disk | Chardev):
        await remove_fdsets(machine, alias_of(device))
    if isinstance(device, Chardev) and device.source and device.source.path:
        path = Path(device.source.path)
        if path.parent == machine.directory:
            path.unlink(missing_ok=True)


async def _remove_host_side(machine: QemuMachine, parts: Parts) -> None:
    steps: list[tuple[str, Props]] = []
    steps += [("netdev_del", {"id": item["id"]}) for item in parts.netdevs]
    steps += [("blockdev-del", {"node-name": item["node-name"]}) for item in reversed(parts.blockdevs)]
    steps += [("chardev-remove", {"id": item.id}) for item in parts.chardevs]
    steps += [("object-del", {"id": item["id"]}) for item in reversed(parts.objects)]
    for command, arguments in steps:
        with contextlib.suppress(KvikError):
            await machine.execute(command, arguments)


async def fresh_index(machine: QemuMachine) -> int:
    """Above that of every image in the document, and of every node in QEMU, should one have been left behind."""
    known = [index for disk in machine.domain.devices.disks for index in indices(disk)]
    reply = await machine.execute("query-named-block-nodes", {"flat": True})
    for item in reply if isinstance(reply, list) else ():
        found = _NODE.search(str(item.get("node-name", ""))) if isinstance(item, dict) else None
        if found is not None:
            known.append(int(found[1]))
    return max(known, default=0) + 1


def node_key(alias: str, name: Any) -> int | None:
    """Which image of a disk a block node is of; None if it is of none."""
    if not isinstance(name, str) or not name.startswith(node_name(alias, 0, "").removesuffix("0-")):
        return None
    found = _NODE.search(name)
    return int(found[1]) if found is not None and name == node_name(alias, int(found[1]), found[2]) else None


async def remove_nodes(machine: QemuMachine, names: Sequence[str]) -> None:
    """From the top down: a node goes when none above it is left. What something uses stays."""
    left = list(names)
    while left:
        refused = []
        for name in left:
            try:
                await machine.execute("blockdev-del", {"node-name": name})
            except MonitorError:
                refused.append(name)
        if len(refused) == len(left):
            return
        left = refused


async def _remove_images(machine: QemuMachine, alias: str) -> None:
    """All of a disk that is gone, whatever jobs made of its chain."""
    with contextlib.suppress(KvikError):
        reply = await machine.execute("query-named-block-nodes", {"flat": True})
        names = [str(item.get("node-name", "")) for item in reply if isinstance(item, dict)]
        await remove_nodes(machine, [name for name in names if node_key(alias, name) is not None])


async def remove_fdsets(machine: QemuMachine, alias: str) -> None:
    """Descriptors of a disk's images that nothing uses any more."""
    with contextlib.suppress(KvikError):
        reply = await machine.execute("query-fdsets")
        for item in reply if isinstance(reply, list) else []:
            names = [entry.get("opaque") for entry in item.get("fds", [])]
            if any(
                isinstance(name, str) and name.startswith((f"disk:{alias}:", f"log:{alias}", f"chardev:{alias}"))
                for name in names
            ):
                await machine.execute("remove-fd", {"fdset-id": item["fdset-id"]})


# -- update


async def update(machine: QemuMachine, old: Any, new: Any) -> None:
    """Changes what can be changed while the guest runs. Raises `OperationUnsupported` for the rest."""
    if isinstance(new, Disk) and isinstance(old, Disk):
        if new.device in ("cdrom", "floppy"):
            check_drive(old, new)
            await _change_medium(machine, old, new)
        else:
            check_disk(old, new)
            keep_chain(old, new)
        if new.iotune is None and old.iotune is not None:
            await settings.set_limits(machine, new)  # none
        await settings.put_limits(machine, new)
    elif isinstance(new, Interface) and isinstance(old, Interface):
        await _update_interface(machine, old, new)
    elif isinstance(new, Graphics):
        await settings.set_password(machine, new)
    elif isinstance(new, Memballoon):
        await machine.tell_balloon_period(new)
    elif isinstance(new, Memory) and isinstance(old, Memory):
        await machine.request_memory(old, new)
    else:
        raise OperationUnsupported(f"a {type(new).__name__.lower()} cannot be changed while the machine runs")


async def _update_interface(machine: QemuMachine, old: Interface, new: Interface) -> None:
    check_interface(old, new)
    await settings.set_link(machine, new)


async def _change_medium(machine: QemuMachine, old: Disk, new: Disk) -> None:
    alias = alias_of(old)
    new.alias = old.alias
    if next(needs(new), None) is not None:
        raise OperationUnsupported(
            f"a medium that needs a secret cannot be put into {alias} while the machine runs",
            remedy="put it into the definition (--config) and start the machine anew",
        )
    with ExitStack() as close, ExitStack() as undo:
        opened = Opened(close, undo, {}, machine.bases())
        opened.next_index = await fresh_index(machine)
        new.alias = old.alias
        await opened.beside(open_disk, new)  # a medium that cannot be opened leaves the old one in
        await _take_medium(machine, alias)
        nodes = disks.block_nodes(_context(machine, {}, {}).files, old) if has_medium(old) else []
        for node in reversed(nodes):
            with contextlib.suppress(MonitorError):
                await machine.execute("blockdev-del", {"node-name": node["node-name"]})
        await remove_fdsets(machine, alias)
        if has_medium(new):
            undone = Undo(machine)
            try:
                paths = {name: await add_fd(machine, fd, name) for name, fd in opened.fds.items()}
                for node in disks.block_nodes(_context(machine, opened.fds, paths).files, new):
                    await machine.execute("blockdev-add", _clean(node), deadline=_DEADLINE)
                    undone.add("blockdev-del", node_name=node["node-name"])
                await machine.execute("blockdev-insert-medium", {"id": alias, "node-name": disks.top_node(new)})
            except BaseException:
                await asyncio.shield(undone.run())
                raise
        with contextlib.suppress(MonitorError):  # a floppy drive has no tray
            await machine.execute("blockdev-close-tray", {"id": alias})


def _context(machine: QemuMachine, fds: Mapping[str, int], paths: Mapping[str, str]) -> Context:
    capabilities = machine.capabilities
    return make_context(machine.domain, capabilities, host_io.files(capabilities, fds, paths))


async def _take_medium(machine: QemuMachine, alias: str) -> None:
    """Opens the tray and takes the medium out, waiting a while for a guest that holds it locked."""
    with contextlib.suppress(MonitorError):
        await machine.execute("blockdev-open-tray", {"id": alias})
    loop = asyncio.get_running_loop()
    end = loop.time() + _TRAY_DEADLINE
    while True:
        try:
            await machine.execute("blockdev-remove-medium", {"id": alias})
            return
        except MonitorError as error:
            if "not open" not in error.message:
                raise
            if loop.time() > end:
                raise OperationFailed(
                    f"the guest holds the tray of {alias} locked", remedy="eject the medium in the guest first"
                ) from error
        await asyncio.sleep(0.05)
