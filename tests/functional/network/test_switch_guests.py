"""Machines of somebody without privileges on the switch: they get addresses and reach each other by name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from functional.network.guests import PYTHON, SwitchSession
from kvik.network.switch.control import Switch

pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt: the image is made from Debian packages"),
    pytest.mark.skipif(not Path(PYTHON).exists(), reason="needs a Python that everybody may run"),
]
SETTINGS = {
    "name": "default",
    "mac": "52:54:00:00:00:01",
    "ip": "192.168.122.1",
    "prefix": 24,
    "ranges": [["192.168.122.2", "192.168.122.254"]],
    "router": False,
    "domain": "example",
}
# The left one's card may have a long MTU, as virtio's have in a session; the right one's not.
MACHINES = [{"name": "left", "mac": "52:54:00:aa:00:01", "mtu": 65520}, {"name": "right", "mac": "52:54:00:aa:00:02"}]


@pytest.fixture(scope="module")
def session() -> Iterator[SwitchSession]:
    directory = Path(tempfile.mkdtemp(prefix="kv-sw-"))
    directory.chmod(0o755)
    session = SwitchSession(directory, SETTINGS, MACHINES)
    yield session
    session.close()
    shutil.rmtree(directory, ignore_errors=True)


def test_two_unprivileged_guests_ping_each_other_by_name(session: SwitchSession) -> None:
    assert os.stat(f"/proc/{session.switch_pid}").st_uid != 0
    left, right = session.guest("left"), session.guest("right")
    left.eventually("ip -4 addr show eth0", "192.168.122.")
    right.eventually("ip -4 addr show eth0", "192.168.122.")
    assert "nameserver 192.168.122.1\n" in left.eventually("cat /etc/resolv.conf", "nameserver")
    for guest, other in ((left, "right"), (right, "left"), (left, "right.example")):
        assert "3 packets received" in guest.shell(f"ping -c 3 {other}")
    assert "bad address" in left.shell("ping -c 1 nobody")
    switch = Switch.attach(session.run / "switch")
    assert switch is not None
    leases = {lease["hostname"]: lease for lease in switch.leases()}
    assert {name: lease["mac"] for name, lease in leases.items()} == {m["name"]: m["mac"] for m in MACHINES}
    assert leases["left"]["ip"] in left.shell("ip -4 addr show eth0")
    switch.close()


def test_guests_of_unlike_mtu_reach_each_other_with_long_packets(session: SwitchSession) -> None:
    left, right = session.guest("left"), session.guest("right")
    left.eventually("ip link show eth0", "mtu 65520")
    right.eventually("ip link show eth0", "mtu 1500")
    # The first one is answered with what fits; the next ones are cut where they come from.
    left.eventually("ping -c 1 -W 1 -s 4000 right", "1 packets received")
    assert "1 packets received" in right.shell("ping -c 1 -s 4000 left")


def test_a_tcp_connection_carries_megabytes_between_them(session: SwitchSession) -> None:
    left, right = session.guest("left"), session.guest("right")
    # The listener's input stays open: a nc whose peer has nothing to say ends.
    right.shell("(tail -f /dev/null | nc -l -p 5000 | md5sum >/tmp/sum) >/dev/null 2>&1 &")
    sent = left.shell(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null; md5sum </tmp/data; nc right 5000 </tmp/data"
    )
    right.eventually("cat /tmp/sum", sent.split()[0])
