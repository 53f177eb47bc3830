"""`kvik run` beside a network `default`, as a user meets it: addresses, names, and what a killed daemon finds again.

The daemon lives in a network namespace of its own; its machines are real, on QEMU.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from real import Root

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: bridges"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt: the image is made from Debian packages"),
    pytest.mark.skipif(shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/sbin") is None, reason="needs dnsmasq-base"),
    pytest.mark.skipif(shutil.which("nsenter") is None, reason="needs nsenter (util-linux)"),
]


class Host(Root):
    """A state directory whose daemon is in a network namespace, which a sleeping process holds."""

    def __init__(self) -> None:
        super().__init__()
        self.holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up; echo; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.holder.stdout is not None
        self.holder.stdout.readline()
        self.serve()

    def inside(self, *words: str) -> str:
        argv = ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", *words]
        return subprocess.run(argv, env=self.environ, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout

    def serve(self) -> None:
        self.inside(sys.executable, "-m", "kvik.daemon", "--system", "--default-network", "on", "--detach")

    def kill(self) -> None:
        """The daemon dies at once; wait until the kernel has let go of its lock."""
        pid = int((self.paths.run / "kvikd.pid").read_text())
        watch = os.pidfd_open(pid)
        signal.pidfd_send_signal(watch, signal.SIGKILL)
        assert select.select([watch], [], [], 10)[0], "the daemon did not die"
        os.close(watch)

    def end(self) -> None:
        self("destroy", "one")
        self("destroy", "two")
        self("net-destroy", "default")
        super().end()
        self.holder.communicate()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    try:
        yield host
    finally:
        host.end()


def test_machines_are_on_it_reach_each_other_by_name_and_outlive_the_daemon(host: Host) -> None:
    assert host.out("-q", "net-list").split() == ["default", "active", "yes", "yes"]
    for name in ("one", "two"):
        done = host("run", "--name", name, "--detach")
        assert done.returncode == 0, done.stderr
    addresses = {name: host.out("ip", name).strip() for name in ("one", "two")}
    assert all(address.startswith("192.168.122.") for address in addresses.values())
    assert len(set(addresses.values())) == 2
    row = host.out("-q", "domiflist", "one").split()
    assert row[1:3] == ["network", "default"]
    assert f": {row[0]}:" in host.inside("ip", "-o", "link", "show", "master", "virbr0")
    told = json.loads(host.out("--json", "net-dhcp-leases", "default"))
    assert {row.get("hostname"): row["address"] for row in told} == addresses, told
    assert addresses["two"] in host.out("exec", "one", "--", "nslookup", "two")
    host.out("exec", "one", "--", "ping", "-c", "1", "two")
    host.out("exec", "one", "--", "ping", "-c", "1", "192.168.122.1")

    ports = sorted(host.out("-q", "net-port-list", "default").split())
    host.kill()
    host.serve()
    assert sorted(host.out("-q", "net-port-list", "default").split()) == ports
    assert "<network connections='2'>" in host.out("net-dumpxml", "default")
    host.out("exec", "two", "--", "ping", "-c", "1", "one")
    host.out("destroy", "two")
    deadline = time.monotonic() + 10
    while len(host.out("-q", "net-port-list", "default").split()) != 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(host.out("-q", "net-port-list", "default").split()) == 1
