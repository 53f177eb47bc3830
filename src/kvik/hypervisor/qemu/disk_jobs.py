"""What block jobs do to the disks of a machine: copy one, merge its images, make one larger.

Images are opened here and passed as descriptors; QEMU needs no right to open them. What lies below the top of a chain
was passed for reading only: an image that a commit writes to gets a second descriptor, for writing, and loses it when
the job is over.

The document is not changed here but for the numbers of new images: what becomes of it is the manager's.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import BackingStore, Disk, Mirror
from kvik.errors import (
    ConfigUnsupported,
    HypervisorError,
    KvikError,
    MonitorError,
    OperationUnsupported,
)
from kvik.host.reach import open_file
from kvik.hypervisor.copies import number_copy
from kvik.hypervisor.descriptors import Opened, open_disk
from kvik.hypervisor.driver import JobState
from kvik.hypervisor.layers import as_disk, layers
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.qemu import block_jobs, host_io, storage_nodes
from kvik.hypervisor.qemu.argv import disks
from kvik.hypervisor.qemu.argv.options import Files, Props, node_name
from kvik.hypervisor.qemu.hotplug import add_fd, fresh_index, lend, node_key, remove_nodes
from kvik.hypervisor.secrets import SECRET_PREFIX

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = ["QemuDiskJobs", "format_node", "nodes_below"]

_DEADLINE = 30.0
_SECRET = re.compile(
    r"(.+)-(\d{1,9})-(?:luks|auth|cookie|tls)"
)  # what `hypervisor/secrets.py` makes of alias and number


class QemuDiskJobs:
    """Block jobs on the disks of one QEMU. Images are named by their numbers in the live document."""

    def __init__(self, machine: QemuMachine) -> None:
        self._machine = machine

    def merges(self, disk: Disk, *, active: bool) -> bool:
        return True

    # -- starting

    async def number(self, disk: Disk, mirror: Mirror, *, fresh: bool) -> None:
        """See `copies.number_copy`."""
        index = await fresh_index(self._machine)
        await number_copy(disk, mirror, index, fresh=fresh, bases=self._machine.bases())

    async def copy(
        self,
        job: str,
        disk: Disk,
        mirror: Mirror,
        *,
        shallow: bool = False,
        fresh: bool = False,
        speed: int = 0,
        granularity: int = 0,
        buffer: int = 0,
        synchronous: bool = False,
        secrets: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Begins to copy a disk to the image that `mirror` describes, which exists and was numbered.

        `shallow`: the disk's top image alone. `fresh`: the copy is to lie on the same images as the disk (of a shallow
        copy), or on none. `speed` is bytes a second, `granularity` and `buffer` bytes, 0 being QEMU's own choice.
        `secrets`: descriptors of the values that the copy's images need, by the names of `Need`.
        """
        machine = self._machine
        target = as_disk(disk, mirror)
        if fresh:
            target.backing_store = BackingStore()
        # What both lie on is shared: its nodes exist.
        below = disk.backing_store if shallow and fresh else None
        with ExitStack() as close, ExitStack() as undo:
            opened = Opened(close, undo, secrets, machine.bases())
            given = target.source.index if target.source is not None else None
            opened.next_index = given or await fresh_index(machine)
            await opened.beside(open_disk, target)
            async with _undoing(machine, alias_of(disk)) as added:
                shared = node_name(alias_of(disk), below.index, "format") if below and below.index is not None else None
                top = await self._add_images(added, opened, target, shared)
                if not fresh or target.type == "network":
                    await self._check_size(disk, target, top)
                arguments: Props = {
                    "device": format_node(disk),
                    "target": top,
                    "sync": "top" if shallow else "full",
                    "speed": speed,
                    "copy-mode": "write-blocking" if synchronous else "background",
                }
                arguments |= {
                    key: value for key, value in (("granularity", granularity), ("buf-size", buffer)) if value
                }
                await block_jobs.start_job(machine, job, "blockdev-mirror", arguments)

    async def _add_images(self, added: _Added, opened: Opened, target: Disk, below: str | None) -> str:
        """Nodes for the images that were opened, on top of node `below`; the highest's name."""
        machine, paths, lent = self._machine, dict[str, str](), []
        try:
            for name, fd in opened.fds.items():
                if name.startswith(SECRET_PREFIX):
                    number, paths[name] = await lend(machine, fd, name)
                    lent.append(number)
                else:
                    paths[name] = await add_fd(machine, fd, name)
                    added.fdsets.append(int(paths[name].rsplit("/", 1)[-1]))
            files = host_io.files(machine.capabilities, opened.fds, paths)
            for item in disks.secret_objects(files, target):
                await machine.execute("object-add", item, deadline=_DEADLINE)
                added.objects.append(item["id"])
            nodes = disks.block_nodes(files, target)
            if below is not None:
                nodes[-1]["backing"] = below
            for node in nodes:
                await machine.execute("blockdev-add", node, deadline=_DEADLINE)
                added.nodes.append(node["node-name"])
            return str(nodes[-1]["node-name"])
        finally:  # QEMU has read the secrets, or will not
            for number in lent:
                with contextlib.suppress(KvikError):
                    await machine.execute("remove-fd", {"fdset-id": number})

    async def _check_size(self, disk: Disk, target: Disk, top: str) -> None:
        """QEMU would find out when it comes to the end of what there is."""
        sizes = {
            item.get("node-name"): image.get("virtual-size")
            for item in await self._nodes()
            if isinstance(image := item.get("image"), dict)
        }
        size, room = sizes.get(format_node(disk)), sizes.get(top)
        if isinstance(size, int) and isinstance(room, int) and room < size:
            where = (target.source.location or target.source.name) if target.source is not None else ""
            raise ConfigUnsupported(
                f"{where or 'the destination'} has {room} bytes, and disk {disk.target.dev} has {size}",
                remedy="make it larger, or copy to another place",
            )

    async def pull(self, job: str, disk: Disk, base: int | None, backing: str | None, *, speed: int = 0) -> None:
        """Begins to fill the top image from those below it, down to but without number `base`.

        `backing` is what the top's header then says of its backing file; needed with `base`.

        QEMU dismisses it by itself: until then the filter that it worked with is there without what it filtered, and
        QEMU 7.2 ends by SIGSEGV at the next query-named-block-nodes.
        """
        arguments: Props = {"device": format_node(disk), "speed": speed, "auto-dismiss": True}
        if base is not None:
            arguments |= {"base-node": node_name(alias_of(disk), base, "format"), "backing-file": backing}
        await block_jobs.start_job(self._machine, job, "block-stream", arguments)

    async def commit(self, job: str, disk: Disk, top: int, base: int, backing: str | None, *, speed: int = 0) -> None:
        """Begins to merge images `top` and what is below it into `base`. Of the disk's own top it becomes ready.

        `backing` is what the header of the image above `top` then says of its backing file.
        """
        alias = alias_of(disk)
        chain = list(layers(disk))
        position = next(number for number, layer in enumerate(chain) if layer.key == top)
        written = [layer for layer in chain if layer.key == base]
        written += [chain[position - 1]] if position > 1 else []  # its header changes
        async with _undoing(self._machine, alias) as added:
            for layer in written:
                path = layer.source.location
                if layer.type in ("file", "block") and path and not position and layer.format == "raw":
                    await storage_nodes.open_anew(self._machine, disk, layer, writable=True)
                elif layer.type in ("file", "block") and path:
                    added.written.append(await self.add_writable(alias, layer.key, path))
            arguments: Props = {
                "device": format_node(disk),
                "base-node": node_name(alias, base, "format"),
                "speed": speed,
            }
            if position:
                arguments |= {"top-node": node_name(alias, top, "format"), "backing-file": backing}
            await block_jobs.start_job(self._machine, job, "block-commit", arguments)

    async def add_writable(self, alias: str, key: int, path: str) -> tuple[int, int]:
        """A descriptor for writing beside the one for reading of an image: QEMU takes the one that fits."""
        machine = self._machine
        fdset = await self._fdset(node_name(alias, key, "storage"))
        fd = await open_file(path, os.O_RDWR | os.O_NONBLOCK, action="open for writing")
        try:
            reply = await machine.execute("add-fd", {"fdset-id": fdset, "opaque": _written(alias, key)}, fds=[fd])
        finally:
            os.close(fd)
        number = reply.get("fd") if isinstance(reply, dict) else None
        if not isinstance(number, int):
            raise HypervisorError(f"{machine.name}: the reply to add-fd is malformed")
        return fdset, number

    async def _fdset(self, storage: str) -> int:
        for item in await self._nodes():
            if item.get("node-name") == storage and (fdset := _fdset_of(item)) is not None:
                return fdset
        raise OperationUnsupported(
            f"{self._machine.name}: the image of block node {storage} was not passed to QEMU open",
            remedy="restart the machine, whose images are then opened for it",
        )

    async def _nodes(self) -> list[dict[str, Any]]:
        reply = await self._machine.execute("query-named-block-nodes", {"flat": True})
        return [item for item in reply if isinstance(item, dict)] if isinstance(reply, list) else []

    # -- while it runs

    async def states(self) -> dict[str, JobState]:
        return {name: _state(job) for name, job in (await block_jobs.list_jobs(self._machine)).items()}

    async def follow(self, job: str) -> AsyncIterator[JobState]:
        async for state in block_jobs.follow_job(self._machine, job):
            yield _state(state)

    async def speed(self, job: str) -> int:
        """The limit in bytes a second, 0 for none."""
        reply = await self._machine.execute("query-block-jobs")
        for item in reply if isinstance(reply, list) else ():
            if isinstance(item, dict) and item.get("device") == job and isinstance(item.get("speed"), int):
                return int(item["speed"])
        return 0

    async def set_speed(self, job: str, speed: int) -> None:
        await block_jobs.set_job_speed(self._machine, job, speed)

    async def complete(self, job: str) -> None:
        await block_jobs.complete_job(self._machine, job)

    async def cancel(self, job: str, *, force: bool) -> None:
        await block_jobs.cancel_job(self._machine, job, force=force)

    # -- when it is over

    async def dismiss(self, job: str) -> None:
        await block_jobs.dismiss_job(self._machine, job)

    async def chain(self, disk: Disk) -> list[int]:
        """Numbers of the images that the guest has now, from the one it writes to down, by QEMU's own graph: those
        below the disk's drive that its document knows. In between there may be filters (copy on read, a job's own)."""
        alias = alias_of(disk)
        numbers = {node_name(alias, key, "format"): key for key in [*_keys(disk), *_keys(disk.mirror)]}
        reply = await self._machine.execute("query-blockstats")
        for item in reply if isinstance(reply, list) else ():
            if isinstance(item, dict) and _alias_in(item.get("qdev")) == alias:
                return list(dict.fromkeys(numbers[name] for name in nodes_below(item) if name in numbers))
        return []

    async def tidy(self, disk: Disk) -> None:
        """QEMU lets go of images that the disk's document has not (any more), and of descriptors for writing of those
        that are only read."""
        machine, alias = self._machine, alias_of(disk)
        kept = {*_keys(disk), *_keys(disk.mirror)}
        nodes = await self._nodes()
        gone = [
            item for item in nodes if (key := node_key(alias, item.get("node-name"))) is not None and key not in kept
        ]
        fdsets = {_fdset_of(item) for item in gone}
        await remove_nodes(machine, [str(item["node-name"]) for item in gone])
        for fdset in fdsets - {None}:
            with contextlib.suppress(MonitorError):
                await machine.execute("remove-fd", {"fdset-id": fdset})
        await self._forget_secrets(alias, kept)
        if disk.mirror is None:
            keys = [layer.key for layer in layers(disk) if layer.number]
            await storage_nodes.settle(machine, disk)
            await self._only_read(disk, {node_name(alias, key, "format") for key in keys})
            await self._seal(alias, keys)

    async def _forget_secrets(self, alias: str, kept: set[int]) -> None:
        reply = await self._machine.execute("qom-list", {"path": "/objects"})
        for item in reply if isinstance(reply, list) else ():
            name = item.get("name") if isinstance(item, dict) else None
            found = _SECRET.fullmatch(name) if isinstance(name, str) else None
            if found is not None and found[1] == alias and int(found[2]) not in kept:
                with contextlib.suppress(MonitorError):  # a node that is left needs it
                    await self._machine.execute("object-del", {"id": name})

    async def _only_read(self, disk: Disk, names: set[str]) -> None:
        """A commit that was broken off leaves its base as one that is written to."""
        written = {item.get("node-name") for item in await self._nodes() if item.get("ro") is False} & names
        for node in disks.block_nodes(Files(), disk) if written else ():
            if node["node-name"] in written:
                with contextlib.suppress(MonitorError):
                    await self._machine.execute("blockdev-reopen", {"options": [node]}, deadline=_DEADLINE)

    async def _seal(self, alias: str, keys: Sequence[int]) -> None:
        names = {_written(alias, key) for key in keys}
        reply = await self._machine.execute("query-fdsets")
        for item in reply if isinstance(reply, list) else ():
            for entry in item.get("fds", []):
                if entry.get("opaque") in names:
                    with contextlib.suppress(MonitorError):
                        await self._machine.execute("remove-fd", {"fdset-id": item["fdset-id"], "fd": entry["fd"]})

    def image_of(self, disk: Disk, name: str) -> int | None:
        return node_key(alias_of(disk), name)

    async def set_threshold(self, disk: Disk, image: int, threshold: int) -> None:
        """One event when the guest has written beyond this byte of the image's file; 0: none."""
        node = node_name(alias_of(disk), image, "storage")
        await self._machine.execute("block-set-write-threshold", {"node-name": node, "write-threshold": threshold})


