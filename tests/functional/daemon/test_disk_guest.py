"""One real Linux that sees a disk on every bus and from every kind of server, and what happens when those fail.

The daemon, its machine and the servers are in a network and mount namespace of their own: nothing leaves it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvik.client import secret
from kvik.host.process import find_program
from lab.kernel import LabUnavailable, ensure_kernel
from lab.vmm_guest import initramfs

from .conftest import DEADLINE, Kvikd, until
from .processes import qemu_of
from .test_block_jobs import ok

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: namespaces, and servers in them"),
    pytest.mark.skipif(
        any(find_program(name) is None for name in ("tgtd", "dropbear", "qemu-nbd", "ssh-keygen")),
        reason="needs tgtd, dropbear, ssh-keygen, qemu-nbd (apt install tgt dropbear-bin openssh-client qemu-utils)",
    ),
    pytest.mark.skipif(not Path("/usr/lib/sftp-server").exists(), reason="needs openssh-sftp-server"),
    pytest.mark.skipif(
        not Path("/usr/lib/x86_64-linux-gnu/qemu/block-iscsi.so").exists(), reason="needs qemu-block-extra"
    ),
]

SIZE = 1440 * 1024
MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_scsi", "ahci", "ata_piix", "sym53c8xx", "nvme", "xhci_pci", "usb-storage"),
    *("sd_mod", "sr_mod", "floppy"),
)
# Commands come on the serial line, one a line; each is answered by its output and its exit code.
SHELL = """
stty -F /dev/ttyS0 raw -echo
exec </dev/ttyS0 >/dev/ttyS0 2>&1
while read -r line; do eval "$line"; echo "=== $?"; done
"""
IQN = "iqn.2026-11.example:disks"
USER, PASSWORD = "reader", "twelve-letters-or-more"
NBD, HTTP, SSH, ISCSI = 10809, 8080, 2222, 3260
HOME = Path("~root").expanduser()
# Keys and known hosts of ssh are looked for in root's home: there it has another one, with the same directories in it
# but that for them.
INSIDE = """
set -e
home=$1; shift
held=$(mktemp -d); mount --rbind "$home" "$held"; mount -t tmpfs -o mode=700 none "$home"
for entry in "$held"/* "$held"/.[!.]*; do
    name=${entry##*/}
    if [ -d "$entry" ] && [ "$name" != .ssh ]; then mkdir "$home/$name"; mount --rbind "$entry" "$home/$name"; fi
