"""A zygote's keeper, with zygotes of a few lines: what it makes of each way in which one can fail."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from kvik.errors import HostError, OperationTimeout
from kvik.host.process import exit_code, find, read_stat
from kvik.host.zygote import Refused, Zygote

BEGIN = """
import json, os, socket, sys, time, signal
channel = socket.socket(fileno=int(sys.argv[-1]))
def say(*fds, **fields): socket.send_fds(channel, [json.dumps(fields).encode()], fds)
def hear():
    data, fds, _, _ = socket.recv_fds(channel, 1 << 18, 253)
    return json.loads(data), fds
def child(*, tells=True):
    pid = os.fork()
    if not pid:
        try:
            if tells: say(os.pidfd_open(os.getpid()), pid=os.getpid())
        except OSError: os._exit(1)
        channel.close()
        time.sleep(1000)
"""
GOOD = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nsay(zygote=1, renames=True)\n"
Make = Callable[..., Awaitable[Zygote]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Zygote] = []

    async def ready(rest: str, begin: str = GOOD) -> Zygote:
        path = tmp_path / "zygote.py"
        path.write_text(BEGIN + begin + rest)
        made.append(Zygote([sys.executable, "-I", str(path)]))
        await made[-1].ready(30.0)
        return made[-1]

    yield ready
    for zygote in made:
        zygote.close()


async def test_it_gives_a_process_that_is_not_our_child_and_outlives_it(make: Make) -> None:
    zygote = await make("while True:\n    asked, fds = hear()\n    child()\n")
    machine = await zygote.fork(["x"], {}, {0: 0}, 10.0)
    assert machine.alive
    stat = read_stat(machine.pid)
    assert stat is not None and stat.parent != os.getpid()
    again = find(machine.pid, machine.start_time)
    assert again is not None
    again.close()
    zygote.close()
    assert machine.alive
    assert not zygote.process.alive
    machine.kill()
    machine.wait(10.0)
    machine.close()


async def test_how_it_ended_is_known_where_the_kernel_tells(make: Make) -> None:
    zygote = await make("hear()\nchild()\nhear()\n")
    machine = await zygote.fork(["x"], {}, {}, 10.0)
    machine.kill()
    code = await machine.wait_async(10.0)
    assert code in (-signal.SIGKILL, None)
    if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 15):
        assert code == -signal.SIGKILL
    machine.close()


def test_a_process_that_runs_has_no_exit_code() -> None:
    pidfd = os.pidfd_open(os.getpid())
    try:
        assert exit_code(pidfd) is None
    finally:
        os.close(pidfd)


async def test_what_it_was_asked_is_what_it_hears(make: Make) -> None:
    told = "say(error=json.dumps([asked, os.read(fds[0], 9).decode()]))"
    zygote = await make(f"while True:\n    asked, fds = hear()\n    {told}\n")
    reader, writer = os.pipe()
    os.write(writer, b"hello")
    with pytest.raises(Refused, match=r'"fds": \[33\].*hello'):
        await zygote.fork(["a", "b"], {"HOME": "/x"}, {33: reader}, 10.0)
    assert zygote.usable
    os.close(reader)
    os.close(writer)
    with pytest.raises(Refused, match="too long"):
        await zygote.fork(["a" * (1 << 20)], {}, {}, 10.0)
    assert zygote.usable


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("hear()\nsys.exit('no more')\n", r"the zygote ended \(exit code 1\): no more"),
        ("hear()\nos.kill(os.getpid(), signal.SIGKILL)\n", "killed by SIGKILL"),
        ("hear()\nchannel.send(b'{')\nhear()\n", "cannot be understood"),
        ("hear()\nsay(pid=1)\nhear()\n", "without a process"),
        ("hear()\nsay(os.pidfd_open(os.getpid()), pid='1')\nhear()\n", "without a process"),
    ],
)
async def test_one_that_fails_is_of_no_use_any_more(make: Make, rest: str, words: str) -> None:
    zygote = await make(rest)
    with pytest.raises(HostError, match=words):
        await zygote.fork(["x"], {}, {}, 10.0)
    assert not zygote.usable
    assert not zygote.process.alive
    with pytest.raises(HostError, match="has ended"):
        await zygote.fork(["x"], {}, {}, 10.0)


async def test_what_it_forked_too_late_does_not_stay(make: Make, tmp_path: Path) -> None:
    """A fork that reports after nobody waits any more, and one that reported while nobody looked."""
    pids = tmp_path / "pids"
    late = f"    open({str(pids)!r}, 'a').write(str(os.getpid()) + chr(10))\n"
    zygote = await make(
        "hear()\n"
        f"if not os.fork():\n{late}    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    time.sleep(1)\n"
        "    try: say(os.pidfd_open(os.getpid()), pid=os.getpid())\n    except OSError: os._exit(1)\n"
        "    time.sleep(1000)\n"
        "time.sleep(1000)\n"
    )
    with pytest.raises(OperationTimeout):
        await zygote.fork(["x"], {}, {}, 0.3)
    for text in pids.read_text().split():
        try:
            pidfd = os.pidfd_open(int(text))
        except ProcessLookupError:
            continue
        import select

        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        assert poller.poll(20_000)
        os.close(pidfd)


@pytest.mark.parametrize(
    ("begin", "words"),
    [
        ("say(zygote=99, renames=True)\nhear()\n", "speaks protocol 99"),
        ("say(zygote=1, renames=False)\nhear()\n", "CHECKPOINT_RESTORE"),
        ("raise SystemExit('cannot import')\n", r"the zygote ended \(exit code 1\): cannot import"),
    ],
)
async def test_one_that_cannot_be_used_is_refused_at_once(make: Make, begin: str, words: str) -> None:
    with pytest.raises(HostError, match=words):
        await make("", begin)
