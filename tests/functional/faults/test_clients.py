"""Clients that die, lie, flood or never speak: the daemon goes on, and a legitimate client is served at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from fault_harness import CLI, PATIENCE, Host, alive, eventually, machine_xml
from fault_harness import host as new_host

from kvik.client import connect
from kvik.errors import KvikError


def raw(host: Host) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(str(host.paths.socket))
    return sock


def script(host: Host, body: str) -> subprocess.Popen[str]:
    """A client of its own process; says something once it is where it is to be killed."""
    text = f"from kvik.client import connect\nc = connect({host.uri!r})\n{body}"
    environ = {**host.environ}
    process = subprocess.Popen([sys.executable, "-c", text], env=environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline()
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout
    process.stdout.close()


def test_killed_amid_a_console(host: Host) -> None:
    host.define("web", "<serial type='pty'/>")
    host.kvik("start", "web")
    before = host.fd_count()
    for _ in range(3):
        end(script(host, "s = c.domain('web').console()\nprint('there', flush=True)\nimport time; time.sleep(100)"))
    eventually(lambda: host.fd_count() <= before, "descriptors of the consoles are closed")
    stream = host.connection.domain("web").console()  # not held by a ghost
    stream.abort()
    assert host.state("web") == "running"


def test_killed_amid_a_definition(host: Host) -> None:
    """Whole or not at all: a request that was cut off does nothing."""
    body = (
        "import os, signal, threading\n"
        "print('there', flush=True)\n"
        f"xml = {machine_xml('NAME')!r}\n"
        "threading.Timer(0.02, lambda: os.kill(os.getpid(), 9)).start()\n"
        "for n in range(10_000): c.define(xml.replace('NAME', 'm' + str(n)))\n"
    )
    process = script(host, body)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert process.stdout
    process.stdout.close()
    eventually(lambda: not host.trouble(), "files and machines agree")
    time.sleep(0.2)  # what had been sent whole is still done
    for domain in host.connection.domains():
        domain.undefine()


def test_killed_amid_a_start(host: Host) -> None:
    """The start goes on, or is undone; nothing is half."""
    host.define("web")
    for delay in (0.0, 0.03, 0.06, 0.1):
        process = script(
            host,
            "import os, threading\nprint('there', flush=True)\n"
            f"threading.Timer({delay}, lambda: os.kill(os.getpid(), 9)).start()\n"
            "c.domain('web').start()\nimport time; time.sleep(5)",
        )
        process.wait(PATIENCE)
        end(process)
        eventually(lambda: host.state("web") in ("running", "shut off"), "it is one or the other")
        eventually(lambda: not host.trouble(), "files and processes agree", 5)
        with contextlib.suppress(KvikError):
            host.connection.domain("web").destroy()


def legitimate(host: Host, seconds: float = 15.0) -> None:
    begun = time.monotonic()
    host.kvik("list", "--all")
    with connect(host.uri) as connection:
        connection.domains()
    assert time.monotonic() - begun < seconds


@pytest.fixture
def crowd() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(
    "words", [b"", b"\0\0\0", b"\0\0\1\0 \0\200\206"], ids=["silent", "half a length", "half a call"]
)
def test_half_open_connections_keep_nobody_out(host: Host, crowd: contextlib.ExitStack, words: bytes) -> None:
    host.define("web")
    held = []
    for _ in range(300):
        with contextlib.suppress(OSError):
            sock = crowd.enter_context(raw(host))
            if words:
                sock.sendall(words)
            held.append(sock)
    assert len(held) >= 100
    legitimate(host)
    host.kvik("start", "web")
    crowd.close()
    eventually(lambda: host.fd_count() < host.daemon_fds + 20, "their descriptors are closed")


def test_garbage(host: Host) -> None:
    host.define("web")
    for data in (
        b"GET / HTTP/1.1\r\nHost: kvik\r\n\r\n",
        os.urandom(10_000),
        b"\xff" * 10_000,
        struct.pack(">I", 0),
        struct.pack(">I", 4) + b"abcd",
        struct.pack(">IIIIIII", 28, 0x20008086, 1, 0xFFFFFF, 0, 0, 0),
        struct.pack(">IIIIIII", 28, 0x12345678, 1, 1, 0, 0, 0),
        struct.pack(">IIIIIII", 28, 0x20008086, 1, 1, 7, 9, 9),
    ):
        with raw(host) as sock, contextlib.suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):  # an answer or the end, but soon
                pass
    legitimate(host)
    eventually(lambda: host.fd_count() <= host.daemon_fds + 2, "their descriptors are closed")


def test_messages_that_are_too_long(host: Host) -> None:
    """Refused by the length alone: nothing is kept of them."""
    for size in (1 << 31, (1 << 32) - 1, 64 << 20):
        with raw(host) as sock, contextlib.suppress(OSError):
            sock.sendall(struct.pack(">I", size))
            for _ in range(200):
                sock.sendall(bytes(1 << 20))
            raise AssertionError("the daemon took it all")
    with open(f"/proc/{host.daemon}/statm") as file:
        assert int(file.read().split()[1]) * 4096 < 300 << 20
    legitimate(host)


def test_a_client_that_asks_and_never_reads(host: Host) -> None:
    """Its answers pile up to a bound; then it waits, alone."""
    for number in range(20):
        host.define(f"m{number}")
    process = script(
        host,
        "print('there', flush=True)\n"
        "import time\n"
        "sock = c.link.socket\n"
        "sock.setblocking(False)\n"
        "import struct\n"
        "call = struct.pack('>IIIIIII', 28, 0x20008086, 1, 7, 0, 5, 0)\n"
        "end = time.monotonic() + 3\n"
        "while time.monotonic() < end:\n"
        "    try: sock.send(call * 1000)\n"
        "    except OSError: time.sleep(0.01)\n"
        "time.sleep(100)\n",
    )
    time.sleep(1)
    legitimate(host)
    assert process.poll() is None
    with open(f"/proc/{host.daemon}/statm") as file:
        assert int(file.read().split()[1]) * 4096 < 300 << 20
    end(process)


def test_a_second_daemon_is_refused(host: Host) -> None:
    host.define("web")
    host.kvik("start", "web")
    pid = host.pid("web")
    said = host.root / "second"
    second = host.spawn(*host.daemon_command(), output=said)
    assert host.exit_code(second) == 1
    assert f"another kvikd (pid {host.daemon}) serves {host.paths.run}" in said.read_text()
    assert alive(host.daemon) and alive(pid)
    assert host.state("web") == "running"
    # Not even with another socket: the directories are the first one's.
    second = host.spawn(*host.daemon_command("--socket", str(host.root / "s")), output=said)
    assert host.exit_code(second) == 1
    assert not (host.root / "s").exists()


def test_a_session_daemon_ends_when_idle_and_finds_its_machine_again() -> None:
    with new_host(session=True) as host:
        host.start("--idle-timeout", "1")
        host.define("web")
        host.kvik("start", "web")
        pid = host.pid("web")
        host.close_connection()
        assert host.exit_code(host.daemon) == 0
        assert alive(pid)
        assert not host.paths.socket.exists()
        connection = host.start("--idle-timeout", "60")
        assert connection.domain("web").is_active() and host.pid("web") == pid
        assert host.state("web") == "running"
        host.kvik("suspend", "web")
        assert host.state("web") == "paused"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_run_rm_leaves_nothing(host: Host, number: signal.Signals) -> None:
    """The machine of `run --rm` is tied to its client: gone with it, however that ends."""
    image = host.image("disk.img")
    client = host.spawn(
        *CLI, "-c", host.uri, "run", "--rm", "--name", "web", "--memory", "32", "--network", "none",
        "--disk", str(image), "--", "true",
    )  # fmt: skip
    eventually(lambda: "web" in host.kvik("list", "--name"), "it runs", 60)
    pid = host.pid("web")
    os.kill(client, number)
    host.exit_code(client)
    eventually(lambda: not alive(pid), "its machine is ended")
    eventually(lambda: "web" not in host.kvik("list", "--all", "--name"), "and forgotten")

    assert image.exists()


def test_run_without_rm_keeps_the_machine(host: Host) -> None:
    image = host.image("disk.img")
    client = host.spawn(
        *CLI, "-c", host.uri, "run", "--name", "web", "--memory", "32", "--network", "none",
        "--disk", str(image), "--", "true",
    )  # fmt: skip
    eventually(lambda: "web" in host.kvik("list", "--name"), "it runs", 60)
    pid = eventually(lambda: host.pid("web"), "its process is known")
    os.kill(client, signal.SIGKILL)
    host.exit_code(client)
    time.sleep(0.3)
    assert alive(pid) and host.state("web") == "running"
