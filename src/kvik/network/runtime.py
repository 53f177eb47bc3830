"""An active network on this host: made, updated, checked and taken away. Everything here blocks.

    status file "starting" -> bridge, addresses, forwarding -> packet filter -> dnsmasq -> status file "active"

Each step is undone if a later one fails. A daemon that is killed on the way leaves a status that says "starting", and
the next one takes away what it names.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

from kvik.conf.devices.common import pci_address
from kvik.conf.network import ForwardInterface, Network
from kvik.conf.network_status import NetworkStatus, Origin
from kvik.errors import ConfigUnsupported, HostError, KvikError, OperationInvalid, ResourceBusy
from kvik.host import firewalld, nftables, sriov
from kvik.host.bridge import set_bridge
from kvik.host.netlink import Netlink
from kvik.host.process import ProcessHandle
from kvik.network import floors, nat
from kvik.network.bridge import add_routes, find_bridge, is_ours, make_bridge, remove_bridge, set_forwarding
from kvik.network.dnsmasq import Dnsmasq, LeaseEntry, is_needed
from kvik.network.mtu import mismatches
from kvik.network.parts import missing, parts
from kvik.network.store import Store
from kvik.network.subnet import refuse_taken

__all__ = ["Runtime"]

logger = logging.getLogger(__name__)
State = Literal["starting", "active", "stopping"]

PAUSES = (0.02, 0.05, 0.1)  # seconds until a start that met another's is tried again
BRIDGES = ("bridge", "openvswitch")  # kinds of interface that other interfaces can be ports of


class Runtime:
    """One active network, or one that is about to be."""

    def __init__(
        self, store: Store, document: Network, *, persistent: bool, status: NetworkStatus | None = None
    ) -> None:
        self.store = store
        self.document = document
        self.persistent = persistent
        self.active = False
        self.ending = threading.Event()  # what only looks at the network is to stop
        self.status = status or NetworkStatus()
        self.found: list[str] = []  # what a start saw that keeps the network from working well
        self.parts: dict[str, str] = {}  # interfaces of the host that it stands on, and what they are to it
        self.dnsmasq = Dnsmasq(document.name, store.data, store.status)

    @property
    def handle(self) -> ProcessHandle | None:
        """The process that serves the network, if one does: who wants to be told of its end asks it."""
        return self.dnsmasq.handle

    def leases(self) -> list[LeaseEntry]:
        return self.dnsmasq.leases(self.document)

    # start

    def start(self) -> None:
        """Make it. On an error nothing of it stays."""
        _check_zone(self.document)
        for pause in (*PAUSES, None):
            try:
                self._start()
                return
            except _Overtaken as error:
                if pause is None:
                    raise error.cause from None
                time.sleep(pause * random.uniform(0.5, 1.5))

    def _start(self) -> None:
        document = self.document
        with Netlink() as netlink, ExitStack() as undo:  # the undo steps talk over this netlink
            if document.owns_bridge:
                refuse_taken(netlink, document)
            undo.callback(_quietly, self.store.remove_status, document.name)
            self._save("starting")
            if document.owns_bridge:
                link = make_bridge(netlink, document, undo, str(self.store.status))
                _refuse_overtaken(netlink, document, link.index)
                undo.callback(_quietly, self._leave_zone)
                self._join_zone()
                if nat.needs_table(document):
                    undo.callback(_quietly, self._remove_filter)
                    self.install_filter()
                set_forwarding(document)
                if is_needed(document):
                    self.dnsmasq.write(document)
                    undo.callback(_quietly, self.dnsmasq.stop_strays)
                    self.dnsmasq.start()
                add_routes(netlink, document, link.index)
                self.found = mismatches(netlink, document, link)
            else:
                _fill_pool(document)
                self.found = _check_parts(netlink, document)
            self.parts = parts(netlink, document)
            for text in missing(netlink, self.parts):
                logger.warning("network %s: %s", document.name, text)
            self._save("active")
            undo.pop_all()
        self.active = True

    def _save(self, state: State) -> None:
        self.status.network = self.document
        self.status.origin = Origin(state=state, boot=self.store.boot, persistent=self.persistent)
        self.store.save_status(self.status)

    def note(self) -> None:
        """Write the status anew: something that it says has changed."""
        self._save("active")

    def _join_zone(self) -> None:
        """firewalld's rules for the bridge are those of its zone."""
        if self.document.bridge is not None and self.document.bridge.zone is not None:
            firewalld.set_zone(self.document.bridge.zone, self.document.bridge_name or "")

    def _leave_zone(self) -> None:
        """firewalld remembers an interface that is gone: the next one by that name would be in the zone."""
        if self.document.bridge is not None and self.document.bridge.zone is not None:
            firewalld.unset_zone(self.document.bridge.zone, self.document.bridge_name or "")

    def keep_floors(self) -> None:
        """The bridge's traffic classes as the status has them, and that on disk first: what is made can be found."""
        self.note()
        with Netlink() as netlink:
            link = find_bridge(netlink, self.document.bridge_name or "")
            if link is not None and is_ours(link, self.document):
                floors.keep(netlink, link.index, self.status)

    def install_filter(self) -> None:
        """The packet filter as the document has it, whatever is there of it."""
        # To delete what is not there costs 10 ms: the kernel waits until no packet is in the old rules any more.
        nftables.run(nat.install(self.document) if self._has_filter() else nat.add(self.document))

    def _has_filter(self) -> bool:
        name = nat.table_name(self.document.bridge_name or "")
        return any(table.get("table", {}).get("name") == name for table in nftables.run([{"list": {"tables": None}}]))

    def _remove_filter(self) -> None:
        nftables.run(nat.remove(self.document.bridge_name or ""))

    # stop

    def stop(self) -> None:
        """Take everything away. What cannot be taken away is tried to the end, then the first error is raised."""
        errors: list[KvikError] = []
        _collect(errors, lambda: self._save("stopping"))
        if self.document.owns_bridge:
            _collect(errors, self.dnsmasq.stop)
            self._take_away(errors)
        if errors:
            raise errors[0]
        if not self.persistent:
            _quietly(self.dnsmasq.forget)  # nobody comes back for its leases
        self.store.remove_status(self.document.name)
        self.active = False

    def clean(self) -> None:
        """Take away what a killed daemon left, as far as its status says it was to be made."""
        errors: list[KvikError] = []
        if self.document.owns_bridge:
            _collect(errors, self.dnsmasq.stop_strays)
            self._take_away(errors)
        if errors:
            raise errors[0]
        self.store.remove_status(self.document.name)

    def _take_away(self, errors: list[KvikError]) -> None:
        """The bridge first: while it is there, guests are never without the filter."""
        with Netlink() as netlink:
            there = find_bridge(netlink, self.document.bridge_name or "")
            mine = there is None or is_ours(there, self.document)
            if mine:
                _collect(errors, self._leave_zone)
            _collect(errors, lambda: remove_bridge(netlink, self.document))
        if mine and nat.needs_table(self.document):  # the table bears the bridge's name: another's is not touched
            _collect(errors, self._remove_filter)

    # after the daemon was away, or when something on the host has changed

    def check(self) -> bool:
        """Put right what is missing of it. False if its bridge is gone."""
        return self.reattach(only_missing=True)

    def reattach(self, *, only_missing: bool = False) -> bool:
        """Find the network again as it was; put right what is missing of it. False if its bridge is gone."""
        document = self.document
        self.active = True
        with Netlink() as netlink:
            if not only_missing:
                self.parts = parts(netlink, document)
            if not document.owns_bridge:
                return True
            link = find_bridge(netlink, document.bridge_name or "")
            if link is None or not is_ours(link, document):
                return False
            if document.bridge is not None and document.bridge.stp and not only_missing:
                set_bridge(netlink, link.index, stp=True)  # who was killed in host/edge_port.py left it off
        if nat.needs_table(document) and not (only_missing and self._has_filter()):
            self.install_filter()
        set_forwarding(document)
        if document.bridge is not None and document.bridge.zone is not None and firewalld.is_running():
            _quietly(self._join_zone)  # of one that was started anew it has to be asked for again
        self.serve()
        return True

    def missing(self) -> list[str]:
        """What it stands on and was unplugged since, in words."""
        if not self.parts:
            return []
        with Netlink() as netlink:
            return missing(netlink, self.parts)

    @property
    def is_served(self) -> bool:
        """Whether there is to be a dnsmasq."""
        return is_needed(self.document)

    def serve(self) -> None:
        """Have a dnsmasq that serves what the document says: started, restarted if it served something else."""
        if not is_needed(self.document):
            self.dnsmasq.stop()
            return
        self.dnsmasq.handle = self.dnsmasq.handle or self.dnsmasq.find()
        changed = self.dnsmasq.write(self.document)
        if self.dnsmasq.handle is not None and self.dnsmasq.handle.alive and not changed:
            return
        self.dnsmasq.stop()
        self.dnsmasq.start()

    def change(self, document: Network) -> None:
        """Make the live network what `document` says; on an error it is what it was."""
        before, self.document = self.document, document
        try:
            if document.owns_bridge:
                if nat.needs_table(document):
                    self.install_filter()
                self.serve()
            self._save("active")
        except KvikError:
            self.document = before
            if before.owns_bridge:
                if nat.needs_table(before):
                    _quietly(self.install_filter)
                _quietly(self.serve)
            raise


