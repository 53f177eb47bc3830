"""The networks of a session without a daemon, and guests that are none on their switches."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from kvik.conf.devices.interface import Interface
from kvik.conf.domain import parse_domain
from kvik.network.networks import Networks
from kvik.network.switch.control import Switch
from kvik.network.switch.session import Card, SessionNetworks
from kvik.paths import Paths
from unit.network.switch.guest import Guest

T = TypeVar("T")

INSIDE = """<network><name>{name}</name><domain name='{name}.example'/>
  <ip address='10.{number}.0.1' prefix='24'>
    <dhcp><range start='10.{number}.0.10' end='10.{number}.0.20'/></dhcp>
  </ip>
</network>"""


def inside(name: str, number: int) -> str:
    """An isolated network: it needs no passt."""
    return INSIDE.format(name=name, number=number)


def interface(network: str, mac: str, alias: str = "net0", more: str = "") -> Interface:
    xml = f"<interface type='network'><mac address='{mac}'/><source network='{network}'/>{more}<alias name='{alias}'/>"
    document = (
        f"<domain type='test'><name>a</name><os><type>hvm</type></os><devices>{xml}</interface></devices></domain>"
    )
    (made,) = parse_domain(document).devices.interfaces
    return made


class Session:
    """Its directories, as a daemon has them; `close` ends what runs."""

    def __init__(self, home: Path) -> None:
        self.paths = Paths.session({"HOME": os.fspath(home)})
        self.home = home
        self.guests = ExitStack()
        self.cards: list[Card] = []
        self.patience: dict[str, float] = {}  # deadlines of `SessionNetworks`

    def turn(self, work: Callable[[Networks, SessionNetworks], Awaitable[T]]) -> T:
        """What one daemon does, from its start to its end. Networks and machines go on."""

        async def run() -> T:
            switches = SessionNetworks(self.paths, **self.patience)
            networks = Networks(self.paths, switches=switches)
            await networks.open()
            try:
                return await work(networks, switches)
            finally:
                await networks.close()
                switches.close()

        return asyncio.run(run())

    def plug(
        self, switches: SessionNetworks, machine: str, network: str, mac: str, *, alias: str = "net0", more: str = ""
    ) -> Guest:
        """A machine's card, as QEMU has it: listening."""
        directory = self.home / machine
        directory.mkdir(exist_ok=True)
        card = interface(network, mac, alias, more)
        with ExitStack() as close:
            files = switches.open_ports(machine, directory, [card], close)
            guest = Guest(socket.socket(fileno=os.dup(files[f"switch:{alias}"])), mac)
        self.guests.callback(guest.close)
        self.cards.append(Card(machine, directory, card))
        return guest

    def pid(self, network: str) -> int | None:
        """Of the switch that runs now."""
        switch = Switch.attach(self.paths.run / "network" / f"{network}.switch")
        if switch is None:
            return None
        switch.close()
        return switch.process.pid

    def pid_of_file(self, network: str) -> int:
        """The same without asking it."""
        switch = Switch.attach(self.paths.run / "network" / f"{network}.switch", deadline=0.1)
        assert switch is not None
        switch.close()
        return switch.process.pid

    def kill(self, network: str) -> int:
        """Its switch, as by accident; its pid."""
        switch = Switch.attach(self.paths.run / "network" / f"{network}.switch")
        assert switch is not None
        pid = switch.process.pid
        os.kill(pid, signal.SIGKILL)
        switch.process.wait(10)
        switch.close()
        return pid

    def close(self) -> None:
        self.guests.close()

        async def end(networks: Networks, switches: SessionNetworks) -> None:
            for network in networks.list():
                if network.is_active:
                    await network.destroy()

        self.turn(end)
        assert not [*(self.paths.run / "network").glob("*.switch")]
        assert not [*(self.paths.run / "network").glob("*.xml")]


@contextmanager
def session(home: Path) -> Iterator[Session]:
    made = Session(home)
    try:
        yield made
    finally:
        made.close()
