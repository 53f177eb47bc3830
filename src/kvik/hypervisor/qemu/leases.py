"""Locks that a running QEMU is given to hold, and gives back: descriptors by name, which outlive the monitor's client.

(Not in an fdset: QEMU closes those when nobody uses them and no client is there.)
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from kvik.conf.devices.other import Lease
from kvik.errors import MonitorError, OperationUnsupported

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = ["hold", "let_go"]


async def hold(machine: QemuMachine, lease: Lease, fd: int) -> None:
    await machine.execute("getfd", {"fdname": _label(lease)}, fds=[fd])


async def let_go(machine: QemuMachine, lease: Lease) -> None:
    """OperationUnsupported for one that it has from its start on: that descriptor has no name."""
    try:
        await machine.execute("closefd", {"fdname": _label(lease)})
    except MonitorError as error:
        raise OperationUnsupported(
            f"machine {machine.name!r} has lease '{lease.key}' from its start on, and keeps it until it ends",
            remedy="take it from the definition (--config) and start the machine anew",
        ) from error


def _label(lease: Lease) -> str:
    return "lease-" + hashlib.sha256(f"{lease.lockspace or ''}\n{lease.key}".encode()).hexdigest()[:32]
