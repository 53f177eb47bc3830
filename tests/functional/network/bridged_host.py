"""A host to change: a daemon in a network namespace of its own, where a veth plays eth0 and its other end the LAN."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import kvik
from kvik.client import Connection, connect
from kvik.client.interface import Interfaces
from kvik.errors import KvikError
from kvik.paths import Paths

SOURCE = Path(kvik.__file__).parent.parent
DEADLINE = 60.0  # seconds; for what takes a second on an idle host
MAC = "52:54:00:0e:70:01"
HOST, GATEWAY = "192.0.2.2", "192.0.2.1"
# The LAN is a namespace within: eth0's other end, the gateway of both families.
SETUP = f"""
set -e
mount -t tmpfs tmpfs /run
mount -t sysfs sysfs /sys
ip link set lo up
ip netns add lan
ip link add eth0 address {MAC} type veth peer name lan0
ip link set lan0 netns lan
ip -n lan link set lo up
ip -n lan addr add {GATEWAY}/24 dev lan0
ip -n lan addr add 2001:db8::1/64 dev lan0 nodad
ip -n lan link set lan0 up
ip addr add {HOST}/24 brd + dev eth0
ip addr add 192.0.2.3/24 dev eth0 label eth0:web
ip addr add 198.51.100.9/30 dev eth0 valid_lft 4000 preferred_lft 3000
ip link set eth0 up
ip -6 addr add 2001:db8::2/64 dev eth0 nodad
ip route add default via {GATEWAY} metric 50 src {HOST}
ip route add 203.0.113.0/24 via {GATEWAY} table 77
ip -6 route add default via 2001:db8::1 metric 60
ip -6 route add 2001:db8:5::/48 via 2001:db8::1
exec "$@"
"""


def until(found: Callable[[], object], what: str = "") -> None:
    deadline = time.monotonic() + DEADLINE
    while not found():
        assert time.monotonic() < deadline, f"it did not come to pass: {what}"
        time.sleep(0.02)


class Host:
    """`kvikd --system --root DIR` in that namespace, killed and started again at will."""

    def __init__(self, files: Mapping[str, str] | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="kh"))
        for path, text in (files or {}).items():
            place = self.root / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        self.paths = Paths.system(self.root)
        self.socket = self.root / "s"
        self.environ = {**os.environ, "PYTHONPATH": str(SOURCE)}
        # The namespaces outlive the daemon: this process holds them.
        enter = ["unshare", "--mount", "--net", "sh", "-c", SETUP, "sh"]
        self.holder = subprocess.Popen([*enter, "sh", "-c", "echo made; exec sleep infinity"], stdout=subprocess.PIPE)
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"made\n"
        until(self._settled, "duplicate address detection is through")
        self.start()

    def _settled(self) -> bool:
        addresses = self.run("ip -6 addr show dev eth0")
        return "fe80:" in addresses and "tentative" not in addresses

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.holder.pid), "-m", "-n", *command]

    def run(self, line: str) -> str:
        done = subprocess.run(self.inside(*shlex.split(line)), capture_output=True, text=True, check=True)
        return done.stdout

    def start(self) -> None:
        command = [sys.executable, "-m", "kvik.daemon", "--system", "--root", str(self.root), "--driver", "test"]
        with (self.root / "log").open("ab") as log:
            command += ["--socket", str(self.socket)]
            self.process = subprocess.Popen(self.inside(*command), env=self.environ, stderr=log)
        until(lambda: self.process.poll() is not None or self._answers(), "the daemon answers")
        assert self.process.poll() is None, self.messages()
        self.interfaces = Interfaces(self.connection)

    def _answers(self) -> bool:
        try:
            self.connection: Connection = connect(f"qemu+unix:///system?socket={self.socket}")
        except KvikError:
            return False
        return True

    def kill(self) -> None:
        """As kill -9 does: no code of the daemon's runs any more."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def messages(self) -> str:
        return (self.root / "log").read_text()

    def file(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()

    def cli(self, *words: str) -> str:
        """`kvik WORDS` as a process of its own; what it printed."""
        command = [sys.executable, "-m", "kvik.cli.main", "-c", f"qemu+unix:///system?socket={self.socket}", *words]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False, stdin=-3)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def network(self, name: str = "eth0") -> dict[str, list[str]]:
        """All that interface `name` has, lifetimes aside, with its name left out of it."""

        def lines(line: str) -> list[str]:
            rows = self.run(line).replace(name, "IF").splitlines()
            return sorted(" ".join(row.split()).removesuffix(" linkdown") for row in rows if row.strip())

        addresses = [
            row.partition(" valid_lft")[0]
            .partition(": ")[2]
            .replace(" nodad", "")
            .replace(" dynamic", "")
            .rstrip("\\ ")
            for row in lines(f"ip -o addr show dev {name}")
        ]
        return {
            "mac": [self.run(f"cat /sys/class/net/{name}/address").strip()],
            "addresses": sorted(addresses),
            "routes": [row for row in lines(f"ip route show table all dev {name}") if "table local" not in row],
            "routes6": [row for row in lines(f"ip -6 route show table all dev {name}") if "table local" not in row],
        }

    def exists(self, name: str) -> bool:
        return f" {name}" in self.run("ip -o link").replace("@", ":").replace(":", " ")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(15) == 0, self.messages()
        for ended in [self.holder]:
            ended.kill()
            ended.wait()
        shutil.rmtree(self.root, ignore_errors=True)
