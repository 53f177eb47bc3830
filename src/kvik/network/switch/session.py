"""The switches of a session's active networks, each started for its first machine and looked after.

What there should be follows from the machines that run; `look_after` compares it with what there is. One path serves
a switch that was killed, a passt that ended, a host that got its network back, and a daemon that was restarted.

A VMM waits at a socket in its machine's directory, so that a new switch finds it again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, NamedTuple

from kvik.conf.devices.interface import Interface
from kvik.errors import (
    ConfigUnsupported,
    HostError,
    KvikError,
    OperationFailed,
    OperationInvalid,
    OperationTimeout,
    ResourceBusy,
)
from kvik.host.process import ProcessHandle
from kvik.network.subnet import free_subnet
from kvik.network.switch.control import DEADLINE, Switch, short_path
from kvik.network.switch.mtu import LONG
from kvik.network.switch.uplink import bind_udp, forward_arguments, loopback_udp, passt_udp, start_uplink
from kvik.paths import Paths

__all__ = ["Card", "SessionNetworks", "longest_mtu"]

logger = logging.getLogger(__name__)

_SUFFIX = ".switch"
RETRY_FIRST, RETRY_LAST = 2.0, 60.0  # seconds until a way out that ended is tried again
HUNG = 30.0  # seconds without an answer, after which a switch that nobody has stopped is ended and started again


class Card(NamedTuple):
    """An interface of a machine that runs, and the directory where its VMM listens."""

    machine: str
    directory: Path
    interface: Interface

    @property
    def label(self) -> str:
        """The machine's name as the switch has it: names do not tell capitals from small letters (RFC 4343)."""
        return self.machine.lower()

    @property
    def alias(self) -> str:
        return self.interface.alias.name if self.interface.alias else ""

    @property
    def mac(self) -> str:
        return self.interface.mac.address.lower() if self.interface.mac else ""

    @property
    def network(self) -> str:
        return (self.interface.source.network if self.interface.source else None) or ""

    @property
    def socket(self) -> Path:
        return self.directory / f"{self.alias}.net"


class _Retry:
    """When a way out may be tried again."""

    def __init__(self) -> None:
        self.pause = RETRY_FIRST
        self.at = 0.0

    def failed(self) -> None:
        self.at = time.monotonic() + self.pause
        self.pause = min(self.pause * 2, RETRY_LAST)