class _Overtaken(Exception):
    """Somebody took the network's subnet between the look and the making."""

    def __init__(self, cause: ResourceBusy) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _refuse_overtaken(netlink: Netlink, document: Network, index: int) -> None:
    """Look once more, now that others see ours: of two daemons that make their networks at once, the later one sees the
    other's, whichever looked first. Both may: then both take theirs back and try again, each after its own time."""
    try:
        refuse_taken(netlink, document, besides=index)
    except ResourceBusy as error:
        raise _Overtaken(error) from error


def _check_zone(document: Network) -> None:
    """OperationInvalid, NotFound or ConfigUnsupported, before anything is made."""
    zone = document.bridge.zone if document.bridge is not None else None
    if zone is None:
        return
    if not document.owns_bridge:
        raise ConfigUnsupported(
            f"network {document.name!r}: a zone is for a bridge that the network makes", path="/network/bridge/@zone"
        )
    firewalld.require_zone(zone, f"the bridge of network {document.name!r}")


def _fill_pool(document: Network) -> None:
    """What a physical function has by now: PCI functions for mode hostdev, their interfaces for macvtap."""
    forward = document.forward
    if forward is None or not forward.pfs:
        return
    functions = sriov.virtual_functions(forward.pfs[0].dev)
    if document.mode == "hostdev":
        forward.addresses = [pci_address(function.address) for function in functions]
        return
    forward.interfaces = [ForwardInterface(dev=function.interface) for function in functions if function.interface]
    if not forward.interfaces:
        raise OperationInvalid(
            f"no virtual function of {forward.pfs[0].dev}, which network {document.name!r} is to use, has a network "
            "interface: their driver is missing, or machines have them"
        )


