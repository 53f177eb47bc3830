"""Debian's virsh runs a machine's life on our daemon."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from kvikd_process import Kvikd, domain_xml

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("virsh") is None, reason="virsh is not installed (apt install libvirt-clients)"),
]

Virsh = Callable[..., str]


@pytest.fixture
def virsh(kvikd: Kvikd) -> Virsh:
    def run(*arguments: str, fails: str = "", readonly: bool = False) -> str:
        command = ["virsh", *(["-r"] if readonly else []), "-c", kvikd.uri, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        output = result.stdout + result.stderr
        if fails:
            assert result.returncode != 0, output
            assert re.search(fails, output), output
        else:
            assert result.returncode == 0, output
        return output

    return run


@pytest.fixture
def web(kvikd: Kvikd, virsh: Virsh) -> Iterator[str]:
    """A defined machine that is off."""
    disk = kvikd.root / "web.img"
    disk.write_bytes(bytes(1 << 20))
    document = kvikd.root / "web.xml"
    document.write_text(domain_xml("web", disk))
    virsh("define", str(document))
    yield "web"
    for verb in ("destroy", "undefine"):
        subprocess.run(["virsh", "-c", kvikd.uri, verb, "web"], capture_output=True, timeout=30, check=False)


def test_the_host(virsh: Virsh) -> None:
    assert "Running hypervisor: QEMU" in virsh("version")
    assert virsh("uri").startswith("qemu")
    assert virsh("hostname").strip() == os.uname().nodename
    assert "Memory size" in virsh("nodeinfo")
    assert "CPUs present" in virsh("nodecpumap")
    assert "total" in virsh("nodememstats")
    assert "idle" in virsh("nodecpustats")
    assert "KiB" in virsh("freecell")
    virsh("sysinfo")
    root = ElementTree.fromstring(virsh("capabilities"))
    assert root.findtext("host/cpu/arch")
    assert root.find("guest/arch/domain[@type='qemu']") is not None
    assert "<domainCapabilities>" in virsh("domcapabilities")


def test_a_life(virsh: Virsh, web: str) -> None:
    assert "shut off" in virsh("list", "--all")
    virsh("start", web)
    assert virsh("domstate", web, "--reason").strip() == "running (booted)"
    assert "web" in virsh("list", "--state-running")
    assert "OS Type:        hvm" in virsh("dominfo", web)
    virsh("suspend", web)
    assert virsh("domstate", web).strip() == "paused"
    virsh("resume", web)
    virsh("reboot", web)
    virsh("reset", web)
    virsh("shutdown", web)
    deadline = time.monotonic() + 10
    while virsh("domstate", web).strip() != "shut off":
        assert time.monotonic() < deadline
    virsh("destroy", web, fails="not running")
    virsh("start", web, "--paused")
    virsh("destroy", web)
    virsh("domrename", web, "web2")
    virsh("domrename", "web2", web)
    virsh("undefine", web)
    virsh("dominfo", web, fails="failed to get domain 'web'")


def test_resources(virsh: Virsh, web: str) -> None:
    virsh("autostart", web)
    assert re.search(r"Autostart:\s+enable", virsh("dominfo", web))
    virsh("autostart", web, "--disable")
    virsh("start", web)
    virsh("setmem", web, "128M", "--live")
    assert re.search(r"Used memory:\s+131072 KiB", virsh("dominfo", web))
    virsh("setvcpus", web, "2", "--live")
    assert re.search(r"current\s+live\s+2", virsh("vcpucount", web))
    assert "CPU Affinity" in virsh("vcpuinfo", web)
    assert "CPU Affinity" in virsh("vcpupin", web)
    assert "emulator" in virsh("emulatorpin", web)
    assert re.search(r"cpu_shares\s+: 1024", virsh("schedinfo", web))
    assert "hard_limit" in virsh("memtune", web)
    assert "numa_mode" in virsh("numatune", web)


def test_figures(virsh: Virsh, web: str) -> None:
    virsh("start", web)
    stats = virsh("domstats", web)
    assert "state.state=1" in stats
    assert "block.0.name=vda" in stats
    assert "vda" in virsh("domblklist", web)
    assert "52:54:00:11:22:33" in virsh("domiflist", web)
    assert "rd_bytes" in virsh("domblkstat", web, "vda")
    assert "rx_bytes" in virsh("domifstat", web, "52:54:00:11:22:33")
    assert "actual" in virsh("dommemstat", web)
    assert "cpu_time" in virsh("cpu-stats", web, "--total")
    assert virsh("domcontrol", web).strip() == "ok"
    assert "None" in virsh("domjobinfo", web)
    virsh("domblkstat", web, "vdz", fails="no disk")


def test_the_guest_through_its_agent(virsh: Virsh, web: str) -> None:
    virsh("start", web)
    assert "eth0" in virsh("domifaddr", web, "--source", "agent")
    assert virsh("domhostname", web).strip()
    assert "hostname" in virsh("guestinfo", web)
    assert '"return"' in virsh("qemu-agent-command", web, '{"execute":"guest-ping"}')
    assert '"return"' in virsh("qemu-monitor-command", web, '{"execute":"query-status"}')


def test_keys_screens_and_metadata(virsh: Virsh, web: str, tmp_path: Path) -> None:
    virsh("start", web)
    virsh("send-key", web, "KEY_LEFTCTRL", "KEY_C")
    virsh("inject-nmi", web)
    image = tmp_path / "screen"
    assert "saved" in virsh("screenshot", web, str(image))
    assert image.stat().st_size > 0
    virsh("desc", web, "--title", "--new-desc", "a title")
    assert virsh("desc", web, "--title").strip() == "a title"
    virsh("metadata", web, "http://none", fails="no metadata")


def test_the_document_comes_back_as_it_can_be_defined_again(virsh: Virsh, web: str, tmp_path: Path) -> None:
    document = tmp_path / "again.xml"
    document.write_text(virsh("dumpxml", web))
    virsh("define", str(document))
    assert virsh("dumpxml", web).strip() == document.read_text().strip()
    assert virsh("domxml-to-native", "qemu-argv", "--domain", web)


def test_what_there_is_none_of(virsh: Virsh, web: str) -> None:
    for verb in ("net-list", "pool-list", "nodedev-list", "secret-list", "nwfilter-binding-list"):
        assert len(virsh(verb, *(["--all"] if verb.startswith(("net", "pool")) else [])).split("\n")) <= 5
    assert "lo" in virsh("iface-list", "--all")
    assert "Name" in virsh("snapshot-list", web)
    assert "Name" in virsh("checkpoint-list", web)
    virsh("net-info", "default", fails="no network with name 'default'")
    virsh("managedsave", web, fails="is not running")
    virsh("dump", web, "/nowhere/dump", fails="not supported|unknown procedure")


def test_read_only(virsh: Virsh, web: str) -> None:
    assert "web" in virsh("list", "--all", readonly=True)
    virsh("start", web, fails="read only|forbidden", readonly=True)


def test_events(kvikd: Kvikd, virsh: Virsh, web: str) -> None:
    watcher = subprocess.Popen(
        ["virsh", "-c", kvikd.uri, "event", "--all", "--loop", "--timeout", "4"], stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.5)
    virsh("start", web)
    virsh("suspend", web)
    virsh("destroy", web)
    output = watcher.communicate(timeout=20)[0]
    told = [line for line in output.splitlines() if "event 'lifecycle'" in line]
    assert [line.split(": ", 1)[1] for line in told] == ["Started Booted", "Suspended Paused", "Stopped Destroyed"]


def test_the_console(kvikd: Kvikd, virsh: Virsh, web: str) -> None:
    virsh("start", web)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp("virsh", ["virsh", "-c", kvikd.uri, "console", web])
    output = b""

    def wait_for(text: bytes) -> None:
        nonlocal output
        deadline = time.monotonic() + 10
        while text not in output:
            assert time.monotonic() < deadline, output
            if select.select([terminal], [], [], 0.2)[0]:
                output += os.read(terminal, 4096)

    try:
        wait_for(b"login:")
        os.write(terminal, b"hello guest\r")
        wait_for(b"hello guest\r\n")
        os.write(terminal, b"\x1d")  # Ctrl-]
        deadline = time.monotonic() + 10
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert os.waitstatus_to_exitcode(ended[1]) == 0
    finally:
        os.close(terminal)
    assert virsh("domstate", web).strip() == "running"


@pytest.mark.skipif(shutil.which("virt-install") is None, reason="virt-install is not installed")
def test_virt_install_imports_a_disk(kvikd: Kvikd, virsh: Virsh) -> None:
    disk = kvikd.root / "import.img"
    disk.write_bytes(bytes(1 << 20))
    command = ["virt-install", "--connect", kvikd.uri, "--name", "imported", "--memory", "256", "--vcpus", "1"]
    command += ["--import", "--disk", f"{disk},bus=virtio", "--osinfo", "generic", "--network", "user"]
    command += ["--graphics", "vnc", "--noautoconsole", "--virt-type", "qemu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert virsh("domstate", "imported").strip() == "running"
    assert str(disk) in virsh("domblklist", "imported")
    virsh("destroy", "imported")
    virsh("undefine", "imported")
