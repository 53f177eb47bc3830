"""`virsh net-*` and `kvik net-*` on a real libvirtd and on kvikd, each in a network namespace: the same words.

Each session is typed into both clients from the same state, and ends with nothing left. UUIDs and MACs, which nobody
chose, are compared by their place only. What kvik says more of, its hints, is left out. Then the two daemons are
compared: what virsh shows of networks on one it shows on the other.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvik

pytestmark = [pytest.mark.interop, pytest.mark.root]

NETWORK = """\
<network>
  <name>lan</name>
  <bridge name='virbr7'/>
  <ip address='192.168.77.1' netmask='255.255.255.0'>
    <dhcp><range start='192.168.77.2' end='192.168.77.9'/></dhcp>
  </ip>
</network>
"""
PORT = """\
<networkport>
  <uuid>a1b1c1d1-a1b1-41d1-81f1-a1b1c1d1e1f1</uuid>
  <owner><name>vm1</name><uuid>12345678-1234-4234-8234-123456789abc</uuid></owner>
  <mac address='52:54:00:7b:35:93'/>
</networkport>
"""
HOST = "\"<host mac='52:54:00:00:00:0{0}' ip='192.168.77.{0}'/>\""
ID = "a1b1c1d1-a1b1-41d1-81f1-a1b1c1d1e1f1"

SESSIONS = {
    "a life": """\
net-list
net-define @net
net-list --all
net-list --inactive
net-list
net-dumpxml lan
net-dumpxml lan --xpath //range/@start
net-dumpxml lan --xpath '//name|//bridge' --wrap
net-info lan
net-uuid lan
net-autostart lan
net-list --all --autostart
net-list --all --no-autostart
net-autostart lan --disable
net-destroy lan
net-start lan
net-list
net-list --name
net-list --uuid
net-list --uuid --name
net-list --table --name
net-dhcp-leases lan
net-dhcp-leases lan --mac 52:54:00:00:00:01
net-undefine lan
net-list --all
net-list --transient
net-list --persistent
net-info lan
net-undefine lan
net-autostart lan
net-destroy lan
net-list --all
""",
    "transient": """\
net-create @net
net-info lan
net-list --transient
net-destroy lan
net-create /nonexistent
net-define /nonexistent
""",
    "changes in place": f"""\
net-define @net
net-update lan add ip-dhcp-host {HOST.format("4")}
net-start lan
net-update lan add-last ip-dhcp-host {HOST.format("5")}
net-update lan add-first ip-dhcp-host {HOST.format("6")} --live --config
net-update lan delete ip-dhcp-host "<host mac='52:54:00:00:00:06'/>" --config
net-update lan add ip-dhcp-host {HOST.format("7")} --live --current
net-update lan frob ip-dhcp-host <host/>
net-update lan add frob <host/>
net-update lan add ip-dhcp-host /nonexistent
net-dumpxml lan
net-dumpxml lan --inactive
net-destroy lan
net-undefine lan
""",
    "what is not there": """\
net-info nope
net-start nope
net-name nope
net-uuid nope
net-dhcp-leases nope
net-list foo
net-info
net-event
net-event --event frob
net-event --event lifecycle --timeout 1
""",
    "ports": f"""\
