"""Guests for the benchmarks of networks: the tiny image with a load program in it, as a machine of kvik's daemon and as
the same QEMU started by hand, with its card on a bridge made by hand."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "src")]

import peer  # noqa: E402

from functional.network.guests import Guest  # noqa: E402 - found by the line above
from kvik.cli import run_document  # noqa: E402
from kvik.guest.tiny import TinyImage, kernel_arguments, tiny  # noqa: E402
from kvik.image.cpio import CpioWriter  # noqa: E402
from kvik.image.kernel import uncompressed_kernel  # noqa: E402
from kvik.paths import Paths  # noqa: E402

GATEWAY = "192.168.122.1"
NETWORK = """<network>
  <name>bench</name>
  <forward mode='nat'/>
  <bridge name='virbr0' {bridge}/>
  <ip address='192.168.122.1' netmask='255.255.255.0'>
    <dhcp><range start='192.168.122.2' end='192.168.122.254'/></dhcp>
  </ip>
</network>"""


def load_program() -> Path:
    """`vmm_net_guest.c`, built: a static program that any guest and the host can run."""
    out = Path(tempfile.mkdtemp(prefix="kv-bench-")) / "load"
    subprocess.run(["gcc", "-O2", "-static", "-o", out, HERE / "vmm_net_guest.c"], check=True)
    return out


class Image:
    """The tiny image, with /load in it."""

    def __init__(self, directory: Path, load: Path) -> None:
        tiny_image: TinyImage = tiny(Paths.default())
        kernel = uncompressed_kernel(tiny_image.kernel, directory / "kernels")
        assert kernel is not None
        self.kernel = kernel
        self.initrd = directory / "initrd"
        with self.initrd.open("wb") as stream:  # archives follow each other (initramfs-buffer-format.rst)
            stream.write(tiny_image.initrd.read_bytes())
            stream.write(bytes(-stream.tell() % 4))
            with CpioWriter(stream) as archive:
                archive.file("load", load.read_bytes(), 0o755)

    def document(self, name: str, interface: str, memory_mib: int = 192) -> str:
        """As `kvik run` writes it."""
        machine = run_document.Machine(name, accelerated=False)
        machine.kernel, machine.initrd = str(self.kernel), str(self.initrd)
        machine.append = kernel_arguments("tcg", hostname=name)
        machine.memory_kib = memory_mib << 10
        machine.network = interface
        return run_document.domain_xml(machine)


@contextlib.contextmanager
def network(daemon: peer.Daemon, bridge: str = "stp='off' delay='0'") -> Iterator[list[str]]:
    """The network `bench`, active in a daemon's own namespace; what runs a command there."""
    if "default" in daemon.run("net-list", "--name").split():  # would hold the subnet
        daemon.run("net-destroy", "default")
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(NETWORK.format(bridge=bridge))
        file.flush()
        daemon.run("net-define", file.name)
    daemon.run("net-start", "bench")
    try:
        yield ["nsenter", f"--net=/proc/{daemon.pid}/ns/net"]
    finally:
        daemon.run("net-destroy", "bench", check=False)


class KvikMachine:
    """Started with this document; `qemu` is the process."""

    def __init__(self, daemon: peer.Daemon, name: str, document: str) -> None:
        self.daemon, self.name = daemon, name
        with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
            file.write(document)
            file.flush()
            daemon.run("create", file.name)
        self.qemu = qemu_of(name)

    def sh(self, script: str) -> str:
        return self.daemon.run("exec", self.name, "--", "sh", "-c", f"exec 2>&1; {script}", check=False)

    def close(self) -> None:
        self.daemon.run("destroy", self.name, check=False)


def qemu_of(name: str) -> int:
    """The pid of a machine's QEMU."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                if f"guest={name},debug-threads=on".encode() in words and b"qemu-system" in words[0]:
                    return int(path.name)
    raise RuntimeError(f"machine {name} has no QEMU")


def by_hand(pid: int, image: Image, directory: Path, tap: str) -> list[str]:
    """The command line of kvik's QEMU with what is kvik's taken out: its sandbox, its monitor, its descriptors."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    made, rest = [words[0]], iter(words[1:])
    for option in rest:
        if option in ("-S", "-no-user-config", "-nodefaults"):
            made += [option] if option != "-S" else []
            continue
        value = next(rest)
        if option in ("-sandbox", "-add-fd", "-mon", "-msg", "-name") or "charmonitor" in value:
            continue
        if option == "-kernel":
            value = str(image.kernel)
        elif option == "-initrd":
            value = str(image.initrd)
        elif "charchannel0" in value and option == "-chardev":
            value = f"socket,id=charchannel0,path={directory}/{tap}.agent,server=on,wait=off"
        elif "charserial0" in value and option == "-chardev":
            value = "null,id=charserial0"
        elif option == "-netdev":
            value = f"tap,id=hostnet0,ifname={tap},script=no,downscript=no"
        elif option == "-device" and '"virtio-net-pci"' in value:
            device = json.loads(value)
            device["mac"] = f"52:54:00:be:00:{int(tap.removeprefix('tap')):02x}"
            value = json.dumps(device)
        made += [option, value]
    return made


class HandMade:
    """A QEMU that nobody manages, with its tap on bridge br0 of the namespace that `inside` enters."""

    def __init__(self, inside: list[str], argv: list[str], directory: Path, tap: str) -> None:
        for command in (f"ip tuntap add {tap} mode tap vnet_hdr", f"ip link set {tap} master br0 up"):
            subprocess.run([*inside, *command.split()], check=True)
        with (directory / f"{tap}.log").open("wb") as log:
            # A session of its own, as whatever manages machines gives it: the scheduler shares the CPUs among sessions
            # (sched_autogroup, sched(7)), and one for two guests and their load would compare that.
            self.process = subprocess.Popen(
                [*inside, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.guest = Guest(directory, tap)

    def sh(self, script: str) -> str:
        return self.guest.shell(script)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def space(*commands: str) -> Iterator[list[str]]:
    """A network namespace with a loopback, and what `commands` make in it; what runs a command there."""
    held = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo && exec sleep 86400"], stdout=subprocess.PIPE
    )
    assert held.stdout is not None
    held.stdout.readline()
    inside = ["nsenter", f"--net=/proc/{held.pid}/ns/net"]
    try:
        for command in commands:
            subprocess.run([*inside, *command.split()], check=True)
        yield inside
    finally:
        held.kill()
        held.wait()


@contextlib.contextmanager
def serving(inside: list[str], load: Path) -> Iterator[None]:
    """The load's other end, on the host's side."""
    process = subprocess.Popen([*inside, str(load), "serve"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def until(machine: KvikMachine | HandMade, script: str, wanted: str, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while wanted not in (text := machine.sh(script)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{script}: {text}")
        time.sleep(0.2)
    return text


def need_root() -> None:
    if os.geteuid() != 0:
        sys.exit("needs root: bridges and taps")