def _check_parts(netlink: Netlink, document: Network) -> list[str]:
    """What the network only refers to has to exist. OperationInvalid; what is to be warned of."""
    found: list[str] = []
    if document.mode == "bridge" and document.bridge_name:
        link = find_bridge(netlink, document.bridge_name)
        port = document.virtualport
        # The bridge of Open vSwitch's userspace datapath is a tun device to the kernel.
        kinds = (*BRIDGES, "tun") if port is not None and port.type == "openvswitch" else BRIDGES
        if link is None or link.kind not in kinds:
            what = "there is no such interface" if link is None else f"that is no bridge ({link.kind or 'hardware'})"
            raise OperationInvalid(
                f"network {document.name!r} is to use bridge {document.bridge_name}: {what}",
                remedy=f"make it: kvik bridge add {document.bridge_name}",
            )
        if link.kind == "bridge":
            found = mismatches(netlink, document, link)
    if document.mode == "hostdev" and document.forward is not None:
        for address in document.forward.addresses:
            if not (sriov.SYSFS / "bus/pci/devices" / address.pci_text).exists():
                raise OperationInvalid(
                    f"network {document.name!r} is to use PCI device {address.pci_text}, which this host does not have",
                    remedy="'lspci -D' lists them",
                )
    if document.is_macvtap and document.forward is not None:
        for interface in document.forward.interfaces:
            link = find_bridge(netlink, interface.dev)
            if link is None:
                raise OperationInvalid(
                    f"network {document.name!r} is to use interface {interface.dev}, which does not exist",
                    remedy=f"plug it in, or name another (kvik net-edit {document.name}): 'ip link' lists them",
                )
            if link.master:
                master = netlink.link(link.master).name
                raise OperationInvalid(
                    f"network {document.name!r} is to use interface {interface.dev}, which is a port of {master}",
                    remedy=f"take it out: kvik bridge delif {master} {interface.dev}, or use <bridge name='{master}'/>",
                )
    return found


def _collect(errors: list[KvikError], step: Callable[[], object]) -> None:
    try:
        step()
    except KvikError as error:
        logger.warning("%s", error)
        errors.append(error)


def _quietly(function: Callable[..., object], *args: object) -> None:
    """For undoing: what fails there has its cause told already."""
    try:
        function(*args)
    except (KvikError, HostError) as error:
        logger.warning("%s", error)
