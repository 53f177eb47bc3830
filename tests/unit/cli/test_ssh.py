"""`kvik ssh`: which address, which ssh, and that nothing from outside can become one of its options."""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.cli import ssh
from kvik.client.domain import InterfaceAddress, Readiness, Stage
from kvik.client.uri import parse_uri

MAC = "52:54:00:aa:bb:cc"
UUID = "11111111-2222-3333-4444-555555555555"


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state of mine"))
    monkeypatch.setenv("KVIK_URI", "kvik:///system")
    monkeypatch.setattr("kvik.cli.ssh.POLL", 0.001)
    return tmp_path / "state of mine/kvik/known_hosts"


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Says that it speaks ssh, after a line that servers may say before."""

    def serve() -> None:
        while True:
            try:
                peer = listener.accept()[0]
            except OSError:
                return
            with closing(peer):
                peer.sendall(b"welcome\r\nSSH-2.0-test\r\n")

    with closing(socket.create_server(("127.0.0.9", 0))) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def told(connection: Any, **by_source: list[tuple[str, str]]) -> None:
    connection.replies["interface_addresses"] = lambda source=0: [
        InterfaceAddress("vnet0", MAC, family, address, 24)
        for family, address in by_source.get(["lease", "agent", "arp"][source], [])
    ]


def test_the_command_has_the_machines_own_key_and_file(
    kvik: Any, state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told(kvik.connection, lease=[("ipv4", "192.168.77.5")])
    monkeypatch.setattr("kvik.cli.ssh.banner", lambda address, port: "")
    (tmp_path / "key").touch()
    key = str(tmp_path / "key")
    words = ["ssh", "tiny-1", "--login", "admin", "--port", "2022", "--identity", key, "--print", "--", "ls", "-l"]
    assert kvik(*words) == 0, kvik.err
    assert shlex.split(kvik.out) == [
        "ssh", f"-oHostKeyAlias=kvik-{UUID}", f'-oUserKnownHostsFile="{state}"', "-oStrictHostKeyChecking=accept-new",
        "-oCheckHostIP=no", "-p", "2022", "-l", "admin", "-i", str(tmp_path / "key"), "-oIdentitiesOnly=yes", "--",
        "192.168.77.5", "ls", "-l",
    ]  # fmt: skip
    assert state.parent.stat().st_mode & 0o777 == 0o700
    assert kvik("ssh", "tiny-1", "--print", "--command", "uptime") == 0, kvik.err
    assert shlex.split(kvik.out)[-2:] == ["192.168.77.5", "uptime"]


def test_a_machine_of_another_host_is_reached_through_that_host(kvik: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told(kvik.connection, lease=[("ipv4", "192.168.77.5")])
    for uri, jump in (
        ("qemu+ssh://far.example/system", "far.example"),
        ("kvik+ssh://me@[2001:db8::1]:2222/system", "me@[2001:db8::1]:2222"),
    ):
        monkeypatch.setenv("KVIK_URI", uri)
        assert kvik("ssh", "tiny-1", "--print") == 0, kvik.err
        argv = shlex.split(kvik.out)
        assert argv[argv.index("-J") + 1] == jump and argv[-2:] == ["--", "192.168.77.5"]


def test_what_the_host_knows_goes_before_what_a_guest_says(kvik: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = {"10.0.0.5": "connection refused", "fd00::5": ""}
    monkeypatch.setattr("kvik.cli.ssh.banner", lambda address, port: heard[address])
    told(
        kvik.connection,
        agent=[("ipv4", "203.0.113.9"), ("ipv4", "127.0.0.2"), ("ipv4", "-oProxyCommand=x"), ("ipv6", "::1")],
        lease=[("ipv4", "10.0.0.5")],
        arp=[("ipv6", "fe80::1"), ("ipv6", "fd00::5")],
    )
    assert kvik("ssh", "tiny-1", "--print") == 0, kvik.err
    assert shlex.split(kvik.out)[-1] == "fd00::5"


def test_a_port_forward_is_taken_where_there_is_one(kvik: Any, server: socket.socket) -> None:
    address, port = server.getsockname()
    forward = f"<portForward proto='tcp' address='{address}'><range start='{port}' to='22'/></portForward>"
    kvik.connection.replies["xml"] = f"<domain><devices><interface type='user'>{forward}</interface></devices></domain>"
    assert kvik("ssh", "tiny-1", "--print") == 0, kvik.err
    argv = shlex.split(kvik.out)
    assert argv[argv.index("-p") + 1] == str(port) and argv[-1] == address
    kvik.connection.replies["xml"] = "<domain><devices><interface type='user'/></devices></domain>"
    assert kvik("ssh", "tiny-1", "--print") == 255, "as ssh itself: its own failure is none of the command's codes"
    assert "behind user networking" in kvik.err and "<portForward" in kvik.err


def test_of_several_addresses_the_best_is_named_with_what_it_said(kvik: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"10.9.9.9": "connection refused", "2001:db8::9": "network is unreachable"}
    monkeypatch.setattr("kvik.cli.ssh.banner", lambda address, port: said[address])
    told(kvik.connection, lease=[("ipv4", "10.9.9.9")], arp=[("ipv6", "2001:db8::9")])
    assert kvik("ssh", "tiny-1", "--timeout", "0.01") == 255
    assert "has the address 10.9.9.9" in kvik.err and "connection refused" in kvik.err


def test_what_does_not_come_is_named(kvik: Any) -> None:
    told(kvik.connection)
    kvik.connection.replies["stages"] = Readiness(False, [Stage("agent", 0.0, 0, "")])
    assert kvik("ssh", "tiny-1", "--timeout", "0.01") == 255
    assert "nobody knows an address" in kvik.err and "stage 'agent' is waiting" in kvik.err
    with closing(socket.create_server(("127.0.0.9", 0))) as free:
        port = free.getsockname()[1]
    assert ssh.banner("127.0.0.9", port) == "connection refused"
    told(kvik.connection, lease=[("ipv4", "192.0.2.7")])
    kvik.connection.replies["xml"] = "<domain><devices/></domain>"


def test_who_answers_must_speak_ssh(server: socket.socket) -> None:
    assert ssh.banner(*server.getsockname()) == ""
    with closing(socket.create_server(("127.0.0.9", 0))) as listener:

        def flood() -> None:
            peer = listener.accept()[0]
            with closing(peer):
                try:
                    peer.sendall(bytes(1 << 20))
                except OSError:
                    pass

        thread = threading.Thread(target=flood)
        thread.start()
        assert ssh.banner(*listener.getsockname()) == "what answers there is no ssh"
        thread.join()


@pytest.mark.parametrize(
    "words",
    [
        ["-l", "-oProxyCommand=x"], ["-l", "a b"], ["-l", "a;b"], ["-p", "0"], ["-p", "65536"],
        ["-i", "/nowhere/at/all"], ["--timeout", "0"],
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(kvik: Any, words: list[str]) -> None:
    assert kvik("ssh", "tiny-1", "--print", *words) != 0
    assert not kvik.out.strip()


@given(command=st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1)))
def test_no_command_becomes_an_option(command: list[str]) -> None:
    argv = ssh.arguments(UUID, ("192.0.2.1", 22), "/s/known_hosts", command, jump=parse_uri("kvik:///system"))
    at = argv.index("--")
    assert argv[at + 1 :] == ["192.0.2.1", *command]


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs openssh-client")
def test_ssh_itself_takes_what_is_behind_for_the_command(state: Path) -> None:
    argv = ssh.arguments(UUID, ("192.0.2.1", 22), f"{state.parent}/100%", ["-oProxyCommand=evil", "-v"])
    shown = subprocess.run([argv[0], "-Fnone", "-G", *argv[1:]], capture_output=True, text=True, check=True).stdout
    settings = dict(line.split(" ", 1) for line in shown.splitlines())
    assert "proxycommand" not in settings and settings["hostname"] == "192.0.2.1"
    assert settings["userknownhostsfile"] in (
        f"{state.parent}/100%%",
        f"{state.parent}/100%",
        f'"{state.parent}/100%%"',
    )
    assert settings["hostkeyalias"] == f"kvik-{UUID}"


def test_its_exit_code_is_ours(kvik: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bin/ssh"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr("kvik.cli.ssh.banner", lambda address, port: "")
    told(kvik.connection, lease=[("ipv4", "192.168.77.5")])
    assert kvik("ssh", "tiny-1") == 7
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kvik("ssh", "tiny-1") == 77 and "openssh-client" in kvik.err
