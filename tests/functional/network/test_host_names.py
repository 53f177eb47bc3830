"""A machine's name resolves on the host through the host's own resolver, and nothing is left when that is switched off.

In a network and a mount namespace of its own, over a copy of /etc: what is there of this machine is never written.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvik.conf.network import complete_network, parse_network
from kvik.host.bridge import create_bridge
from kvik.host.netlink import Netlink
from kvik.network.dnsmasq import Dnsmasq
from kvik.network.host_names import HostNames, zone_of
from kvik.paths import Paths
from netns import in_namespace

LAN = """<network><name>lan</name><forward mode='nat'/><bridge name='virbr7'/><domain name='lab'/>
<dns><host ip='10.7.0.9'><hostname>web</hostname></host></dns><ip address='10.7.0.1' prefix='24'/></network>"""
# The system's dnsmasq: it knows one name of the world, and reads the directory that Debian's reads.
SERVICE = """#!/bin/sh
[ ! -e {run}/host.pid ] || kill $(cat {run}/host.pid)
while [ -e {run}/host.pid ] && kill -0 $(cat {run}/host.pid) 2>/dev/null; do sleep 0.02; done
exec {dnsmasq} --conf-file= --conf-dir=/etc/dnsmasq.d,.dpkg-dist --pid-file={run}/host.pid --no-resolv --no-hosts \\
    --listen-address=127.0.0.1 --bind-interfaces --address=/world.example/192.0.2.80 --user=root
"""


def private_etc(directory: Path) -> None:
    """Of this thread alone, which ends with the test."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
    assert libc.mount(None, b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
    shutil.copytree("/etc", directory, symlinks=True, ignore=shutil.ignore_patterns("alternatives", "ssl"))
    assert libc.mount(str(directory).encode(), b"/etc", None, 0x1000, None) == 0  # MS_BIND
    if not Path("/etc").samefile(directory):
        raise AssertionError("/etc is this machine's own")


def found(name: str) -> str:
    """What this host's programs find (getent: the system's library, nsswitch.conf, resolv.conf)."""
    done = subprocess.run(["getent", "ahostsv4", name], capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.split(" ", 1)[0]


def below_etc() -> set[str]:
    return {str(path) for path in Path("/etc").rglob("*") if "kvik" in str(path)}


@pytest.mark.skipif(shutil.which("service") is None, reason="needs service (init-system-helpers)")
@pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="systemd would be asked to restart its own dnsmasq")
@in_namespace
def test_the_hosts_programs_find_a_machine_while_it_is_enabled(tmp_path: Path) -> None:
    dnsmasq = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/sbin")
    if dnsmasq is None:
        pytest.skip("needs dnsmasq-base")
    private_etc(tmp_path / "etc")
    shutil.rmtree("/etc/kvik", ignore_errors=True)
    for path in ("/etc/resolv.conf", "/etc/init.d/dnsmasq", "/etc/nsswitch.conf"):
        Path(path).unlink(missing_ok=True)
    Path("/etc/dnsmasq.d").mkdir(exist_ok=True)
    Path("/etc/nsswitch.conf").write_text("hosts: files dns\n")
    Path("/etc/resolv.conf").write_text("nameserver 127.0.0.1\n")
    script = Path("/etc/init.d/dnsmasq")
    script.parent.mkdir(exist_ok=True)
    script.write_text(SERVICE.format(run=tmp_path, dnsmasq=dnsmasq))
    script.chmod(0o755)
    with ExitStack() as close:
        with Netlink() as netlink:
            netlink.set_link(netlink.link("lo").index, up=True)
            bridge = create_bridge(netlink, "virbr7", up=True, stp=False)
            netlink.add_address(bridge.index, "10.7.0.1/24")
        subprocess.run([str(script)], check=True)
        close.callback(ended(tmp_path / "host.pid"))
        document = parse_network(LAN)
        complete_network(document, ())
        server = Dnsmasq("lan", tmp_path / "net", tmp_path)
        server.write(document)
        server.start()
        close.callback(server.stop)
        assert (found("world.example"), found("web.lab")) == ("192.0.2.80", "")
        names, zones = HostNames(Paths.system(Path("/"))), [zone_of(document, active=True)]
        before = below_etc()
        assert names.enable(zones) == "dnsmasq"
        assert names.status(zones).file == "/etc/dnsmasq.d/kvik.conf"
        assert (found("web.lab"), found("world.example"), found("nobody.lab")) == ("10.7.0.9", "192.0.2.80", "")
        names.refresh([])  # the network was stopped
        assert (found("web.lab"), found("world.example")) == ("", "192.0.2.80")
        names.refresh(zones)
        assert found("web.lab") == "10.7.0.9"
        assert names.disable(zones)
        assert (found("web.lab"), found("world.example")) == ("", "192.0.2.80")
        assert below_etc() - before <= {"/etc/kvik"}


def ended(pid_file: Path) -> Callable[[], None]:
    def end() -> None:
        subprocess.run(["kill", pid_file.read_text().strip()], check=False)

    return end
