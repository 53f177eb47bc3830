"""Machines as forks of one zygote, on the host's own KVM."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests import needs_kvm

import kvik.vmm
from kvik.host.zygote_wire import PROTOCOL, Request

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import pvh_kernel

pytestmark = needs_kvm

LAUNCHER = str(Path(kvik.vmm.__file__).with_name("__main__.py"))
DEADLINE = 60.0


class Zygote:
    def __init__(self, kernel: Path) -> None:
        self.kernel = kernel
        self.channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(DEADLINE)
        command = [sys.executable, "-I", "-S", LAUNCHER, "--zygote", str(other.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[other.fileno()])
        other.close()
        assert json.loads(self.channel.recv(4096)) == {"zygote": PROTOCOL, "renames": True}

    def ask(self, data: bytes, fds: list[int]) -> tuple[dict[str, object], list[int]]:
        socket.send_fds(self.channel, [data], fds)
        answer, got, _, _ = socket.recv_fds(self.channel, 4096, 4)
        return json.loads(answer), got

    def start(self, home: str = "/nowhere") -> tuple[int, int, int]:
        """(pid, pidfd, the serial line's reading end) of a new machine."""
        reader, writer = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        argv = ["kvik-vmm", "--kernel", str(self.kernel), "--memory", "64M", "--serial", "fd=33", "--pvpanic", "off"]
        request = Request(argv, {"HOME": home}, [0, 1, 2, 33])
        answer, got = self.ask(request.encode(), [null, null, 2, writer])
        os.close(null)
        os.close(writer)
        assert "error" not in answer
        assert isinstance(answer["pid"], int)
        return answer["pid"], got[0], reader


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    made = Zygote(pvh_kernel.write(tmp_path / "kernel", power_off=False))
    yield made
    made.channel.close()
    assert made.process.wait(DEADLINE) in (0, -signal.SIGKILL)


def _ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(DEADLINE * 1000))


def _end(machine: tuple[int, int, int]) -> None:
    _, pidfd, reader = machine
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    assert _ended(pidfd)
    assert os.read(reader, 1) == b""  # nobody else holds the other end
    os.close(pidfd)
    os.close(reader)


def test_a_fork_is_seen_as_the_process_that_was_asked_for(zygote: Zygote) -> None:
    machine = pid, _, reader = zygote.start("/some/where")
    assert os.read(reader, 1) == b"!"
    proc = Path(f"/proc/{pid}")
    assert proc.joinpath("comm").read_text() == "kvik-vmm\n"
    assert proc.joinpath("cmdline").read_bytes().startswith(b"kvik-vmm\0--kernel\0")
    assert proc.joinpath("environ").read_bytes() == b"HOME=/some/where\0"
    assert os.getsid(pid) == pid
    _end(machine)


def pipes_of(pid: int) -> list[str]:
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it is still closing what it needs no more
            found.append(os.readlink(fd))
    return [link for link in found if link.startswith("pipe:")]


def test_many_share_nothing_and_outlive_the_zygote(zygote: Zygote) -> None:
    machines = [zygote.start() for _ in range(5)]
    for pid, _, reader in machines:
        assert os.read(reader, 1) == b"!"
        pipes = pipes_of(pid)
        mine = os.readlink(f"/proc/self/fd/{reader}")
        others = {os.readlink(f"/proc/self/fd/{other}") for _, _, other in machines} - {mine}
        assert mine in pipes
        assert not others & set(pipes)
    zygote.process.kill()
    zygote.process.wait()
    for machine in machines:
        signal.pidfd_send_signal(machine[1], 0)  # it is there
        _end(machine)


def test_a_bad_request_harms_nobody(zygote: Zygote) -> None:
    for bad in (b"{}", b"[[[", Request(["x"], {}, [5]).encode()):
        answer, got = zygote.ask(bad, [])
        assert "error" in answer
        assert not got
    machine = zygote.start()
    assert os.read(machine[2], 1) == b"!"
    _end(machine)
