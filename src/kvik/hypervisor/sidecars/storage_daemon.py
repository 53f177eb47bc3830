"""A disk's image in a process of its own, served to kvik-vmm over vhost-user: by qemu-storage-daemon(1), for what
our own program (`kvik_blk.py`) does not read, or on request.

    <disk type='file'><driver name='qemu' type='qcow2'/>...                    kvik-blk
    <disk type='file'><driver name='qemu' type='vmdk'/>...                     qemu-storage-daemon: other formats
    <disk type='file'><driver name='qemu-storage-daemon' type='qcow2'/>...     qemu-storage-daemon on request, raw too
    <disk type='vhostuser'><source type='unix' path='/run/x.sock'/>...         a back end that somebody else runs

One process a disk, so what a hostile image does to it harms that disk alone. QEMU's is started by
`vmm/sandbox/launch.py`, which leaves it the images that were opened here. It ends with the VMM, which holds the other
end of its life line.
Formats and chain are the document's, as for QEMU (`qemu/argv/disks.py` makes the same nodes for both). Its own monitor
listens in the machine's directory and tells sizes and takes limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvik
from kvik.conf.devices.disk import Disk, IoTune
from kvik.conf.domain import Domain
from kvik.errors import ConfigError, ConfigUnsupported, HostError, HypervisorError, KvikError, MissingPackages
from kvik.host.files import host_error
from kvik.hypervisor.descriptors import Opened, connected_listener, listen_unix
from kvik.hypervisor.layers import layers
from kvik.hypervisor.names import alias_of, image_name, life_name, vhost_user_name
from kvik.hypervisor.qemu.argv.disks import FORMATS as QEMUS
from kvik.hypervisor.qemu.argv.disks import block_nodes, top_node
from kvik.hypervisor.qemu.argv.options import Files, node_name
from kvik.hypervisor.sidecars import kvik_blk
from kvik.hypervisor.sidecars.group import Command, Sidecar, Sidecars, program
from kvik.qmp.aio import EventCallback, QmpConnection, connect_unix, short_unix_path

__all__ = [
    "FORMATS",
    "KIND",
    "Waiting",
    "bottom_node",
    "by_vhost_user",
    "connect",
    "kind_of",
    "limits",
    "limits_name",
    "monitor_path",
    "of",
    "open_redo",
    "queues",
    "redo_path",
    "served",
    "start",
    "storage_command",
    "top_node",
]

KIND = "qemu-storage-daemon"
FORMATS = QEMUS - {"luks"}  # that one needs a secret
READY = 20.0  # seconds for it to read the images' headers, on a busy host
_QUEUES = 4  # unless asked for more: one thread serves them all
_LAUNCHER = Path(kvik.__file__).parent / "vmm" / "sandbox" / "launch.py"
_VMDK_SPARSE = b"KDMV"


def served(disk: Disk) -> bool:
    """Whether a daemon of ours has its image."""
    if disk.type not in ("file", "block") or disk.driver is None:
        return False
    return disk.driver.type not in (None, "raw") or disk.driver.name in (KIND, kvik_blk.KIND)


def kind_of(disk: Disk) -> str:
    """Which program does it. Raises `ConfigUnsupported` for one that was asked for and cannot."""
    if kvik_blk.serves(disk):
        return kvik_blk.KIND
    if disk.driver is not None and disk.driver.name == kvik_blk.KIND:
        raise ConfigUnsupported(
            f"disk {disk.target.dev}: kvik-blk reads raw and qcow2 images, and nothing more may be asked of it",
            path="/domain/devices/disk/driver/@name",
            remedy="write <driver name='qemu'>: qemu-storage-daemon then serves what kvik-blk does not",
        )
    return KIND


def by_vhost_user(disk: Disk) -> bool:
    """Whether another process, ours or somebody's, reads and writes guest memory for it."""
    return served(disk) or disk.type == "vhostuser"


def of(domain: Domain) -> list[Disk]:
    """The disks that are reached so."""
    return [disk for disk in domain.devices.disks if by_vhost_user(disk)]


def monitor_path(directory: Path, alias: str) -> Path:
    return directory / f"{alias}-storage.sock"


def redo_path(directory: Path, alias: str) -> Path:
    """Where kvik-blk notes what is in its memory only, for the one that may have to take its place."""
    return directory / f"{alias}-redo"