class _Added:
    def __init__(self) -> None:
        self.nodes: list[str] = []
        self.objects: list[str] = []
        self.fdsets: list[int] = []
        self.written: list[tuple[int, int]] = []


@contextlib.asynccontextmanager
async def _undoing(machine: QemuMachine, alias: str) -> AsyncIterator[_Added]:
    """What was given to QEMU is taken back if the job does not come to be started."""
    added = _Added()
    try:
        yield added
    except BaseException:
        for name in reversed(added.nodes):
            with contextlib.suppress(KvikError):
                await machine.execute("blockdev-del", {"node-name": name})
        for name in added.objects:
            with contextlib.suppress(KvikError):
                await machine.execute("object-del", {"id": name})
        for fdset in added.fdsets:
            with contextlib.suppress(KvikError):
                await machine.execute("remove-fd", {"fdset-id": fdset})
        for fdset, fd in added.written:
            with contextlib.suppress(KvikError):
                await machine.execute("remove-fd", {"fdset-id": fdset, "fd": fd})
        raise


def format_node(disk: Disk) -> str:
    """The disk's top image, below any filter."""
    return node_name(alias_of(disk), disk.source.index or 0 if disk.source is not None else 0, "format")


def _fdset_of(node: Props) -> int | None:
    number = str(node.get("file", "")).removeprefix("/dev/fdset/")
    return int(number) if number.isdecimal() else None


def _written(alias: str, key: int) -> str:
    return f"disk:{alias}:{key}:written"


def _keys(chain: Disk | Mirror | None) -> list[int]:
    if chain is None:
        return []
    found = [chain.source.index] if chain.source is not None else []
    below = chain.backing_store
    while below is not None:
        found.append(below.index)
        below = below.backing_store
    return [index for index in found if index is not None]


def nodes_below(drive: Mapping[str, Any]) -> Iterator[str]:
    """Names of a drive's nodes in `query-blockstats`, nearest first: `parent` is what a node has its data in (and what
    a filter filters), `backing` what it lies on."""
    here: list[Any] = [drive]
    while here:
        below: list[Any] = []
        for item in here:
            if isinstance(item, dict):
                if isinstance(item.get("node-name"), str):
                    yield item["node-name"]
                below += [item.get("parent"), item.get("backing")]
        here = below


def _alias_in(path: Any) -> str:
    return path.split("/")[3] if isinstance(path, str) and path.startswith("/machine/peripheral/") else str(path or "")


def _state(job: block_jobs.Job) -> JobState:
    return JobState(current=job.current, total=job.total, ready=job.ready, concluded=job.concluded, error=job.error)
