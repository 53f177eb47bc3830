"""The daemon killed at every step of a change: the host has what it had, or what it was to have, and never neither."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from functional.network.bridged_host import SOURCE
from kvik.host.process import find_program

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(find_program("ip") is None, reason="needs iproute2"),
]
SETUP = """
set -e
ip link set lo up
ip link add eth0 type veth peer name far0
ip link set far0 up
ip addr add 192.0.2.2/24 dev eth0
ip link set eth0 up
ip -6 addr add 2001:db8::2/64 dev eth0 nodad
ip route add default via 192.0.2.1
ip -6 route add default via 2001:db8::1
echo made
exec sleep infinity
"""
CONFIG = "auto eth0\niface eth0 inet static\n    address 192.0.2.2/24\n    gateway 192.0.2.1\n"
PROGRAM = Path(__file__).with_name("killed_change.py")


class Place:
    """A namespace with an eth0, and the files of a host."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="kk"))
        self.config = self.root / "etc/network/interfaces"
        self.config.parent.mkdir(parents=True)
        self.config.write_text(CONFIG)
        self.holder = subprocess.Popen(["unshare", "--net", "sh", "-c", SETUP], stdout=subprocess.PIPE)
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"made\n"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "-t", str(self.holder.pid), "-n"]
        environ = {**os.environ, "PYTHONPATH": str(SOURCE)}
        return subprocess.run([*enter, *command], capture_output=True, text=True, check=False, env=environ)

    def change(self, action: str, last: int = 0) -> int:
        done = self.run(sys.executable, str(PROGRAM), str(self.root), str(last), action)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    def record(self) -> dict[str, Any] | None:
        file = self.root / "run/kvik/interfaces/pending.json"
        return msgspec.json.decode(file.read_bytes()) if file.exists() else None

    def end_watchdog(self) -> None:
        """So that the next daemon has to see to it, at once."""
        record = self.record()
        if record and record["watchdog"] and record["state"] == "open":
            os.kill(record["watchdog"], signal.SIGKILL)

    def owner(self) -> str:
        """Which interface has everything: "" if none has."""
        for name in ("eth0", "br0"):
            has = [
                "192.0.2.2/24" in self.run("ip", "-o", "addr", "show", "dev", name).stdout,
                "2001:db8::2/64" in self.run("ip", "-o", "-6", "addr", "show", "dev", name).stdout,
                "default via 192.0.2.1" in self.run("ip", "route", "show", "dev", name).stdout,
                "default via 2001:db8::1" in self.run("ip", "-6", "route", "show", "dev", name).stdout,
            ]
            if all(has):
                return name
        return ""

    def end(self) -> None:
        self.holder.kill()
        self.holder.wait()
        assert self.holder.stdout is not None
        self.holder.stdout.close()
        shutil.rmtree(self.root, ignore_errors=True)


@pytest.fixture
def places() -> Iterator[list[Place]]:
    made: list[Place] = []
    yield made
    for place in made:
        place.end()


@pytest.mark.parametrize("action", ["bridge", "unbridge"])
def test_killed_at_every_step(places: list[Place], action: str) -> None:
    source, target = ("eth0", "br0") if action == "bridge" else ("br0", "eth0")
    outcomes = []
    last = 0
    while True:
        last += 1
        assert last < 100, "it never came to its end"
        if not places or outcomes[-1] != "before":  # else all is as it was: the same host again
            places.append(Place())
            if action == "unbridge":
                assert places[-1].change("bridge") == 0
        place = places[-1]
        before = place.config.read_text()
        code = place.change(action, last)
        place.end_watchdog()
        assert place.change("recover") == 0
        record = place.record()
        if record is not None and record["state"] == "kept":
            # The change was decided: it is live, and committing again brings what is written up to it.
            assert place.owner() == target, (last, record)
            assert place.change("commit") == 0
            outcomes.append("kept")
        elif place.owner() == source:
            assert place.config.read_text() == before, last
            outcomes.append("before")
        else:
            outcomes.append("after")
        if outcomes[-1] != "before":
            assert place.owner() == target, last
            assert ("bridge_ports eth0" in place.config.read_text()) == (action == "bridge"), last
        if outcomes[-1] == "before" and action == "bridge":
            assert "br0" not in place.run("ip", "-o", "link").stdout, last
        if code == 0:
            break
    # Once decided it is never undecided again.
    assert outcomes == sorted(outcomes, key=["before", "kept", "after"].index)
    assert set(outcomes) == {"before", "kept", "after"}