def open_redo(path: Path, *, anew: bool) -> int:
    """Raises `HostError`."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_TRUNC if anew else 0)
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        raise host_error("open", path, error) from error


# -- starting it


def start(
    disk: Disk, directory: Path, opened: Opened, sidecars: Sidecars, *, vcpus: int, log_fd: int, again: str = ""
) -> Waiting | None:
    """Takes the disk's images out of `opened` and leaves the VMM's ends there: `vublk:ALIAS` and `life:ALIAS`. `again`:
    for one that takes the place of another, what the image that the guest writes to is called by now.

    Nothing to wait for where somebody else runs the back end. Raises `MissingPackages`, `HostError`, `ConfigError`.
    """
    alias = alias_of(disk)
    if disk.type == "vhostuser":
        opened.add(vhost_user_name(alias), _connect(disk).detach())
        return None
    kind = kind_of(disk)
    if kind == KIND and disk.serial:
        raise ConfigUnsupported(
            f"disk {disk.target.dev}: qemu-storage-daemon, which must serve it, tells no serial number",
            path="/domain/devices/disk/serial",
            remedy="leave <serial> out, or convert all of its chain to qcow2 or raw images",
        )
    images = _take_images(opened, disk)
    _check_images(disk, images)
    path = monitor_path(directory, alias)
    with ExitStack() as close:
        ours, theirs = socket.socketpair()
        close.callback(theirs.close)
        opened.add(life_name(alias), ours.detach())
        monitor = listen_unix(path)
        close.callback(monitor.close)
        opened.undo.callback(path.unlink, missing_ok=True)
        export, client = connected_listener(directory / f"{alias}-export.sock")
        close.callback(export.close)
        opened.add(vhost_user_name(alias), client.detach())
        ends = {"life": theirs.fileno(), "monitor": monitor.fileno(), "export": export.fileno()}
        if kind == kvik_blk.KIND:
            ends["redo"] = open_redo(redo_path(directory, alias), anew=not again)
            close.callback(os.close, ends["redo"])
            if not again:
                opened.undo.callback(redo_path(directory, alias).unlink, missing_ok=True)
            command = kvik_blk.blk_command(disk, images, queues=queues(disk, vcpus), node=again, **ends)
        else:
            command = storage_command(disk, images, vcpus=vcpus, **ends)
        member = sidecars.spawn(command, log_fd)
    return Waiting(disk, images, path, member, sidecars, log_fd)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A daemon that was started and has not said yet that it could open its images."""

    disk: Disk
    images: Mapping[str, int]
    monitor: Path
    member: Sidecar
    sidecars: Sidecars
    log_fd: int

    async def ready(self, deadline: float = READY) -> None:
        """Its monitor answers when everything on its command line is done. `HypervisorError` with its own words."""
        try:
            connection = await connect(self.monitor, self.member.label, deadline)
            try:
                if self.member.kind == kvik_blk.KIND and self.disk.iotune is not None:
                    await connection.execute("block_set_io_throttle", kvik_blk.throttle(self.disk, self.disk.iotune))
            finally:
                connection.close()
        except KvikError as error:
            with contextlib.suppress(KvikError):
                await self.member.process.wait_async(1.0)  # it hung up, and is about to be gone
            raise _explained(
                self.sidecars.failure(self.log_fd, only=self.member.alias) or error, self.disk, self.images
            ) from error


def _explained(error: KvikError, disk: Disk, images: Mapping[str, int]) -> HypervisorError:
    """With the images' own names: the daemon knows them by number."""
    names = {
        str(images[name]): layer.source.location or "the image"
        for layer in layers(disk)
        if (name := image_name(alias_of(disk), layer.number)) in images
    }
    text = re.sub(r"/proc/self/fd/(\d+)", lambda match: names.get(match[1], match[0]), str(error))
    busy = "another process" in text  # "Failed to get ... lock; is another process using the image", our own the same
    return HypervisorError(
        text,
        remedy="stop the machine or tool that has the image open (fuser -v shows which)"
        if busy
        else "qemu-img check tells whether the image is whole; <driver type=...> must name its true format",
    )


async def connect(path: Path, name: str, deadline: float, on_event: EventCallback | None = None) -> QmpConnection:
    """A session on a daemon's monitor. Raises `HypervisorError`, `OperationTimeout`."""
    sock = await connect_unix(path, deadline)
    return await QmpConnection.open(sock, name=name, deadline=deadline, on_event=on_event)


def _connect(disk: Disk) -> socket.socket:
    path = disk.source.path if disk.source is not None else None
    if not path:
        raise ConfigError(
            f"disk {disk.target.dev}: a vhostuser source needs a path", path="/domain/devices/disk/source"
        )
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(0)  # one that does not accept is an error at once, and not this whole daemon's wait
    try:
        with short_unix_path(Path(path)) as short:
            sock.connect(short)
    except OSError as error:
        sock.close()
        raise HostError(
            f"disk {disk.target.dev}: cannot connect to its vhost-user back end at {path}: {error.strerror}",
            errno=error.errno or 0,
            remedy="start the back end first; it serves one machine at a time",
        ) from error
    sock.settimeout(None)
    return sock


def _take_images(opened: Opened, disk: Disk) -> dict[str, int]:
    """They are this daemon's: the VMM gets none of them. `opened` still closes them."""
    prefix = image_name(alias_of(disk), 0).rpartition(":")[0] + ":"
    return {name: opened.fds.pop(name) for name in list(opened.fds) if name.startswith(prefix)}


