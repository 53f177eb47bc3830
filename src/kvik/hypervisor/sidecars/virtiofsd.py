"""virtiofsd(1): a directory of the host as a virtio file system.

    <filesystem type='mount'><driver type='virtiofs'/><source dir='/srv'/><target dir='tag'/></filesystem>

It reads and writes the guest's memory itself, so that has to be shared memory. Two programs bear the name: QEMU's own
(up to version 7.2, in C) and its successor in Rust; their options differ.
"""

from __future__ import annotations

import re
from pathlib import Path

from kvik.conf.devices.other import Filesystem, FilesystemBinary
from kvik.conf.domain import Domain
from kvik.errors import ConfigError, ConfigUnsupported
from kvik.host import tools
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.sidecars.group import Command, program

__all__ = ["check", "ours", "shares", "virtiofsd_command"]

_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")
_REMEDY = "add <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"


def shares(domain: Domain) -> list[Filesystem]:
    """Those that need a virtiofsd of ours: not those whose document names the socket of another one."""
    return [item for item in domain.devices.filesystems if ours(item)]


def ours(share: Filesystem) -> bool:
    return share.driver is not None and share.driver.type == "virtiofs" and not (share.source and share.source.socket)


def check(domain: Domain) -> None:
    """Raises `ConfigUnsupported`, `ConfigError`."""
    for item in domain.devices.filesystems:
        if item.driver is None or item.driver.type != "virtiofs":
            continue
        path = "/domain/devices/filesystem"
        if not _shared(domain):
            raise ConfigUnsupported(
                "virtiofs needs guest memory that another process can share", path=path, remedy=_REMEDY
            )
        if item.source is None or not (item.source.dir or item.source.socket):
            raise ConfigError("virtiofs needs a <source dir=...> (or socket=...)", path=path)
        if item.idmap is not None:
            raise ConfigUnsupported("virtiofs with <idmap> is not supported yet", path=path)
        if item.accessmode not in (None, "passthrough"):
            raise ConfigUnsupported(f"virtiofs has no access mode {item.accessmode!r}", path=path)


def _shared(domain: Domain) -> bool:
    backing = domain.memory_backing
    if backing is not None and backing.access is not None and backing.access.mode == "shared":
        return True
    cells = domain.cpu.numa.cells if domain.cpu is not None and domain.cpu.numa is not None else []
    return bool(cells) and all(cell.mem_access == "shared" for cell in cells)


async def virtiofsd_command(device: Filesystem, listening: int) -> Command:
    """`listening` is a socket on which it takes its one connection. Raises `MissingPackages`, `ConfigError`."""
    assert device.source is not None and device.source.dir
    directory = device.source.dir
    if not Path(directory).is_dir():
        raise ConfigError(f"the shared directory {directory} does not exist", path="/domain/devices/filesystem/source")
    described = device.binary or FilesystemBinary()
    path = described.path or program("virtiofsd", others=_PLACES)
    answer = await tools.run_async([path, "--version"], check=False, timeout=10.0)
    options = _successor if re.match(r"virtiofsd (backend )?\d", answer.text) else _first
    argv = [path, f"--fd={listening}", *options(described, directory, device.readonly)]
    if described.thread_pool is not None:
        argv.append(f"--thread-pool-size={described.thread_pool.size}")
    if described.openfiles is not None:
        argv.append(f"--rlimit-nofile={described.openfiles.max}")
    return Command("virtiofsd", alias_of(device), argv, (listening,))


def _first(described: FilesystemBinary, directory: str, readonly: bool) -> list[str]:
    if readonly:
        raise ConfigUnsupported(
            "this virtiofsd cannot share read-only", path="/domain/devices/filesystem/readonly",
            remedy="mount the directory read-only on the host and share that",
        )  # fmt: skip
    escaped = directory.replace("\\", "\\\\").replace(",", "\\,")
    words = [f"source={escaped}"]
    if described.cache is not None and described.cache.mode is not None:
        words.append(f"cache={described.cache.mode}")
    if described.sandbox is not None and described.sandbox.mode is not None:
        words.append(f"sandbox={described.sandbox.mode}")
    if described.xattr is not None:
        words.append("xattr" if described.xattr else "no_xattr")
    if described.lock is not None:
        for name, state in (("posix_lock", described.lock.posix), ("flock", described.lock.flock)):
            if state is not None:
                words.append(name if state else f"no_{name}")
    return ["-f", "-o", ",".join(words)]


def _successor(described: FilesystemBinary, directory: str, readonly: bool) -> list[str]:
    argv = [f"--shared-dir={directory}"]
    if described.cache is not None and described.cache.mode is not None:
        argv.append(f"--cache={'never' if described.cache.mode == 'none' else described.cache.mode}")
    if described.sandbox is not None and described.sandbox.mode is not None:
        argv.append(f"--sandbox={described.sandbox.mode}")
    if described.xattr:
        argv.append("--xattr")
    if described.lock is not None and (described.lock.posix or described.lock.flock):
        raise ConfigUnsupported("this virtiofsd has no locks of its own", path="/domain/devices/filesystem/binary")
    if readonly:
        argv.append("--readonly")
    return argv
