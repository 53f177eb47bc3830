"""virsh, virt-install and the Python bindings against kvikd with real QEMU machines: a whole life."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from real import LONG, Root, Terminal

pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the machines are of a system scope"),
    pytest.mark.skipif(shutil.which("virsh") is None, reason="virsh is not installed (apt install libvirt-clients)"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt: the image is made from Debian packages"),
]
WORDS = "quiet loglevel=3 panic=-1 cryptomgr.notests tsc=reliable no_timer_check noreplace-smp console=ttyS0"


def document(root: Root, name: str) -> str:
    """As virt-manager would write it: a graphics card beside the kernel."""
    return f"""<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>256</memory>
  <vcpu current='1'>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{root.tiny}/vmlinuz</kernel><initrd>{root.tiny}/initramfs</initrd>
    <cmdline>{WORDS} kvik.hostname={name}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='maximum'/>
  <devices>
    <interface type='user'><model type='virtio'/></interface>
    <serial type='pty'/><console type='pty'/>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memballoon model='virtio'/>
    <graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1'/>
    <video><model type='vga'/></video>
  </devices>
</domain>
"""


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    root = Root()
    root.out("list")  # starts the daemon
    yield root
    root.end()


def run(root: Root, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        env={**root.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )


def virsh(root: Root, *words: str, **environ: str) -> str:
    done = run(root, "virsh", "-c", root.uri, *words, **environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def until(test: Callable[[], bool], seconds: float = LONG) -> None:
    deadline = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def ready(root: Root, name: str) -> bool:
    return run(root, "virsh", "-c", root.uri, "qemu-agent-command", name, '{"execute":"guest-ping"}').returncode == 0


@pytest.fixture(scope="module")
def life(root: Root) -> Iterator[str]:
    """A machine that virsh defined and started, its agent answering."""
    file = root.path / "life.xml"
    file.write_text(document(root, "life"))
    assert virsh(root, "define", str(file)) == f"Domain 'life' defined from {file}"
    assert virsh(root, "start", "life") == "Domain 'life' started"
    until(lambda: ready(root, "life"))
    yield "life"


def test_what_virsh_tells_of_a_running_machine(root: Root, life: str) -> None:
    assert re.search(r"\d+\s+life\s+running", virsh(root, "list"))
    assert "Persistent:     yes" in virsh(root, "dominfo", life)
    assert virsh(root, "domstate", life, "--reason") == "running (booted)"
    until(lambda: "10.0.2.15/24" in virsh(root, "domifaddr", life, "--source", "agent"))
    assert virsh(root, "domhostname", life) == "life"
    assert re.fullmatch(r"127\.0\.0\.1:\d+", virsh(root, "vncdisplay", life))
    assert "state.state=1" in virsh(root, "domstats", life)
    assert "<name>life</name>" in virsh(root, "dumpxml", life)


def test_suspended_and_resumed_with_events(root: Root, life: str) -> None:
    watcher = subprocess.Popen(
        ["stdbuf", "-oL", "virsh", "-c", root.uri, "event", "--all", "--loop"],
        env=root.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        time.sleep(0.5)
        virsh(root, "suspend", life)
        assert virsh(root, "domstate", life) == "paused"
        virsh(root, "resume", life)
        assert virsh(root, "domstate", life) == "running"
    finally:
        time.sleep(0.3)
        watcher.terminate()
        out, _ = watcher.communicate(timeout=10)
    assert "event 'lifecycle' for domain 'life': Suspended Paused" in out
    assert "event 'lifecycle' for domain 'life': Resumed Unpaused" in out


def test_the_console_of_virsh(root: Root, life: str) -> None:
    terminal = Terminal(["virsh", "-c", root.uri, "console", life], root.environ)
    terminal.expect(r"\(Ctrl \+ \]\)")
    deadline = time.monotonic() + LONG
    while "life:~# " not in terminal.shown:  # virsh throws away what was typed before its terminal was raw
        assert time.monotonic() < deadline, terminal.shown
        terminal.type("\r")
        terminal.read(1)
    terminal.type("uname -r\r")
    terminal.expect(r"uname -r\s+6\.\d+")
    terminal.type("\x1d")
    assert terminal.wait(20) == 0


def test_vcpus_memory_and_disks_of_a_running_machine(root: Root, life: str) -> None:
    virsh(root, "setvcpus", life, "2", "--live")
    assert re.search(r"current\s+live\s+2", virsh(root, "vcpucount", life))
    virsh(root, "setmem", life, "200M", "--live")
    until(lambda: "actual 204800" in virsh(root, "dommemstat", life))
    disk = root.path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    virsh(root, "attach-disk", life, str(disk), "vdb", "--subdriver", "qcow2", "--targetbus", "virtio")
    assert str(disk) in virsh(root, "domblklist", life)
    assert "vdb wr_req 0" in virsh(root, "domblkstat", life, "vdb")
    assert re.search(r"Capacity:\s+67108864", virsh(root, "domblkinfo", life, "vdb"))
    virsh(root, "detach-disk", life, "vdb")
    until(lambda: str(disk) not in virsh(root, "domblklist", life))


def test_screen_keys_and_agent(root: Root, life: str) -> None:
    picture = root.path / "screen"
    virsh(root, "screenshot", life, str(picture))
    assert picture.read_bytes()[:4] in (b"\x89PNG", b"P6\n7", b"P6\n6")
    virsh(root, "send-key", life, "KEY_LEFTCTRL", "KEY_C")
    assert "version" in virsh(root, "qemu-agent-command", life, '{"execute":"guest-info"}')


def test_the_definition_is_edited_and_marked(root: Root, life: str) -> None:
    editor = root.path / "editor"
    editor.write_text("#!/bin/sh\nsed -i 's,<vcpu,<title>edited</title><vcpu,' \"$1\"\n")
    editor.chmod(0o755)
    root.environ.pop("VISUAL", None)
    virsh(root, "edit", life, EDITOR=str(editor))
    assert "<title>edited</title>" in virsh(root, "dumpxml", life, "--inactive")
    virsh(root, "autostart", life)
    assert "Autostart:      enable" in virsh(root, "dominfo", life)
    virsh(root, "autostart", life, "--disable")


def test_the_bindings_see_a_whole_life_in_their_event_loop(root: Root) -> None:
    python = Path("/usr/bin/python3")
    if run(root, str(python), "-c", "import libvirt", PYTHONPATH="").returncode:
        pytest.skip("python3-libvirt is not installed (apt install python3-libvirt)")
    script = """
