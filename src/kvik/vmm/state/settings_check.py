"""A machine's configuration out of a snapshot: every member is what its class says, or the error names it.

And what of it the command line may replace: everything on the host's side of the machine.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument, OperationFailed
from kvik.vmm import config as c
from kvik.vmm.config import CLASSES, MachineConfig
from kvik.vmm.settings import annotation, fields_of, from_dict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["merge", "read_config"]

_PLAIN: dict[str, type] = {"int": int, "str": str, "bool": bool}
# Never out of a snapshot: they belong to one run of the process.
_OF_THE_RUN = (
    *("qmp", "gdb", "metrics", "paused", "incoming", "restore", "catch_up", "trace", "log"),
    *("sandbox", "migratable", "snapshots"),
)
_DEVICES = ("disks", "vhost_user_blk", "nets", "rng", "balloon", "vsock", "fs", "virtio_mem", "watchdog")
_CHARACTER = ("serials", "consoles", "channels", "debugcon")


def read_config(data: Any, where: str) -> MachineConfig:
    _check(MachineConfig, data, f"{where}: config")
    return from_dict(MachineConfig, data, CLASSES)


def _check(cls: type, data: Any, where: str) -> None:
    if not isinstance(data, dict):
        raise OperationFailed(f"{where} is damaged: it is no object")
    for name in fields_of(cls):
        if name in data:
            _check_value(annotation(cls, name), data[name], f"{where}.{name}")


def _check_value(written: str, value: Any, where: str) -> None:
    if written in CLASSES:
        _check(CLASSES[written], value, where)
        return
    inner = written.removeprefix("list[").removeprefix("tuple[").removesuffix("]").removesuffix(", ...")
    if inner == written:
        kind = _PLAIN[written]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise OperationFailed(f"{where} is damaged: {written} was expected, not {str(value)[:40]!r}")
    elif not isinstance(value, list):
        raise OperationFailed(f"{where} is damaged: a list was expected")
    else:
        for index, item in enumerate(value):
            _check_value(inner, item, f"{where}[{index}]")


def merge(saved: MachineConfig, given: MachineConfig) -> MachineConfig:
    """The saved machine with what the command line says otherwise. Changes and returns `saved`.

    A list of devices that is given replaces the saved one, item by item: names and PCI slots stay where the new item
    says nothing. A descriptor is only good in the process that had it, so what was one must be given anew.
    """
    default = MachineConfig()
    for name in _OF_THE_RUN:
        setattr(saved, name, getattr(given, name))
    for name in (*_DEVICES, *_CHARACTER):
        items = getattr(given, name)
        if items:
            _replace(name, getattr(saved, name), items)
    for name in ("name", "on_reboot", "on_poweroff", "on_panic", "boot"):
        if getattr(given, name) != getattr(default, name):
            setattr(saved, name, getattr(given, name))
    memory, size = saved.memory, given.memory.size
    if size not in (default.memory.size, memory.size):
        raise InvalidArgument(
            f"the saved machine has {memory.size >> 20} MiB of memory, not {size >> 20}", remedy="leave --memory out"
        )
    for name in ("shared", "hugepages", "prealloc"):
        if getattr(given.memory, name) != getattr(default.memory, name):
            setattr(memory, name, getattr(given.memory, name))
    if given.cpus not in (default.cpus, saved.cpus):
        raise InvalidArgument("the CPUs of a saved machine cannot change", remedy="leave --cpus and --cpu out")
    _check_descriptors(saved, given)
    return saved


def _replace(name: str, saved: list[Any], items: list[Any]) -> None:
    if len(items) != len(saved):
        raise InvalidArgument(
            f"the saved machine has {len(saved)} {name}, and {len(items)} were given",
            remedy="give all of them, in the same order, or none",
        )
    by_id = {item.id: index for index, item in enumerate(saved) if item.id}
    for number, item in enumerate(items):
        index = by_id.get(item.id, number)
        old = saved[index]
        item.id = item.id or old.id
        if not item.slot:
            item.slot = old.slot
        for guest in ("mac", "serial", "name", "cid", "tag"):  # what the guest knows of it
            if hasattr(item, guest) and not getattr(item, guest):
                setattr(item, guest, getattr(old, guest))
        if isinstance(item, c.DiskConfig) and not item.queues:
            item.queues = old.queues
        saved[index] = item


def _check_descriptors(saved: MachineConfig, given: MachineConfig) -> None:
    for name in (*_DEVICES, *_CHARACTER):
        if getattr(given, name):
            continue
        for index, item in enumerate(getattr(saved, name)):
            backend = str(getattr(item, "backend", ""))
            if getattr(item, "fd", -1) >= 0 or getattr(item, "fds", ()) or backend.startswith("fd="):
                raise InvalidArgument(
                    f"{item.id or f'number {index}'} of the saved machine's {name} was a descriptor of another process",
                    remedy="give it again, by descriptor or by path",
                )
    for name in ("kernel_fd", "initrd_fd", "firmware_fd", "nvram_fd"):
        if getattr(saved.boot, name) >= 0 and saved.boot is not given.boot:
            setattr(saved.boot, name, -1)  # only a reset would want it, and will say so
