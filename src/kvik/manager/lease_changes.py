"""Leases that a machine is given, or gives back, while it runs.

A daemon that is killed in between leaves a lease that its VMM holds and the document does not name: it ends with that.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvik.conf.devices.other import Lease
from kvik.conf.devices_xml import add_device, remove_device
from kvik.conf.domain import Domain
from kvik.errors import AlreadyExists, NoDevice
from kvik.host.reach import reach
from kvik.host.threads import in_thread
from kvik.manager import sanlock
from kvik.manager.leases import take_leases

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["attach", "detach", "find_lease"]


def find_lease(document: Domain, wanted: Lease) -> Lease:
    """By lockspace and key."""
    for lease in document.devices.leases:
        if (lease.lockspace, lease.key) == (wanted.lockspace, wanted.key):
            return lease
    where = f" in lockspace '{wanted.lockspace}'" if wanted.lockspace else ""
    raise NoDevice(f"machine {document.name!r} has no lease '{wanted.key}'{where}")


async def attach(domain: DomainObject, lease: Lease) -> None:
    """Raises ResourceBusy where another machine holds it: then nothing has changed."""
    machine, run = domain.require_machine(), domain.run
    assert run is not None
    if any((each.lockspace, each.key) == (lease.lockspace, lease.key) for each in run.live.devices.leases):
        raise AlreadyExists(f"machine {domain.name!r} has lease '{lease.key}' already")
    trial = run.live.copy()
    add_device(trial.devices, lease)
    await domain.manager.driver_of(trial).validate(trial)
    if await reach(sanlock.is_sanlocks, lease):
        await in_thread(sanlock.acquire, lease, machine.pid)
    else:
        with ExitStack() as held:
            files = await take_leases([lease], domain.name, domain.uuid_text, held)
            await machine.attach_device(lease, files)
    if domain.run is run:
        add_device(run.live.devices, lease)
        domain.live_changed()
        await domain.save_status()


async def detach(domain: DomainObject, wanted: Lease) -> None:
    machine, run = domain.require_machine(), domain.run
    assert run is not None
    lease = find_lease(run.live, wanted)
    if await reach(sanlock.is_sanlocks, lease):
        await in_thread(sanlock.release, lease, machine.pid)
    else:
        await machine.detach_device(lease)
    if domain.run is run:
        remove_device(run.live.devices, lease)
        domain.live_changed()
        await domain.save_status()
