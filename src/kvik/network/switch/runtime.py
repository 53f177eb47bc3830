"""An active network of a session, as `NetworkObject` knows it: what `network/runtime.py` is for the host's networks.

Nothing of it is in the host's network. Its process comes with its first machine (`session.py`), so to start a network
is to say in its status file that there may be machines on it, and costs next to nothing.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Literal

from kvik.conf.network_status import NetworkStatus, Origin
from kvik.network.dnsmasq import LeaseEntry
from kvik.network.switch.document import switch_settings

if TYPE_CHECKING:
    from kvik.conf.network import Network
    from kvik.host.process import ProcessHandle
    from kvik.network.store import Store
    from kvik.network.switch.session import SessionNetworks

__all__ = ["SwitchRuntime"]


class SwitchRuntime:
    """Its methods are those of `network.runtime.Runtime`, and block for milliseconds."""

    def __init__(
        self,
        store: Store,
        switches: SessionNetworks,
        document: Network,
        *,
        persistent: bool,
        status: NetworkStatus | None = None,
    ) -> None:
        self.store = store
        self.document = document
        self.persistent = persistent
        self.active = False
        self.ending = threading.Event()
        self.found: list[str] = []  # nothing of the host's is in its way
        self.parts: dict[str, str] = {}  # nor does it stand on any
        self.status = status or NetworkStatus()
        self._switches = switches

    @property
    def handle(self) -> ProcessHandle | None:
        """None: `SessionNetworks.look_after` sees by itself when a switch has ended."""
        return None

    def start(self) -> None:
        """Raises `ConfigUnsupported`, `ResourceBusy` (another active network has its subnet), `HostError`."""
        name = self.document.name
        self._switches.activate(name, switch_settings(self.document))
        try:
            self.note()
        except BaseException:
            self._switches.deactivate(name)
            raise
        self.active = True

    def stop(self) -> None:
        """Its machines lose the network. The status goes last: what a daemon that is killed before leaves is found."""
        self._save("stopping")
        self._switches.deactivate(self.document.name)
        self.store.remove_status(self.document.name)
        self.active = False

    def clean(self) -> None:
        """Take away what a daemon left that was killed while it stopped the network."""
        self._switches.deactivate(self.document.name)
        self.store.remove_status(self.document.name)

    def reattach(self) -> bool:
        self._switches.activate(self.document.name, switch_settings(self.document))
        self.active = True
        return True

    def check(self) -> bool:
        return True

    def missing(self) -> list[str]:
        return []

    @property
    def is_served(self) -> bool:
        return False

    def serve(self) -> None:
        pass

    def keep_floors(self) -> None:
        """A switch keeps no rates, so none of a part of one: documents with `<bandwidth>` are refused."""

    def change(self, document: Network) -> None:
        """Make the live network what `document` says; on an error it is what it was."""
        before = self.document
        self._switches.change(document.name, switch_settings(document))
        self.document = document
        try:
            self.note()
        except BaseException:
            self.document = before
            self._switches.change(document.name, switch_settings(before))
            raise

    def note(self) -> None:
        """Write the status anew: something that it says has changed."""
        self._save("active")

    def _save(self, state: Literal["active", "stopping"]) -> None:
        self.status.network = self.document
        self.status.origin = Origin(state=state, boot=self.store.boot, persistent=self.persistent)
        self.store.save_status(self.status)

    def leases(self) -> list[LeaseEntry]:
        """Empty while no machine is on it."""
        now = time.time()
        return [
            LeaseEntry("", int(now + item["expires"]), item["ip"], item["prefix"], item["mac"], item["hostname"])
            for item in self._switches.leases(self.document.name)
        ]
