"""A machine of kvik-vmm's and one of QEMU's on one switch of a session: they find each other by name."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from net_guest import SerialGuest, relay
from running import Running

from functional.network.guests import PYTHON, SwitchSession
from kvik.network.switch.control import Switch
from kvik.network.switch.packets import UDP

pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt: the image is made from Debian packages"),
    pytest.mark.skipif(not Path(PYTHON).exists(), reason="needs a Python that everybody may run"),
]
SETTINGS = {
    "name": "default", "mac": "52:54:00:00:00:01", "ip": "192.168.122.1", "prefix": 24,
    "ranges": [["192.168.122.2", "192.168.122.254"]], "router": False, "domain": "example",
}  # fmt: skip
OURS = "52:54:00:aa:00:02"


@pytest.fixture
def session() -> Iterator[SwitchSession]:
    directory = Path(tempfile.mkdtemp(prefix="kv-sw-"))
    directory.chmod(0o755)
    session = SwitchSession(directory, SETTINGS, [{"name": "qemu", "mac": "52:54:00:aa:00:01"}])
    yield session
    session.close()
    shutil.rmtree(directory, ignore_errors=True)


def test_machines_of_both_vmms_ping_each_other_by_name(session: SwitchSession, start: Callable[..., Running]) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(session.run / "ours.net"))
    listener.listen(1)
    line, theirs = socket.socketpair()
    with listener, theirs, socket.socket(socket.AF_UNIX) as card:
        card.connect(str(session.run / "ours.net"))
        switch = Switch.attach(session.run / "switch")
        assert switch is not None
        switch.add_port("ours", OURS, card.fileno(), alias="net0")
        net = f"stream,fds={listener.fileno()},id=net0,slot=4,mac={OURS}"
        fds = (listener.fileno(), theirs.fileno())
        machine = start(relay(4), "--net", net, "--serial", f"fd={theirs.fileno()}", fds=fds)
    guest, qemu = SerialGuest(line, OURS), session.guest("qemu")
    assert machine.process.poll() is None
    qemu.eventually("ip -4 addr show eth0", "192.168.122.")
    own = guest.boot()
    (address,) = guest.ask("qemu")
    assert address in qemu.shell("ip -4 addr show eth0")
    guest.ping(address)

    def answer() -> None:
        with contextlib.suppress(OSError, ConnectionError):
            guest.packet(UDP)  # which never comes; pings are answered meanwhile

    answering = threading.Thread(target=answer, daemon=True)
    answering.start()
    said = qemu.shell("ping -c 2 ours")
    assert f"PING ours ({own})" in said and "2 packets received" in said, said
    assert {lease["hostname"]: lease["ip"] for lease in switch.leases()} == {"qemu": address, "ours": own}
    switch.close()
    line.shutdown(socket.SHUT_RDWR)
    answering.join()
    line.close()
