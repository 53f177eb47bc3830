"""A host's daemon in namespaces of its own, and a small world at the other end of its only cable: two families, name
servers that know every name, pages. Nothing leaves this machine."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from real import Root

needs = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: bridges"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt: the image is made from Debian packages"),
    pytest.mark.skipif(shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/sbin") is None, reason="needs dnsmasq-base"),
    pytest.mark.skipif(shutil.which("nsenter") is None, reason="needs nsenter (util-linux)"),
]
NAMES = {  # name -> its last number in both families
    "example.test": 10, "www.example.test": 10, "other.test": 11, "edge.cdn.test": 12, "more.test": 13,
}  # fmt: skip
ALIAS = "alias.example.test"  # of edge.cdn.test
SERVERS = (53, 54)
_PAGES = r"""
import http.server, socket, sys, threading, time

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.page + f"from {self.client_address[0]}\n".encode())
        while self.path == "/drip":
            self.wfile.write(b"drip\n")
            time.sleep(0.2)
    def log_message(self, *words):
        pass

class Six(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6

for number in sys.argv[1:]:
    for kind, address in ((http.server.ThreadingHTTPServer, f"203.0.113.{number}"), (Six, f"2001:db8:9::{number}")):
        made = kind((address, 80), Page)
        made.page = f"page {number} {'v6' if kind is Six else 'v4'}\n".encode()
        threading.Thread(target=made.serve_forever, daemon=True).start()
held = [socket.create_server((address, 853)) for address in ("203.0.113.53", "203.0.113.54")]
print("ready", flush=True)
sys.stdin.read()
"""


def v4(number: int) -> str:
    return f"203.0.113.{number}"


def v6(number: int) -> str:
    return f"2001:db8:9::{number}"


class Site(Root):
    def __init__(self) -> None:
        super().__init__()
        (self.path / "resolv.conf").write_text(f"nameserver {v4(53)}\n")
        mine = f"mount --bind {self.path}/resolv.conf /etc/resolv.conf"
        self.holder = self._hold("--mount", "--propagation", "private", first=mine)
        self.far = self._hold()
        self.within(
            f"ip link add uplink0 type veth peer name cable0 netns {self.far.pid}",
            "ip link set lo up",
            "sysctl -q -w net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.uplink0.accept_dad=0",
            "ip addr add 198.51.100.1/24 dev uplink0",
            "ip addr add 2001:db8:1::1/64 dev uplink0 nodad",
            "ip link set uplink0 up",
            "ip route add default via 198.51.100.2",
            "ip -6 route add default via 2001:db8:1::2",
        )
        numbers = sorted({*NAMES.values(), *SERVERS})
        self.outside(
            "ip link set lo up",
            "ip addr add 198.51.100.2/24 dev cable0",
            "ip addr add 2001:db8:1::2/64 dev cable0 nodad",
            "ip link set cable0 up",
            *(f"ip addr add {v4(number)}/32 dev lo" for number in numbers),
            *(f"ip addr add {v6(number)}/128 dev lo" for number in numbers),
        )
        self._world = [
            self._serve(sys.executable, "-c", _PAGES, *(str(number) for number in sorted(set(NAMES.values())))),
            self._serve(
                "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--pid-file=", "--bind-interfaces",
                "--except-interface=cable0", "--local=/test/", "--user=root",
                *(f"--listen-address={family(number)}" for number in SERVERS for family in (v4, v6)),
                *(f"--host-record={name},{v4(number)},{v6(number)}" for name, number in NAMES.items()),
                f"--cname={ALIAS},edge.cdn.test",
            ),
        ]  # fmt: skip
        assert self._world[0].stdout is not None
        self._world[0].stdout.readline()
        self.serve()

    @staticmethod
    def _hold(*more: str, first: str = "true") -> subprocess.Popen[bytes]:
        held = subprocess.Popen(
            ["unshare", "--net", *more, "sh", "-c", f"{first} && echo && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert held.stdout is not None and held.stdout.readline()
        return held

    def _serve(self, *argv: str) -> subprocess.Popen[bytes]:
        net = f"--net=/proc/{self.far.pid}/ns/net"
        return subprocess.Popen(["nsenter", net, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def inside(self, *words: str) -> str:
        argv = ["nsenter", f"--target={self.holder.pid}", "--net", "--mount", *words]
        return subprocess.run(argv, env=self.environ, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout

    def within(self, *commands: str) -> None:
        for command in commands:
            self.inside(*command.split())

    def outside(self, *commands: str) -> None:
        for command in commands:
            subprocess.run(["nsenter", f"--net=/proc/{self.far.pid}/ns/net", *command.split()], check=True)

    def serve(self) -> None:
        self.inside(sys.executable, "-m", "kvik.daemon", "--system", "--default-network", "off", "--detach")

    def kill(self) -> None:
        """The daemon dies at once; wait until the kernel has let go of its lock."""
        kill(int((self.paths.run / "kvikd.pid").read_text()))

    def shell(self, name: str, script: str) -> str:
        """What a machine's shell printed."""
        return self("exec", name, "--", "sh", "-c", script).stdout

    def end(self) -> None:
        for name in self.names():
            self("destroy", name)
        for name in self.out("-q", "net-list", "--name").split():
            self("net-destroy", name)
        super().end()
        for process in (*self._world, self.holder, self.far):
            process.terminate()
            process.communicate()


def kill(pid: int) -> None:
    watch = os.pidfd_open(pid)
    signal.pidfd_send_signal(watch, signal.SIGKILL)
    assert select.select([watch], [], [], 10)[0], "it did not die"
    os.close(watch)


def until(check: object, seconds: float = 60) -> None:
    assert callable(check)
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, check
        time.sleep(0.1)
