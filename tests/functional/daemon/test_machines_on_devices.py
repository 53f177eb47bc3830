"""Machines that stand on an interface of the host (macvtap): by type direct, or by a network that is a pool of such.

The interfaces are ends of wires in a network namespace; at the other end of `e0` a network gives addresses.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvik.errors import KvikError

from .conftest import AGENT, CONSOLE, Kvikd, until
from .processes import qemu_of
from .test_machines_on_networks import NetworkedKvikd, inside, pytestmark  # noqa: F401  the same needs

NAMESPACE = (
    "mount -t sysfs sysfs /sys && ip link set lo up"
    "; for n in 0 1 2; do ip link add e$n type veth peer name w$n; ip link set e$n up; ip link set w$n up; done"
)
POOL = "<forward mode='{}'><interface dev='e1'/><interface dev='e2'/></forward>"


class PooledKvikd(NetworkedKvikd):
    networks: ClassVar = {
        "default": "<forward mode='nat'/><bridge name='virbr0' stp='off'/><ip address='192.168.122.1' prefix='24'>"
        "<dhcp><range start='192.168.122.2' end='192.168.122.254'/></dhcp></ip>",
        "pool": POOL.format("bridge"),
        "alone": POOL.format("passthrough"),
        "functions": "<forward mode='hostdev' managed='yes'>"
        "<address type='pci' domain='0x0000' bus='0x00' slot='0x00' function='0x0'/></forward>",
    }


@pytest.fixture(scope="module")
def kvikd() -> Iterator[Kvikd]:
    daemon = PooledKvikd("unshare", "--mount", "--net", "sh", "-c", f'{NAMESPACE}; exec "$@"', "sh")
    try:
        inside(daemon, "ip", "link", "set", "w0", "master", "virbr0")
        yield daemon
    finally:
        for domain in daemon.connection.domains(1):
            domain.destroy()
        for name in daemon.virsh("net-list", "--name").stdout.split():
            assert daemon.virsh("net-destroy", name).returncode == 0
        assert daemon.end() == 0
        shutil.rmtree(daemon.root, ignore_errors=True)


def direct(number: int, dev: str = "e0", mode: str = "bridge", more: str = "") -> str:
    return (
        f"<interface type='direct'><source dev='{dev}' mode='{mode}'/><mac address='52:54:00:00:00:{number:02x}'/>"
        f"<model type='virtio'/>{more}</interface>"
    )


def pooled(number: int, network: str = "pool") -> str:
    return (
        f"<interface type='network'><source network='{network}'/><mac address='52:54:00:00:00:{number:02x}'/>"
        "<model type='virtio'/></interface>"
    )


def macvtaps(kvikd: Kvikd) -> dict[str, str]:
    """Address -> interface below."""
    found = {}
    for line in inside(kvikd, "ip", "-o", "link", "show", "type", "macvtap").splitlines():
        words = line.split()
        found[words[words.index("link/ether") + 1]] = words[1].partition("@")[2].rstrip(":")
    return found


def connections(kvikd: Kvikd, network: str) -> list[str]:
    """Of the network, and of each interface of its pool."""
    lines = kvikd.virsh("net-dumpxml", network).stdout.splitlines()
    found = [line for line in lines if "<network" in line or "<interface" in line]
    return [line.split("connections='")[1].split("'")[0] if "connections=" in line else "0" for line in found]


def test_machines_on_one_interface_get_addresses_through_it_and_reach_each_other(make: Any, kvikd: Kvikd) -> None:
    trusted = direct(0x31, more="<driver queues='2'/>").replace("direct'>", "direct' trustGuestRxFilters='yes'>")
    one = make("one", CONSOLE + AGENT + trusted, vcpus="<vcpu>2</vcpu>")
    two = make("two", CONSOLE + AGENT + direct(0x32))
    for domain in (one, two):
        domain.start()
    assert macvtaps(kvikd) == {"52:54:00:00:00:31": "e0", "52:54:00:00:00:32": "e0"}
    assert "<target dev='macvtap0'/>" in one.xml() and "<target dev='macvtap1'/>" in two.xml()
    for domain in (one, two):
        assert domain.wait_ready(60).ready
    address = next(
        found.address
        for found in two.interface_addresses(1)
        if found.family == "ipv4" and found.address.startswith("192.168.122.")
    )
    assert one.exec(["/bin/ping", "-c", "1", "-W", "5", address]).exitcode == 0
    assert one.exec(["/bin/ping", "-c", "1", "-W", "5", "192.168.122.1"]).exitcode == 0
    before = two.interface_stats("macvtap1")
    two.exec(["/bin/ping", "-c", "3", "-i", "0.2", "-s", "1000", "-W", "5", "192.168.122.1"])
    after = two.interface_stats("macvtap1")
    assert after.tx_bytes - before.tx_bytes >= 3000 and after.rx_bytes - before.rx_bytes >= 3000

    # Who is trusted gets frames for the address that it takes, and nobody else.
    def take(domain: Any, number: int) -> None:
        assert domain.exec(["/bin/ip", "link", "set", "eth0", "address", f"52:54:00:00:00:{number}"]).exitcode == 0

    take(two, 71)
    take(one, 72)
    until(lambda: "52:54:00:00:00:72" in macvtaps(kvikd))
    assert set(macvtaps(kvikd)) == {"52:54:00:00:00:72", "52:54:00:00:00:32"}
    assert one.exec(["/bin/ping", "-c", "1", "-W", "5", "192.168.122.1"]).exitcode == 0

    # The daemon is killed, then a machine: the next daemon takes away what that one had, and finds the other again.
    enter = ("nsenter", "-t", str(qemu_of(one)), "-m", "-n")
    assert kvikd.end(signal.SIGKILL) == -signal.SIGKILL
    os.kill(qemu_of(two), signal.SIGKILL)
    kvikd.prefix = enter
    kvikd.start()
    until(lambda: macvtaps(kvikd) == {"52:54:00:00:00:72": "e0"})
    one = kvikd.connection.lookup_name("one")
    assert one.exec(["/bin/ping", "-c", "1", "-W", "5", "192.168.122.1"]).exitcode == 0
    take(one, 73)
    until(lambda: macvtaps(kvikd) == {"52:54:00:00:00:73": "e0"})
    # It is plugged and unplugged, and goes with its machine when that is killed under the daemon's eyes.
    one.attach_device(direct(0x33), 1)
    assert macvtaps(kvikd)["52:54:00:00:00:33"] == "e0"
    one.detach_device(direct(0x33), 1)
    until(lambda: "52:54:00:00:00:33" not in macvtaps(kvikd))
    os.kill(qemu_of(one), signal.SIGKILL)
    until(lambda: macvtaps(kvikd) == {})


def test_a_pool_is_shared_evenly_and_counted_and_passthrough_takes_one_alone(make: Any, kvikd: Kvikd) -> None:
    assert connections(kvikd, "pool") == ["0", "0", "0"]
    # Of a machine that never gets to run all is given back.
    broken = make("broken", CONSOLE + pooled(0x41) + direct(0x42, "nowhere"))
    with pytest.raises(KvikError, match="nowhere"):
        broken.start()
    until(lambda: macvtaps(kvikd) == {})
    assert connections(kvikd, "pool") == ["0", "0", "0"]
    spread = make("spread", CONSOLE + pooled(0x43) + pooled(0x44) + pooled(0x45))
    spread.start()
    assert macvtaps(kvikd) == {f"52:54:00:00:00:{at}": dev for at, dev in (("43", "e1"), ("44", "e2"), ("45", "e1"))}
    assert connections(kvikd, "pool") == ["3", "2", "1"]
    assert "dev='e2' mode='bridge'" in spread.xml() and "'e2'" not in spread.xml(2)
    live = spread.xml()
    spread.set_interface_parameters("52:54:00:00:00:44", {"outbound.average": 100}, 1)
    bounded = "      <bandwidth>\n        <outbound average='100'/>\n      </bandwidth>\n"
    assert spread.xml() != live and spread.xml().replace(bounded, "") == live  # nothing else has changed
    refused = kvikd.virsh("net-update", "pool", "delete", "forward-interface", "<interface dev='e1'/>", "--live")
    assert refused.returncode == 1 and "2" in refused.stderr
    enter = ("nsenter", "-t", str(qemu_of(spread)), "-m", "-n")
    assert kvikd.end(signal.SIGKILL) == -signal.SIGKILL
    kvikd.prefix = enter
    kvikd.start()
    assert connections(kvikd, "pool") == ["3", "2", "1"]
    kvikd.connection.lookup_name("spread").destroy()
    until(lambda: macvtaps(kvikd) == {})
    assert connections(kvikd, "pool") == ["0", "0", "0"]

    both = make("both", CONSOLE + pooled(0x46, "alone") + pooled(0x47, "alone"))
    both.start()
    assert sorted(macvtaps(kvikd).values()) == ["e1", "e2"]
    third = make("third", CONSOLE + pooled(0x48, "alone"))
    with pytest.raises(KvikError, match="no free interface: all 2 of its pool are in use"):
        third.start()


def test_what_a_device_of_the_host_cannot_do_is_refused(make: Any, kvikd: Kvikd) -> None:
    for number, (more, words) in enumerate(
        [
            ("<filterref filter='clean-traffic'/>", "<filterref> is not supported on a device of the host"),
            ("<vlan><tag id='5'/></vlan>", "<vlan> is not supported on a device of the host"),
            ("<port isolated='yes'/>", "isolated"),
            ("<mtu size='9000'/>", "e0 has only 1500"),
        ]
    ):
        domain = make(f"refused-{number}", CONSOLE + direct(0x51, more=more))
        with pytest.raises(KvikError, match=words):
            domain.start()
        until(lambda: "52:54:00:00:00:51" not in macvtaps(kvikd))


def test_a_pci_device_that_cannot_be_given_away_is_refused_with_the_reason(make: Any, kvikd: Kvikd) -> None:
    if not Path("/sys/bus/pci/devices/0000:00:00.0").exists() or Path("/dev/vfio/vfio").exists():
        pytest.skip("needs a host with PCI and without VFIO")
    domain = make("given", CONSOLE + pooled(0x71, "functions"))
    for _ in range(2):  # the second finds it free again
        with pytest.raises(KvikError, match=r"PCI device 0000:00:00.0 cannot be given to a machine: "):
            domain.start()
        until(lambda: connections(kvikd, "functions")[0] == "0")
    # The same without a network, and one that is not there.
    for number, (slot, words) in enumerate(
        (
            ("0x00", r"PCI device 0000:00:00.0 cannot be given to a machine: "),
            ("0x1e", "this host has no PCI device 0000:"),
        )
    ):
        named = (
            f"<interface type='hostdev' managed='yes'><source><address type='pci' domain='0' bus='0' slot='{slot}' "
            f"function='{7 * number}'/></source><mac address='52:54:00:00:00:72'/></interface>"
        )
        domain = make(f"named{number}", CONSOLE + named)
        with pytest.raises(KvikError, match=words):
            domain.start()
        assert not domain.is_active()