net-create @net
net-port-list lan
net-port-create lan @port
net-port-list lan
net-port-list lan --uuid
net-port-list lan --uuid --table
net-port-dumpxml lan {ID}
net-port-dumpxml lan {ID} --xpath //mac/@address
net-port-delete lan {ID}
net-port-list lan
net-destroy lan
""",
}

CONFIGURATION = """\
unix_sock_dir = "{run}"
auth_unix_ro = "none"
auth_unix_rw = "none"
"""
ENVIRON = {**os.environ, "LC_ALL": "C", "PYTHONPATH": str(Path(kvik.__file__).parent.parent)}
PRIVATE = ("/run", "/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")


NEEDED = ("virsh", "unshare", "dnsmasq", "ip")


def missing(*programs: str) -> str:
    """Why these daemons cannot be had here, or nothing."""
    for program in programs:
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            return f"{program} is not installed"
    return "" if os.geteuid() == 0 else "networks of the system scope need root"


@contextlib.contextmanager
def daemon(argv: list[str], socket: Path, log: Path, before: str = "") -> Iterator[str]:
    """Run a daemon in network and mount namespaces of its own, where it can meet no other's network or files."""
    script = f'{before} ip link set lo up; exec "$@"'
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "-m", "--net", "sh", "-c", script, "sh", *argv], stdout=output, stderr=output, env=ENVIRON
        )
    try:
        deadline = time.monotonic() + 20
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{argv[0]} does not start here: {log.read_text()[-500:]}")
            time.sleep(0.05)
        yield f"qemu+unix:///system?socket={socket}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if why := missing("libvirtd", *NEEDED):
        pytest.skip(why)
    base = tmp_path_factory.mktemp("ln")
    (base / "libvirtd.conf").write_text(CONFIGURATION.format(run=base))
    mounts = " ".join(f"mkdir -p {place} && mount -t tmpfs none {place};" for place in PRIVATE)
    argv = ["libvirtd", "-f", f"{base}/libvirtd.conf", "-p", f"{base}/pid"]
    with daemon(argv, base / "libvirt-sock", base / "log", mounts) as uri:
        yield uri


@pytest.fixture(scope="module")
def kvikd() -> Iterator[str]:
    if why := missing(*NEEDED):
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="kvikd-") as directory:
        base = Path(directory)
        argv = [sys.executable, "-m", "kvik.daemon", "--system", "--root", directory, "--driver", "test"]
        with daemon([*argv, "--socket", f"{base}/s"], base / "s", base / "log") as uri:
            yield uri
        assert "failed unexpectedly" not in (base / "log").read_text()


@pytest.fixture
def uri(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def said(program: list[str], words: list[str]) -> tuple[int, str, str]:
    done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=60, env=ENVIRON, check=False)
    errors = "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("hint: "))
    return done.returncode, unchosen(done.stdout), unchosen(errors)


def unchosen(text: str) -> str:
    """Without the numbers that are made up anew each time, and without the hint in the message itself."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID" + " " * 32, text)
    return re.sub(r"(<mac address=')[0-9a-f:]{17}", r"\1MAC", text)


@pytest.fixture
def type_in(tmp_path: Path) -> Callable[[list[str], str], list[tuple[str, int, str, str]]]:
    (tmp_path / "net.xml").write_text(NETWORK)
    (tmp_path / "port.xml").write_text(PORT)

    def type_in(program: list[str], session: str) -> list[tuple[str, int, str, str]]:
        lines = SESSIONS[session].replace("@net", f"{tmp_path}/net.xml").replace("@port", f"{tmp_path}/port.xml")
        return [(line, *said(program, shlex.split(line))) for line in lines.splitlines()]

    return type_in


KVIK = [sys.executable, "-m", "kvik.cli.main", "-c"]
ON = [("libvirtd", session) for session in SESSIONS] + [
    ("kvikd", session) for session in SESSIONS if session != "ports"
]


@pytest.mark.parametrize(("uri", "session"), ON, indirect=["uri"])
def test_same_words_and_exit_codes(uri: str, session: str, type_in: Any) -> None:
    theirs, ours = type_in(["virsh", "-c", uri], session), type_in([*KVIK, uri], session)
    for their, our in zip(theirs, ours, strict=True):
        line, code, out, errors = their
        if uri.endswith("/s"):  # kvikd: libvirt's clients get the hint within the message
            errors, our = without_hints(errors), (*our[:3], without_hints(our[3]))
        assert our == (line, code, out, errors)


def without_hints(errors: str) -> str:
    return "".join(f"{line.partition('; ')[0]}\n" for line in errors.splitlines())


# What is said and done otherwise on purpose: starting an active network is no error.
@pytest.mark.parametrize("session", ["a life", "changes in place"])
def test_the_two_daemons_answer_virsh_alike(libvirtd: str, kvikd: str, session: str, type_in: Any) -> None:
    theirs, ours = type_in(["virsh", "-c", libvirtd], session), type_in(["virsh", "-c", kvikd], session)
    for their, our in zip(theirs, ours, strict=True):
        assert our[:3] == their[:3], (our, their)
        assert our[3].count("\n") == their[3].count("\n"), (our, their)
