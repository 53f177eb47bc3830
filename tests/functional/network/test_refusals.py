"""Each request to the kernel, nftables and the disk is refused once, or done and its answer lost, at every step
of a start, a stop, a change and a tap's way to its bridge: all is taken back, and the error says which step it was."""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from functional.network.networks import NAT, with_networks
from functional.network.test_mtu import card
from functional.network.test_networks import links, pytestmark, space, tables, tables_here  # noqa: F401  the marks
from functional.network.test_networks_killed import servers
from kvik.conf.enums import NetworkUpdateCommand, NetworkUpdateFlags, NetworkUpdateSection
from kvik.errors import HostError, KvikError
from kvik.host import files, netlink, nftables, tools
from kvik.host.bridge import create_bridge
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.network import bridge
from kvik.network.attachment import Attachment, resolve
from kvik.network.networks import Networks
from kvik.network.tap_changes import change_tap
from kvik.network.taps import open_taps, release_taps

STEPS_MAX = 150
RICH = NAT.replace("<ip ", "<bandwidth><inbound average='1000'/></bandwidth><ip ", 1).replace(
    "</network>", "<route address='10.9.0.0' prefix='16' gateway='192.168.122.2'/></network>"
)


class Fault:
    """The so-many-th step fails: it is refused, or done and its answer lost."""

    def __init__(self, patch: pytest.MonkeyPatch, *, lost: bool) -> None:
        self.count = self.at = 0
        self.lost = lost
        self.done = False  # it happened
        self.asked = ""  # what was refused
        exchange, execute = Netlink._exchange_alone, nftables._execute

        def ask(self_: Netlink, action: str, kind: int, flags: int, payload: bytes) -> Any:
            if not self._now():
                return exchange(self_, action, kind, flags, payload)
            self.asked = action
            if lost:
                exchange(self_, action, kind, flags, payload)
                raise HostError(f"cannot {action}: Timer expired", errno=errno.ETIME)
            netlink.raise_refusal(action, struct.pack("=i", -errno.EIO), 0)
            raise AssertionError("it was refused")

        def filter_(commands: Any, **how: Any) -> Any:
            if not self._now():
                return execute(commands, **how)
            if lost:
                execute(commands, **how)
            return "Error: Could not process rule: Input/output error", b""

        patch.setattr(Netlink, "_exchange_alone", ask)
        patch.setattr(nftables, "_execute", filter_)
        for holder, name, what in (
            (files, "atomic_write", "write a file"), (files, "remove_file", "remove a file"),
            (tools, "run", "run a program"), (bridge, "_write", "set a value of the kernel's"),
        ):  # fmt: skip
            patch.setattr(holder, name, self._other(getattr(holder, name), what))

    def _other(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def step(*args: Any, **how: Any) -> Any:
            if not self._now():
                return function(*args, **how)
            if self.lost:
                function(*args, **how)
            raise HostError(f"cannot {what}: Input/output error", errno=errno.EIO)

        return step

    def _now(self) -> bool:
        self.count += 1
        return self.count == self.at

    @contextmanager
    def armed(self, at: int) -> Iterator[None]:
        self.count, self.at, self.asked = 0, at, ""
        try:
            yield
        finally:
            self.done, self.at = self.count >= at, 0


@pytest.fixture(params=["refused", "lost"])
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fault:
    return Fault(monkeypatch, lost=request.param == "lost")


async def sweep(fault: Fault, work: Callable[[], Awaitable[object]], after: Callable[[str], Awaitable[None]]) -> int:
    """`work` with a fault at each step of it; `after` it with what was said, "" if the fault did no harm."""
    for at in range(1, STEPS_MAX):
        said = ""
        with fault.armed(at):
            try:
                await work()
            except KvikError as error:
                said = str(error)
                assert said.startswith(("cannot ", "nftables refused ")), said
                if fault.asked.startswith(("change", "delete", "make", "bound")):  # which one, by its name
                    assert fault.lost or re.search(r"\b(virbr0|br9|vnet\d+|ifb-?\w+)\b", said), said
        try:
            await after(said)
        except AssertionError as error:
            error.add_note(f"step {at}: {said or 'no error'}")
            raise
        if not fault.done:
            return at
    raise AssertionError("there is no end to the steps")


def nothing_is_left(root: Path) -> None:
    with Netlink() as netlink:
        assert {link.name for link in netlink.links()} == {"lo"}
    assert tables_here() == set()
    assert servers(root) == []
    assert not [*(root / "run/kvik/network").glob("*.xml")]


def test_a_start_that_fails_anywhere_leaves_nothing(space: Namespace, tmp_path: Path, fault: Fault) -> None:  # noqa: F811
    async def turn(networks: Networks) -> None:
        network = await networks.define(RICH)
        failed = []

        async def after(said: str) -> None:
            if said:
                failed.append(said)
                assert not network.is_active
                nothing_is_left(tmp_path)
            else:
                assert network.is_active
                await network.destroy()

        assert await sweep(fault, network.start, after) > 20
        assert len(failed) > 15
        nothing_is_left(tmp_path)

    with_networks(space, tmp_path, turn)


def test_a_stop_that_fails_anywhere_can_be_done_again(space: Namespace, tmp_path: Path, fault: Fault) -> None:  # noqa: F811
    async def turn(networks: Networks) -> None:
        network = await networks.define(RICH)
        await network.start()

        async def after(said: str) -> None:
            assert network.is_active == bool(said)
            if said:
                await network.destroy()
            nothing_is_left(tmp_path)
            await network.start()

        assert await sweep(fault, network.destroy, after) > 6
        await network.destroy()

    with_networks(space, tmp_path, turn)


def test_a_change_that_fails_anywhere_changes_nothing(space: Namespace, tmp_path: Path, fault: Fault) -> None:  # noqa: F811
    command, section = NetworkUpdateCommand, NetworkUpdateSection.IP_DHCP_HOST
    both = NetworkUpdateFlags.LIVE | NetworkUpdateFlags.CONFIG
    host = "<host mac='52:54:00:00:00:05' ip='192.168.122.5'/>"

    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        assert network.runtime is not None
        told = network.runtime.dnsmasq.config_file

        async def after(said: str) -> None:
            known = [host in text for text in (network.xml(), network.xml(inactive=True))]
            known += [
                "192.168.122.5" in text.read_text() for text in (told, tmp_path / "etc/kvik/qemu/networks/default.xml")
            ]
            assert known == [not said] * 4
            assert network.runtime is not None and network.runtime.dnsmasq.find() is not None
            assert tables_here() == {"kvik-virbr0"}
            if not said:
                await network.update(command.DELETE, section, -1, host, both)

        assert await sweep(fault, lambda: network.update(command.ADD_LAST, section, -1, host, both), after) > 4
        await network.destroy()

    with_networks(space, tmp_path, turn)


def test_a_tap_that_fails_anywhere_is_gone(space: Namespace, tmp_path: Path, fault: Fault) -> None:  # noqa: F811
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT.replace("stp='off' delay='0'", "stp='on' delay='0'"))
        await network.start()
        attachment = resolved(networks, "<bandwidth><inbound average='500'/><outbound average='500'/></bandwidth>")
        before = links_here()
        interface = card(NETWORK, 1400)

        async def work() -> None:
            interface.target = None
            try:
                with ExitStack() as close:
                    open_taps([interface], close, {"net0": attachment})
            finally:
                fault.at = 0
                release_taps([interface])  # as the manager does

        async def after(said: str) -> None:
            assert links_here() == before

        assert await sweep(fault, work, after) > 10
        await network.destroy()

    with_networks(space, tmp_path, turn)


