"""Allow-lists by name, with a real resolver: a machine reaches what the names on its list resolve to, nothing else."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from functional.network.questions import AAAA, NOERROR, REFUSED, A, ask
from kvik.conf.nwfilter import FilterBinding, FilterReference, Parameter
from kvik.errors import ConfigError
from kvik.host import nftables
from kvik.host.bridge import bridge_ports, create_bridge
from kvik.host.namespace import Namespace
from kvik.host.netlink import Netlink
from kvik.host.process import ProcessHandle
from kvik.network.egress import Resolver, check_name, name_servers
from kvik.network.filters.filters import Filters
from kvik.paths import Paths
from netns import in_namespace, new_namespace, until, until_ports_forward

GATEWAY, GUEST = "10.0.0.254", "10.0.0.1"
GATEWAY6, GUEST6 = "fd00::fe", "fd00::1"
GOOD, BAD = "192.0.2.10", "192.0.2.11"
GOOD6, BAD6 = "2001:db8::10", "2001:db8::11"
MAC = "52:54:00:00:00:01"
UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"


class Host:
    """A bridge with the gateway's address, name servers and two hosts of the world; `guest` is a namespace on it."""

    def __init__(self, directory: Path, close: ExitStack, keep: float) -> None:
        self.filters = Filters(Paths.system(directory), keep=keep)
        self.filters.open()
        close.callback(self.filters.close)
        close.callback(self._release)
        self.guest = close.enter_context(new_namespace())
        with Netlink() as netlink:
            lo = netlink.link("lo")
            netlink.set_link(lo.index, up=True)
            for address in (GOOD, BAD, "192.0.2.53", GOOD6, BAD6):
                netlink.add_address(lo.index, f"{address}/{128 if ':' in address else 32}")
            bridge = create_bridge(netlink, "br0", up=True, stp=False)
            netlink.add_address(bridge.index, f"{GATEWAY}/24")
            subprocess.run(["ip", "addr", "add", f"{GATEWAY6}/64", "dev", "br0", "nodad"], check=True)
            link = netlink.add_veth("tap0", "eth0", namespace=self.guest.fd)
            netlink.set_link(link.index, master=bridge.index)
            netlink.set_link(link.index, up=True)
            self.guest.run(self._inside)
            while [port.state for port in bridge_ports(netlink, bridge.index)] != ["forwarding"]:
                pass
        # A world in which every name resolves, and the network's own DNS, which knows them all.
        for address in ("192.0.2.53", GATEWAY):
            names = [f"--address=/example.org/{GOOD}", f"--address=/other.org/{BAD}"]
            names += [f"--address=/example.org/{GOOD6}", f"--address=/other.org/{BAD6}"]
            options = ["--no-resolv", "--no-hosts", "--bind-interfaces", "--keep-in-foreground", "--pid-file="]
            started = subprocess.Popen(
                ["dnsmasq", f"--listen-address={address}", "--except-interface=lo", *options, *names]
                if address == GATEWAY
                else ["dnsmasq", f"--listen-address={address}", *options, *names]
            )
            close.callback(started.wait)
            close.callback(started.terminate)
        self.listeners = {}
        for address in (GOOD, BAD, GOOD6, BAD6):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self.listeners[address] = close.enter_context(socket.create_server((address, 80), family=family))

    def _release(self) -> None:
        """A resolver outlives a daemon, and would outlive the test and its namespace."""
        for binding in self.filters.bindings():
            self.filters.unbind(binding.portdev)

    @staticmethod
    def _inside() -> None:
        subprocess.run(["ip", "link", "set", "eth0", "address", MAC], check=True)
        for command in (f"addr add {GUEST}/24 dev eth0", "link set eth0 up", "link set lo up",
                        f"route add default via {GATEWAY}", f"addr add {GUEST6}/64 dev eth0 nodad",
                        f"-6 route add default via {GATEWAY6}"):  # fmt: skip
            subprocess.run(["ip", *command.split()], check=True)

    def bind(self, *names: str, filter_: str = "allow-names") -> None:
        listed = [Parameter(name="ALLOW", value=name) for name in names]
        listed.append(Parameter(name="DNSSERVER", value="192.0.2.53"))
        self.filters.bind(
            FilterBinding(
                owner_name="m",
                owner_uuid=UUID,
                portdev="tap0",
                mac=MAC,
                reference=FilterReference(filter=filter_, parameters=listed),
            )
        )

    def ask(self, name: str, server: str = GATEWAY, kind: int = A) -> tuple[int, str] | None:
        return self.guest.run(lambda: ask(name, server, kind))

    @contextmanager
    def neighbour(self, tap: str, bridge: str, address: str, mac: str) -> Iterator[Namespace]:
        """Another guest, whose card has whatever MAC it likes."""
        with new_namespace() as guest, Netlink() as netlink:
            link = netlink.add_veth(tap, "eth0", namespace=guest.fd)

            def inside() -> None:
                for command in (f"link set eth0 address {mac}", f"addr add {address}/24 dev eth0", "link set eth0 up"):
                    subprocess.run(["ip", *command.split()], check=True)

            guest.run(inside)
            netlink.set_link(link.index, master=netlink.link(bridge).index)
            netlink.set_link(link.index, up=True)
            until_ports_forward(netlink)
            yield guest
            netlink.delete_link(link.index)

    def resolver(self) -> ProcessHandle:
        found = Resolver(self.filters.store.bindings, "tap0", MAC).find()
        assert found is not None
        return found

    def reaches(self, address: str) -> bool:
        def connect() -> bool:
            try:
                with socket.create_connection((address, 80), timeout=0.7):
                    return True
            except OSError:
                return False

        reached = self.guest.run(connect)
        if reached and address in self.listeners:
            self.listeners[address].accept()[0].close()
        return reached

    def connect(self, address: str) -> tuple[socket.socket, socket.socket]:
        """A connection from the guest: the world's end, and the guest's."""
        listener = self.listeners[address]
        client = self.guest.run(lambda: socket.create_connection((address, 80), timeout=5))
        peer, _ = listener.accept()
        peer.settimeout(5)
        return peer, client


