"""A bridge over the host's own interface: all moves in one go, and comes back by itself unless somebody says keep."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from functional.network.bridged_host import GATEWAY, HOST, MAC, Host, until
from kvik.client.bridge import Bridges
from kvik.errors import HostError, KvikError, NoInterface, OperationInvalid, ResourceBusy
from kvik.host.process import find_program

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(find_program("ip") is None, reason="needs iproute2"),
]
INTERFACES = f"""\
# The primary network interface
auto lo
iface lo inet loopback

allow-hotplug eth0
iface eth0 inet static
    address {HOST}/24
    gateway {GATEWAY}
    dns-nameservers {GATEWAY}
    up ip route add 203.0.113.0/24 via {GATEWAY} dev eth0 table 77
iface eth0 inet6 static
    address 2001:db8::2/64
    gateway 2001:db8::1
"""
CONFIG = "/etc/network/interfaces"
LONG = 3000  # seconds: never within a test


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host({CONFIG: INTERFACES})
    yield made
    made.end()


class Administrator:
    """A TCP connection from the LAN to the host, open all the while: what an administrator's ssh would notice."""

    def __init__(self, host: Host) -> None:
        serve = (
            "import socket; s = socket.create_server(('192.0.2.2', 2222)); print('up', flush=True); c, _ = s.accept()\n"
            "while data := c.recv(100): c.sendall(data)"
        )
        ask = (
            "import socket, sys; s = socket.create_connection(('192.0.2.2', 2222)); print('up', flush=True)\n"
            "for line in sys.stdin: s.sendall(line.encode()); print(s.recv(100).decode().strip(), flush=True)"
        )
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(host.inside(sys.executable, "-c", serve), **pipes)
        assert self.server.stdout.readline() == "up\n"
        self.client = subprocess.Popen(host.inside("ip", "netns", "exec", "lan", sys.executable, "-c", ask), **pipes)
        assert self.client.stdout.readline() == "up\n"

    def says(self, word: str) -> bool:
        """The word comes back by the same connection (TCP repeats it while nothing gets through)."""
        stdin, stdout = self.client.stdin, self.client.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(word + "\n")
        stdin.flush()
        return stdout.readline() == word + "\n"

    def close(self) -> None:
        for process in (self.client, self.server):
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


@pytest.fixture
def administrator(host: Host) -> Iterator[Administrator]:
    made = Administrator(host)
    yield made
    made.close()


def test_everything_moves_and_the_administrator_stays_connected(host: Host, administrator: Administrator) -> None:
    before = host.network("eth0")
    assert administrator.says("before")
    words = host.interfaces.bridge("eth0", "br0", seconds=LONG)
    assert words == ["the configuration is ifupdown's"]
    assert administrator.says("on the bridge")
    now = host.network("br0")
    assert now == before
    assert len(now["addresses"]) == 5  # three of IPv4, one of IPv6, the link-local one
    assert now["mac"] == [MAC]
    left = host.network("eth0")
    assert (left["addresses"], left["routes"], left["routes6"]) == ([], [], [])
    assert "tentative" not in host.run("ip -6 addr show dev br0")  # usable at once: no second without IPv6
    assert "master br0" in host.run("ip link show eth0")
    # The dynamic one keeps its lifetime.
    assert "valid_lft forever" not in host.run("ip addr show to 198.51.100.9")
    # The host answers IPv4 and IPv6 of the LAN.
    for address in (HOST, "2001:db8::2"):
        host.run(f"ip netns exec lan {sys.executable} -c {shlex.quote(REFUSED.format(address))}")
    # Nothing is written yet: a reboot would bring back what was.
    assert host.file(CONFIG) == INTERFACES
    host.interfaces.rollback()
    assert administrator.says("back")
    assert host.network("eth0") == before
    assert not host.exists("br0")


# Ends well if somebody at the address answers that nothing listens there.
REFUSED = """
import errno, socket
family, *_ = socket.getaddrinfo("{0}", 9)[0]
with socket.socket(family) as probe:
    probe.settimeout(30)
    assert probe.connect_ex(("{0}", 9)) == errno.ECONNREFUSED
"""


def test_unconfirmed_it_comes_back(host: Host, administrator: Administrator) -> None:
    before = host.network()
    host.interfaces.bridge("eth0", "br0", seconds=1)
    until(lambda: host.interfaces.pending().state == "reverted", "the watchdog undoes it")
    assert host.network() == before
    assert not host.exists("br0")
    assert administrator.says("still here")
    assert host.file(CONFIG) == INTERFACES
    pending = host.interfaces.pending()
    assert pending.what == "eth0 into bridge br0"
    assert pending.outcome == "not committed within 1 s: undone"
    with pytest.raises(OperationInvalid, match="too late"):
        host.interfaces.commit()
    assert host.network() == before
    # And again, for what was undone must not stand in the way.
    host.interfaces.bridge("eth0", "br0", seconds=LONG)
    host.interfaces.commit()
    assert host.network("br0") == before