NETWORK = "type='network'><source network='default'/>"


def resolved(networks: Networks, more: str = "") -> Attachment:
    found = resolve(card(f"{NETWORK}{more}", 1400), networks)
    assert found is not None
    return found


def links_here() -> set[str]:
    with Netlink() as netlink:
        return {link.name for link in netlink.links()}


def test_a_tap_whose_move_fails_anywhere_is_where_it_was(space: Namespace, tmp_path: Path, fault: Fault) -> None:  # noqa: F811
    async def turn(networks: Networks) -> None:
        network = await networks.define(NAT)
        await network.start()
        with Netlink() as netlink, ExitStack() as close:
            index = create_bridge(netlink, "br9", up=True).link.index
            home = netlink.link("virbr0").index
            here = resolved(networks)
            there = resolve(card("type='bridge'><source bridge='br9'/>", 1400), None)
            assert there is not None
            interface = card(NETWORK, 1400)
            open_taps([interface], close, {"net0": here})
            assert interface.target is not None and interface.target.dev is not None
            name = interface.target.dev

            async def work() -> None:
                change_tap(interface, here, there)

            async def after(said: str) -> None:
                tap = netlink.link(name)
                assert tap.up
                assert tap.master == (home if said else index)
                if not said:
                    change_tap(interface, there, here)

            assert await sweep(fault, work, after) > 5
        await network.destroy()

    with_networks(space, tmp_path, turn)
