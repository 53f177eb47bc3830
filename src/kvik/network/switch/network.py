"""The session's network `default` as all that speaks of networks sees it: listed, described, its leases told.

Its process comes with the first machine and goes after the last, so there is nothing to start or to stop. It counts as
active where passt is installed: without a way out it is nothing to put a machine on that did not ask for it. Who wants
it for machines among themselves starts it. What cannot be changed is refused by name.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import NAMESPACE_DNS, uuid5

from kvik.conf.enums import NetworkEventLifecycleType
from kvik.conf.network import parse_network
from kvik.errors import OperationUnsupported
from kvik.host.process import find_program
from kvik.network.dnsmasq import LeaseEntry
from kvik.network.network import NetworkObject
from kvik.network.switch.session import DEFAULT

if TYPE_CHECKING:
    from kvik.network.networks import Networks
    from kvik.network.switch.session import SessionNetworks

__all__ = ["SwitchNetwork"]

_UUID = uuid5(NAMESPACE_DNS, "default.session.kvik")  # the same in each session: it is the same network
_XML = f"""<network>
  <name>{DEFAULT["name"]}</name>
  <uuid>{_UUID}</uuid>
  <forward mode='nat'/>
  <mac address='{DEFAULT["mac"]}'/>
  <ip address='{DEFAULT["ip"]}' prefix='{DEFAULT["prefix"]}'>
    <dhcp><range start='{DEFAULT["range"][0]}' end='{DEFAULT["range"][1]}'/></dhcp>
  </ip>
</network>"""


class SwitchNetwork(NetworkObject):
    built_in = True

    def __init__(self, networks: Networks, session: SessionNetworks) -> None:
        super().__init__(networks, parse_network(_XML), persistent=True)
        self.autostart = True
        self._session = session
        self._active = find_program("passt") is not None

    @property
    def is_active(self) -> bool:
        return self._active

    def leases(self, mac: str | None = None) -> list[LeaseEntry]:
        """Blocks for about a millisecond. Empty while no machine runs."""
        now = time.time()
        found = [
            LeaseEntry("", int(now + item["expires"]), item["ip"], item["prefix"], item["mac"], item["hostname"])
            for item in self._session.leases(self.name)
        ]
        return [lease for lease in found if mac is None or lease.mac == mac.lower()]

    async def start(self) -> bool:
        if self._active:
            return False
        self._active = True
        self._networks.emit(self, NetworkEventLifecycleType.STARTED)
        return True

    async def check(self) -> None:
        """Nothing of it is in the host's network."""

    @asynccontextmanager
    async def job(self, name: str) -> AsyncIterator[None]:
        raise OperationUnsupported(
            f"cannot {name} network {self.name!r}: a session's network is there as long as its machines are",
            remedy="the system's daemon (root) has networks that can be changed",
        )
        yield
