"""A network's bridge in a zone of firewalld: the real one, on a D-Bus of its own, in a network namespace."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from functional.network.networks import ISOLATED, with_networks
from kvik.errors import HostError, NotFound, OperationInvalid
from kvik.host import firewalld
from kvik.host.dbus import SystemBus
from kvik.host.namespace import Namespace
from kvik.host.process import find_program
from kvik.network.networks import Networks

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces"),
    pytest.mark.skipif(find_program("firewalld") is None, reason="needs firewalld"),
    pytest.mark.skipif(find_program("dbus-daemon") is None, reason="needs dbus-daemon"),
]

BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path={}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/>
<allow user="*"/></policy></busconfig>"""
ZONED = ISOLATED.replace("name='virbr7'", "name='virbr7' zone='{}'")


class Firewall:
    """A namespace with a bus in it, and firewalld when it is started."""

    def __init__(self, space: Namespace) -> None:
        self.space = space
        self.root = Path(tempfile.mkdtemp(prefix="kv-fw-"))
        (self.root / "bus.conf").write_text(BUS.format(self.root / "s"))
        self.environ = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={self.root / 's'}"}
        self.bus = self._run("dbus-daemon", f"--config-file={self.root / 'bus.conf'}", "--nofork", "--nopidfile")
        self.firewalld: subprocess.Popen[bytes] | None = None
        self._until(lambda: (self.root / "s").exists())

    def _run(self, *words: str) -> subprocess.Popen[bytes]:
        return self.space.run(
            lambda: subprocess.Popen(
                words, env=self.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
            )
        )

    def _until(self, condition: object) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def start(self) -> None:
        self.firewalld = self._run(
            find_program("firewalld") or "", "--nofork", "--nopid", "--log-file", str(self.root / "log")
        )
        self._until(firewalld.is_running)

    def stop(self) -> None:
        if self.firewalld is not None:
            self.firewalld.send_signal(signal.SIGTERM)
            self.firewalld.wait(10)
            self.firewalld = None

    def kill(self) -> None:
        assert self.firewalld is not None
        self.firewalld.kill()
        self.firewalld.wait(10)

    def end(self) -> None:
        self.stop()
        self.bus.terminate()
        self.bus.wait(10)
        shutil.rmtree(self.root)


@pytest.fixture
def firewall(monkeypatch: pytest.MonkeyPatch) -> Iterator[Firewall]:
    with Namespace() as space:
        made = Firewall(space)
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", made.environ["DBUS_SYSTEM_BUS_ADDRESS"])
        try:
            yield made
        finally:
            made.end()


async def zone_is(wanted: str) -> None:
    deadline = time.monotonic() + 20
    while zone_of("virbr7") != wanted:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def zone_of(interface: str) -> str:
    with SystemBus() as bus:
        return str(bus.call(firewalld.NAME, firewalld.PATH, firewalld.ZONES, "getZoneOfInterface", interface)[0])


def test_a_bridge_is_in_its_zone_as_long_as_the_network_is_active(firewall: Firewall, tmp_path: Path) -> None:
    firewall.start()

    async def work(networks: Networks) -> None:
        network = await networks.define(ZONED.format("trusted"))
        await network.start()
        assert zone_of("virbr7") == "trusted"
        with SystemBus() as bus:
            bus.call(firewalld.NAME, firewalld.PATH, firewalld.NAME, "reload")
        # It has forgotten by then; the notice of its table's end has the network looked at.
        await zone_is("trusted")
        await asyncio.to_thread(firewall.stop)
        await asyncio.to_thread(firewall.start)
        await zone_is("trusted")  # the bus has told of it
        await asyncio.to_thread(firewall.kill)
        await asyncio.to_thread(firewall.start)
        await zone_is("trusted")
        await network.destroy()
        assert zone_of("virbr7") == ""
        await networks.define(ZONED.format("nowhere").replace("inside", "other").replace("virbr7", "virbr8"))
        with pytest.raises(NotFound, match="zone 'nowhere', which it does not have; block, dmz"):
            await networks.lookup_name("other").start()
        assert not networks.lookup_name("other").is_active
        # Gone before the network: nothing is left that could be in a zone.
        await network.start()
        await asyncio.to_thread(firewall.stop)
        await network.destroy()

    with_networks(firewall.space, tmp_path, work)


def test_a_zone_without_firewalld_is_refused_and_a_network_without_one_does_not_ask(
    firewall: Firewall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(networks: Networks) -> None:
        network = await networks.define(ZONED.format("trusted"))
        for address in (firewall.environ["DBUS_SYSTEM_BUS_ADDRESS"], f"unix:path={tmp_path / 'nobody'}", "tcp:host=x"):
            monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
            with pytest.raises(OperationInvalid, match="zone 'trusted', and firewalld does not run; start firewalld"):
                await network.start()
        assert not network.is_active
        await networks.define(ISOLATED.replace("virbr7", "virbr8").replace("inside", "plain"))
        plain = networks.lookup_name("plain")
        await plain.start()
        await plain.destroy()

    with_networks(firewall.space, tmp_path, work)
    with pytest.raises(HostError):
        SystemBus()