@contextmanager
def host(directory: Path, keep: float = 60) -> Iterator[Host]:
    if shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        pytest.skip("dnsmasq is not installed")
    with ExitStack() as close:
        yield Host(directory, close, keep)


@in_namespace
def test_a_machine_reaches_what_its_names_resolve_to_and_nothing_else(tmp_path: Path) -> None:
    with host(tmp_path) as here:
        assert here.ask("other.org") == (NOERROR, BAD) and here.reaches(BAD), "without the filter all is open"
        here.bind("example.org")
        assert not here.reaches(GOOD), "nobody asked for its name yet"
        assert here.ask("example.org") == (NOERROR, GOOD)
        assert here.reaches(GOOD)
        assert here.ask("www.example.org") == (NOERROR, GOOD), "what is below a name is allowed with it"
        assert here.ask("other.org") == (REFUSED, "")
        assert here.ask("secret.data.other.org") == (REFUSED, ""), "names carry nothing out"
        assert not here.reaches(BAD)
        assert here.ask("example.org", "192.0.2.53") is None, "no other name server"
        here.filters.unbind("tap0")
        assert here.ask("other.org") == (NOERROR, BAD) and here.reaches(BAD)


@in_namespace
def test_the_gateway_answers_by_ipv6_too(tmp_path: Path) -> None:
    with host(tmp_path) as here:
        assert here.reaches(BAD6), "without the filter all is open"
        here.bind("example.org")
        assert not here.reaches(GOOD6)
        assert here.ask("other.org", GATEWAY6, AAAA) == (REFUSED, "")
        assert here.ask("example.org", GATEWAY6, AAAA) == (NOERROR, GOOD6)
        assert here.reaches(GOOD6) and not here.reaches(BAD6)
        assert here.ask("example.org", GATEWAY6) == (NOERROR, GOOD) and here.reaches(GOOD)


@in_namespace
def test_who_takes_a_listed_machines_mac_is_not_answered_in_its_place(tmp_path: Path) -> None:
    with host(tmp_path) as here, Netlink() as netlink:
        here.bind("example.org")
        with here.neighbour("tap1", "br0", "10.0.0.2", MAC) as thief:
            assert thief.run(lambda: ask("other.org", GATEWAY)) == (NOERROR, BAD), "the network's own DNS answers it"
        assert here.ask("other.org") == (REFUSED, "")
        # The same MAC on another bridge is another machine: no list is its own.
        second = create_bridge(netlink, "br1", up=True, stp=False)
        netlink.add_address(second.index, "10.1.0.254/24")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("10.1.0.254", 53))
            server.settimeout(5)
            with here.neighbour("tap2", "br1", "10.1.0.1", MAC) as namesake:
                assert namesake.run(lambda: ask("other.org", "10.1.0.254", tries=1, patience=0.1)) is None
                assert b"other" in server.recv(512), "its question went where it was sent"
        here.filters.unbind("tap0")
        with here.neighbour("tap1", "br0", "10.0.0.2", MAC) as free:
            assert free.run(lambda: ask("other.org", GATEWAY)) == (NOERROR, BAD)