import libvirt, sys, time
libvirt.virEventRegisterDefaultImpl()
conn = libvirt.open(sys.argv[1])
seen = []
kind = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
conn.domainEventRegisterAny(None, kind, lambda c, d, e, detail, o: seen.append(e), None)
def spin(wanted):
    end = time.time() + 60
    libvirt.virEventAddTimeout(200, lambda *a: None, None)
    while wanted not in seen and time.time() < end:
        libvirt.virEventRunDefaultImpl()
dom = conn.createXML(open(sys.argv[2]).read(), 0)
spin(libvirt.VIR_DOMAIN_EVENT_STARTED)
dom.suspend(); spin(libvirt.VIR_DOMAIN_EVENT_SUSPENDED)
dom.resume(); spin(libvirt.VIR_DOMAIN_EVENT_RESUMED)
dom.destroy(); spin(libvirt.VIR_DOMAIN_EVENT_STOPPED)
print(seen)
"""
    file = root.path / "bound.xml"
    file.write_text(document(root, "bound"))
    done = run(root, str(python), "-c", script, root.uri, str(file), PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in re.findall(r"\d+", done.stdout)] == [2, 3, 4, 5]


@pytest.mark.skipif(shutil.which("virt-install") is None, reason="virt-install is not installed (apt install virtinst)")
def test_virt_install_imports_a_disk_and_boots_a_kernel(root: Root) -> None:
    disk = root.path / "import.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    common = ["virt-install", "--connect", root.uri, "--memory", "256", "--osinfo", "detect=off,require=off"]
    common += ["--noautoconsole", "--virt-type", "qemu", "--import", "--network", "user,model=virtio"]
    done = run(root, *common, "--name", "imported", "--disk", str(disk), PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    kernel = f"kernel={root.tiny}/vmlinuz,initrd={root.tiny}/initramfs,kernel_args={WORDS}"
    agent = "unix,target.type=virtio,target.name=org.qemu.guest_agent.0"
    done = run(root, *common, "--name", "booted", "--disk", "none", "--boot", kernel, "--channel", agent, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    until(lambda: ready(root, "booted"))
    done = run(root, "virt-xml", "--connect", root.uri, "imported", "--edit", "--memory", "300", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    for name in ("imported", "booted"):
        virsh(root, "destroy", name)
    clone = [
        "virt-clone",
        "--connect",
        root.uri,
        "--original",
        "booted",
        "--name",
        "copy",
        "--auto-clone",
        "--print-xml",
    ]
    done = run(root, *clone, PYTHONPATH="")
    assert "<name>copy</name>" in done.stdout, done.stderr
    for name in ("imported", "booted"):
        virsh(root, "undefine", name)


@pytest.mark.parametrize("mode", ["acpi", "agent"])
def test_rebooted_and_shut_down(root: Root, life: str, mode: str) -> None:
    if virsh(root, "domstate", life) == "shut off":
        virsh(root, "start", life)
        until(lambda: ready(root, life))
    if mode == "agent":
        virsh(root, "reboot", life, "--mode", mode)
        time.sleep(1)
        until(lambda: ready(root, life))
    virsh(root, "shutdown", life, "--mode", mode)
    until(lambda: virsh(root, "domstate", life) == "shut off", 40)


def test_undefined_it_is_gone(root: Root, life: str) -> None:
    assert virsh(root, "undefine", life) == "Domain 'life' has been undefined"
    done = run(root, "virsh", "-c", root.uri, "dominfo", life)
    assert done.returncode == 1
    assert "failed to get domain 'life'" in done.stderr
