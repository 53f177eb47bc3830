"""From a document somebody wrote to one that can be kept: parsed, completed by the driver, defaults, checked.

The driver comes before the defaults: which buses and addresses there are depends on the machine type it fixes.
"""

from __future__ import annotations

from kvik.conf.aliases import USER_PREFIX, assign_aliases
from kvik.conf.cpu import Vcpu
from kvik.conf.devices_xml import guest_devices
from kvik.conf.domain import Domain, parse_domain
from kvik.conf.machine import MachineDefaults
from kvik.conf.postparse import new_uuid, postparse
from kvik.conf.prepare import located
from kvik.conf.validate import validate
from kvik.errors import ConfigError, InvalidArgument
from kvik.hypervisor.driver import Driver
from kvik.hypervisor.layers import forget_live
from kvik.manager.states import check_actions
from kvik.manager.store import check_name

__all__ = ["complete", "default_vcpu", "fill", "fill_live", "forget_run", "parse"]

_DEFAULTS = MachineDefaults()
_LIVE_DEFAULTS = MachineDefaults(spare_root_ports=0)  # no new slots can be had while the machine runs


def default_vcpu() -> Vcpu:
    return Vcpu(value=1)


def parse(xml: str | bytes) -> Domain:
    """The document with a name that may be a file's. `ConfigError` with line and path."""
    domain = parse_domain(xml)
    with located(xml):
        try:
            check_name(domain.name)
        except InvalidArgument as error:
            raise ConfigError(error.message, path="/domain/name", remedy=error.remedy) from error
        check_actions(domain.on_poweroff, domain.on_reboot, domain.on_crash)
    return domain


async def complete(domain: Domain, driver: Driver, xml: str | bytes = "") -> None:
    """Everything that was left out is filled in and fixed for good, then checked. `xml` is for lines in errors."""
    with located(xml):
        domain.uuid = domain.uuid or new_uuid(_DEFAULTS)
        await driver.complete(domain)
        fill(domain)
        await driver.validate(domain)


def fill(domain: Domain) -> None:
    """The defaults that need no VMM, and the checks that need no host; what only a running machine has goes."""
    forget_run(domain)
    postparse(domain, _DEFAULTS)
    validate(domain)
    check_actions(domain.on_poweroff, domain.on_reboot, domain.on_crash)


def forget_run(domain: Domain) -> None:
    """What only a running machine has: its id, the numbers of its images, its devices' names."""
    domain.id = None
    for disk in domain.devices.disks:
        forget_live(disk)
    for _, device in guest_devices(domain.devices):
        if device.alias is not None and not device.alias.name.startswith(USER_PREFIX):
            device.alias = None


def fill_live(domain: Domain) -> None:
    """The same for a running machine's document, whose devices keep their places and have aliases."""
    postparse(domain, _LIVE_DEFAULTS)
    assign_aliases(domain)
    validate(domain)