done
umount -l "$held"; rmdir "$held"
ip link set lo up
exec "$@"
"""


@pytest.fixture(scope="module")
def kvikd() -> Iterator[Kvikd]:
    daemon = Kvikd("unshare", "--net", "--mount", "sh", "-c", INSIDE, "sh", str(HOME))
    try:
        yield daemon
        assert "failed unexpectedly" not in daemon.messages(), daemon.messages()
    finally:
        try:
            for domain in daemon.connection.domains(1):
                domain.destroy()
        finally:
            assert daemon.end() == 0
            shutil.rmtree(daemon.root, ignore_errors=True)


class Site:
    """Images, each of which begins with its name, and servers beside the daemon."""

    def __init__(self, kvikd: Kvikd) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="kvsite"))
        self.pid = kvikd.process.pid
        self.within = ["nsenter", "--net", "--mount", "-t", str(self.pid)]
        self.processes: list[subprocess.Popen[bytes]] = []

    def image(self, name: str, size: int = SIZE) -> Path:
        path = self.place / name
        path.write_bytes(f"{name}\n".encode().ljust(size, b"\0"))
        return path

    def run(self, *words: str) -> None:
        subprocess.run([*self.within, *words], check=True, capture_output=True)

    def serve(self, port: int, *words: str) -> subprocess.Popen[bytes]:
        with (self.place / "servers.log").open("ab") as log:
            process = subprocess.Popen([*self.within, *words], stdout=log, stderr=log)
        self.processes.append(process)
        until(lambda: process.poll() is not None or self.listens(port))
        assert process.poll() is None, (words, (self.place / "servers.log").read_text())
        return process

    def listens(self, port: int) -> bool:
        table = Path(f"/proc/{self.pid}/net/tcp").read_text()
        return f":{port:04X} 00000000:0000 0A" in table

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.place)

    def small_filesystem(self) -> Path:
        """1 MiB, with two images that are larger."""
        small = self.place / "small"
        small.mkdir()
        self.run("mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small))
        for name in ("reporting", "stopping"):
            self.run("sh", "-c", f"echo {name} >{small}/{name}; truncate -s 4M {small}/{name}")
        return small

    # the servers

    def nbd(self, image: Path) -> subprocess.Popen[bytes]:
        return self.serve(
            NBD, "qemu-nbd", "-f", "raw", "-t", "-e", "4", "-x", "data", "-b", "127.0.0.1", "-p", str(NBD), str(image)
        )

    def http(self) -> None:
        script = Path(__file__).with_name("range_server.py")
        self.serve(HTTP, sys.executable, str(script), str(HTTP), str(self.place), f"{USER}:{PASSWORD}")

    def ssh(self) -> None:
        key, host = self.place / "id_ed25519", self.place / "host_key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        made = subprocess.run(
            ["dropbearkey", "-t", "ed25519", "-f", str(host)], check=True, capture_output=True, text=True
        )
        public = next(line for line in made.stdout.splitlines() if line.startswith("ssh-"))
        (self.place / "known_hosts").write_text(f"[127.0.0.1]:{SSH} {' '.join(public.split()[:2])}\n")
        self.run("mkdir", "-m", "700", str(HOME / ".ssh"))
        self.run("cp", str(key), str(self.place / "known_hosts"), str(HOME / ".ssh"))
        self.run("cp", f"{key}.pub", str(HOME / ".ssh/authorized_keys"))
        self.serve(SSH, "dropbear", "-F", "-E", "-s", "-r", str(host), "-p", f"127.0.0.1:{SSH}", "-P", "")

    def iscsi(self, image: Path) -> None:
        control = str(os.getpid() % 30000)

        def tgtadm(*words: str) -> None:
            self.run("tgtadm", "-C", control, "--lld", "iscsi", *words)

        self.serve(ISCSI, "tgtd", "-f", "-C", control, "--iscsi", f"portal=127.0.0.1:{ISCSI}")
        target = ("--tid", "1")
        tgtadm("--op", "new", "--mode", "target", *target, "-T", IQN)
        tgtadm("--op", "new", "--mode", "logicalunit", *target, "--lun", "1", "-b", str(image))
        tgtadm("--op", "new", "--mode", "account", "--user", USER, "--password", PASSWORD)
        tgtadm("--op", "bind", "--mode", "account", *target, "--user", USER)
        tgtadm("--op", "bind", "--mode", "target", *target, "-I", "ALL")


@pytest.fixture
def site(kvikd: Kvikd) -> Iterator[Site]:
    site = Site(kvikd)
    try:
        yield site
    finally:
        site.close()


class Guest:
    """The guest's shell, on its serial line."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(str(path))
        self.heard = b""
        self._greet()

    def _greet(self) -> None:
        """What is said before its shell listens is lost, wholly or in part."""
        self.socket.settimeout(1.0)
        for number in range(int(DEADLINE)):
            self.socket.sendall(b"\necho hello-%d\n" % number)
            with contextlib.suppress(TimeoutError):
                while not re.search(rb"hello-%d\r?\n=== 0\r?\n" % number, self.heard):
                    self.heard += self.socket.recv(65536)
                break
        else:
            raise AssertionError(f"the guest's shell does not answer: {self.heard!r}")
        self.socket.settimeout(DEADLINE)
        self.heard = b""

    def begin(self, line: str) -> None:
        self.last = line
        self.socket.sendall(line.encode() + b"\n")

    def end(self) -> str:
        """What the line last begun printed; it must end well."""
        deadline = time.monotonic() + DEADLINE
        while not (found := re.search(rb"=== (\d+)\r?\n", self.heard)):
            assert time.monotonic() < deadline, self.heard
            try:
                self.heard += self.socket.recv(65536)
            except TimeoutError:
                raise AssertionError(f"the guest says nothing after {self.last!r}: {self.heard!r}") from None
        said, self.heard = self.heard[: found.start()].decode(errors="replace"), self.heard[found.end() :]
        assert found[1] == b"0", said
        return said

    def run(self, line: str) -> str:
        self.begin(line)
        return self.end()

    def begins(self, device: str) -> str:
        """The first line of a disk, read past the guest's cache."""
        return self.run(f"echo 3 >/proc/sys/vm/drop_caches; head -c 32 /dev/{device} | head -n 1").strip()


