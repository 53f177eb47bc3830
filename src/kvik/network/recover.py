"""What happens to networks when the daemon comes back: found again, put right, or taken away.

| status          | the bridge     | then                                                              |
|-----------------|----------------|-------------------------------------------------------------------|
| of another boot |                | inactive: what it made went with that boot                         |
| starting        |                | nobody was told of it: what is there of it is taken away           |
| stopping        |                | it was to go: the rest is taken away                               |
| active          | there          | active; packet filter and dnsmasq are put back where they are gone |
| active          | gone, or not ours | inactive; the rest is taken away                                |
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from kvik.conf.network import Network, format_network, parse_network
from kvik.conf.network_status import NetworkStatus
from kvik.errors import HostError, KvikError
from kvik.host import files
from kvik.network.network import NetworkObject
from kvik.network.store import Loaded

if TYPE_CHECKING:
    from kvik.network.networks import Networks

logger = logging.getLogger(__name__)

AUTOSTARTED = "autostarted"  # in the status directory: the id of the boot whose autostart is done


async def recover(networks: Networks) -> None:
    loaded = await networks.run(networks.store.load)
    networks.warnings += loaded.warnings
    for name, text in loaded.documents:
        await _load(networks, name, text, loaded)
    for status in loaded.statuses:
        try:
            await _recover_one(networks, status)
        except Exception as error:
            # One network that cannot be recovered must not keep the others, or the daemon, from coming up.
            logger.exception("network %s", status.document.name)
            networks.warnings.append(f"network {status.document.name!r} could not be recovered: {error}")


async def _load(networks: Networks, name: str, text: str, loaded: Loaded) -> None:
    try:
        document = parse_network(text)
        document.name = document.name or name
        if document.name != name:
            raise KvikError(f"its file is named {name!r} but its <name> is {document.name!r}")
        written = format_network(document, inactive=True)
        taken = {other.bridge_name for other in networks.list() if other.bridge_name}
        networks.complete(document, taken)
        if format_network(document, inactive=True) != written:  # written by hand: what was left out is fixed from now
            await networks.run(networks.store.save, name, format_network(document, inactive=True))
        network = NetworkObject(networks, document, persistent=True)
        other = next((each for each in networks.list() if each.uuid == network.uuid), None)
        if other is not None:
            raise KvikError(f"network {other.name!r} has the same UUID")
    except KvikError as error:
        networks.warnings.append(networks.store.set_aside(name, str(error)))
        return
    network.autostart = name in loaded.autostart
    networks.add(network)


async def _recover_one(networks: Networks, status: NetworkStatus) -> None:
    document, name = status.document, status.document.name
    origin = status.origin
    if origin is None or origin.boot != networks.store.boot:
        await networks.run(networks.store.remove_status, name)
        return
    runtime = networks.runtime(document, persistent=origin.persistent is not False, status=status)
    if origin.state != "active":
        await networks.run(runtime.clean)
        networks.warn(f"network {name!r} was {origin.state} when the daemon was stopped: what was left is taken away")
        return
    try:
        there = await networks.run(runtime.reattach)
    except KvikError as error:  # dnsmasq is missing, say: the network is there, and says what it lacks
        network = _object(networks, document)
        network.adopt(runtime)
        network.warn(str(error))
        return
    if not there:
        await networks.run(runtime.clean)
        networks.warn(f"network {name!r} is not active any more: its bridge {document.bridge_name} is gone")
        return
    _object(networks, document).adopt(runtime)


def _object(networks: Networks, document: Network) -> NetworkObject:
    """The network that this live document is of; a transient one is made up from it."""
    with suppress(KvikError):
        return networks.lookup_name(document.name)
    network = NetworkObject(networks, document.copy(), persistent=False)
    networks.add(network)
    return network


async def autostart(networks: Networks) -> None:
    """Start what starts with the host, once per boot of it, however often the daemon is restarted."""
    marker, boot = networks.store.status / AUTOSTARTED, networks.store.boot.encode()
    with suppress(HostError):
        if await networks.run(files.try_read_file, marker, limit=256) == boot:
            return
    for network in networks.list():
        if network.autostart and not network.is_active:
            if lack := networks.lacks(network.definition):
                logger.info("network %s is not started automatically: %s", network.name, lack)
                continue
            try:
                await network.start()
            except KvikError as error:
                networks.warn(f"network {network.name!r} was not started automatically: {error}")
    with suppress(HostError):
        await networks.run(files.atomic_write, marker, boot, durable=False)