def test_it_comes_back_when_the_daemon_was_killed(host: Host, administrator: Administrator) -> None:
    before = host.network()
    host.interfaces.bridge("eth0", "br0", seconds=2)
    host.kill()
    assert host.exists("br0")
    assert administrator.says("nobody at home")
    until(lambda: not host.exists("br0"), "the watchdog undoes it without the daemon")
    assert host.network() == before
    assert administrator.says("back")
    host.start()
    assert host.interfaces.pending().state == "reverted"


def test_a_daemon_that_comes_back_can_still_commit(host: Host) -> None:
    before = host.network()
    host.interfaces.bridge("eth0", "br0", seconds=LONG)
    host.kill()
    host.start()
    assert host.interfaces.pending().state == "open"
    host.interfaces.commit()
    assert host.network("br0") == before
    assert "bridge_ports eth0" in host.file(CONFIG)


def watchdog(host: Host) -> int:
    """The process id of the host's watchdog."""
    import msgspec

    record: dict[str, Any] = msgspec.json.decode((host.paths.run / "interfaces/pending.json").read_bytes())
    return int(record["watchdog"])


def gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_confirmed_it_stays_and_is_written(host: Host, administrator: Administrator) -> None:
    before = host.network()
    host.interfaces.bridge("eth0", "br0", seconds=LONG)
    pid = watchdog(host)
    host.interfaces.commit()
    until(lambda: gone(pid), "the watchdog ends")
    assert host.network("br0") == before
    assert administrator.says("for good")
    assert host.interfaces.pending().state == ""
    written = host.file(CONFIG)
    assert "iface eth0 inet manual" in written
    assert "auto br0\niface" in written
    assert "dns-nameservers" in written  # all that the interface had went along
    assert "dev br0 table 77" in written
    original = host.paths.config / "interfaces/original/etc/network/interfaces"
    assert original.read_text() == INTERFACES
    # The document tells what is, and what the configuration says.
    assert "<bridge stp='off' delay='0'>" in host.interfaces.find("br0").xml()
    assert "<ip address='192.0.2.2' prefix='24'/>" in host.interfaces.find("br0").xml(1)


def test_stopping_the_daemon_and_all_that_it_started_does_not_lose_the_way_back(host: Host) -> None:
    """systemd ends a service by SIGTERM to each of its processes."""
    before = host.network()
    host.interfaces.bridge("eth0", "br0", seconds=2)
    pid = watchdog(host)
    os.kill(pid, 15)
    host.kill()
    until(lambda: not host.exists("br0"), "the watchdog stayed")
    assert host.network() == before


def test_a_watchdog_that_was_killed_is_made_up_for_by_the_next_daemon(host: Host) -> None:
    before = host.network()
    host.interfaces.bridge("eth0", "br0", seconds=LONG)
    os.kill(watchdog(host), 9)
    host.kill()
    host.start()
    assert host.network() == before
    assert "its watchdog was gone" in host.messages()


def test_a_bridge_dissolves_and_comes_back_too(host: Host, administrator: Administrator) -> None:
    before = host.network()
    host.interfaces.bridge("eth0", "br0", seconds=0)  # for good at once
    assert host.interfaces.pending().state == ""
    assert "bridge_ports" in host.file(CONFIG)
    host.interfaces.unbridge("br0", seconds=1)
    assert administrator.says("off the bridge")
    until(lambda: host.interfaces.pending().state == "reverted", "undone")
    assert host.network("br0") == before
    assert administrator.says("on it again")
    host.interfaces.unbridge("br0", seconds=LONG)
    host.interfaces.commit()
    assert host.network() == before
    assert not host.exists("br0")
    assert administrator.says("off for good")
    assert "bridge" not in host.file(CONFIG)
    assert f"    address {HOST}/24" in host.file(CONFIG)


def test_a_step_that_the_kernel_refuses_leaves_all_as_it_was(host: Host) -> None:
    before = host.network()
    # What cannot be a bridge, or a port of one.
    for port, bridge, error, words in (
        ("lo", "br0", OperationInvalid, "loopback"),
        ("none0", "br0", HostError, "none0"),
        ("eth0", "lo", KvikError, "no bridge"),
        ("eth0", "a-name-too-long-", KvikError, "no name"),
        ("eth0", "br 0", KvikError, "no name"),
    ):
        with pytest.raises(error, match=words):
            host.interfaces.bridge(port, bridge, seconds=LONG)
    assert host.network() == before
    assert host.interfaces.pending().state == ""
    assert host.file(CONFIG) == INTERFACES


def test_one_change_at_a_time(host: Host) -> None:
    host.interfaces.begin(LONG)
    with pytest.raises(ResourceBusy, match="pending change already"):
        host.interfaces.begin(LONG)
    host.interfaces.rollback()
    with pytest.raises(OperationInvalid, match="no pending change"):
        host.interfaces.rollback()
    with pytest.raises(OperationInvalid, match="no pending change"):
        host.interfaces.commit()


