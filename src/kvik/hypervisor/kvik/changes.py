"""What changes in a running kvik-vmm without a device coming or going: limits, links, figures; and what is set so
before its first instruction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvik.conf.devices.disk import Disk, IoTune
from kvik.conf.devices.interface import Interface
from kvik.conf.devices.memory import Memballoon, Memory
from kvik.errors import OperationUnsupported
from kvik.hypervisor import cpus
from kvik.hypervisor.changes import check_disk, check_interface
from kvik.hypervisor.kvik import support
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.sidecars import kvik_blk, storage_daemon

if TYPE_CHECKING:
    from kvik.hypervisor.kvik.machine import KvikMachine

__all__ = ["start_settings", "throttle", "update"]

Props = dict[str, Any]


async def update(machine: KvikMachine, old: Any, new: Any) -> None:
    """Changes what can be changed while the guest runs. Raises `OperationUnsupported` for the rest, and
    `ConfigUnsupported` for what kvik-vmm never has."""
    support.check_device(new)
    if isinstance(new, Disk) and isinstance(old, Disk):
        check_disk(old, new)
        if old.iotune is not None or new.iotune is not None:
            await throttle(machine, new, new.iotune or IoTune())
    elif isinstance(new, Interface) and isinstance(old, Interface):
        check_interface(old, new)
        up = new.link is None or new.link.state == "up"
        await machine.execute("set_link", {"name": alias_of(new), "up": up})
    elif isinstance(new, Memballoon):
        await machine.tell_balloon_period(new)
    elif isinstance(new, Memory) and isinstance(old, Memory):
        await machine.request_memory(old, new)
    else:
        raise OperationUnsupported(
            f"a {type(new).__name__.lower()} cannot be changed while machine {machine.name} runs",
            remedy="change the definition (--config) and start the machine again",
        )


async def throttle(machine: KvikMachine, disk: Disk, tune: IoTune) -> None:
    """Bytes and requests a second, reads and writes together; 0: no limit. Its daemon's, for a disk that has one."""
    if machine.served(disk) and machine.storage_kind(disk) == kvik_blk.KIND:
        await machine.ask_storage(disk, "block_set_io_throttle", kvik_blk.throttle(disk, tune))
        return
    if machine.served(disk):
        group = {"path": f"/objects/{storage_daemon.limits_name(alias_of(disk))}", "property": "limits"}
        await machine.ask_storage(disk, "qom-set", group | {"value": storage_daemon.limits(tune)})
        return
    arguments: Props = {"id": alias_of(disk), "bps_rd": 0, "bps_wr": 0, "iops_rd": 0, "iops_wr": 0}
    arguments |= {"bps": tune.total_bytes_sec or 0, "iops": tune.total_iops_sec or 0}
    if tune.total_bytes_sec_max:
        arguments["bps_max"] = tune.total_bytes_sec_max
    if tune.total_iops_sec_max:
        arguments["iops_max"] = tune.total_iops_sec_max
    await machine.execute("block_set_io_throttle", arguments)


async def start_settings(machine: KvikMachine) -> None:
    """Before the first instruction: what is no option of the command line."""
    domain = machine.domain
    await cpus.plug_listed(machine)
    balloon = domain.devices.memballoon
    if balloon is not None and balloon.model != "none":
        if balloon.stats is not None:
            await machine.tell_balloon_period(balloon)
        if domain.current_memory and domain.current_memory < domain.memory:
            await machine.set_balloon(domain.current_memory * 1024)
