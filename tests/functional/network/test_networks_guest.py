"""Guests on a NAT network: a real machine with an address, names and a way out; and what comes in, or does not."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from functional.network.networks import NAT, with_networks
from functional.test_tiny_boot import Guest
from kvik.conf.enums import NetworkUpdateCommand, NetworkUpdateFlags, NetworkUpdateSection
from kvik.guest.tiny import TinyImage, tiny
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.process import find_program
from kvik.host.route import add_route
from kvik.host.tap import create_tap
from kvik.network.dhcp import discover
from kvik.network.networks import Networks
from kvik.paths import Paths

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: bridges"),
    pytest.mark.skipif(find_program("dnsmasq") is None, reason="needs dnsmasq (Debian: dnsmasq-base)"),
]
OUTSIDE, WORLD = "203.0.113.1", "203.0.113.2"  # this host's address on the world's side, and the world
NAMED = NAT.replace(
    "<ip ", "<domain name='lan'/><dns><host ip='192.168.122.1'><hostname>gateway</hostname></host></dns>\n  <ip "
)
FORWARDING = NAMED.replace(
    "<forward mode='nat'/>",
    "<forward mode='nat' xmlns:kvik='urn:kvik:1'>"
    "<kvik:portForward proto='tcp' start='8080' guest='192.168.122.9' to='80'/>"
    "<kvik:portForward proto='udp' start='5000' end='5009' guest='192.168.122.9' to='6000'/></forward>",
)


@pytest.fixture
def spaces() -> Iterator[tuple[Namespace, Namespace]]:
    """The host, and a world that a wire joins to it. The world has no route to the guests' addresses."""
    with Namespace() as host, Namespace() as world:

        def join() -> None:
            with Netlink() as netlink:
                wire = netlink.add_veth("uplink", "eth0", namespace=world.fd)
                netlink.add_address(wire.index, f"{OUTSIDE}/24")
                netlink.set_link(wire.index, up=True)
                netlink.set_link(netlink.link("lo").index, up=True)

        def settle() -> None:
            with Netlink() as netlink:
                wire = netlink.link("eth0")
                netlink.add_address(wire.index, f"{WORLD}/24")
                netlink.set_link(wire.index, up=True)

        host.run(join)
        world.run(settle)
        yield host, world


def plug(guest: Namespace, bridge: str) -> None:
    """Join a namespace to a bridge as a guest's card would be."""
    with Netlink() as netlink:
        port = netlink.add_veth(f"port{guest.fd}", "eth0", namespace=guest.fd)
        netlink.set_link(port.index, master=netlink.link(bridge).index, up=True)


def settle(address: str) -> None:
    with Netlink() as netlink:
        card = netlink.link("eth0")
        netlink.add_address(card.index, f"{address}/24")
        netlink.set_link(card.index, up=True)
        add_route(netlink, "0.0.0.0/0", gateway="192.168.122.1", index=card.index)


