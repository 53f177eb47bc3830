"""Connecting: real sockets, a daemon that starts on first use, one only, and what is said when it does not."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.client import connect, transport
from kvik.client.transport import daemon_command, open_transport, paths_of, ssh_command, start_daemon
from kvik.client.uri import parse_uri
from kvik.errors import ConnectError
from kvik.paths import Paths


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvik-") as directory:  # short: Unix socket paths are
        monkeypatch.setenv("KVIK_ROOT", directory)
        yield Path(directory)


# Listens on argv[1], answers AUTH_LIST and CONNECT_OPEN of any number of clients, counts its starts in argv[2].
DAEMON = textwrap.dedent("""
    import os, socket, sys, threading
    path, starts = sys.argv[1:3]
    with open(starts, "a") as file:
        file.write("started\\n")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)
    if os.fork():
        os._exit(0)
    os.setsid()
    listener.settimeout(20)
    def serve(client):
        from kvik.rpc import message as m
        from kvik.rpc.connection import Connection, Role
        wire = Connection(Role.SERVER)
        while data := client.recv(65536):
            for call in wire.feed(data):
                client.sendall(m.reply(call, ([0],) if call.procedure == 66 else ()))
    try:
        clients = int(sys.argv[3])
        threads = []
        for _ in range(clients):
            threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
            threads[-1].start()
    except TimeoutError:
        pass
    os.unlink(path)
""")


def use(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    monkeypatch.setattr(transport, "daemon_command", lambda paths: list(command))


def test_the_daemon_is_started_on_first_use(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, path = root / "starts", Paths.system().socket
    use(monkeypatch, sys.executable, "-c", DAEMON, str(path), str(starts), "2")
    for _ in range(2):
        with connect("kvik:///system") as connection:
            assert connection.link.socket.getpeername() == f"{path}.new"  # as bound, before the rename
    assert starts.read_text() == "started\n"


def test_clients_that_come_together_start_one_daemon(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, paths = root / "starts", Paths.system()
    use(monkeypatch, sys.executable, "-c", DAEMON, str(paths.socket), str(starts), "6")
    sockets: list[socket.socket] = []
    threads = [threading.Thread(target=lambda: sockets.append(start_daemon(paths))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(sockets) == 6
    for sock in sockets:
        sock.close()
    assert starts.read_text() == "started\n"


def test_a_daemon_that_dies_at_start_says_why(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "sh", "-c", "echo the state directory is full >&2; exit 3")
    with pytest.raises(ConnectError) as caught:
        connect("kvik:///system")
    assert "ended with status 3" in str(caught.value)
    assert "the state directory is full" in str(caught.value)


def test_a_daemon_that_never_listens_is_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "sh", "-c", "echo still thinking >&2; exec sleep 30")
    with pytest.raises(ConnectError, match="in time: still thinking"):
        start_daemon(Paths.system(), timeout=0.2)


def test_a_daemon_that_cannot_be_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, str(root / "nothing"))
    with pytest.raises(ConnectError, match="cannot start the daemon"):
        connect("kvik:///system")


def test_without_autostart_nothing_is_started(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "sh", "-c", f"touch {root}/started")
    with pytest.raises(ConnectError, match="is kvikd running"):
        connect("kvik:///system", autostart=False)
    with pytest.raises(ConnectError, match="is kvikd running"):
        connect(f"qemu+unix:///system?socket={root}/x.sock")
    assert not (root / "started").exists()


def test_a_stale_socket_counts_as_nobody(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = Paths.system()
    paths.run.mkdir(parents=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(paths.socket))
    listener.close()
    use(monkeypatch, sys.executable, "-c", DAEMON, str(paths.socket), str(root / "starts"), "1")
    with connect("kvik:///system"):
        pass


def test_a_path_too_long_for_a_socket_is_said(root: Path) -> None:
    with pytest.raises(ConnectError, match="107 bytes"):
        connect(f"kvik+unix:///system?socket=/{'x' * 120}")


@pytest.mark.skipif(os.geteuid() != 0, reason="drops privileges to be forbidden: needs root")
def test_a_socket_of_somebody_else_is_said(root: Path) -> None:
    path = root / "x.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o600)
        root.chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(ConnectError, match="another user"):
                open_transport(parse_uri(f"kvik+unix:///system?socket={path}"))
        finally:
            os.seteuid(0)


def test_the_system_daemon_is_not_started_by_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVIK_ROOT", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(transport, "paths_of", lambda scope: Paths.system("/nonexistent", {}))
    with pytest.raises(ConnectError, match=r"start it as root .* kvik:///session"):
        connect("kvik:///system")


def test_what_is_run_for_each_scope() -> None:
    system = daemon_command(Paths.system(environ={}), {})
    assert system == [sys.executable, "-P", "-m", "kvik.daemon.main", "--system", "--detach"]
    assert daemon_command(Paths.system(environ={}), {"KVIK_ROOT": "/r"})[-2:] == ["--root", "/r"]
    session = daemon_command(Paths.session({"HOME": "/h"}), {"KVIK_ROOT": "/r"})
    assert session[-2:] == ["--session", "--detach"]
    assert paths_of("session", {"HOME": "/h", "XDG_RUNTIME_DIR": "/x"}).socket == Path("/x/kvik/kvikd.sock")


# --- ssh ---


def test_ssh_commands() -> None:
    assert ssh_command(parse_uri("kvik+ssh://me@host:22/system"))[4:] == [
        *("-l", "me", "-p", "22", "--", "host", "kvik", "proxy", "--system")
    ]
    last = ssh_command(parse_uri("kvik+ssh://host/session?socket=/a%20b;reboot"))[-1]
    assert last == "'/a b;reboot'"  # the remote end is a shell


def fake_ssh(root: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (root / "bin").mkdir()
    program = root / "bin/ssh"
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{root}/bin:{os.environ['PATH']}")


def test_through_ssh(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = textwrap.dedent("""
        import os, sys
        from kvik.rpc import message as m
        from kvik.rpc.connection import Connection, Role
        assert sys.argv[-4:] == ["host", "kvik", "proxy", "--system"], sys.argv
        wire = Connection(Role.SERVER)
        while data := os.read(0, 65536):
            for call in wire.feed(data):
                os.write(1, m.reply(call, {66: ([0],), 59: ("remote",)}.get(call.procedure, ())))
    """)
    fake_ssh(root, monkeypatch, script)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    with connect("kvik+ssh://host/system") as connection:
        assert connection.hostname() == "remote"
        process = connection.link.transport._process
    assert process is not None
    assert process.returncode is not None  # it ended with its connection


def test_what_ssh_says_is_passed_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ssh(root, monkeypatch, "import sys; sys.exit('Permission denied (publickey).')")
    with pytest.raises(ConnectError, match=r"Permission denied \(publickey\)"):
        connect("kvik+ssh://host/system")


def test_the_command_to_see_more_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = tmp_path / "a b"
    monkeypatch.setenv("KVIK_ROOT", str(root))
    monkeypatch.setattr(transport, "daemon_command", lambda paths: ["/bin/false", "--root", str(root), "--detach"])
    with pytest.raises(ConnectError) as caught:
        transport.start_daemon(Paths.system(root), timeout=5.0)
    assert caught.value.remedy.endswith(f"/bin/false --root '{root}'")