def _check_images(disk: Disk, images: Mapping[str, int]) -> None:
    """A VMDK may be a text that names other files: only the kind that is one file is taken."""
    for layer in layers(disk):
        if layer.format != "vmdk":
            continue
        head = os.pread(images[image_name(alias_of(disk), layer.number)], 20, 0)
        # SparseExtentHeader: magic, version, flags, capacity; a capacity of 0 means a descriptor with extents
        if not head.startswith(_VMDK_SPARSE) or not any(head[12:20]):
            raise ConfigError(
                f"{layer.source.location} is no VMDK image of the kind that is one file (monolithicSparse)",
                remedy="convert it: qemu-img convert -f vmdk -O qcow2",
            )


def storage_command(
    disk: Disk, images: Mapping[str, int], *, life: int, monitor: int, export: int, vcpus: int = 1
) -> Command:
    """`images`: by `image_name`. `life`: its end of the life line. `monitor`, `export`: sockets on which it listens;
    the VMM's connection waits on `export`. Raises `MissingPackages`."""
    alias = alias_of(disk)
    try:
        daemon = program(KIND)
    except MissingPackages as error:
        image, kind = disk.source.location if disk.source else "", disk.driver.type if disk.driver else "raw"
        raise MissingPackages(
            f"disk {disk.target.dev} ({kind}) needs {KIND}, which is not installed",
            packages=error.packages,
            remedy=f"{error.remedy}; or convert it: qemu-img convert -f {kind} -O raw {image} {image}.raw",
        ) from error
    chain = list(layers(disk))
    launch = [sys.executable, "-I", "-S", str(_LAUNCHER), f"--life={life}"]
    for layer in chain:
        fd = images[image_name(alias, layer.number)]
        launch.append(f"--{'read' if layer.read_only else 'write'}={fd}")
        if _is_raw(disk) and not disk.shareable:
            # The daemon's raw driver lets everybody else write as well; other formats allow no second writer.
            launch.append(f"--lock={fd}")
    fds = (*images.values(), life, monitor, export)
    argv = [
        *(*launch, "--", daemon),
        *("--chardev", f"socket,id=monitor,fd={monitor},server=on,wait=off", "--monitor", "chardev=monitor"),
        *("--object", _json({"qom-type": "throttle-group", "id": limits_name(alias), "limits": limits(disk.iotune)})),
    ]
    for node in _nodes(disk, images):
        argv += ["--blockdev", _json(node)]
    return Command(KIND, alias, [*argv, "--export", _json(_export(disk, export, vcpus))], fds)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def bottom_node(disk: Disk) -> str:
    """The block node of the image file that the guest writes to."""
    return node_name(alias_of(disk), disk.source.index or 0 if disk.source is not None else 0, "storage")


def limits_name(alias: str) -> str:
    return f"{alias}-limits"


def _is_raw(disk: Disk) -> bool:
    return disk.driver is None or disk.driver.type in (None, "raw")


def _nodes(disk: Disk, images: Mapping[str, int]) -> list[dict[str, Any]]:
    files = Files(paths={name: f"/proc/self/fd/{fd}" for name, fd in images.items()})
    nodes: list[dict[str, Any]] = block_nodes(files, disk)
    for node in nodes:
        if node["driver"] in ("file", "host_device") and _is_raw(disk):
            node["locking"] = "off"  # the launcher has locked it, or it is shared
    alias = alias_of(disk)
    return [*nodes, {"driver": "throttle", "node-name": f"{alias}-drive", "throttle-group": limits_name(alias),
                     "file": top_node(disk)}]  # fmt: skip


def _export(disk: Disk, listening: int, vcpus: int) -> dict[str, Any]:
    cache = disk.driver.cache if disk.driver is not None else None
    export: dict[str, Any] = {
        "type": "vhost-user-blk",
        "id": alias_of(disk),
        "node-name": f"{alias_of(disk)}-drive",
        "writable": not disk.readonly,
        "writethrough": cache in ("writethrough", "directsync"),
        "num-queues": queues(disk, vcpus),
        "addr": {"type": "fd", "str": str(listening)},
    }
    if disk.blockio is not None and disk.blockio.logical_block_size:
        export["logical-block-size"] = disk.blockio.logical_block_size
    return export


def queues(disk: Disk, vcpus: int) -> int:
    """As kvik-vmm chooses for its own disks."""
    return (disk.driver.queues if disk.driver is not None else None) or max(1, min(vcpus, _QUEUES))


_KINDS = {"bytes": "bps", "iops": "iops"}
_WAYS = ("total", "read", "write")


def limits(tune: IoTune | None) -> dict[str, int]:
    """QEMU's ThrottleLimits (qapi/block-core.json); 0 is no limit."""
    found: dict[str, int] = {}
    for way in _WAYS:
        for ours, theirs in _KINDS.items():
            name = f"{way}_{ours}_sec"
            found[f"{theirs}-{way}"] = getattr(tune, name, None) or 0
            most = getattr(tune, f"{name}_max", None)
            if most:
                found[f"{theirs}-{way}-max"] = most
                found[f"{theirs}-{way}-max-length"] = getattr(tune, f"{name}_max_length", None) or 1
    if tune is not None and tune.size_iops_sec:
        found["iops-size"] = tune.size_iops_sec
    return found
