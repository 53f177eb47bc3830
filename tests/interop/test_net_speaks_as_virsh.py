"""`virsh net-*` and `kvik net-*` on one real libvirtd, in a network namespace of its own: the same words.

Each session is typed into both from the same state, and ends with nothing left. UUIDs, MACs and times, which nobody
chose, are compared by their place only. What kvik says more of, its hints, is left out.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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
HOST = "\"<host mac='52:54:00:00:00:{0}' ip='192.168.77.{0}'/>\""
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
net-update lan add ip-dhcp-host {HOST.format("04")}
net-start lan
net-update lan add-last ip-dhcp-host {HOST.format("05")}
net-update lan add-first ip-dhcp-host {HOST.format("06")} --live --config
net-update lan delete ip-dhcp-host "<host mac='52:54:00:00:00:06'/>" --config
net-update lan add ip-dhcp-host {HOST.format("07")} --live --current
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
net-event lifecycle --timeout 1 --loop
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
PRIVATE = ("/run", "/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    for program in ("libvirtd", "virsh", "unshare", "dnsmasq"):
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            pytest.skip(f"{program} is not installed")
    if os.geteuid() != 0:
        pytest.skip("libvirtd's system mode needs root")
    base = tmp_path_factory.mktemp("ln")
    (base / "libvirtd.conf").write_text(CONFIGURATION.format(run=base))
    # Its own network, and its own places on disk: this daemon must not meet the host's libvirt.
    mounts = "; ".join(f"mkdir -p {place} && mount -t tmpfs none {place}" for place in PRIVATE)
    script = f"{mounts}; ip link set lo up; exec libvirtd -f {base}/libvirtd.conf -p {base}/pid"
    with (base / "log").open("wb") as log:
        process = subprocess.Popen(["unshare", "-m", "--net", "sh", "-c", script], stdout=log, stderr=log)
    socket = base / "libvirt-sock"
    try:
        deadline = time.monotonic() + 20
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"libvirtd does not start here: {(base / 'log').read_text()[-300:]}")
            time.sleep(0.05)
        yield f"qemu+unix:///system?socket={socket}"
    finally:
        process.terminate()
        process.wait(10)


def said(program: list[str], words: list[str]) -> tuple[int, str, str]:
    environ = {**os.environ, "LC_ALL": "C", "PYTHONPATH": str(Path(kvik.__file__).parent.parent)}
    done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=60, env=environ, check=False)
    errors = "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("hint: "))
    return done.returncode, unchosen(done.stdout), unchosen(errors)


def unchosen(text: str) -> str:
    """Without the numbers that are made up anew each time."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID" + " " * 32, text)
    return re.sub(r"(<mac address=')[0-9a-f:]{17}", r"\1MAC", text)


@pytest.mark.parametrize("session", SESSIONS)
def test_same_words_and_exit_codes(uri: str, session: str, tmp_path: Path) -> None:
    (tmp_path / "net.xml").write_text(NETWORK)
    (tmp_path / "port.xml").write_text(PORT)
    lines = SESSIONS[session].replace("@net", f"{tmp_path}/net.xml").replace("@port", f"{tmp_path}/port.xml")
    transcripts = []
    for program in (["virsh", "-c", uri], [sys.executable, "-m", "kvik.cli.main", "-c", uri]):
        transcripts.append([(line, said(program, shlex.split(line))) for line in lines.splitlines()])
    theirs, ours = transcripts
    for their, our in zip(theirs, ours, strict=True):
        assert our == their
