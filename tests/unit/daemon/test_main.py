"""The command: options, becoming a daemon, signals."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvik
from kvik.daemon.main import parser, scope_paths, wants_default_network
from kvik.rpc import message as m
from kvik.rpc.program import kvik as kvik_program
from kvik.rpc.program import remote

ENVIRON = {**os.environ, "PYTHONPATH": str(Path(kvik.__file__).parent.parent)}


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="kvikd-"))
    yield path
    for file in path.rglob("kvikd.pid"):  # a test that failed half-way leaves no daemon behind
        process = Path("/proc") / file.read_text().strip()
        if (process / "cmdline").exists() and os.fsencode(path) in (process / "cmdline").read_bytes():
            os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="networks of the system scope need root")
@pytest.mark.parametrize(
    ("words", "environ", "wanted"),
    [
        ("--system", {}, True),
        ("", {}, True),
        ("--session", {"HOME": "/nonexistent"}, True),
        ("--session --default-network off", {"HOME": "/nonexistent"}, False),
        ("--system --root /srv/other", {}, False),
        ("--system", {"KVIK_ROOT": "/srv/other"}, False),
        ("--system --default-network off", {}, False),
        ("--system --root /srv/other --default-network on", {}, True),
    ],
)
def test_the_default_network_is_the_hosts_own_daemons_and_each_sessions(
    words: str, environ: dict[str, str], wanted: bool
) -> None:
    options = parser().parse_args(words.split())
    assert wants_default_network(options, scope_paths(options, environ), environ) is wanted


def kvikd(*options: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvik.daemon", *options]
    return subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=timeout, check=False)


def status(path: Path) -> tuple[int, str]:
    """(pid, scope) of the daemon that listens there."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(path))
        sock.sendall(m.call(remote()["CONNECT_OPEN"], 0, (None, 0)))
        sock.sendall(m.call(kvik_program()["DAEMON_STATUS"], 1))
        data = b""
        while len(data) < 32 or len(data) < 28 + int.from_bytes(data[28:32]):
            data += sock.recv(4096)
        record = kvik_program()["DAEMON_STATUS"].result.decode(data, 56, len(data))
        return record.pid, record.scope


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(") ")[1][:1]:
        assert time.monotonic() < deadline, "the daemon did not end"
        time.sleep(0.02)


def test_version() -> None:
    assert kvikd("--version").stdout == f"kvikd {kvik.__version__}\n"


@pytest.mark.parametrize("options", [["--session", "--system"], ["--idle-timeout", "-1"], ["--driver", "xen"], ["x"]])
def test_wrong_options_are_refused(options: list[str]) -> None:
    assert kvikd(*options).returncode == 2


def test_the_scope_follows_the_user_unless_told(tmp_path: Path) -> None:
    def paths(*options: str) -> object:
        return scope_paths(parser().parse_args(options), {"HOME": "/home/u"})

    assert paths("--system").scope == "system"
    assert str(paths("--session").config) == "/home/u/.config/kvik"
    assert str(paths("--system", "--root", "/r").run) == "/r/run/kvik"
    assert str(paths("--session", "--root", "/r").run) == "/r/run/kvik"


@pytest.mark.parametrize("scope", ["system", "session"])
def test_detached_it_answers_when_the_command_returns_and_ends_on_sigterm(root: Path, scope: str) -> None:
    options = [f"--{scope}", "--root", str(root), "--driver", "test", "--detach"]
    done = kvikd(*options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    path = root / "run/kvik/kvikd.sock"
    pid, told = status(path)
    assert told == scope
    # Its own session, no terminal, nothing of the caller's open.
    assert os.getsid(pid) != os.getsid(0)
    assert {str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in (0, 1, 2)} == {"/dev/null"}
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    second = kvikd(*options)
    assert second.returncode == 1
    assert f"pid {pid}" in second.stderr
    os.kill(pid, signal.SIGTERM)
    wait_until_gone(pid)
    assert not path.exists()
    logs = list(root.rglob("kvikd.log"))
    assert len(logs) == 1
    assert "received SIGTERM" in logs[0].read_text()
    assert logs[0].stat().st_mode & 0o777 == 0o600


IMPATIENT = """
import pathlib, sys, time
from kvik.daemon.main import detach
from kvik.paths import Paths
root = pathlib.Path(sys.argv[1])

def serve(ready):
    (root / "forked").touch()
    while not (root / "go").exists():
        time.sleep(0.01)
    ready()
    (root / "serving").touch()
    return 0

detach(serve, Paths.system(root))
"""


def test_a_daemon_that_is_late_serves_though_its_starter_has_gone(root: Path) -> None:
    """The next client finds it; else each would start one that ends as soon as it is ready."""
    starter = subprocess.Popen([sys.executable, "-c", IMPATIENT, str(root)], env=ENVIRON)
    wait_for(root / "forked")
    starter.kill()
    starter.wait()
    (root / "go").touch()
    wait_for(root / "serving")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def test_killed_it_leaves_nothing_that_stops_the_next(root: Path) -> None:
    options = ["--system", "--root", str(root), "--driver", "test", "--detach"]
    path = root / "run/kvik/kvikd.sock"
    pids = []
    for _ in range(3):
        assert kvikd(*options).returncode == 0
        pids.append(status(path)[0])
        os.kill(pids[-1], signal.SIGKILL)
        wait_until_gone(pids[-1])
    assert len(set(pids)) == 3


def test_a_directory_that_cannot_be_had_is_said_to_the_caller(root: Path) -> None:
    (root / "run").write_text("a file")
    done = kvikd("--system", "--root", str(root), "--driver", "test", "--detach")
    assert done.returncode == 1
    assert "kvikd: error:" in done.stderr
    assert "Traceback" not in done.stderr


def test_idle_it_ends(root: Path) -> None:
    done = kvikd("--system", "--root", str(root), "--driver", "test", "--idle-timeout", "0.2")
    assert done.returncode == 0
    assert "idle for 0.2 s" in done.stderr
