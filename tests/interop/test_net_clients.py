"""The network `default` of a fresh daemon, in a network namespace of its own, as other people's clients meet it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
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

PYTHON = Path("/usr/bin/python3")
ENVIRON = {**os.environ, "LC_ALL": "C", "PYTHONPATH": str(Path(kvik.__file__).parent.parent)}


def holder() -> subprocess.Popen[bytes]:
    """A process that keeps a network namespace of its own until its standard input ends."""
    process = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up; echo; exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    return process


class Kvikd:
    """A daemon whose network namespace outlives it, for as long as a sleeping process holds that."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = root / "s"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self.holder = holder()
        self.process: subprocess.Popen[bytes] | None = None

    def inside(self, *words: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", *words]

    def start(self) -> None:
        argv = [sys.executable, "-m", "kvik.daemon", "--system", "--root", str(self.root), "--driver", "test"]
        argv += ["--socket", str(self.socket), "--default-network", "on"]
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(self.inside(*argv), env=ENVIRON, stderr=log)
        deadline = time.monotonic() + 20
        while not self.socket.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"kvikd did not start: {(self.root / 'log').read_text()}")
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(15)
            self.process = None
            self.socket.unlink(missing_ok=True)

    def end(self) -> None:
        """All that lives in the namespace: the daemon, then the network's helpers, then the namespace itself."""
        with contextlib.suppress(AssertionError):  # it may be gone already
            self.virsh("net-destroy", "default")
        self.stop()
        self.holder.communicate()

    def virsh(self, *words: str) -> str:
        return self._run("virsh", "-q", "-c", self.uri, *words)

    def kvik(self, *words: str) -> str:
        return self._run(sys.executable, "-m", "kvik.cli.main", "-q", "-c", self.uri, *words)

    def _run(self, *argv: str) -> str:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=ENVIRON, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def kvikd() -> Iterator[Kvikd]:
    for program in ("virsh", "unshare", "nsenter", "dnsmasq", "ip"):
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            pytest.skip(f"{program} is not installed")
    if os.geteuid() != 0:
        pytest.skip("networks of the system scope need root")
    with tempfile.TemporaryDirectory(prefix="kvikd-") as root:
        daemon = Kvikd(Path(root))
        try:
            daemon.start()
            yield daemon
        finally:
            daemon.end()
        assert "failed unexpectedly" not in (Path(root) / "log").read_text()


def test_a_fresh_daemon_has_a_working_network_default(kvikd: Kvikd) -> None:
    assert kvikd.virsh("net-list").split() == ["default", "active", "yes", "yes"]
    assert "Bridge:         virbr0" in kvikd.virsh("net-info", "default")
    assert "<ip address='192.168.122.1' netmask='255.255.255.0'>" in kvikd.virsh("net-dumpxml", "default")
    addresses = subprocess.run(
        kvikd.inside("ip", "-br", "address", "show", "virbr0"), capture_output=True, text=True, check=True
    )
    assert "192.168.122.1/24" in addresses.stdout


