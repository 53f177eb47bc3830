"""Allow-lists by name, with a real resolver: a machine reaches what the names on its list resolve to, nothing else."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvik.conf.nwfilter import FilterBinding, FilterReference, Parameter
from kvik.errors import ConfigError
from kvik.host import nftables
from kvik.host.bridge import bridge_ports, create_bridge
from kvik.host.netlink import Netlink
from kvik.network.egress import check_name, name_servers
from kvik.network.filters.filters import Filters
from kvik.paths import Paths
from netns import in_namespace, new_namespace

GATEWAY, GUEST = "10.0.0.254", "10.0.0.1"
GOOD, BAD = "192.0.2.10", "192.0.2.11"
MAC = "52:54:00:00:00:01"
UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
NOERROR, REFUSED = 0, 5


class Host:
    """A bridge with the gateway's address, name servers and two hosts of the world; `guest` is a namespace on it."""

    def __init__(self, directory: Path, close: ExitStack) -> None:
        self.filters = Filters(Paths.system(directory))
        self.filters.open()
        close.callback(self.filters.close)
        self.guest = close.enter_context(new_namespace())
        with Netlink() as netlink:
            lo = netlink.link("lo")
            netlink.set_link(lo.index, up=True)
            for address in (GOOD, BAD, "192.0.2.53"):
                netlink.add_address(lo.index, f"{address}/32")
            bridge = create_bridge(netlink, "br0", up=True, stp=False)
            netlink.add_address(bridge.index, f"{GATEWAY}/24")
            link = netlink.add_veth("tap0", "eth0", namespace=self.guest.fd)
            netlink.set_link(link.index, master=bridge.index)
            netlink.set_link(link.index, up=True)
            self.guest.run(self._inside)
            while [port.state for port in bridge_ports(netlink, bridge.index)] != ["forwarding"]:
                pass
        # A world in which every name resolves, and the network's own DNS, which knows them all.
        for address in ("192.0.2.53", GATEWAY):
            names = [f"--address=/example.org/{GOOD}", f"--address=/other.org/{BAD}"]
            options = ["--no-resolv", "--no-hosts", "--bind-interfaces", "--keep-in-foreground", "--pid-file="]
            started = subprocess.Popen(
                ["dnsmasq", f"--listen-address={address}", "--except-interface=lo", *options, *names]
                if address == GATEWAY
                else ["dnsmasq", f"--listen-address={address}", *options, *names]
            )
            close.callback(started.wait)
            close.callback(started.terminate)
        for address in (GOOD, BAD):
            listener = close.enter_context(socket.create_server((address, 80)))
            listener.listen()

    @staticmethod
    def _inside() -> None:
        subprocess.run(["ip", "link", "set", "eth0", "address", MAC], check=True)
        for command in (f"addr add {GUEST}/24 dev eth0", "link set eth0 up", "link set lo up",
                        f"route add default via {GATEWAY}"):  # fmt: skip
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

    def ask(self, name: str, server: str = GATEWAY) -> tuple[int, str] | None:
        """(result code, the last address of the answer or ""); None if nobody answers."""
        question = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0\0\1\0\1"

        def query() -> tuple[int, str] | None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
                made.settimeout(0.5)
                for _ in range(4):
                    made.sendto(struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + question, (server, 53))
                    try:
                        answer = made.recv(2048)
                    except TimeoutError:
                        continue
                    count = struct.unpack_from(">H", answer, 6)[0]
                    return answer[3] & 0xF, socket.inet_ntoa(answer[-4:]) if count else ""
            return None

        return self.guest.run(query)

    def reaches(self, address: str) -> bool:
        def connect() -> bool:
            try:
                with socket.create_connection((address, 80), timeout=0.7):
                    return True
            except OSError:
                return False

        return self.guest.run(connect)


@contextmanager
def host(directory: Path) -> Iterator[Host]:
    if shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        pytest.skip("dnsmasq is not installed")
    with ExitStack() as close:
        yield Host(directory, close)


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
def test_a_list_that_changes_takes_effect_and_nothing_is_left_at_the_end(tmp_path: Path) -> None:
    with host(tmp_path) as here:
        here.bind("example.org")
        here.ask("example.org")
        here.bind("other.org")
        assert here.ask("example.org") == (REFUSED, "") and not here.reaches(GOOD)
        assert here.ask("other.org") == (NOERROR, BAD) and here.reaches(BAD)
        # The next daemon finds the binding, and the machine its names.
        again = Filters(Paths.system(tmp_path))
        again.open()
        assert again.warnings == []
        assert here.reaches(BAD) and not here.reaches(GOOD)
        assert here.ask("other.org") == (NOERROR, BAD)
        again.unbind("tap0")
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