def disk(
    target: str, bus: str, source: str, more: str = "", *, kind: str = "file", device: str = "disk", driver: str = ""
) -> str:
    return (
        f"<disk type='{kind}' device='{device}'><driver name='qemu' type='raw' {driver}/>{source}"
        f"<target dev='{target}' bus='{bus}'{' removable=' + repr('on') if bus == 'usb' else ''}/>{more}</disk>"
    )


def server(protocol: str, name: str, port: int, inner: str = "") -> str:
    return f"<source protocol='{protocol}' name='{name}'><host name='127.0.0.1' port='{port}'/>{inner}</source>"


@pytest.fixture
def machine(kvikd: Kvikd, site: Site) -> Iterator[Any]:
    """Defines one; `start` gives its guest."""
    try:
        kernel = ensure_kernel()
    except LabUnavailable as error:
        pytest.skip(str(error))
    initrd = site.place / "initrd"
    initrd.write_bytes(initramfs(SHELL, MODULES))
    names: list[str] = []

    def define(name: str, devices: str) -> Any:
        names.append(name)
        return kvikd.connection.define(
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>256</memory><iothreads>1</iothreads>"
            f"<os><type arch='x86_64' machine='pc'>hvm</type><kernel>{kernel.image}</kernel><initrd>{initrd}</initrd>"
            "<cmdline>console=ttyS0 quiet panic=-1 tsc=reliable</cmdline></os><features><acpi/><apic/></features>"
            f"<cpu mode='maximum'/><devices>{devices}<serial type='unix'><source mode='bind' path='{site.place}/"
            f"{name}.serial'/></serial><memballoon model='none'/></devices></domain>"
        )

    yield define
    for name in names:
        for verb in ("destroy", "undefine"):
            kvikd.kvik(verb, name)