def test_virt_install_puts_a_machine_on_it(kvikd: Kvikd) -> None:
    if shutil.which("virt-install") is None:
        pytest.skip("virt-install is not installed")
    disk = kvikd.root / "import.img"
    disk.write_bytes(bytes(1 << 20))
    command = ["virt-install", "--connect", kvikd.uri, "--name", "imported", "--memory", "256", "--vcpus", "1"]
    command += ["--import", "--disk", f"{disk},bus=virtio", "--osinfo", "generic", "--network", "network=default"]
    command += ["--graphics", "vnc", "--noautoconsole", "--virt-type", "qemu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRON, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    row = kvikd.virsh("domiflist", "imported").split()
    assert row[1:3] == ["network", "default"]
    assert "<network connections='1'>" in kvikd.virsh("net-dumpxml", "default")
    port = kvikd.virsh("net-port-list", "default", "--uuid").strip()
    text = kvikd.virsh("net-port-dumpxml", "default", port)
    uuid = kvikd.virsh("domuuid", "imported").strip()
    mac = kvikd.virsh("domiflist", "imported").split()[4]
    assert (
        text.strip()
        == f"""\
<networkport>
  <uuid>{port}</uuid>
  <owner>
    <name>imported</name>
    <uuid>{uuid}</uuid>
  </owner>
  <mac address='{mac}'/>
  <plug type='network' bridge='virbr0'/>
</networkport>"""
    )
    with pytest.raises(AssertionError, match="come and go with machines' interfaces"):
        kvikd.kvik("net-port-delete", "default", port)  # virsh says so, too, but ends with code 0
    kvikd.virsh("destroy", "imported")
    assert kvikd.virsh("net-port-list", "default", "--uuid").strip() == ""
    kvikd.virsh("undefine", "imported")


BINDINGS = """
import json, libvirt, sys, threading
libvirt.registerErrorHandler(lambda *a: None, None)
libvirt.virEventRegisterDefaultImpl()
conn = libvirt.open(sys.argv[1])
result, heard = {}, []
def code(f, *a):
    try:
        f(*a)
    except libvirt.libvirtError as error:
        return error.get_error_code()
conn.networkEventRegisterAny(None, libvirt.VIR_NETWORK_EVENT_ID_LIFECYCLE,
                             lambda c, net, event, detail, opaque: heard.append([net.name(), event]), None)
net = conn.networkDefineXML("<network><name>lan</name><ip address='192.168.77.1' prefix='24'>"
                            "<dhcp><range start='192.168.77.2' end='192.168.77.9'/></dhcp></ip></network>")
result["inactive"] = [n.name() for n in conn.listAllNetworks(libvirt.VIR_CONNECT_LIST_NETWORKS_INACTIVE)]
result["defined"] = conn.listDefinedNetworks()
net.create()
result["active"] = sorted(conn.listNetworks())
result["count"] = [conn.numOfNetworks(), conn.numOfDefinedNetworks()]
result["is"] = [net.isActive(), net.isPersistent(), net.autostart(), net.bridgeName().startswith("virbr")]
result["leases"] = net.DHCPLeases()
net.update(libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST, libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST, -1,
           "<host mac='52:54:00:00:00:01' ip='192.168.77.5'/>",
           libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE | libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG)
result["updated"] = ["192.168.77.5" in net.XMLDesc(flags) for flags in (0, libvirt.VIR_NETWORK_XML_INACTIVE)]
result["same"] = conn.networkLookupByUUIDString(net.UUIDString()).name()
result["defined twice"] = code(conn.networkDefineXML, "<network")
net.destroy()
result["again"] = code(net.destroy)
net.undefine()
result["gone"] = code(net.isActive)
for _ in range(50):
    if len(heard) < 4:
        timer = libvirt.virEventAddTimeout(100, lambda *a: None, None)
        libvirt.virEventRunDefaultImpl()
        libvirt.virEventRemoveTimeout(timer)
result["heard"] = heard
print(json.dumps(result))
"""


def test_libvirts_bindings_make_change_and_watch_one(kvikd: Kvikd) -> None:
    if (
        not PYTHON.exists()
        or subprocess.run([PYTHON, "-c", "import libvirt"], check=False, capture_output=True).returncode
    ):
        pytest.skip("python3-libvirt is not installed (apt install python3-libvirt)")
    done = subprocess.run(
        [PYTHON, "-c", BINDINGS, kvikd.uri], capture_output=True, text=True, timeout=60, env=ENVIRON, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result == {
        "inactive": ["lan"],
        "defined": ["lan"],
        "active": ["default", "lan"],
        "count": [2, 0],
        "is": [1, 1, 0, True],
        "leases": [],
        "updated": [True, True],
        "same": "lan",
        "defined twice": 27,
        "again": 55,
        "gone": 43,
        "heard": [["lan", 0], ["lan", 2], ["lan", 3], ["lan", 1]],
    }


GUEST = """<domain type='test'><name>guest</name><memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <interface type='bridge'>
      <mac address='52:54:00:0a:0b:0c'/><source bridge='virbr0'/><target dev='guest0'/>
    </interface>
  </devices>
</domain>"""


@pytest.fixture
def guest(kvikd: Kvikd) -> Iterator[Callable[..., str]]:
    """What a guest's kernel would be: an interface at the far end of a cable into virbr0, in a namespace of its own.
    Called with words, it runs them there."""
    far = holder()

    def there(*words: str) -> str:
        argv = ["nsenter", f"--net=/proc/{far.pid}/ns/net", *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout

    script = f"""ip link add g1 type veth peer name g0 address 52:54:00:0a:0b:0c && ip link set g0 netns {far.pid} &&
    ip link set g1 master virbr0 up"""
    subprocess.run(kvikd.inside("sh", "-c", script), check=True)
    there("ip", "link", "set", "g0", "up")
    yield there
    far.communicate()


def test_a_guests_address_is_known_by_its_lease_and_by_arp(kvikd: Kvikd, guest: Any) -> None:
    if shutil.which("busybox") is None:
        pytest.skip("busybox, which has a DHCP client, is not installed")
    document = kvikd.root / "guest.xml"
    document.write_text(GUEST)
    kvikd.virsh("create", str(document))
    assert kvikd.virsh("domifaddr", "guest").strip() == ""
    script = kvikd.root / "bound"
    script.write_text('#!/bin/sh\n[ "$1" != bound ] || ip address add "$ip/24" dev "$interface"\n')
    script.chmod(0o755)
    guest("busybox", "udhcpc", "-i", "g0", "-n", "-q", "-x", "hostname:web", "-s", str(script))
    guest("busybox", "ping", "-c", "1", "-W", "5", "192.168.122.1")
    (lease,) = kvikd.virsh("net-dhcp-leases", "default").splitlines()
    _, _, mac, protocol, address, hostname, _ = lease.split()
    assert (mac, protocol, hostname) == ("52:54:00:0a:0b:0c", "ipv4", "web")
    bare = address.removesuffix("/24")
    assert guest("ip", "-o", "address", "show", "g0").count(address) == 1
    assert kvikd.virsh("domifaddr", "guest").split() == ["guest0", mac, "ipv4", address]
    assert ["guest0", mac, "ipv4", f"{bare}/0"] in [
        line.split() for line in kvikd.virsh("domifaddr", "guest", "--source", "arp").splitlines()
    ]
    assert kvikd.kvik("ip", "guest") == f"{bare}\n"
    assert json.loads(kvikd.kvik("--json", "domifaddr", "guest"))[0]["sources"] == ["lease", "arp"]
    kvikd.virsh("destroy", "guest")


def test_it_is_there_after_the_daemon_was_killed_and_not_again_once_undefined(kvikd: Kvikd) -> None:
    kvikd.stop(signal.SIGKILL)
    kvikd.start()
    assert kvikd.virsh("net-list").split() == ["default", "active", "yes", "yes"]
    kvikd.virsh("net-destroy", "default")
    kvikd.virsh("net-undefine", "default")
    kvikd.stop()
    kvikd.start()
    assert kvikd.virsh("net-list", "--all").split() == []
    links = subprocess.run(kvikd.inside("ip", "-o", "link"), capture_output=True, text=True, check=True).stdout
    assert "virbr" not in links
