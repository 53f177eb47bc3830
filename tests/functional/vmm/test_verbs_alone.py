"""Verbs of kvik that need a terminal, or something beside them, on a machine that runs on kvik-vmm; and CPU models.

What all the others do is in test_verbs.py.
"""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from verbs_machine import DOMAIN, MARKS, Machine

from kvik.host.process import find_program

pytestmark = MARKS
VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/bin/virtiofsd")


@pytest.fixture
def running(machine: Machine) -> Iterator[Machine]:
    machine.out("create @c")
    yield machine
    machine.out("destroy c")


def test_the_console_is_the_serial_line(running: Machine) -> None:
    ours, theirs = pty.openpty()
    client = subprocess.Popen(running.command("console c"), env=running.environ, stdin=theirs, stdout=theirs)
    os.close(theirs)
    seen = b""

    def sees(wanted: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 30
        while wanted not in seen:
            assert select.select([ours], [], [], end - time.monotonic())[0], seen
            seen += os.read(ours, 4096)

    try:
        sees(b"Escape character")
        os.write(ours, b"echo?")
        sees(b"echo?")
        seen = b""
        running.out("inject-nmi c")
        sees(b"N")
        os.write(ours, b"\x1d")
        assert client.wait(30) == 0
    finally:
        client.kill()
        client.wait()
        os.close(ours)


def test_events_are_told_as_they_happen(running: Machine) -> None:
    listener = subprocess.Popen(
        running.command("event --all --loop --timeout 60"), env=running.environ, stdout=subprocess.PIPE, text=True
    )
    assert listener.stdout is not None
    try:
        # The listener says nothing when it listens: a change now and then, until it has heard of one.
        end = time.monotonic() + 30
        while not select.select([listener.stdout], [], [], 0.3)[0]:
            assert time.monotonic() < end
            running.out("suspend c")
            running.out("resume c")
        assert re.search(r"event '.*' for domain 'c': (Suspended|Resumed)", listener.stdout.readline())
    finally:
        listener.kill()
        listener.wait()
        listener.stdout.close()


def test_a_shared_directory_and_passt_bring_their_processes_and_take_them_along(running: Machine) -> None:
    def beside(name: str) -> bool:
        return any(name in argv for argv in processes(running.root))

    if find_program("passt"):
        running.out("attach-device c @user --live")
        assert beside("passt")
        running.out("detach-device c @user --live")
        assert not beside("passt")
    if any(Path(place).exists() for place in VIRTIOFSD):
        running.out("attach-device c @filesystem --live")
        assert beside("virtiofsd")
        running.out("detach-device c @filesystem --live")
        assert not beside("virtiofsd")


def test_a_later_daemon_lets_go_what_an_earlier_one_plugged(running: Machine) -> None:
    running.out("attach-device c @rng --live")
    running.out("attach-device c @memory --live")
    if virtiofsd := any(Path(place).exists() for place in VIRTIOFSD):
        running.out("attach-device c @filesystem --live")
    running.daemon.end(signal.SIGKILL)
    running.daemon.start()
    document = running.out("dumpxml c")
    assert "<rng " in document and "<memory model='virtio-mem'" in document
    running.out("update-device c @memory-none --live")
    for name in ("rng", "memory", *(["filesystem"] if virtiofsd else [])):
        running.out(f"detach-device c @{name} --live")
    document = running.out("dumpxml c")
    assert "<rng " not in document and "<filesystem" not in document and "virtio-mem" not in document
    assert not any("virtiofsd" in argv for argv in processes(running.root))
    running.out("update-device c @balloon --live")


def processes(root: Path) -> list[str]:
    """Command lines of the machine's side processes, by the log that they write to."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and str((entry / "fd/2").readlink()).startswith(f"{root}/"):
                found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found


@pytest.mark.skipif(Path("/dev/vhost-vsock").exists(), reason="this host has vhost_vsock")
def test_a_vsock_where_the_host_has_none_is_refused_with_the_module_that_is_missing(running: Machine) -> None:
    done = running("attach-device c @vsock --live")
    assert done.returncode == 1 and "hint: modprobe vhost_vsock" in done.stderr


def test_run_boots_a_kernel_on_kvik_vmm(machine: Machine) -> None:
    try:
        done = machine(f"run --vmm kvik --kernel {machine.root}/kernel --network none --name r --detach --timeout 1")
        assert "r" in machine.out("list --name").split(), (done.stdout, done.stderr)
        assert "<emulator>kvik-vmm</emulator>" in machine.out("dumpxml r")
    finally:
        machine("destroy r")
        machine("undefine r")


MODELS = {
    "custom": ("<cpu mode='custom'><model>{0}</model></cpu>", "--cpu {0}"),
    "host-model": ("<cpu mode='host-model'/>", "--cpu {0}"),
    "host-passthrough": (
        "<cpu mode='host-passthrough'><feature policy='disable' name='aes'/></cpu>",
        "--cpu host,-aes",
    ),
}


@pytest.mark.parametrize("mode", MODELS)
def test_cpu_models_of_a_document_are_those_that_the_host_can_be(machine: Machine, mode: str) -> None:
    listed = machine.out("cpu-models x86_64 --emulatorbin kvik-vmm").split()
    told = machine.out("domcapabilities --emulatorbin kvik-vmm")
    nearest = re.search(r"<mode name='host-model' supported='yes'>\s*<model fallback='forbid'>(.*?)<", told)
    assert nearest is not None and nearest[1] in listed
    cpu, words = MODELS[mode]
    document = DOMAIN.format(name="cpu", root=machine.root, devices="")
    document = re.sub("<cpu .*</cpu>", cpu.format(nearest[1]), document).replace(
        "<maxMemory slots='4' unit='MiB'>2048</maxMemory>", ""
    )
    machine.write("cpu", document)
    machine.out("create @cpu")
    try:
        (log,) = machine.root.rglob("qemu/cpu.log")
        assert words.format(nearest[1]) in log.read_text()
        assert (nearest[1] in machine.out("dumpxml cpu")) is (mode != "host-passthrough")
    finally:
        machine.out("destroy cpu")
        log.unlink()


def test_a_cpu_model_that_is_not_there_is_refused_with_those_that_are(machine: Machine) -> None:
    document = DOMAIN.format(name="cpu", root=machine.root, devices="")
    machine.write("cpu", document.replace("mode='host-passthrough'>", "mode='custom'><model>core2duo</model>"))
    done = machine("define @cpu")
    assert done.returncode == 1 and "at /domain/cpu/model: kvik-vmm has no CPU model 'core2duo'" in done.stderr
    assert "x86-64-v1" in done.stderr