def test_a_guest_sees_them_all(kvikd: Kvikd, site: Site, machine: Any) -> None:
    def file(name: str) -> str:
        return f"<source file='{site.image(name)}'/>"

    held = secret.define_secret(
        kvikd.connection, "<secret><usage type='iscsi'><target>servers</target></usage></secret>"
    )
    held.set_value(PASSWORD.encode())
    auth = f"<auth username='{USER}'><secret type='iscsi' usage='servers'/></auth>"
    cookies = "<cookies><cookie name='token'>twelve</cookie><cookie name='site'>3</cookie></cookies>"
    site.nbd(site.image("nbd"))
    site.image("http")
    site.http()
    site.ssh()
    site.image("ssh")
    site.iscsi(site.image("iscsi"))
    small = site.small_filesystem()
    drive = "<address type='drive' controller='1' bus='0' target='0' unit='{}'/>"
    net: dict[str, Any] = {"kind": "network"}
    devices = (
        disk("vda", "virtio", file("virtio"), "<serial>SERIAL-1</serial>", driver="iothread='1' queues='2'")
        + disk("vdb", "virtio", file("transient"), "<transient/>")
        + disk("vdc", "virtio", server("nbd", "data", NBD, "<reconnect delay='30'/>"), **net)
        + disk("vdd", "virtio", server("http", "http", HTTP, auth + cookies), "<readonly/>", **net)
        + disk("vde", "virtio", server("ssh", f"{site.place}/ssh", SSH, "<identity username='root'/>"), **net)
        + disk("vdf", "virtio", server("iscsi", f"{IQN}/1", ISCSI, auth), **net)
        + disk("vdg", "virtio", f"<source file='{small}/reporting'/>", driver="error_policy='report'")
        + disk("vdh", "virtio", f"<source file='{small}/stopping'/>", driver="error_policy='stop' rerror_policy='stop'")
        + disk("hda", "ide", file("ide"), "<serial>IDE-2</serial>")
        + disk("hdc", "ide", file("cd-one"), "<readonly/>", device="cdrom")
        + disk("sda", "scsi", file("scsi"), "<serial>SCSI-3</serial><vendor>KVIK</vendor><product>DISK</product>")
        + disk("sdb", "scsi", file("lsi"), drive.format(2))
        + disk("sdc", "sata", file("sata"), "<serial>SATA-4</serial><blockio logical_block_size='512' "
               "physical_block_size='4096'/>")
        + disk("sdd", "usb", file("usb"))
        + disk("nvme0n1", "nvme", file("nvme"), "<serial>NVME-5</serial>")
        + disk("nvme0n2", "nvme", file("second"))
        + disk("fda", "fdc", file("floppy"), device="floppy")
        + "<controller type='scsi' index='0' model='virtio-scsi'/><controller type='scsi' index='1' model='lsilogic'/>"
        "<controller type='usb' index='0' model='qemu-xhci'/>"
    )  # fmt: skip
    domain = machine("all", devices)
    domain.start()
    guest = Guest(site.place / "all.serial")
    until(lambda: "sdd" in guest.run("ls /sys/block") and guest.run("ls /sys/block").count("sd") == 5)
    names = guest.run("ls /sys/block").split()
    found = {guest.begins(name): name for name in names if not name.startswith("loop")}
    wanted = {
        "virtio",
        "transient",
        "nbd",
        "http",
        "ssh",
        "iscsi",
        "ide",
        "cd-one",
        "scsi",
        "lsi",
        "sata",
        "usb",
        "nvme",
    }
    assert wanted | {"second", "floppy"} <= set(found), found
    assert found["virtio"].startswith("vd") and found["nvme"] == "nvme0n1" and found["second"] == "nvme0n2"

    def of(name: str, file: str) -> str:
        return guest.run(f"cat /sys/block/{found[name]}/{file}").strip()

    assert of("virtio", "serial") == "SERIAL-1" and of("nvme", "device/serial") == "NVME-5"
    assert (of("scsi", "device/vendor"), of("scsi", "device/model")) == ("KVIK", "DISK")
    assert (of("usb", "removable"), of("http", "ro"), of("sata", "queue/physical_block_size")) == ("1", "1", "4096")
    assert "sym53c8xx" in guest.run(f"readlink -f /sys/block/{found['lsi']}/device/../../../driver")

    # Another disc in the drive.
    ok(kvikd, "change-media", "all", "hdc", str(site.image("cd-two")), "--update", "--live")
    until(lambda: guest.begins(found["cd-one"]) == "cd-two")

    # What it writes is on the servers; not in the image of a transient disk.
    for name in ("nbd", "ssh", "iscsi", "transient", "nvme", "lsi", "usb", "floppy"):
        guest.run(f"echo written-{name} >/dev/{found[name]}; sync")
        assert guest.begins(found[name]) == f"written-{name}"
        held_by_host = (site.place / name).read_bytes()[:32].split(b"\n")[0].decode()
        assert held_by_host == (name if name == "transient" else f"written-{name}"), name
    # A server that is away for a moment: the guest's request waits.
    site.processes[0].kill()
    site.processes[0].wait()
    guest.begin(f"echo 3 >/proc/sys/vm/drop_caches; head -n 1 /dev/{found['nbd']}")
    site.nbd(site.place / "nbd")
    assert guest.end().strip() == "written-nbd"

    plugged(kvikd, site, guest)

    # What cannot be done with them says why.
    for words, why in (
        (("snapshot-create-as", "all", "s", "--disk-only", "--diskspec", "vdb,snapshot=no"), "of type 'network'"),
        (("snapshot-create-as", "all", "s", "--disk-only", "--diskspec", "vdb,snapshot=external"), "is transient"),
        (("save", "all", str(site.place / "saved")), "has a transient disk, vdb"),
        (("blockcopy", "all", "vdb", "--dest", "/tmp/x"), "transient disk 'vdb' cannot be copied"),
        (
            ("attach-disk", "all", str(site.image("third")), "nvme0n3", "--targetbus", "nvme"),
            "disks on bus nvme cannot be plugged",
        ),
    ):
        done = kvikd.kvik(*words)
        assert done.returncode and re.search(why, done.stderr), (words, done.stderr)
    # The overlay has no name; it is gone with the machine, and another start begins anew.
    assert not list(site.place.glob("*transient?*")) and not list(site.place.glob(".kvik*"))
    fills_up(kvikd, site, domain, guest, found)
    # The guest lets it go: the overlay is nobody's any more.
    held = Path(f"/proc/{qemu_of(domain)}/fd")

    def overlays() -> list[str]:
        names = [os.readlink(fd) for fd in held.iterdir()]
        return [name for name in names if "(deleted)" in name and str(site.place) in name]

    assert overlays()
    ok(kvikd, "detach-disk", "all", "vdb", "--live")
    until(lambda: not overlays())
    assert (site.place / "transient").read_bytes().startswith(b"transient\n")