class SessionNetworks:
    """All methods block for some milliseconds, and may be called from any thread. A switch that hangs holds up its own
    network alone, and that once for `deadline` seconds."""

    def __init__(self, paths: Paths, *, deadline: float = DEADLINE, hung: float = HUNG) -> None:
        self._run = paths.run / "network"
        self._log = paths.log / "network"
        self._settings: dict[str, dict[str, Any]] = {}  # of active networks
        self._switches: dict[str, Switch] = {}
        self._uplinks: list[ProcessHandle] = []
        self._retries: dict[tuple[str, int], _Retry] = {}
        self._silent: set[str] = set()  # networks whose switch hangs, which was said
        self._without: set[tuple[str, int]] = set()  # ports that there is no address for, which was said
        self._deadline, self._hung = deadline, hung
        self._lock = threading.Lock()  # what follows is of all networks; taken last
        self._locks: dict[str, threading.Lock] = {}  # each network's: who holds one may wait for its switch

    @contextlib.contextmanager
    def _only(self, name: str) -> Iterator[None]:
        """Be the only one to deal with that network's switch."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            yield

    # networks

    def activate(self, name: str, settings: dict[str, Any]) -> None:
        """From now on it may have machines. `ResourceBusy` if another active network has its subnet: a machine on both
        could not tell them apart."""
        with self._lock:
            taken = {_subnet(item): other for other, item in self._settings.items() if other != name and item.get("ip")}
            own = _subnet(settings) if settings.get("ip") else None
            clash = next((subnet for subnet in taken if own is not None and own.overlaps(subnet)), None)
            if clash is not None:
                raise ResourceBusy(
                    f"network {name!r} wants {own}, which network {taken[clash]!r} has already",
                    remedy=f"{free_subnet(taken)} is free: change the network's <ip> to it (kvik net-edit)",
                )
            self._settings[name] = settings

    def deactivate(self, name: str) -> None:
        """It has no machines any more: its switch ends, if there is one."""
        with self._only(name):
            with self._lock:
                self._settings.pop(name, None)
            switch = self._switches.pop(name, None) or self._attach(self._path(name))
            if switch is not None:
                switch.stop()
            self._silent.discard(name)
            self._path(name).unlink(missing_ok=True)

    def change(self, name: str, settings: dict[str, Any]) -> None:
        """Tell a switch that runs. Raises `OperationFailed`, with the switch's words, and then nothing has changed."""
        with self._only(name):
            switch = self._known(name)
            if switch is not None:
                try:
                    switch.configure(settings)
                except OperationTimeout:
                    self._silent.add(name)  # it may do that late: then it is told again what holds
                    raise
            with self._lock:
                self._settings[name] = settings

    def sweep(self) -> None:
        """After the daemon was away: end switches of networks that are not active, and remove what ended ones left.
        Those of active networks are found by `look_after`."""
        for path in self._run.glob(f"*{_SUFFIX}"):
            name = path.name.removesuffix(_SUFFIX)
            with self._only(name):
                if name in self._settings:
                    continue
                try:
                    switch = self._attach(path)
                except HostError as error:
                    logger.warning("%s", error)
                    continue
                if switch is None:
                    path.unlink(missing_ok=True)
                else:
                    switch.stop()

    # machines

    def open_ports(
        self, machine: str, directory: Path, interfaces: Iterable[Interface], close: ExitStack
    ) -> dict[str, int]:
        """ "switch:ALIAS" -> a socket that listens, for the VMM of each interface of type network; the switch waits on
        it already. `close` closes ours. Raises `ConfigUnsupported`, `OperationInvalid`, `HostError`,
        `MissingPackages`."""
        files: dict[str, int] = {}
        for interface in interfaces:
            if interface.type != "network":
                continue
            card = Card(machine, directory, interface)
            with self._only(card.network):
                _refuse_unkept_promises(card, self._settings.get(card.network))
                switch = self._switch(card.network)
                listener, ours = _listen(card)
                with listener, ours:
                    self._connect(switch, card, ours, must_forward=True)
                    theirs = listener.detach()
                files[f"switch:{card.alias}"] = theirs
                close.callback(os.close, theirs)
        return files

    def plug_by_path(self, machine: str, directory: Path, interface: Interface) -> None:
        """A VMM that was given a socket listens at its path by one of its own: the port goes there. Raises `HostError`,
        `OperationFailed`."""
        card = Card(machine, directory, interface)
        with self._only(card.network):
            switch = self._switch(card.network)
            number = next(
                (port["port"] for port in switch.ports() if (port["name"], port["alias"]) == (card.label, card.alias)),
                0,
            )
            with _client(card.socket) as ours:
                switch.call("replace", (ours.fileno(),), port=number)

    def look_after(self, cards: Sequence[Card]) -> list[str]:
        """Make what there is what there should be, as far as it can be; what was put right, or is wrong, in words."""
        said: list[str] = []
        with self._lock:
            ended = [handle for handle in self._uplinks if not handle.alive]  # which reaps them
            self._uplinks = [handle for handle in self._uplinks if handle not in ended]
        for handle in ended:
            handle.close()
        for name in sorted({card.network for card in cards}):
            with self._only(name):
                if name not in self._settings:
                    continue
                try:
                    said += self._look_after(name, [card for card in cards if card.network == name])
                except OperationTimeout as error:
                    said += self._say_silent(name, error)
                except KvikError as error:
                    said.append(f"network {name}: {error}")
        return said

    def _say_silent(self, name: str, error: OperationTimeout) -> list[str]:
        """Once for each time that its switch hangs."""
        if name in self._silent:
            return []
        self._silent.add(name)
        return [f"network {name}: {error}"]

    def _look_after(self, name: str, cards: list[Card]) -> list[str]:
        said = []
        known = self._switches.get(name)
        if known is not None and known.alive and known.silence > self._hung and not known.stopped:
            said.append(f"network {name}: its switch has not answered for {known.silence:.0f} s and is ended")
            del self._switches[name]
            known.stop()
        switch = self._switch(name)
        if known is not None and switch is not known:
            said.append(f"network {name}: its switch had ended and was started again")
        if name in self._silent and not switch.silence:
            self._silent.discard(name)
            switch.configure(self._settings[name])  # of what it did late, this is the last
            said.append(f"network {name}: its switch answers again")
        ports = {(port["name"], port["alias"]): port for port in switch.ports()}
        for card in cards:
            port = ports.get((card.label, card.alias))
            if port is None:
                with contextlib.suppress(HostError), _client(card.socket) as ours:  # a VMM that ends does not listen
                    self._connect(switch, card, ours, must_forward=False)
                    said.append(f"network {name}: machine {card.machine} was connected again")
                continue
            said += self._say_exhausted(name, card, port)
            if port["uplink"]:
                self._retries.pop((name, port["port"]), None)
            else:
                self._give_uplink(name, switch, card, port)
        return said

    def _say_exhausted(self, name: str, card: Card, port: dict[str, Any]) -> list[str]:
        """Once for each machine that there is no address for."""
        known = (name, port["port"])
        if port["ip"] or not card.mac or not self._settings[name].get("ranges"):
            self._without.discard(known)
            return []
        if known in self._without:
            return []
        self._without.add(known)
        return [
            f"network {name}: machine {card.machine} gets no address: all that it has are lent or reserved; widen its "
            f"<range> (kvik net-edit {name})"
        ]

    def leases(self, name: str) -> list[dict[str, Any]]:
        """Empty if the network does not run."""
        with self._only(name):
            switch = self._known(name)
            return switch.leases() if switch is not None else []

    def close(self) -> None:
        """Let go: the networks go on, as long as there is a machine on them. Nobody asks for anything any more."""
        with self._lock:
            for switch in self._switches.values():
                switch.close()
            self._switches.clear()
            for handle in self._uplinks:
                handle.close()
            self._uplinks.clear()

    def _known(self, name: str) -> Switch | None:
        switch = self._switches.get(name)
        if switch is not None and not switch.alive:
            del self._switches[name]
            switch.close()
            switch = None
        return switch

    def _path(self, name: str) -> Path:
        return self._run / f"{name}{_SUFFIX}"

    def _switch(self, name: str) -> Switch:
        """The network's switch: known, found, or started."""
        switch = self._known(name)
        if switch is not None:
            return switch
        settings = self._settings.get(name)
        if settings is None:
            raise OperationInvalid(f"network {name!r} is not active", remedy=f"start it: kvik net-start {name}")
        for directory in (self._run, self._log):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(name)
        switch = self._found(path, settings)
        if switch is None:
            log_fd = self._open_log(name)
            try:
                switch = Switch.start(path, settings, log_fd, deadline=self._deadline)
            finally:
                os.close(log_fd)
        self._switches[name] = switch
        return switch

    def _attach(self, path: Path) -> Switch | None:
        return Switch.attach(path, deadline=self._deadline)

    def _found(self, path: Path, settings: dict[str, Any]) -> Switch | None:
        """The switch that an earlier daemon started, told what its network is now. One that cannot be that, or does
        not answer, is ended."""
        switch = self._attach(path)
        if switch is None:
            return None
        try:
            switch.configure(settings)
        except (HostError, OperationFailed, OperationTimeout) as error:
            logger.warning("%s; it is started anew", error)
            switch.stop()
            return None
        return switch

    def _open_log(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self._log / f"{name}.log", flags, 0o600)

    def _connect(self, switch: Switch, card: Card, ours: socket.socket, *, must_forward: bool) -> None:
        isolated = bool(card.interface.port and card.interface.port.isolated)
        isolated = isolated or self._settings[card.network]["isolated"]
        mtu = longest_mtu(card, self._settings[card.network])
        answer = switch.add_port(card.machine, card.mac, ours.fileno(), alias=card.alias, isolated=isolated, mtu=mtu)
        port = {"port": answer[0], "ip": answer[1]}
        forwards = bool(card.interface.port_forwards)
        try:
            for address, number, to in loopback_udp(card.interface.port_forwards):
                with bind_udp(address, number) as sock:
                    switch.call("udp", (sock.fileno(),), port=answer[0], to=to)
            self._give_uplink(card.network, switch, card, port, wait=must_forward and forwards)
        except KvikError:
            if must_forward and forwards:
                switch.remove_port(answer[0])
                raise

    def _give_uplink(self, name: str, switch: Switch, card: Card, port: dict[str, Any], *, wait: bool = False) -> None:
        """A passt for a port that has none. One that cannot be had now is tried again later, `wait` or not."""
        settings = self._settings[name]
        if not settings["router"] or not port["ip"]:
            return
        retry = self._retries.setdefault((name, port["port"]), _Retry())
        if time.monotonic() < retry.at:
            return
        retry.failed()  # until it is seen to be there the next time
        try:
            arguments = forward_arguments(card.interface.port_forwards)
            log = card.directory / f"{card.alias}.passt.log"
            ours, handle = start_uplink(settings, port["ip"], arguments, log, wait=wait)
        except KvikError as error:
            if wait:
                raise
            logger.warning("network %s: machine %s has no way out: %s", name, card.machine, error)
            return
        with ours:
            with self._lock:
                self._uplinks.append(handle)
            udp = passt_udp(card.interface.port_forwards)
            switch.call("uplink", (ours.fileno(),), port=port["port"], udp=udp)


