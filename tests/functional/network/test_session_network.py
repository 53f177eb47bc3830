"""A session's network `default`: machines of somebody without privileges, run by their own daemon, on one switch."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from functional.network.world import World
from functional.test_session import UID
from functional.test_session import Session as PlainSession
from functional.test_session import pytestmark as needs

pytestmark = needs
DEADLINE = 60.0


class Session(PlainSession):
    """Each command, and so the daemon, in a network namespace whose only neighbour is a world of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def __call__(self, *words: str, program: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        user = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups")
        return subprocess.run(
            [*self.world.inside, *user, program or self.clone / "kvik", *words],
            env={"HOME": str(self.home), "PATH": "/usr/bin:/bin", **environ},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def shell(self, machine: str, script: str) -> str:
        done = self("exec", machine, "--", "sh", "-c", f"exec 2>&1; {script}")
        return done.stdout + done.stderr

    def eventually(self, machine: str, script: str, wanted: str) -> str:
        deadline = time.monotonic() + DEADLINE
        while wanted not in (text := self.shell(machine, script)):
            assert time.monotonic() < deadline, f"{script}: {text}\n{self.log()}"
            time.sleep(0.3)
        return text

    def log(self) -> str:
        return (self.home / ".local/state/kvik/log/network/default.log").read_text()

    def processes(self, program: bytes) -> list[int]:
        """Of the session's user, in its namespace."""
        found = []
        for path in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if (
                    path.name.isdigit()
                    and program in (path / "cmdline").read_bytes().split(b"\0")
                    and (path / "ns/net").readlink() == self.world.namespace
                ):
                    found.append(int(path.name))
        return found

    def switch(self) -> int:
        """The pid of the switch of `default`."""
        (pid,) = self.processes(str(self.clone / "src/kvik/network/switch/__main__.py").encode())
        return pid


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    session = Session()
    assert PlainSession.__call__(session, "--version").returncode == 0  # makes the environment, which needs a network
    yield session
    for name in ("left", "right", "open"):
        session("destroy", name)
    with contextlib.suppress(OSError):
        os.kill(session.daemon(), signal.SIGTERM)
        time.sleep(0.5)
    session.world.close()
    subprocess.run(["rm", "-rf", session.path], check=True)


@pytest.fixture(scope="module")
def machines(session: Session) -> Session:
    # The tiny image is made before, outside of the namespace: its packages come from a network.
    done = PlainSession.__call__(session, "run", "--name", "maker", "--network", "none")
    assert done.returncode == 0, done.stderr
    PlainSession.__call__(session, "destroy", "maker")
    os.kill(session.daemon(), signal.SIGTERM)
    deadline = time.monotonic() + DEADLINE
    while (session.runtime / "kvikd.sock").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for name in ("left", "right"):
        done = session("run", "--name", name, "--network", "network=default")
        assert done.returncode == 0, done.stderr
    return session


def test_machines_of_a_session_ping_each_other_by_name(machines: Session) -> None:
    assert os.stat(f"/proc/{machines.switch()}").st_uid == os.stat(machines.home).st_uid != 0
    for name, other in (("left", "right"), ("right", "left")):
        machines.eventually(name, f"ping -c 2 -W 1 {other}", "2 packets received")


def test_the_address_is_known_without_the_guests_help(machines: Session) -> None:
    address = re.findall(r"inet (192\.168\.122\.\d+)", machines.shell("left", "ip -4 addr show eth0"))[0]
    assert f"{address}/24" in machines("domifaddr", "left", "--source", "lease").stdout
    leases = machines("net-dhcp-leases", "default").stdout
    assert re.search(rf"{re.escape(address)}/24 +left", leases), leases


def test_it_is_a_network_like_others(machines: Session) -> None:
    assert re.search(r"default +active +yes +yes", machines("net-list").stdout)
    xml = machines("net-dumpxml", "default").stdout
    assert "<network connections='2'>" in xml
    assert "<forward mode='nat'" in xml
    assert "<bridge" not in xml
    assert "Active:         yes" in machines("net-info", "default").stdout


LAB = """<network>
  <name>lab</name>
  <domain name='lab.example'/>
  <dns><host ip='10.9.0.77'><hostname>printer</hostname></host></dns>
  <ip address='10.9.0.1' netmask='255.255.255.0'>
    <dhcp>
      <range start='10.9.0.10' end='10.9.0.20'/>
      <host mac='52:54:00:00:09:01' name='left' ip='10.9.0.90'/>
    </dhcp>
  </ip>
</network>"""


def test_running_machines_are_plugged_into_a_network_of_ones_own(machines: Session) -> None:
    path = machines.home / "lab.xml"
    path.write_text(LAB)
    for verb in (("net-define", str(path)), ("net-start", "lab"), ("net-autostart", "lab")):
        done = machines(*verb)
        assert done.returncode == 0, done.stderr
    for number, name in enumerate(("left", "right"), 1):
        card = f"52:54:00:00:09:0{number}"
        done = machines("attach-interface", name, "network", "lab", "--mac", card, "--model", "virtio", "--live")
        assert done.returncode == 0, done.stderr
        machines.eventually(
            name,
            "ip link set eth1 up; udhcpc -i eth1 -s /etc/udhcpc.script -n -q; ip -4 addr show eth1",
            "inet 10.9.0.",
        )
    assert "10.9.0.90/24" in machines("domifaddr", "left", "--source", "lease").stdout
    machines.eventually("right", "ping -c 2 -W 1 10.9.0.90", "2 packets received")
    assert "10.9.0.77" in machines.shell("right", "nslookup printer.lab.example 10.9.0.1")
    done = machines("net-update", "lab", "add", "dns-host", "<host ip='10.9.0.78'><hostname>late</hostname></host>")
    assert done.returncode == 0, done.stderr
    assert "10.9.0.78" in machines.shell("right", "nslookup late.lab.example 10.9.0.1")
    # Isolated: no way out, and the other network is not reached through it.
    assert machines.world.ADDRESS not in machines.shell("right", "nslookup anything.example.org 10.9.0.1")
    refused = machines("net-update", "lab", "add", "dns-txt", "<txt name='a' value='b'/>")
    assert "not supported on a session's network" in refused.stderr
    # Stopped and started under its machines: they are on it again.
    for verb in ("net-destroy", "net-start"):
        done = machines(verb, "lab")
        assert done.returncode == 0, done.stderr
    machines.eventually("right", "ping -c 2 -W 1 10.9.0.90", "2 packets received")
    assert re.search(r"10\.9\.0\.90/24 +left", machines("net-dhcp-leases", "lab").stdout)
    for number, name in enumerate(("left", "right"), 1):
        done = machines("detach-interface", name, "network", "--mac", f"52:54:00:00:09:0{number}", "--live")
        assert done.returncode == 0, done.stderr
    for verb in ("net-destroy", "net-undefine"):
        done = machines(verb, "lab")
        assert done.returncode == 0, done.stderr
    assert not (machines.runtime / "network/lab.switch").exists()


def fetch(host: str, port: int = 8000) -> str:
    """A page by hand: the tiny image's wget has a libc that cannot."""
    return f"(printf 'GET / HTTP/1.0\\r\\n\\r\\n'; sleep 1) | nc -w 5 {host} {port}"


def test_a_machine_reaches_the_world_by_address_and_by_name(machines: Session) -> None:
    machines.eventually("left", fetch(machines.world.ADDRESS), "the world")
    if machines.world.resolvers:
        machines.eventually("right", fetch("anything.example.org"), "the world")


def test_the_hosts_own_loopback_is_not_the_gateway(machines: Session) -> None:
    with machines.world.listening_inside(4321):
        assert "refused" in machines.shell("left", fetch("192.168.122.1", 4321))


def test_a_way_out_that_was_killed_is_had_again(machines: Session) -> None:
    passts = machines.processes(b"192.168.122.1")
    assert len(passts) == 2
    for pid in passts:
        os.kill(pid, signal.SIGKILL)
    machines.eventually("left", fetch(machines.world.ADDRESS), "the world")


def test_a_port_of_the_host_leads_to_a_machine(machines: Session) -> None:
    xml = machines("dumpxml", "right", "--inactive").stdout
    xml = xml.replace("<name>right</name>", "<name>open</name>")
    xml = re.sub("<uuid>.*</uuid>", f"<uuid>{uuid4()}</uuid>", xml)
    forward = "<portForward proto='tcp' address='127.0.0.1'><range start='2222' to='80'/></portForward>"
    xml = re.sub(r"<mac address='.*'/>", f"<mac address='52:54:00:aa:bb:cc'/>{forward}", xml)
    path = machines.home / "open.xml"
    path.write_text(xml)
    for verb in (("define", str(path)), ("start", "open")):
        done = machines(*verb)
        assert done.returncode == 0, done.stderr
    machines.eventually("open", "ip -4 addr show eth0", "192.168.122.")
    machines.shell("open", "(while true; do echo from inside | nc -l -p 80; done) >/dev/null 2>&1 </dev/null &")
    deadline = time.monotonic() + DEADLINE
    while b"from inside" not in (said := machines.world.fetch_inside(2222)):
        assert time.monotonic() < deadline, said
        time.sleep(0.2)
    # The port is taken now: another machine that wants it is told.
    path.write_text(re.sub("<uuid>.*</uuid>", "", xml).replace("<name>open<", "<name>late<").replace("bb:cc", "bb:cd"))
    assert machines("define", str(path)).returncode == 0
    late = machines("start", "late")
    assert late.returncode != 0
    assert "2222" in late.stderr
    machines("undefine", "late")


def test_a_switch_that_was_killed_is_started_again_and_machines_keep_their_addresses(machines: Session) -> None:
    address = re.findall(r"inet (192\.168\.122\.\d+)", machines.shell("left", "ip -4 addr show eth0"))
    killed = machines.switch()
    os.kill(killed, signal.SIGKILL)
    machines.eventually("right", f"ping -c 2 -W 1 {address[0]}", "2 packets received")
    assert machines.switch() != killed
    # Names are known again as well, without anybody asking for a lease.
    machines.eventually("left", "ping -c 2 -W 1 right", "2 packets received")


def test_a_daemon_that_was_killed_finds_the_switch_again(machines: Session) -> None:
    switch = machines.switch()
    os.kill(machines.daemon(), signal.SIGKILL)
    machines.eventually("left", "ping -c 2 -W 1 right", "2 packets received")
    assert machines.switch() == switch
    done = machines("run", "--name", "third", "--network", "network=default")
    assert done.returncode == 0, done.stderr
    machines.eventually("third", "ping -c 2 -W 1 left", "2 packets received")
    assert machines("destroy", "third").returncode == 0


def test_a_network_that_does_not_exist_is_said(machines: Session) -> None:
    done = machines("run", "--name", "nowhere", "--network", "network=other")
    assert done.returncode != 0
    assert "there is no network or bridge 'other'" in done.stderr
    assert "networks here: default" in done.stderr
    machines("undefine", "nowhere")
