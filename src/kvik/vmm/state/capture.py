"""Everything of a machine but its RAM, as one value, and back.

    {"status": ..., "cpu": {"vm": ..., "vcpus": [...]}, "devices": {name: {"kind": ..., "state": ...}}}

Order of `apply`: interrupt chips and vCPUs first (`cpu.state` has the order within), devices behind them. A device that
interrupts because it was restored (the generation ID, a card that announces itself, a message that was pending) then
does so into the restored local APIC; the other way round that interrupt would be overwritten. Lines are driven once
more at the end: IOAPIC and devices agree on every level.
"""

from __future__ import annotations

import struct

from kvik.errors import KvikError, OperationFailed
from kvik.kvm.descriptor import KvmError
from kvik.vmm.cpu.state import restore_machine, save_machine
from kvik.vmm.faults import GuestFault
from kvik.vmm.state.values import Fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.machine import Machine

__all__ = ["MALFORMED", "apply", "capture", "check_devices"]

# What reading a state that somebody made up can raise in the code of a device or of the CPUs.
MALFORMED = (ValueError, KeyError, TypeError, IndexError, OverflowError, AttributeError, struct.error, GuestFault)


# One device to the guest: who reads and writes its image is the host's side, and may change between two runs.
_DISKS = {"virtio-blk", "vhost-user-blk"}


def capture(machine: Machine) -> dict[str, Any]:
    """The machine is paused."""
    devices = {name: {"kind": device.kind, "state": device.state()} for name, device in machine.devices.items()}
    cpu = save_machine(machine)
    for thread, vcpu in zip(machine.vcpus, cpu["vcpus"], strict=True):
        vcpu["index"] = thread.index  # there are gaps where processors left
    return {"status": machine.status, "cpu": cpu, "devices": devices}


def check_devices(machine: Machine, devices: dict[str, Any], where: str) -> None:
    """Both sides have the same devices, by name and kind."""
    missing = [name for name in devices if name not in machine.devices]
    extra = [name for name in machine.devices if name not in devices]
    if missing or extra:
        parts = [f"{', '.join(map(repr, missing))} only there"] if missing else []
        parts += [f"{', '.join(map(repr, extra))} only here"] if extra else []
        raise OperationFailed(
            f"{where} has other devices than this machine: {'; '.join(parts)}",
            remedy="give this machine the same devices, under the same ids",
        )
    for name, device in machine.devices.items():
        kind = Fields(devices[name], f"{where}: devices.{name}").text("kind")
        if kind != device.kind and not {kind, device.kind} <= _DISKS:
            raise OperationFailed(f"{where}: device {name!r} is a {kind[:40]} there, a {device.kind} here")


def apply(
    machine: Machine,
    state: dict[str, Any],
    where: str,
    *,
    identity: bool,
    catch_up: bool = False,
    same: bool = False,
) -> None:
    """Make the machine what `state` says; it is paused, its RAM is restored already.

    `identity`: its vCPUs have not run yet and take over CPUID and TSC frequency. `catch_up`: the guest's clock counts
    the time at rest. `same`: this is the machine that the state was taken of, gone back: its generation ID stays.
    """
    fields = Fields(state, where)
    devices = fields.object("devices")
    check_devices(machine, devices, where)
    try:
        restore_machine(machine, fields.object("cpu"), identity=identity, catch_up=catch_up)
    except KvmError as error:
        raise OperationFailed(f"{where}: cpu: this host's KVM refuses it: {error}") from error
    except MALFORMED as error:
        raise OperationFailed(f"{where}: cpu is damaged: {_text(error)}") from error
    for name, device in machine.devices.items():
        saved = Fields(devices[name], f"{where}: devices.{name}").object("state")
        try:
            if same and device.kind == "vmgenid":
                device.guid = Fields(saved, f"{where}: devices.{name}").blob("guid")  # type: ignore[attr-defined]  # in RAM it stands already
            else:
                device.restore(saved)
        except KvikError as error:
            raise OperationFailed(f"{where}: devices.{name}: {error}") from error
        except OSError as error:
            raise OperationFailed(f"{where}: devices.{name}: {error}") from error
        except MALFORMED as error:
            raise OperationFailed(f"{where}: devices.{name} is damaged: {_text(error)}") from error
    machine.interrupts.redrive()


def _text(error: BaseException) -> str:
    return f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