@in_namespace
def test_a_list_that_changes_takes_effect_and_nothing_is_left_at_the_end(tmp_path: Path) -> None:
    with host(tmp_path) as here:
        here.bind("example.org")
        here.ask("example.org")
        here.bind("other.org")
        assert here.ask("example.org") == (REFUSED, "") and not here.reaches(GOOD)
        assert here.ask("other.org") == (NOERROR, BAD) and here.reaches(BAD)
        # The next daemon finds the binding, and the machine its names: its resolver has gone on.
        before = here.resolver().pid
        here.filters.close()
        again = Filters(Paths.system(tmp_path))
        again.open()
        assert again.warnings == []
        assert here.reaches(BAD) and not here.reaches(GOOD)
        assert here.ask("other.org") == (NOERROR, BAD)
        assert here.resolver().pid == before
        again.unbind("tap0")
        again.close()
        assert not list((tmp_path / "run/kvik/nwfilter-binding").iterdir())
        left = str(nftables.run([{"list": {"ruleset": None}}]))
        assert "tap0" not in left and MAC not in left
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    assert os.fsencode(tmp_path) not in (entry / "cmdline").read_bytes()
                except OSError:
                    continue


@in_namespace
def test_what_a_name_resolved_to_lapses_but_its_connections_go_on(tmp_path: Path) -> None:
    with host(tmp_path, keep=1) as here:
        here.bind("example.org")
        assert here.ask("example.org") == (NOERROR, GOOD)
        peer, client = here.connect(GOOD)
        with peer, client:
            here.bind("example.org", "more.example")  # only added to: nothing is forgotten
            assert here.reaches(GOOD)
            until(lambda: not here.reaches(GOOD))
            client.sendall(b"still")
            assert peer.recv(5) == b"still"
            peer.sendall(b"there")
            assert client.recv(5) == b"there"
            assert here.ask("example.org") == (NOERROR, GOOD) and here.reaches(GOOD), "who asks again may again"
            here.bind("more.example")
            client.sendall(b"gone")
            peer.settimeout(0.5)
            with pytest.raises(TimeoutError):
                peer.recv(4)


@in_namespace
def test_a_resolver_that_dies_is_started_again(tmp_path: Path) -> None:
    with host(tmp_path) as here:
        here.bind("example.org")
        here.resolver().kill()
        until(lambda: here.ask("example.org") == (NOERROR, GOOD))
        # Somebody flushed our redirection: the machine asks nobody else meanwhile, and has its own back.
        nftables.run([{"delete": {"table": {"family": "inet", "name": "kvik_names"}}}])
        assert here.filters.repair()
        assert here.ask("other.org") == (REFUSED, "")
        # It dies with nobody to see it; the next daemon starts it.
        here.filters.close()
        here.resolver().kill()
        assert here.ask("example.org") is None
        here.filters.open()
        assert here.ask("example.org") == (NOERROR, GOOD)
        # The machine ends with nobody to see it: nothing of it stays.
        here.filters.close()
        with Netlink() as netlink:
            netlink.delete_link(netlink.link("tap0").index)
        last = here.resolver()
        again = Filters(Paths.system(tmp_path))
        again.open()
        assert not again.bindings() and not last.alive
        assert not list((tmp_path / "run/kvik/nwfilter-binding").iterdir())
        left = str(nftables.run([{"list": {"ruleset": None}}]))
        assert "tap0" not in left and MAC not in left


@in_namespace
def test_what_cannot_be_is_refused_and_leaves_the_interface_as_it_was(tmp_path: Path) -> None:
    with host(tmp_path) as here:
        with pytest.raises(ConfigError, match="not a DNS name"):
            here.bind("-x.example")
        with pytest.raises(ConfigError, match="an address, not a name"):
            here.bind("192.0.2.1")
        with pytest.raises(ConfigError, match="256 are the most"):
            here.bind(*(f"h{number}.example" for number in range(257)))
        assert not here.filters.bindings() and here.reaches(BAD)


def test_names_are_checked_before_they_become_configuration(tmp_path: Path) -> None:
    assert check_name("Example.ORG.") == "example.org"
    for wrong in ("", ".", "a..b", "a/b", "a\nserver=/#/192.0.2.1", "a#b", "*.example.org", "x" * 64, "é.example"):
        with pytest.raises(ConfigError):
            check_name(wrong)
    (tmp_path / "resolv.conf").write_text("# x\nnameserver 192.0.2.1\nnameserver bad\n nameserver 2001:db8::1\n")
    assert name_servers(tmp_path / "resolv.conf") == ["192.0.2.1", "2001:db8::1"]
    assert name_servers(tmp_path / "missing") == []
