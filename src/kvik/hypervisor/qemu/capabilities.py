"""What one QEMU binary can do: asked over QMP once, kept on disk under the binary's identity.

A probe starts the binary with no machine and no guest, never touches /dev/kvm (`-machine none,accel=tcg`), and takes
about 0.2 s. The cache file is named by path, device, inode, size and modification time of the binary, carries them
again inside, and is validated by type when read, so an upgraded binary or a damaged file is simply probed anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from kvik.errors import HostError, HypervisorError, KvikError
from kvik.host import files, process
from kvik.qmp.aio import QmpConnection

__all__ = ["MINIMUM_VERSION", "CpuModel", "MachineType", "QemuCapabilities", "QemuProber"]

# 6.2 has JSON syntax for -device and -netdev alike; older ones would need a second command line.
MINIMUM_VERSION = 6_002_000
_FORMAT = 5  # raise when the fields below change meaning
_DEADLINE = 15.0
_KEPT = 16  # cache files


class MachineType(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    alias: str = ""
    max_cpus: int = 1
    default_cpu: str = ""
    default_ram_id: str = ""
    is_default: bool = False
    deprecated: bool = False
    hotpluggable_cpus: bool = False


class CpuModel(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    typename: str = ""
    usable: bool = False  # under software emulation, which is what was asked
    blockers: tuple[str, ...] = ()
    deprecated: bool = False


class QemuCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """All facts are the binary's own; `version` is major * 1_000_000 + minor * 1_000 + micro."""

    binary: str
    identity: tuple[int, ...]
    format: int
    version: int
    package: str
    arch: str
    kvm: bool  # compiled in; says nothing of the host
    machines: tuple[MachineType, ...]
    devices: frozenset[str]
    objects: frozenset[str]
    cpus: tuple[CpuModel, ...]
    commands: frozenset[str]
    options: frozenset[str]
    tpm_models: frozenset[str]
    tpm_types: frozenset[str]
    screendump_format: bool
    io_uring: bool  # compiled in; says nothing of the host

    def machine(self, name: str) -> MachineType | None:
        """The machine type of this name or alias; "" gives the default one."""
        for machine in self.machines:
            if name in (machine.name, machine.alias) or (not name and machine.is_default):
                return machine
        return None

    def has(self, device: str) -> bool:
        return device in self.devices

    @property
    def version_text(self) -> str:
        return f"{self.version // 1_000_000}.{self.version // 1000 % 1000}.{self.version % 1000}"


def identity_of(binary: str) -> tuple[int, ...]:
    """Device, inode, size, and modification time in ns. Raises `HypervisorError` naming the package to install."""
    try:
        info = os.stat(binary)  # noqa: PTH116 - hot path
    except OSError as error:
        name = binary.rsplit("/", 1)[-1]
        package = {"qemu-system-x86_64": "qemu-system-x86", "kvm": "qemu-system-x86"}.get(name, "qemu-system")
        raise HypervisorError(
            f"cannot use {binary} as emulator: {error.strerror}", remedy=f"install it: apt install {package}"
        ) from error
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


class QemuProber:
    """Gives the capabilities of binaries: from memory, from disk, or by asking. Owned by the driver."""

    def __init__(self, cache_dir: Path) -> None:
        self._directory = cache_dir
        self._known: dict[str, QemuCapabilities] = {}
        self._probing = asyncio.Lock()

    async def capabilities(self, binary: str) -> QemuCapabilities:
        """Raises `HypervisorError`: no such binary, not a QEMU, or too old."""
        identity = identity_of(binary)
        known = self._known.get(binary)
        if known is None or known.identity != identity:
            async with self._probing:  # many calls at once ask one QEMU, not one each
                known = self._known.get(binary)
                if known is None or known.identity != identity:
                    known = self._load(binary, identity)
                    if known is None:
                        known = await probe(binary, identity, self._directory)
                        self._store(known)
                    self._known[binary] = known
        if known.version < MINIMUM_VERSION:
            wanted = f"{MINIMUM_VERSION // 1_000_000}.{MINIMUM_VERSION // 1000 % 1000}"
            raise HypervisorError(
                f"{binary} is QEMU {known.version_text}, which is too old", remedy=f"install QEMU {wanted} or newer"
            )
        return known

    def _file(self, binary: str, identity: tuple[int, ...]) -> Path:
        digest = hashlib.sha256(repr((binary, identity)).encode()).hexdigest()[:32]
        return self._directory / f"{digest}.json"

    def _load(self, binary: str, identity: tuple[int, ...]) -> QemuCapabilities | None:
        try:
            data = files.try_read_file(self._file(binary, identity))
            cached = msgspec.json.decode(data, type=QemuCapabilities) if data else None
        except (KvikError, msgspec.MsgspecError, ValueError):
            return None
        if cached is None or (cached.binary, cached.identity, cached.format) != (binary, identity, _FORMAT):
            return None
        return cached

    def _store(self, capabilities: QemuCapabilities) -> None:
        path = self._file(capabilities.binary, capabilities.identity)
        with contextlib.suppress(KvikError, OSError):  # a cache that cannot be written only costs time
            files.ensure_directory(self._directory)
            files.atomic_write(path, msgspec.json.encode(capabilities), durable=False)
            kept = sorted(self._directory.glob("*.json"), key=lambda item: item.stat().st_mtime_ns, reverse=True)
            for old in kept[_KEPT:]:
                old.unlink(missing_ok=True)