def bound(kind: int, address: str, port: int) -> Callable[[], socket.socket]:
    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, kind)
        made.settimeout(5)
        made.bind((address, port))
        if kind == socket.SOCK_STREAM:
            made.listen()
        return made

    return make


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed")
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt: the image is made from Debian packages")
@pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="no /dev/net/tun")
def test_a_machine_gets_an_address_a_name_and_the_world(
    spaces: tuple[Namespace, Namespace], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    host, world = spaces
    paths = Paths.system(tmp_path_factory.mktemp("image"))
    image: TinyImage = tiny(paths)

    async def turn(networks: Networks) -> None:
        network = await networks.define(NAMED)
        await network.start()
        mac = "52:54:00:11:22:33"
        with ExitStack() as stack:
            tap = create_tap("", bridge="virbr0", queues=1)
            stack.callback(tap.close)
            answering = stack.enter_context(closing(world.run(bound(socket.SOCK_STREAM, WORLD, 7))))
            machine = await networks.run(
                lambda: Guest(image, paths, tmp_path, f"tap,id=net,fd={tap.fds[0]}", (tap.fds[0],), mac=mac)
            )
            stack.callback(machine.close)

            def look() -> None:
                machine.eventually("ip -4 addr show eth0", "inet 192.168.122.")
                assert "default via 192.168.122.1" in machine.shell("ip route")
                assert "0% packet loss" in machine.shell("ping -c 1 -W 5 192.168.122.1")
                assert "192.168.122.1" in machine.shell("nslookup gateway.lan 192.168.122.1")
                assert "0% packet loss" in machine.shell(f"ping -c 1 -W 5 {WORLD}")
                machine.shell(f"(echo hello | nc {WORLD} 7) >/dev/null 2>&1 &")  # it ends when the world hangs up
                peer, source = answering.accept()
                peer.settimeout(5)
                assert peer.recv(64) == b"hello\n"
                peer.close()
                assert source[0] == OUTSIDE and source[1] >= 1024  # masqueraded

            await networks.run(look)
            (lease,) = network.leases(mac)
            assert lease.hostname == "tested" and lease.prefix == 24 and lease.interface == "virbr0"
            assert lease.address in await networks.run(machine.shell, "ip -4 addr show eth0")
            assert lease.address in await networks.run(machine.shell, "nslookup tested.lan 192.168.122.1")

            # Edited while the machine is on it: what is live is so for the machine, what is defined is not yet.
            async def add(section: NetworkUpdateSection, xml: str) -> None:
                await network.update(
                    NetworkUpdateCommand.ADD_LAST, section, -1, xml, NetworkUpdateFlags.LIVE | NetworkUpdateFlags.CONFIG
                )

            await add(NetworkUpdateSection.DNS_HOST, "<host ip='192.168.122.77'><hostname>printer</hostname></host>")
            assert "192.168.122.77" in await networks.run(machine.shell, "nslookup printer.lan 192.168.122.1")
            assert lease.address in await networks.run(machine.shell, "nslookup tested.lan 192.168.122.1")
            await add(NetworkUpdateSection.IP_DHCP_HOST, f"<host mac='{mac}' ip='192.168.122.200'/>")
            assert "0% packet loss" in await networks.run(machine.shell, f"ping -c 1 -W 5 {WORLD}")
            renewed = await networks.run(machine.shell, "udhcpc -n -q -f -i eth0 -s /etc/udhcpc.script 2>&1")
            assert "192.168.122.200" in renewed
            assert "0% packet loss" in await networks.run(machine.shell, f"ping -c 1 -W 5 {WORLD}")
            assert [found.address for found in network.leases(mac)] == ["192.168.122.200"]
            edited = network.xml(inactive=True).replace("192.168.122.77", "192.168.122.78")
            assert await networks.define(edited) is network
            assert "192.168.122.77" in await networks.run(machine.shell, "nslookup printer.lan 192.168.122.1")
        await network.destroy()

    with_networks(host, tmp_path, turn)


def test_what_comes_in_is_what_was_declared(spaces: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    host, world = spaces

    async def turn(networks: Networks) -> None:
        network = await networks.define(FORWARDING)
        await network.start()
        with Namespace() as guest, ExitStack() as stack:
            plug(guest, "virbr0")
            guest.run(lambda: settle("192.168.122.9"))
            web = stack.enter_context(closing(guest.run(bound(socket.SOCK_STREAM, "192.168.122.9", 80))))
            games = stack.enter_context(closing(guest.run(bound(socket.SOCK_DGRAM, "192.168.122.9", 6003))))

            def call(space: Namespace | None, where: tuple[str, int]) -> socket.socket:
                make = lambda: socket.create_connection(where, timeout=5)  # noqa: E731
                return stack.enter_context(closing(space.run(make) if space else make()))

            def look() -> None:
                for caller in (world, None):  # from outside, and from this host itself
                    call(caller, (OUTSIDE, 8080)).sendall(b"x")
                    peer, source = web.accept()
                    assert peer.recv(1) == b"x"
                    assert source[0] == (WORLD if caller else OUTSIDE)  # the guest sees who calls
                    peer.close()
                asking = stack.enter_context(closing(world.run(bound(socket.SOCK_DGRAM, WORLD, 9999))))
                asking.sendto(b"play", (OUTSIDE, 5003))
                data, source = games.recvfrom(16)
                games.sendto(data.upper(), source)
                assert asking.recvfrom(16) == (b"PLAY", (OUTSIDE, 5003))

                # A port that was not declared is not there, nor is the guest's own address from outside.
                def route_in() -> None:
                    with Netlink() as netlink:
                        add_route(netlink, "192.168.122.0/24", gateway=OUTSIDE, index=netlink.link("eth0").index)

                world.run(route_in)
                for where in ((OUTSIDE, 8081), ("192.168.122.9", 80)):
                    with pytest.raises(OSError):
                        call(world, where)

            await networks.run(look)
        await network.destroy()

    with_networks(host, tmp_path, turn)


def test_guests_of_two_networks_do_not_meet_and_an_isolated_one_has_no_way_out(
    spaces: tuple[Namespace, Namespace], tmp_path: Path
) -> None:
    host, world = spaces
    inside = (
        "<network><name>inside</name><bridge name='virbr7' stp='off'/>"
        "<ip address='10.7.0.1' prefix='24'><dhcp><range start='10.7.0.10' end='10.7.0.20'/></dhcp></ip></network>"
    )

    async def turn(networks: Networks) -> None:
        first, second = await networks.define(NAT), await networks.create_xml(inside)
        await first.start()
        with Namespace() as guest, Namespace() as other, ExitStack() as stack:
            plug(guest, "virbr0")
            plug(other, "virbr7")
            guest.run(lambda: settle("192.168.122.9"))

            def settle_other() -> None:
                with Netlink() as netlink:
                    card = netlink.link("eth0")
                    netlink.set_link(card.index, up=True)
                    offer = discover("eth0", 5)
                    assert offer is not None and offer.router is None  # no way out is not advertised as one
                    netlink.add_address(card.index, f"{offer.address}/24")
                    add_route(netlink, "0.0.0.0/0", gateway="10.7.0.1", index=card.index)

            def look() -> None:
                other.run(settle_other)
                stack.enter_context(closing(guest.run(bound(socket.SOCK_STREAM, "192.168.122.9", 80))))
                stack.enter_context(closing(world.run(bound(socket.SOCK_STREAM, WORLD, 80))))
                guest.run(lambda: socket.create_connection((WORLD, 80), 5)).close()
                for where in (("192.168.122.9", 80), (WORLD, 80)):
                    with pytest.raises(ConnectionRefusedError):  # rejected, so told at once
                        other.run(lambda to=where: socket.create_connection(to, 5))

            await networks.run(look)
        await first.destroy()
        await second.destroy()

    with_networks(host, tmp_path, turn)
