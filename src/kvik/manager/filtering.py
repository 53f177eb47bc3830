"""Network filters on the interfaces of machines: put on before the VMM has the tap, taken off when it is gone."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from kvik.conf.devices.interface import Interface
from kvik.conf.nwfilter import FilterBinding, FilterReference, Parameter
from kvik.errors import ConfigError, KvikError

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager

__all__ = ["changed", "follow", "protector", "release", "repair"]

logger = logging.getLogger(__name__)


def protector(domain: DomainObject) -> Callable[[Interface], None]:
    """For each tap that is made, with its name in the interface's target: the filter that the document asks for, or
    none at all, whatever an earlier interface of that name had. Raises as `Filters.bind`."""

    def protect(interface: Interface) -> None:
        filters = domain.manager.filters
        device = (interface.target and interface.target.dev) or ""
        if interface.filterref is None:
            filters.release(device)
            return
        if interface.mac is None:
            raise ConfigError("an interface with a filter needs a MAC address", path="/domain/devices/interface/mac")
        filters.bind(
            FilterBinding(
                owner_name=domain.name,
                owner_uuid=domain.uuid_text,
                portdev=device,
                mac=interface.mac.address.lower(),
                reference=FilterReference(
                    filter=interface.filterref.filter,
                    parameters=[Parameter(name=one.name, value=one.value) for one in interface.filterref.parameters],
                ),
            )
        )

    return protect


@asynccontextmanager
async def changed(domain: DomainObject, old: object, new: object) -> AsyncIterator[None]:
    """A running interface gets the filter of its new description; on an error in the block it has the old one again."""
    if not isinstance(old, Interface) or not isinstance(new, Interface) or old.filterref == new.filterref:
        yield
        return
    protect, run = protector(domain), domain.manager.store.run
    await run(protect, new)
    try:
        yield
    except BaseException:
        await run(protect, old)
        raise


async def follow(domain: DomainObject, interface: Interface) -> None:
    """Its tap is on another bridge, or that has other addresses: an allow-list by name has to do with those of the
    gateway. Raises as `Filters.bind`."""
    if interface.filterref is not None:
        await domain.manager.store.run(protector(domain), interface)


async def release(domain: DomainObject, interfaces: Iterable[Interface]) -> None:
    """What these had, if the device's name is not another machine's by now."""
    manager = domain.manager
    for interface in interfaces:
        if interface.filterref is not None and interface.target and interface.target.dev:
            try:
                await manager.store.run(manager.filters.release, interface.target.dev, domain.uuid_text)
            except KvikError as error:  # the interface is gone; its rules go with the next one of that name
                logger.warning("machine %s: filter of %s: %s", domain.name, interface.target.dev, error)


async def repair(manager: Manager) -> None:
    """A table of the host's packet filter is gone: perhaps ours among them."""
    try:
        if await manager.store.run(manager.filters.repair):
            logger.warning("somebody flushed the host's packet filter: the rules of network filters were put back")
    except KvikError as error:
        logger.error("the rules of network filters are gone and could not be put back: %s", error)