async def probe(binary: str, identity: tuple[int, ...], home: Path) -> QemuCapabilities:
    """Ask the binary itself. Raises `HypervisorError` with what it printed if it is no QEMU.

    `home` goes into its environment: a daemon that comes after one that was killed knows it by that.
    """
    ours, theirs = socket.socketpair()
    errors = os.memfd_create("kvik-qemu-probe", os.MFD_CLOEXEC)
    child = None
    connection = None
    try:
        ours.setblocking(False)
        argv = [
            *(binary, "-S", "-no-user-config", "-nodefaults", "-display", "none"),
            *("-machine", "none,accel=tcg"),
            *("-chardev", f"socket,id=monitor,fd={theirs.fileno()}"),
            *("-mon", "chardev=monitor,mode=control"),
        ]
        environment = {**process.BASE_ENVIRONMENT, "HOME": str(home)}
        child = process.spawn(argv, env=environment, stderr=errors, pass_fds=[theirs.fileno()])
        theirs.close()
        connection = await QmpConnection.open(ours, name=binary, deadline=_DEADLINE)
        return await _ask(connection, binary, identity)
    except KvikError as error:
        said = os.pread(errors, 2000, 0).decode("utf-8", "replace").strip()
        reason = f"{error.message}: {said}" if said else error.message
        raise HypervisorError(f"cannot learn what {binary} can do: {reason}") from error
    finally:
        if connection is not None:
            connection.close()
        ours.close()
        theirs.close()
        if child is not None:
            child.kill()
            with contextlib.suppress(HostError):
                await child.wait_async(5.0)
            child.close()
        os.close(errors)


async def _ask(connection: QmpConnection, binary: str, identity: tuple[int, ...]) -> QemuCapabilities:
    async def ask(command: str, **arguments: object) -> Any:
        return await connection.execute(command, arguments, deadline=_DEADLINE)

    commands = frozenset(item["name"] for item in await ask("query-commands"))
    major, minor, micro = connection.greeting.version
    try:
        types = await ask("qom-list-types", implements="device", abstract=False)
        devices = frozenset(item["name"] for item in types)
        objects = await ask("qom-list-types", implements="user-creatable", abstract=False)
        kvm = "query-kvm" in commands and bool((await ask("query-kvm"))["present"])
        raw = QemuCapabilities(
            binary=binary,
            identity=identity,
            format=_FORMAT,
            version=major * 1_000_000 + minor * 1000 + micro,
            package=connection.greeting.package,
            arch=(await ask("query-target"))["arch"],
            kvm=kvm,
            machines=tuple(map(_machine, await ask("query-machines"))),
            devices=devices,
            objects=frozenset(item["name"] for item in objects),
            cpus=tuple(map(_cpu, await ask("query-cpu-definitions"))),
            commands=commands,
            options=frozenset(item["option"] for item in await ask("query-command-line-options")),
            tpm_models=frozenset(await ask("query-tpm-models") if "query-tpm-models" in commands else ()),
            tpm_types=frozenset(await ask("query-tpm-types") if "query-tpm-types" in commands else ()),
            screendump_format=(major, minor) >= (7, 1),
            io_uring=_has_io_uring(await ask("query-qmp-schema")),
        )
        # Through the typed decoder: what the binary said is checked exactly as a cache file is.
        return msgspec.json.decode(msgspec.json.encode(raw), type=QemuCapabilities)
    except (KeyError, TypeError, AttributeError, msgspec.MsgspecError) as error:
        raise HypervisorError(f"a reply is not what QEMU's schema promises ({error})") from error


def _has_io_uring(schema: list[Mapping[str, Any]]) -> bool:
    """Whether BlockdevAioOptions of qapi/block-core.json has it. The schema hides types' names: members tell them."""
    members = (set(item["values"]) for item in schema if item["meta-type"] == "enum")
    return any({"threads", "native", "io_uring"} <= names for names in members)


def _machine(item: Mapping[str, Any]) -> MachineType:
    return MachineType(
        name=item["name"],
        alias=item.get("alias", ""),
        max_cpus=item["cpu-max"],
        default_cpu=item.get("default-cpu-type", ""),
        default_ram_id=item.get("default-ram-id", ""),
        is_default=item.get("is-default", False),
        deprecated=item.get("deprecated", False),
        hotpluggable_cpus=item.get("hotpluggable-cpus", False),
    )


def _cpu(item: Mapping[str, Any]) -> CpuModel:
    blockers = item.get("unavailable-features")
    return CpuModel(
        name=item["name"],
        typename=item.get("typename", ""),
        usable=blockers == [],
        blockers=tuple(blockers or ()),
        deprecated=item.get("deprecated", False),
    )