def test_a_transaction_as_virsh_makes_it(host: Host) -> None:
    """begin, define, create, rollback: libvirt's calls. What is defined is on disk only after commit."""
    before = host.network()
    document = """<interface type='bridge' name='br1'>
      <start mode='onboot'/>
      <protocol family='ipv4'><ip address='192.0.2.2' prefix='24'/><route gateway='192.0.2.1'/></protocol>
      <bridge stp='off' delay='0'><interface type='ethernet' name='eth0'/></bridge>
    </interface>"""
    host.interfaces.begin()
    made = host.interfaces.define(document)
    assert host.file(CONFIG) == INTERFACES
    made.create()
    assert host.network("br1")["addresses"] == before["addresses"]
    host.interfaces.rollback()
    assert host.network() == before
    assert not host.exists("br1")
    with pytest.raises(NoInterface):
        host.interfaces.find("br1")
    assert host.file(CONFIG) == INTERFACES


def test_a_file_that_changed_meanwhile_is_not_overwritten(host: Host) -> None:
    host.interfaces.bridge("eth0", "br0", seconds=LONG)
    place = host.root / CONFIG.lstrip("/")
    place.write_text(INTERFACES + "# by hand\n")
    with pytest.raises(KvikError, match="was changed meanwhile"):
        host.interfaces.commit()
    assert host.interfaces.pending().state == "kept"
    assert host.exists("br0")
    with pytest.raises(ResourceBusy, match="could not be written"):
        host.interfaces.begin(LONG)
    place.write_text(INTERFACES)
    host.interfaces.commit()
    assert "bridge_ports" in host.file(CONFIG)


def test_the_commands(host: Host) -> None:
    out = host.cli("iface-bridge", "eth0", "br0", "--timeout", str(LONG))
    assert "Created bridge br0 with attached device eth0" in out
    assert "unless you say: kvik iface-commit" in out
    assert "Pending: eth0 into bridge br0 (undone in " in host.cli("iface-pending")
    assert "Kept: eth0 into bridge br0" in host.cli("iface-commit")
    listed = host.cli("iface-list", "--all")
    assert f" br0    active   {MAC}" in listed
    shown = host.cli("bridge", "show", "br0")
    assert "forwarding" in shown
    assert "192.0.2.2/24" in shown
    with pytest.raises(KvikError, match="several interfaces have MAC address") as caught:
        host.interfaces.find(MAC)
    assert caught.value.code == 59  # VIR_ERR_MULTIPLE_INTERFACES


def test_sockets_of_the_test_itself_stay_out() -> None:
    """The namespace is the daemon's: this process still has its own network."""
    assert "lan0" not in [name for _, name in socket.if_nameindex()]


def virsh(host: Host, *words: str) -> str:
    command = ["virsh", "-c", f"qemu+unix:///system?socket={host.socket}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.interop
@pytest.mark.skipif(find_program("virsh") is None, reason="needs virsh (libvirt-clients)")
def test_the_real_virsh(host: Host) -> None:
    """Its iface-bridge and iface-unbridge are made of documents: define, create; destroy, undefine, define, create."""
    before = host.network()
    assert virsh(host, "iface-list", "--all") == host.cli("iface-list", "--all").strip()
    assert virsh(host, "iface-name", MAC) == "eth0"
    assert virsh(host, "iface-mac", "eth0") == MAC
    assert virsh(host, "iface-dumpxml", "eth0") == host.interfaces.find("eth0").xml().strip()
    virsh(host, "iface-begin")
    assert "Bridge interface br0 started" in virsh(host, "iface-bridge", "eth0", "br0")
    assert host.network("br0") == before
    assert "stp='on'" in virsh(host, "iface-dumpxml", "br0")
    virsh(host, "iface-rollback")
    assert host.network() == before
    assert host.file(CONFIG) == INTERFACES
    virsh(host, "iface-bridge", "eth0", "br0", "--no-stp")
    assert host.network("br0") == before
    assert "iface eth0 inet manual" in host.file(CONFIG)
    assert "Interface eth0 started" in virsh(host, "iface-unbridge", "br0")
    now = host.network()
    assert now["mac"] == before["mac"]
    assert f"IF inet {HOST}/24 brd 192.0.2.255 scope global IF" in now["addresses"]
    assert [row for row in now["routes"] if row.startswith(f"default via {GATEWAY}")]
    assert not host.exists("br0")
    assert "br0" not in host.file(CONFIG)


def test_an_interface_with_an_address_is_no_port_by_accident(host: Host) -> None:
    """`kvik bridge addif` of the host's own interface would cut it off: refused, with the way that does not."""
    bridges = Bridges(host.connection)
    bridges.add("br0")
    with pytest.raises(OperationInvalid, match=r"kvik iface-bridge eth0 br0"):
        bridges.add_port("br0", "eth0")
    # That way takes an existing bridge, too, and leaves it when undone.
    before = host.network()
    host.interfaces.bridge("eth0", "br0", seconds=LONG)
    assert host.network("br0")["addresses"][0] == before["addresses"][0]
    host.interfaces.rollback()
    assert host.network() == before
    assert [one.name for one in bridges.all()] == ["br0"]
