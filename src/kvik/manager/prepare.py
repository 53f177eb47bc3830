"""From a document somebody wrote to one that can be kept: parsed, completed by the driver, defaults, checked."""

from __future__ import annotations

import importlib
import random
import uuid

from kvik.conf.cpu import Vcpu
from kvik.conf.domain import Domain, parse_domain
from kvik.errors import ConfigError, InvalidArgument
from kvik.hypervisor.driver import Driver
from kvik.manager.states import check_actions
from kvik.manager.store import check_name

ARCHITECTURE = "x86_64"


def default_vcpu() -> Vcpu:
    return Vcpu(value=1)


def parse(xml: str | bytes) -> Domain:
    """The document with a name that may be a file's. `ConfigError` with line and path."""
    domain = parse_domain(xml)
    try:
        check_name(domain.name)
    except InvalidArgument as error:
        raise ConfigError(error.message, path="/domain/name", remedy=error.remedy) from error
    check_actions(domain.on_poweroff, domain.on_reboot, domain.on_crash)
    return domain


async def complete(domain: Domain, driver: Driver) -> None:
    """Everything that was left out is filled in and fixed for good, then checked."""
    if domain.os.type.arch is None:
        domain.os.type.arch = ARCHITECTURE
    await driver.complete(domain)
    fill(domain)
    await driver.validate(domain)


def fill(domain: Domain) -> None:
    """The defaults that need no VMM, and the checks that need no host."""
    try:
        postparse = importlib.import_module("kvik.conf.postparse")
        validate = importlib.import_module("kvik.conf.validate")
    except ImportError:
        _fill_meanwhile(domain)
        return
    postparse.postparse(domain, postparse.MachineDefaults())
    validate.validate(domain)


def _fill_meanwhile(domain: Domain) -> None:
    if domain.uuid is None:
        domain.uuid = str(uuid.UUID(int=random.getrandbits(128), version=4))
    if domain.vcpu is None:
        domain.vcpu = default_vcpu()
    counts: dict[str, int] = {}
    from kvik.conf.devices.common import Alias
    from kvik.conf.devices_xml import guest_devices

    for path, device in guest_devices(domain.devices):
        kind = path.split("[")[0]
        number = counts.get(kind, 0)
        counts[kind] = number + 1
        if device.alias is None:
            device.alias = Alias(name=f"{kind}{number}")


def name_devices(domain: Domain) -> None:
    """Aliases for the devices that have none."""
    try:
        aliases = importlib.import_module("kvik.conf.aliases")
    except ImportError:
        return
    aliases.assign_aliases(domain)
