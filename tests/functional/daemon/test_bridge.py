"""Machines on a real bridge, in a network namespace: taps come with a machine and go with it, however it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import KvikError
from kvik.host.process import find_program

from .conftest import AGENT, CONSOLE, Kvikd, until
from .processes import qemu_of

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        find_program("ip") is None or not Path("/dev/net/tun").exists(), reason="needs iproute2 and tun"
    ),
]
# sysfs shows the network namespace that it was mounted in.
NAMESPACE = "mount -t sysfs sysfs /sys && ip link set lo up && ip link add br0 type bridge && ip link set br0 up"
BRIDGE = "<interface type='bridge'><source bridge='br0'/><mac address='52:54:00:00:00:07'/><model type='virtio'/>{}</interface>"  # noqa: E501


@pytest.fixture(scope="module")
def kvikd() -> Iterator[Kvikd]:
    daemon = Kvikd("unshare", "--mount", "--net", "sh", "-c", f'{NAMESPACE}; exec "$@"', "sh")
    yield daemon
    for domain in daemon.connection.domains(1):
        domain.destroy()
    assert daemon.end() == 0
    shutil.rmtree(daemon.root, ignore_errors=True)


def inside(kvikd: Kvikd, *command: str) -> str:
    enter = ["nsenter", "-t", str(kvikd.process.pid), "-m", "-n"]
    return subprocess.run([*enter, *command], capture_output=True, text=True, check=True).stdout


def ports(kvikd: Kvikd) -> str:
    return inside(kvikd, "ip", "-o", "link", "show", "master", "br0")


def test_the_tap_is_a_port_and_carries_packets(make: Any, kvikd: Kvikd) -> None:
    domain = make("linked", CONSOLE + AGENT + BRIDGE.format(""))
    assert ports(kvikd) == ""
    domain.start()
    line = ports(kvikd)
    assert "vnet0" in line and "UP" in line and "fe:54:00:00:00:07" in line
    assert "<target dev='vnet0'/>" in domain.xml()
    assert "vnet0" in kvikd.virsh("domiflist", "linked").stdout
    assert "vnet0" not in domain.xml(2)  # a name of this run only
    until(lambda: domain.stages().stages[4].state == 1)  # the agent
    # The bridge is the user's, without DHCP of ours and without an address of the host: what the machine says is heard.
    take = "ip addr add 192.0.2.2/24 dev eth0; ip addr add fd00::2/64 dev eth0; ip link set eth0 up; ping -c 1 -W 1 "
    domain.exec(["/bin/sh", "-c", f"{take} 192.0.2.9"])
    until(lambda: {"192.0.2.2", "fd00::2"} <= {one.address for one in domain.interface_addresses(2)})
    (found,) = [one for one in domain.interface_addresses(2) if one.address == "192.0.2.2"]
    assert (found.interface, found.mac, found.family) == ("vnet0", "52:54:00:00:00:07", "ipv4")
    assert domain.interface_addresses(0) == [], "nobody lent it"
    assert kvikd.kvik("ip", "linked", "--source", "arp").stdout == "192.0.2.2\n"
    inside(kvikd, "ip", "addr", "replace", "192.0.2.1/24", "dev", "br0")
    assert domain.exec(["/bin/ping", "-c", "1", "-W", "5", "192.0.2.1"]).exitcode == 0
    stats = kvikd.virsh("domstats", "--interface", "linked").stdout
    assert "net.0.name=vnet0" in stats and "net.0.rx.bytes=" in stats and "net.0.rx.bytes=0\n" not in stats
    domain.destroy()
    until(lambda: ports(kvikd) == "")


def test_it_goes_with_a_killed_qemu(make: Any, kvikd: Kvikd) -> None:
    domain = make("shot", CONSOLE + BRIDGE.format(""))
    domain.start()
    assert ports(kvikd)
    os.kill(qemu_of(domain), signal.SIGKILL)
    until(lambda: ports(kvikd) == "")


def test_it_stays_with_the_machine_when_the_daemon_is_killed(make: Any, kvikd: Kvikd) -> None:
    domain = make("outlives", CONSOLE + BRIDGE.format(""))
    domain.start()
    pid = qemu_of(domain)
    daemon = kvikd.process.pid
    enter = ["nsenter", f"--mount=/proc/{pid}/ns/mnt", f"--net=/proc/{pid}/ns/net"]
    assert kvikd.end(signal.SIGKILL) == -signal.SIGKILL
    assert not Path(f"/proc/{daemon}").exists()
    show = [*enter, "ip", "-o", "link", "show", "master", "br0"]
    assert "vnet" in subprocess.run(show, capture_output=True, text=True, check=True).stdout
    # The next daemon lives in the same namespaces, finds the machine and destroys it with its tap.
    kvikd.prefix = tuple(enter)
    kvikd.start()
    found = kvikd.connection.lookup_name("outlives")
    assert "<target dev='vnet" in found.xml()
    assert ports(kvikd)
    found.destroy()
    until(lambda: ports(kvikd) == "")


def test_a_tap_is_plugged_and_unplugged(make: Any, kvikd: Kvikd) -> None:
    domain = make.ready("plugged")
    domain.attach_device(BRIDGE.format(""), 1)
    assert "vnet" in ports(kvikd)
    until(lambda: "52:54:00:00:00:07" in domain.exec(["/bin/ip", "link"]).stdout.decode())
    domain.detach_device(BRIDGE.format(""), 1)
    until(lambda: ports(kvikd) == "")


def test_what_cannot_be_had_is_refused_and_leaves_nothing(make: Any, kvikd: Kvikd) -> None:
    for number, (device, words) in enumerate(
        [
            (BRIDGE.format("").replace("br0", "br9"), "br9"),
            (BRIDGE.format("<filterref filter='missing'/>"), "no network filter with name 'missing'"),
            (BRIDGE.format("<vlan><tag id='5'/></vlan>"), "vlan"),
            ("<interface type='network'><source network='default'/></interface>", "no network with name 'default'"),
        ]
    ):
        domain = make(f"refused-{number}", CONSOLE + BRIDGE.format("").replace("00:07", "00:08") + device)
        with pytest.raises(KvikError, match=words):
            domain.start()
        assert ports(kvikd) == ""


CLEAN = BRIDGE.format("<filterref filter='clean-traffic'><parameter name='IP' value='192.0.2.2'/></filterref>")


def test_a_filtered_machine_speaks_from_its_own_address_and_no_other(make: Any, kvikd: Kvikd) -> None:
    inside(kvikd, "ip", "addr", "replace", "192.0.2.1/24", "dev", "br0")
    domain = make("filtered", CONSOLE + AGENT + CLEAN)
    domain.start()
    until(lambda: domain.stages().stages[4].state == 1)  # the agent
    assert "<filterref filter='clean-traffic'>" in domain.xml()
    assert "vnet0" in kvikd.virsh("nwfilter-binding-list").stdout

    def ping(own: str) -> int:
        setup = f"ip addr flush dev eth0; ip addr add {own}/24 dev eth0; ip link set eth0 up"
        domain.exec(["/bin/sh", "-c", setup])
        return int(domain.exec(["/bin/ping", "-c", "1", "-W", "2", "192.0.2.1"]).exitcode)

    assert ping("192.0.2.2") == 0
    assert ping("192.0.2.3") != 0
    inside(kvikd, "nft", "flush", "ruleset")  # as a reload of the host's firewall does
    until(lambda: "vnet0/out" in inside(kvikd, "nft", "list", "ruleset"))
    assert ping("192.0.2.3") != 0
    # Another filter while the guest runs, and one that cannot be.
    domain.update_device(CLEAN.replace("192.0.2.2'", "192.0.2.4'"), 1)
    assert ping("192.0.2.2") != 0 and ping("192.0.2.4") == 0
    with pytest.raises(KvikError, match="no network filter with name 'missing'"):
        domain.update_device(CLEAN.replace("clean-traffic", "missing"), 1)
    assert ping("192.0.2.2") != 0 and ping("192.0.2.4") == 0
    domain.destroy()
    until(lambda: "vnet" not in kvikd.virsh("nwfilter-binding-list").stdout)
    assert "vnet" not in inside(kvikd, "nft", "list", "ruleset")
    # A later machine without a filter has none, whatever the interface's name had before.
    free = make("free", CONSOLE + AGENT + BRIDGE.format(""))
    free.start()
    until(lambda: free.stages().stages[4].state == 1)
    assert "vnet" not in kvikd.virsh("nwfilter-binding-list").stdout
    free.attach_device(CLEAN.replace("00:07", "00:09"), 1)
    assert "vnet1" in kvikd.virsh("nwfilter-binding-list").stdout
    free.detach_device(CLEAN.replace("00:07", "00:09"), 1)
    until(lambda: "vnet1" not in kvikd.virsh("nwfilter-binding-list").stdout)


def test_run_takes_a_bridge(kvikd: Kvikd, image: Any) -> None:
    enter = ["nsenter", "-t", str(kvikd.process.pid), "-m", "-n"]
    kvik = [sys.executable, "-m", "kvik.cli.main", "-c", kvikd.uri]
    words = ["--name", "ran", "--kernel", str(image.kernel), "--network", "bridge=br0", "--detach", "--memory", "128"]
    done = subprocess.run(
        [*enter, *kvik, "run", *words],
        env={**kvikd.environ, "KVIK_ROOT": str(kvikd.root)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vnet" in ports(kvikd)
    domain = kvikd.connection.lookup_name("ran")
    domain.destroy()
    domain.undefine()
    until(lambda: ports(kvikd) == "")
