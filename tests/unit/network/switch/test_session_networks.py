"""A session's networks: defined as others are, each a switch of its own, changed while machines are on them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from kvik.conf.enums import NetworkUpdateCommand, NetworkUpdateFlags, NetworkUpdateSection
from kvik.errors import ConfigUnsupported, KvikError, OperationInvalid, ResourceBusy
from kvik.network.default import ensure_default
from kvik.network.networks import Networks
from kvik.network.switch.session import Card, SessionNetworks, longest_mtu
from unit.network.switch.guest import Guest
from unit.network.switch.session import Session, inside, interface, session

ONE, TWO, THREE = (f"52:54:00:aa:00:0{number}" for number in (1, 2, 3))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Session]:
    with session(tmp_path) as made:
        yield made


async def started(networks: Networks, xml: str) -> None:
    network = await networks.define(xml)
    await network.start()


def answering(guest: Guest) -> threading.Thread:
    """A guest that answers ARP and pings until its switch is gone."""

    def look() -> None:
        try:
            guest.packet(-1)
        except OSError:
            pass

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread


def test_a_machine_is_on_several_networks_and_each_has_its_own_machines_and_names(home: Session) -> None:
    async def work(networks: Networks, switches: SessionNetworks) -> None:
        await started(networks, inside("red", 1))
        await started(networks, inside("blue", 2))
        both = home.plug(switches, "both", "red", ONE), home.plug(switches, "both", "blue", TWO, alias="net1")
        red, blue = home.plug(switches, "left", "red", TWO), home.plug(switches, "right", "blue", ONE)
        for guest, other, number in ((both[0], red, 1), (both[1], blue, 2)):
            assert guest.boot().startswith(f"10.{number}.0.")
            address = other.boot()
            assert other.ask("both") == other.ask(f"both.{['', 'red', 'blue'][number]}.example") != []
            assert guest.ask(["", "left", "right"][number]) == [address]
            answering(other)
            guest.ping(address)
        assert both[0].ask("right") == both[1].ask("left") == []
        assert home.pid("red") != home.pid("blue")
        assert {lease.hostname for lease in networks.lookup_name("red").leases()} == {"both", "left"}

    home.turn(work)


def test_definitions_are_files_like_others_and_come_back_with_the_next_daemon(home: Session) -> None:
    async def first(networks: Networks, switches: SessionNetworks) -> str:
        network = await networks.define(inside("red", 1).replace("<ip", "<bridge name='virbr9'/><ip", 1))
        await network.set_autostart(True)
        await network.start()
        assert "<bridge" not in network.xml()
        assert network.bridge_name is None
        other = await networks.define(inside("blue", 2))
        assert not other.is_active
        with pytest.raises(OperationInvalid, match="net-start blue"):
            home.plug(switches, "early", "blue", ONE)
        return network.uuid_text

    uuid = home.turn(first)

    async def second(networks: Networks, switches: SessionNetworks) -> None:
        network = networks.lookup_uuid(UUID(uuid).bytes)
        assert (network.name, network.is_active, network.autostart) == ("red", True, True)
        guest = home.plug(switches, "left", "red", ONE)
        assert guest.boot().startswith("10.1.0.")
        await network.destroy()
        await networks.undefine(network)
        assert [each.name for each in networks.list()] == ["blue"]

    home.turn(second)
    assert [path.name for path in home.paths.networks.glob("*.xml")] == ["blue.xml"]


def test_what_cannot_be_is_refused_when_it_is_defined_and_two_do_not_share_a_subnet(home: Session) -> None:
    async def work(networks: Networks, switches: SessionNetworks) -> None:
        with pytest.raises(ConfigUnsupported, match="takes privileges"):
            await networks.define("<network><name>b</name><forward mode='bridge'/><bridge name='br0'/></network>")
        await started(networks, inside("red", 1))
        twin = await networks.define(inside("twin", 1))
        with pytest.raises(ResourceBusy, match="network 'red' has already") as caught:
            await twin.start()
        assert "is free" in caught.value.remedy
        assert [network.name for network in networks.list() if network.is_active] == ["red"]

    home.turn(work)


def test_reservations_names_and_ranges_change_while_machines_are_on(home: Session) -> None:
    add, live = NetworkUpdateCommand.ADD_LAST, NetworkUpdateFlags.LIVE | NetworkUpdateFlags.CONFIG

    async def work(networks: Networks, switches: SessionNetworks) -> None:
        await started(networks, inside("red", 1))
        network = networks.lookup_name("red")
        left = home.plug(switches, "left", "red", ONE)
        address = left.boot()
        host = f"<host mac='{TWO}' name='web' ip='10.1.0.80'/>"
        await network.update(add, NetworkUpdateSection.IP_DHCP_HOST, -1, host, live)
        name = "<host ip='10.1.0.90'><hostname>printer</hostname></host>"
        await network.update(add, NetworkUpdateSection.DNS_HOST, -1, name, live)
        assert left.ask("printer") == ["10.1.0.90"]
        assert home.plug(switches, "right", "red", TWO).boot() == "10.1.0.80"
        assert left.ask("right") == ["10.1.0.80"]
        assert "10.1.0.90" in network.xml(inactive=True)
        with pytest.raises(ConfigUnsupported):
            await network.update(add, NetworkUpdateSection.DNS_TXT, -1, "<txt name='a' value='b'/>", live)
        assert "<txt" not in network.xml() + network.xml(inactive=True)
        assert left.boot() == address

    home.turn(work)


def test_a_network_that_is_stopped_under_its_machines_has_them_again_when_it_is_started(home: Session) -> None:
    async def work(networks: Networks, switches: SessionNetworks) -> None:
        await started(networks, inside("red", 1))
        network = networks.lookup_name("red")
        left = home.plug(switches, "left", "red", ONE)
        address = left.boot()
        await network.destroy()
        with pytest.raises(ConnectionError):
            left.frame()
        assert switches.look_after(home.cards) == []  # nobody starts it again
        assert home.pid("red") is None
        # Edited meanwhile: what it is from now on is what its machines see.
        await networks.define(inside("red", 3).replace("<network>", f"<network><uuid>{network.uuid_text}</uuid>"))
        await network.start()
        switches.look_after(home.cards)
        left.plug()
        assert left.boot() == address.replace("10.1.", "10.3.")
        # Undefined while it is active: it goes on, and is forgotten when it ends.
        await networks.undefine(network)
        assert left.boot()
        await network.destroy()
        assert networks.list() == []
        assert switches.look_after(home.cards) == []
        home.cards.clear()

    home.turn(work)


def test_a_machine_that_there_is_no_address_for_is_said_until_one_is_free(home: Session) -> None:
    small = inside("red", 1).replace("end='10.1.0.20'", "end='10.1.0.11'")

    async def work(networks: Networks, switches: SessionNetworks) -> None:
        await started(networks, small)
        network = networks.lookup_name("red")
        one, two = (home.plug(switches, name, "red", mac) for name, mac in (("one", ONE), ("two", TWO)))
        address = one.boot()
        two.boot()
        assert switches.look_after(home.cards) == []
        three = home.plug(switches, "three", "red", THREE)
        assert not three.wants_address(0.2)
        (said,) = switches.look_after(home.cards)
        assert "machine three gets no address" in said and "net-edit red" in said
        assert switches.look_after(home.cards) == []
        assert network.messages()[0].startswith("all 2 addresses")
        assert one.boot() == address
        two.close()  # its machine has ended
        home.cards = [card for card in home.cards if card.machine != "two"]
        while len(network.leases()) == 2:
            switches.look_after(home.cards)
        assert three.boot()
        assert switches.look_after(home.cards) == []

    home.turn(work)


def test_a_killed_switch_is_had_again_and_gives_the_same_addresses(home: Session) -> None:
    async def work(networks: Networks, switches: SessionNetworks) -> None:
        await started(networks, inside("red", 1))
        guests = [home.plug(switches, name, "red", mac) for name, mac in (("left", ONE), ("right", TWO))]
        addresses = [guest.boot() for guest in guests]
        killed = home.kill("red")
        said = switches.look_after(home.cards)
        assert "started again" in said[0]
        assert home.pid("red") != killed
        for guest in guests:
            guest.plug()
        answering(guests[1])
        guests[0].ping(addresses[1])
        assert guests[0].boot() == addresses[0]

    home.turn(work)


def test_a_new_daemon_takes_over_switches_and_ends_those_of_no_network(home: Session) -> None:
    async def first(networks: Networks, switches: SessionNetworks) -> Guest:
        for name, number in (("red", 1), ("blue", 2)):
            await started(networks, inside(name, number))
        home.plug(switches, "right", "blue", TWO).boot()
        guest = home.plug(switches, "left", "red", ONE)
        guest.boot()
        return guest

    guest = home.turn(first)
    before = home.pid("red"), home.pid("blue")
    assert None not in before
    (home.paths.run / "network/blue.xml").unlink()  # as if the daemon was killed when this was all that was left

    async def second(networks: Networks, switches: SessionNetworks) -> None:
        assert (home.pid("red"), home.pid("blue")) == (before[0], None)
        assert switches.look_after(home.cards) == []
        assert guest.boot()
        assert len(networks.lookup_name("red").leases()) == 1

    home.turn(second)


def test_default_is_made_on_first_use_and_is_a_network_like_any_other(
    home: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvik.network.networks.find_program", lambda name: None)

    async def first(networks: Networks, switches: SessionNetworks) -> None:
        network = await ensure_default(networks)
        assert network is not None
        # Without passt nobody is put on it who did not ask.
        assert (network.name, network.is_active, network.autostart) == ("default", False, True)
        await network.start()
        assert network.is_active

    home.turn(first)

    async def second(networks: Networks, switches: SessionNetworks) -> None:
        assert await ensure_default(networks) is None
        network = networks.lookup_name("default")
        await network.destroy()
        await networks.undefine(network)

    home.turn(second)

    async def third(networks: Networks, switches: SessionNetworks) -> None:
        assert await ensure_default(networks) is None
        with pytest.raises(KvikError):
            networks.lookup_name("default")

    home.turn(third)


def test_with_passt_default_starts_by_itself(home: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvik.network.networks.find_program", lambda name: "/usr/bin/passt")

    async def work(networks: Networks, switches: SessionNetworks) -> None:
        network = await ensure_default(networks)
        assert network is not None
        assert network.is_active
        assert home.pid("default") is None  # no machine, no process

    home.turn(work)


@pytest.mark.parametrize(
    ("more", "network", "mtu"),
    [
        ("<model type='virtio'/>", 0, 65520),
        ("<model type='virtio-non-transitional'/>", 0, 65520),
        ("<model type='e1000'/>", 0, 0),
        ("", 0, 0),
        ("<model type='virtio'/><mtu size='1400'/>", 0, 0),
        ("<model type='virtio'/>", 9000, 0),
    ],
)
def test_a_card_of_virtios_may_have_a_long_mtu_unless_another_is_said(more: str, network: int, mtu: int) -> None:
    card = Card("one", Path("/nonexistent"), interface("red", ONE, more=more))
    assert longest_mtu(card, {"mtu": network}) == mtu
