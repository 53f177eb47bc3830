"""A session's network `default`: machines of somebody without privileges, run by their own daemon, on one switch."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from functional.test_session import Session as PlainSession
from functional.test_session import pytestmark as needs

pytestmark = needs
DEADLINE = 60.0


class Session(PlainSession):
    """Each command, and so the daemon, in a network namespace without any way out."""

    def __call__(self, *words: str, program: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        kvik = str(program or self.clone / "kvik")
        return super().__call__(
            "--user", "--map-current-user", "--net", kvik, *words, program="/usr/bin/unshare", **environ
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

    def switch(self) -> int:
        """The pid of the switch."""
        found, program = [], str(self.clone / "src/kvik/network/switch/__main__.py").encode()
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                try:
                    if program in (path / "cmdline").read_bytes().split(b"\0"):
                        found.append(int(path.name))
                except OSError:
                    pass
        (pid,) = found
        return pid


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    session = Session()
    assert PlainSession.__call__(session, "--version").returncode == 0  # makes the environment, which needs a network
    yield session
    for name in ("left", "right"):
        session("destroy", name)
    try:
        os.kill(session.daemon(), signal.SIGTERM)
        time.sleep(0.5)
    except OSError:
        pass
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
    assert "no network with name 'other'" in done.stderr
    machines("undefine", "nowhere")