def guest_begins(guest: Guest, device: str, begins: str) -> bool:
    return guest.begins(device) == begins


def plugged(kvikd: Kvikd, site: Site, guest: Guest) -> None:
    """virsh attaches a disk to each bus that takes one while the guest runs, and detaches it again."""
    nbd = ("--sourcetype", "network", "--source-protocol", "nbd", "--source-host-name", "127.0.0.1")
    cases = (
        ("vdx", "written-nbd", "data", ("--targetbus", "virtio", *nbd)),
        (
            "vdy", "fast", str(site.image("fast")),
            ("--targetbus", "virtio", "--iothread", "1", "--cache", "none", "--io", "native", "--serial", "FAST"),
        ),
        (
            "sdx", "tagged", str(site.image("tagged")),
            ("--targetbus", "scsi", "--address", "scsi:0.0.5", "--wwn", "5000c50015ea71aa", "--mode", "readonly"),
        ),
        ("sdy", "stick", str(site.image("stick")), ("--targetbus", "usb", "--driver", "qemu", "--subdriver", "raw")),
    )  # fmt: skip
    before = set(guest.run("ls /sys/block").split())
    names: dict[str, str] = {}
    for target, begins, source, options in cases:
        done = kvikd.virsh("attach-disk", "all", source, target, *options, "--live")
        assert done.returncode == 0, (target, done.stderr)
        until(lambda: set(guest.run("ls /sys/block").split()) - before - set(names.values()))
        (names[target],) = set(guest.run("ls /sys/block").split()) - before - set(names.values())
        until(partial(guest_begins, guest, names[target], begins))
    assert guest.run(f"cat /sys/block/{names['vdy']}/serial").strip() == "FAST"
    assert "5000c50015ea71aa" in guest.run(f"cat /sys/block/{names['sdx']}/device/wwid")
    assert guest.run(f"cat /sys/block/{names['sdx']}/ro").strip() == "1"
    for target in names:
        done = kvikd.virsh("detach-disk", "all", target, "--live")
        assert done.returncode == 0, (target, done.stderr)
    until(lambda: set(guest.run("ls /sys/block").split()) == before)
    assert not {"sdx", "vdy"} & set(kvikd.virsh("domblklist", "all").stdout.split())


def fills_up(kvikd: Kvikd, site: Site, domain: Any, guest: Guest, found: dict[str, str]) -> None:
    """A full file system: what is reported to the guest, and what stops the machine until there is room."""
    events = kvikd.connection
    for kind in ("io-error", "io-error-reason", "lifecycle"):
        events.register(kind, domain)
    fill = "dd if=/dev/zero of=/dev/{} bs=64k count=32 conv=fsync"
    assert "failed" in guest.run(f"{fill.format(found['reporting'])} || echo failed")
    assert ok(kvikd, "domstate", "all", "--reason").strip() == "running (booted)"
    guest.begin(fill.format(found["stopping"]))
    until(lambda: ok(kvikd, "domstate", "all", "--reason").strip() == "paused (I/O error)")
    assert kvikd.virsh("domstate", "all", "--reason").stdout.strip() == "paused (I/O error)"
    assert kvikd.virsh("domblkerror", "all").stdout.strip() == "vdh: no space"
    heard = {str(event) for event in iter(lambda: events.next_event(0.2), None)}
    for name, alias, action in (("reporting", "virtio-disk6", 2), ("stopping", "virtio-disk7", 1)):
        told = f"srcPath={site.place}/small/{name} devAlias={alias} action={action}"
        assert {told, f"{told} reason=enospc"} <= heard, heard
    assert "Suspended I/O Error" in heard
    site.run("mount", "-o", "remount,size=16m", f"{site.place}/small")
    assert kvikd.virsh("resume", "all").returncode == 0
    assert "32+0 records out" in guest.end()
    assert ok(kvikd, "domstate", "all", "--reason").strip() == "running (unpaused)"
    assert ok(kvikd, "domblkerror", "all").strip() == "No errors found"