def longest_mtu(card: Card, settings: dict[str, Any]) -> int:
    """What the card may be told of a long MTU: virtio's takes any, and nobody has said another."""
    model, said = card.interface.model, card.interface.mtu is not None or settings["mtu"]
    return LONG if model is not None and model.type.startswith("virtio") and not said else 0


def _subnet(settings: dict[str, Any]) -> IPv4Network:
    return IPv4Network(f"{settings['ip']}/{settings['prefix']}", strict=False)


def _refuse_unkept_promises(card: Card, settings: dict[str, Any] | None) -> None:
    """What a session's network cannot do and would be missed."""
    interface = card.interface
    if interface.port_forwards and settings is not None and not settings["router"]:
        raise ConfigUnsupported(
            f"interface {card.alias}: network {card.network!r} is isolated, so no port of the host leads into it",
            path="/domain/devices/interface/portForward",
            remedy="leave <portForward> out, or give the network <forward mode='nat'/>",
        )
    kept = {
        "filterref": interface.filterref,
        "vlan": interface.vlan,
        "virtualport": interface.virtualport,
        "bandwidth": interface.bandwidth,
        "source portgroup": interface.source.portgroup if interface.source else None,
        "driver queues": (interface.driver.queues or 1) > 1 if interface.driver else None,
    }
    for name, value in kept.items():
        if value:
            raise ConfigUnsupported(
                f"interface {card.alias}: <{name}> is not supported on a session's network",
                path="/domain/devices/interface",
                remedy="leave it out, or use a network of the system's daemon",
            )


def _listen(card: Card) -> tuple[socket.socket, socket.socket]:
    """A socket that listens in the machine's directory, and the connection that waits on it."""
    path = card.socket
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), 0o600)  # the file takes the socket's mode: it is never open to others
        with short_path(path) as name:
            listener.bind(name)
        listener.listen(1)
        return listener, _client(path)
    except OSError as error:
        listener.close()
        raise HostError(f"cannot listen on {path}: {error.strerror or error}", errno=error.errno or 0) from error


def _client(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)  # a VMM that does not accept must not hold us: its backlog is full then
        with short_path(path) as name:
            sock.connect(name)
    except OSError as error:
        sock.close()
        why = error.strerror if error.errno != errno.EAGAIN else "its VMM does not accept"
        raise HostError(f"cannot connect to {path}: {why}", errno=error.errno or 0) from error
    return sock
