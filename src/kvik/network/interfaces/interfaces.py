"""The host's interfaces, for the manager: listed, defined, started, put into bridges with a way back.

All of it blocks, so it runs on one thread of its own, one call after the other; the daemon's loop only waits.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvik.conf.interface import (
    BridgeInterface,
    Interface,
    InterfaceMac,
    InterfaceStart,
    check_interface_name,
    format_interface,
    parse_interface,
)
from kvik.errors import (
    AlreadyExists,
    InvalidArgument,
    KvikError,
    NoInterface,
    OperationFailed,
    OperationInvalid,
    OperationUnsupported,
)
from kvik.host import tools
from kvik.host.bridge import set_bridge
from kvik.host.netlink import Netlink
from kvik.host.process import find_program
from kvik.network.interfaces import live, start
from kvik.network.interfaces.formats import Format, owner, usual
from kvik.network.interfaces.formats.tree import Changes, Move, Tree, apply
from kvik.network.interfaces.pending import Pending, Record
from kvik.network.interfaces.switch import Switch, plan_bridge, plan_unbridge, remove_bridge, undo
from kvik.network.interfaces.switch import apply as do_switch
from kvik.paths import Paths

logger = logging.getLogger(__name__)
T = TypeVar("T")
TELL_TIMEOUT = 20.0  # seconds for a command to the host's network service


@dataclass(frozen=True, slots=True)
class InterfaceRow:
    name: str
    mac: str
    active: bool


class Interfaces:
    """One host's. The async methods run their blocking namesakes in the thread."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.pending = Pending(paths.run / "interfaces")
        # The host's own files lie beside ours: below / or below KVIK_ROOT.
        self.root = Path(paths.config_name.removesuffix("/etc/kvik") or "/") if paths.scope == "system" else None
        self.originals = paths.config / "interfaces" / "original"
        self._thread = ThreadPoolExecutor(1, "kvik-interfaces")

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Run a blocking method. One that has begun is never cut off by a client that leaves."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._thread, work, *arguments))

    async def open(self) -> list[str]:
        """See to a change that was pending when the daemon ended. Returns what there is to warn of."""
        if not (await self.run(self.pending.file.exists)):
            return []
        try:
            record = await self.run(self.pending.recover)
        except KvikError as error:
            return [f"a pending change of the host's interfaces could not be looked after: {error}"]
        return [f"{record.words}: {record.outcome}"] if record else []

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    # looking

    def rows(self) -> list[InterfaceRow]:
        """Those that are there, and those that are defined only."""
        tree = self._tree()
        with Netlink() as netlink:
            found = [InterfaceRow(link.name, link.mac, link.up) for link in live.interfaces(netlink)]
        known = {row.name for row in found}
        for one in self._formats(tree):
            for name in one.names(tree):
                if name not in known:
                    known.add(name)
                    found.append(InterfaceRow(name, "", False))
        return sorted(found, key=lambda row: row.name)

    def row(self, name: str) -> InterfaceRow:
        found = next((row for row in self.rows() if row.name == name), None)
        if found is None:
            raise NoInterface(f"there is no interface {name!r}", remedy="'kvik iface-list --all' shows them")
        return found

    def document(self, name: str, *, inactive: bool) -> Interface:
        """As it is, or as the host's configuration has it."""
        if not inactive:
            with Netlink() as netlink:
                document = live.describe(netlink, name)
            if document is not None:
                return document
        tree = self._tree()
        by = owner(tree, name)
        document = by.describe(tree, name) if by else None
        if document is None:
            self.row(name)
            raise NoInterface(
                f"{name} is not defined in the host's configuration", remedy="without --inactive it is shown as it is"
            )
        return document

    def xml(self, name: str, inactive: bool) -> str:
        return format_interface(self.document(name, inactive=inactive))

    def _tree(self) -> Tree:
        """The configuration as it will be once what is pending is committed."""
        record = self.pending.open()
        return Tree(self.root or Path("/"), record.staged if record else None)

    def _formats(self, tree: Tree) -> list[Format]:
        from kvik.network.interfaces.formats import FORMATS

        return [] if self.root is None else list(FORMATS)

    def _format(self, tree: Tree, name: str) -> Format:
        if self.root is None:
            raise OperationUnsupported(
                "the host's interfaces are the system's", remedy="connect to it as root: kvik -c kvik:///system"
            )
        found = owner(tree, name) or usual(tree)
        if found is None:
            raise OperationUnsupported(
                "this host keeps its interfaces in none of the places that are known",
                remedy="known are netplan, NetworkManager's keyfiles, systemd-networkd and /etc/network/interfaces",
            )
        return found

    # definitions

    def define(self, xml: str) -> InterfaceRow:
        document = parse_interface(xml)
        tree = self._tree()
        self._save(tree, self._format(tree, document.name).define(tree, document))
        return self.row(document.name)

    def undefine(self, name: str) -> None:
        tree = self._tree()
        by = owner(tree, name)
        if by is None:
            self.row(name)
            raise OperationInvalid(f"{name} is not defined in the host's configuration")
        changes = by.undefine(tree, name)
        if not changes:
            raise OperationInvalid(
                f"the definition of {name} is not kvik's and stays", remedy=f"it is {by.NAME}'s: edit its files"
            )
        self._save(tree, changes)

    def _save(self, tree: Tree, changes: Changes) -> None:
        """Stage within a pending change, else write at once."""
        record = self.pending.open()
        if record is None:
            self._write(changes)
            return

        def stage(record: Record) -> None:
            self._stage(record, changes)
            self.pending.write(record)

        self.pending.change(stage)

    def _stage(self, record: Record, changes: Changes) -> None:
        tree = Tree(self.root or Path("/"))
        for path in changes:
            record.before.setdefault(path, _digest(tree.read_disk(path)))
        record.staged.update(changes)

    def _write(self, changes: Changes, moves: Sequence[Move] = ()) -> None:
        assert self.root is not None
        for path in apply(self.root, changes, self.originals):
            logger.warning("the original is kept as %s", path)
        self._tell(moves)

    def _tell(self, moves: Sequence[Move]) -> None:
        """Tell the host's own network service what moved. Its refusal does not undo what is written.

        It is told of nothing else: at once it would do what was only written, and take away what it no longer finds.
        """
        if self.root != Path("/"):
            return  # not the host's
        tree = Tree(Path("/"))
        for one in self._formats(tree):
            own = [move for move in moves if owner(tree, move.bridge if move.into else move.port) is one]
            for command in one.tell(tree, own) if own else []:
                if find_program(command[0]) is None:
                    continue
                try:
                    tools.run(command, timeout=TELL_TIMEOUT)
                except KvikError as error:
                    logger.warning("%s was not told of its new files: %s", one.NAME, error)
                    break

    # up and down

    def create(self, name: str) -> None:
        """Start an interface as it is defined. A bridge takes its port's addresses along, within a pending change if
        there is one, else for good."""
        document = self.document(name, inactive=True)
        if document.bridge is not None and document.bridge.ports:
            self._create_bridge(document)
            return
        with Netlink() as netlink:
            bridge = start.bridge_of(netlink, name)
            plan = plan_unbridge(netlink, bridge) if bridge else None
        if plan is not None:  # what has a definition of its own is no port any more
            self._switch(plan, None, {}, seconds=0)
        with Netlink() as netlink:
            start.start(netlink, document)

    def _create_bridge(self, document: Interface) -> None:
        assert document.bridge is not None
        for port in document.bridge.ports:
            with Netlink() as netlink:
                link = netlink.link(port.name)
                master = netlink.link(link.master).name if link.master else ""
                if master == document.name:
                    continue
                plan = plan_bridge(netlink, port.name, document.name)
            self._switch(plan, document.bridge, {}, seconds=0)
        with Netlink() as netlink:
            start.start(netlink, document)

    def destroy(self, name: str) -> None:
        self.row(name)
        with Netlink() as netlink:
            start.stop(netlink, name)

    # bridges over physical interfaces

    def wanted(self, name: str, stp: bool, delay: float) -> Interface:
        """The document of a bridge to be made, without its port."""
        check_interface_name(name, "bridge")
        if not 0 <= delay <= 30:
            raise InvalidArgument(f"a delay of {delay:g} s is not between 0 and 30")
        bridge = BridgeInterface(stp=stp, delay=f"{delay:g}", ports=[])
        return Interface(type="bridge", name=name, start=InterfaceStart(mode="onboot"), bridge=bridge)

    def bridge(self, port: str, document: Interface, now: bool, seconds: int) -> list[str]:
        """Make the bridge of `document` over `port`. Returns what there is to say.

        `now`: also live, undone after `seconds` unless committed (0: for good at once; within a pending change the
        time is that one's). Not `now`: only the configuration.
        """
        assert document.bridge is not None
        with Netlink() as netlink:
            plan = plan_bridge(netlink, port, document.name)
            present = live.describe(netlink, port, origins=True)
        assert present is not None
        tree = self._tree()
        if any(one.describe(tree, document.name) for one in self._formats(tree)):
            raise AlreadyExists(f"{document.name} is defined already", remedy="choose another name, or undefine it")
        document.bridge.ports = [Interface(type="ethernet", name=port)]
        document.mac = InterfaceMac(address=plan.things.mac)
        document.protocols = present.protocols  # what is written if the configuration has nothing of the port
        by = self._format(tree, port)
        changes = by.bridge(tree, port, document)
        if not now:
            self._save(tree, changes)
            return [f"written for {by.NAME}; it counts from the next boot on"]
        self._switch(plan, document.bridge, changes, seconds)
        return [f"the configuration is {by.NAME}'s"]

    def unbridge(self, name: str, now: bool, seconds: int) -> list[str]:
        """Dissolve a bridge: its addresses go to its one port."""
        with Netlink() as netlink:
            plan = plan_unbridge(netlink, name)
        tree = self._tree()
        by = owner(tree, name)
        if by is not None and now and self._held(tree, by, name):
            raise OperationUnsupported(
                f"NetworkManager has made {name} and would put {plan.port} back into it",
                remedy="with --no-start it is written, and counts from the next boot on",
            )
        changes = by.unbridge(tree, name, plan.port) if by else {}
        words = [f"the configuration is {by.NAME}'s" if by else f"the configuration knows nothing of {name}"]
        if not now:
            self._save(tree, changes)
            return words
        self._switch(plan, None, changes, seconds)
        return words

    def _held(self, tree: Tree, by: Format, name: str) -> bool:
        asked = by.held(tree, name)
        if asked is None or self.root != Path("/") or find_program(asked[0][0]) is None:
            return False
        done = tools.run(asked[0], timeout=TELL_TIMEOUT, check=False)  # it does not run: it holds nothing
        return done.code == 0 and done.text.strip() == asked[1]

    def _switch(self, plan: Switch, bridge: BridgeInterface | None, changes: Changes, seconds: int) -> None:
        """Do it within the pending change; without one, within one of its own."""
        own = self.pending.open() is None
        if own:
            self.pending.begin(seconds)

        def work(record: Record) -> None:
            record.switches.append(plan)
            self._stage(record, changes)
            self.pending.write(record)  # before anything is done: who comes after us knows the way back
            self.pending.refresh(record)
            try:
                with Netlink() as netlink:
                    do_switch(netlink, plan)
                    if bridge is not None:
                        _settle(netlink, plan.bridge, bridge)
            except BaseException:
                with Netlink() as netlink:
                    undo(netlink, plan)
                record.switches.remove(plan)
                for path in changes:
                    record.staged.pop(path, None)
                self.pending.write(record)
                raise

        try:
            self.pending.change(work)
        except BaseException:
            if own:
                self.pending.rollback()
                self.pending.forget()
            raise
        if own and not seconds:
            self.commit()

    # the pending change

    def begin(self, seconds: int) -> None:
        self.pending.begin(seconds)

    def commit(self) -> str:
        """Keep the pending change and write the configuration. Returns what it was."""

        def save(record: Record) -> None:
            if self.root is None:
                return
            tree = Tree(self.root)
            changed = [
                path
                for path, digest in record.before.items()
                # Or written already, by a commit that was cut off.
                if _digest(tree.read_disk(path)) not in (digest, _digest(record.staged.get(path)))
            ]
            if changed:
                raise OperationFailed(
                    f"{', '.join(changed)} was changed meanwhile: the interfaces stay as they are now, but that is not "
                    "written",
                    remedy="put the file back and commit again, or write it by hand",
                )
            self._write(
                record.staged, [Move(switch.bridge, switch.port, switch.to_bridge) for switch in record.switches]
            )
            for switch in record.switches:
                if not switch.to_bridge:
                    with Netlink() as netlink:
                        remove_bridge(netlink, switch.bridge)

        return self.pending.commit(save).words

    def rollback(self) -> str:
        record = self.pending.rollback()
        if "but" in record.outcome:
            raise OperationFailed(f"{record.words}: {record.outcome}")
        self.pending.forget()
        return record.words

    def state(self) -> Record | None:
        return self.pending.read()


def _settle(netlink: Netlink, name: str, bridge: BridgeInterface) -> None:
    """STP and delay. After the port is in and forwards: with STP on it would be silent for twice the delay."""
    index = netlink.link(name).index
    set_bridge(
        netlink, index, forward_delay=float(bridge.delay or 0) if not bridge.stp else max(2.0, float(bridge.delay or 0))
    )
    if bridge.stp is not None:
        set_bridge(netlink, index, stp=bridge.stp)


def _digest(data: bytes | None) -> str:
    return "" if data is None else hashlib.sha256(data).hexdigest()
