"""Disk images where they lie, in no pool: any existing file is a volume of the directory it is in.

virt-install turns every `--disk PATH` into a volume of a pool before it goes on, and would define a pool for each
directory in which somebody keeps an image. So a file that exists is found as a volume, and its directory answers as
that volume's pool; nothing can be made or changed through them, and none is listed. Names of such pools begin with a
'/', which no other's can. Whether a file exists is told to those only who may change something.
"""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from kvik.daemon.dispatch import Access
from kvik.daemon.errors import OperationDenied
from kvik.errors import NoStoragePool, NoStorageVolume
from kvik.manager.storage import about, reach

if TYPE_CHECKING:
    from kvik.daemon.connection import Connection

NAMESPACE = uuid.UUID("9d1f6d2c-6f0b-5f0e-9c55-6b76696b0001")  # of the directories' UUIDs
FILE, BLOCK = 0, 1  # virStorageVolType
POOL_RUNNING = 2  # virStoragePoolState
MAGIC = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdx": "vhdx", b"QED\0": "qed"}


def is_loose(ref: Any) -> bool:
    """Whether a wire reference to a volume means a file in no pool."""
    return str(ref[0]).startswith("/")


def is_loose_pool(ref: Any) -> bool:
    return str(ref[0]).startswith("/")


def may_look(connection: Connection) -> bool:
    """Its own rights: the procedures are open to readers, for what is in pools."""
    return connection.access >= Access.WRITE


def _allow(connection: Connection) -> None:
    if not may_look(connection):
        raise OperationDenied("a file outside of all pools is not shown for read only access")


def _stat(path: str) -> os.stat_result:
    """Of a disk image: a regular file or a block device with an absolute path."""
    if path.startswith("/") and "\0" not in path:
        about(path)
        try:
            info = Path(path).stat()
        except OSError:
            pass
        else:
            if stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode):
                return info
    raise NoStorageVolume(f"no storage volume with path '{path}'")


def _look(path: str) -> tuple[os.stat_result, tuple[int, int, int, str]]:
    info = _stat(path)
    return info, _sizes(path, info)


def _pool(directory: str) -> tuple[str, bytes]:
    return (directory, uuid.uuid5(NAMESPACE, directory).bytes)


def _sizes(path: str, info: os.stat_result) -> tuple[int, int, int, str]:
    """(type, capacity, allocation, format), sizes in bytes."""
    if stat.S_ISBLK(info.st_mode):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
        return (BLOCK, size, size, "raw")
    with Path(path).open("rb") as file:
        head = file.read(32)
    kind = MAGIC.get(head[:4], "raw")
    # A qcow2 header has the guest's size at byte 24; of the other formats only the file's own size is told.
    capacity = int.from_bytes(head[24:32]) if kind == "qcow2" and len(head) == 32 else info.st_size
    return (FILE, min(capacity, 2**63 - 1), info.st_blocks * 512, kind)


async def lookup_by_path(connection: Connection, args: Any) -> tuple[Any]:
    (path,) = args
    await reach(_stat, path)
    directory, name = os.path.split(os.path.normpath(path))
    return ((directory, name, os.path.join(directory, name)),)  # noqa: PTH118  # pure text


async def lookup_pool(connection: Connection, args: Any) -> tuple[Any]:
    _allow(connection)
    await reach(_stat, args[0][2])
    return (_pool(args[0][0]),)


async def get_path(connection: Connection, args: Any) -> tuple[str]:
    _allow(connection)
    await reach(_stat, args[0][2])
    return (args[0][2],)


async def get_info(connection: Connection, args: Any) -> tuple[int, int, int]:
    _allow(connection)
    path = args[0][2]
    return (await reach(_look, path))[1][:3]


async def get_xml(connection: Connection, args: Any) -> tuple[str]:
    _allow(connection)
    _, name, path = args[0]
    info, (kind, capacity, allocation, image) = await reach(_look, path)
    return (
        f"<volume type='{'block' if kind == BLOCK else 'file'}'>\n"
        f"  <name>{escape(name)}</name>\n"
        f"  <key>{escape(path)}</key>\n"
        f"  <capacity unit='bytes'>{capacity}</capacity>\n"
        f"  <allocation unit='bytes'>{allocation}</allocation>\n"
        f"  <target>\n    <path>{escape(path)}</path>\n    <format type='{image}'/>\n"
        f"    <permissions><mode>0{stat.S_IMODE(info.st_mode):o}</mode><owner>{info.st_uid}</owner>"
        f"<group>{info.st_gid}</group></permissions>\n"
        "  </target>\n</volume>\n",
    )


async def _directory(reference: Any) -> str:
    name, identity = reference
    if not name.startswith("/") or _pool(name)[1] != identity or not await reach(_is_directory, name):
        raise NoStoragePool(f"no storage pool '{name}'")
    return str(name)


def _is_directory(path: str) -> bool:
    about(path)
    return Path(path).is_dir()


def _space(path: str) -> tuple[int, int]:
    """(capacity, available) of its file system, in bytes."""
    about(path)
    space = os.statvfs(path)
    return space.f_frsize * space.f_blocks, space.f_frsize * space.f_bavail


async def get_pool_xml(connection: Connection, args: Any) -> tuple[str]:
    _allow(connection)
    directory = await _directory(args[0])
    capacity, available = await reach(_space, directory)
    return (
        "<pool type='dir'>\n"
        f"  <name>{escape(directory)}</name>\n"
        f"  <uuid>{uuid.uuid5(NAMESPACE, directory)}</uuid>\n"
        f"  <capacity unit='bytes'>{capacity}</capacity>\n"
        f"  <allocation unit='bytes'>{capacity - available}</allocation>\n"
        f"  <available unit='bytes'>{available}</available>\n"
        f"  <source/>\n  <target><path>{escape(directory)}</path></target>\n"
        "</pool>\n",
    )


async def get_pool_info(connection: Connection, args: Any) -> tuple[int, int, int, int]:
    _allow(connection)
    capacity, available = await reach(_space, await _directory(args[0]))
    return (POOL_RUNNING, capacity, capacity - available, available)


async def pool_is_active(connection: Connection, args: Any) -> tuple[int]:
    _allow(connection)
    await _directory(args[0])
    return (1,)


async def refresh_pool(connection: Connection, args: Any) -> None:
    _allow(connection)
    await _directory(args[0])
