"""`kvik run` as a user meets it, with real QEMU machines."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator

import pytest

from real import Root, Terminal

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the machines are of a system scope"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt: the image is made from Debian packages"),
]


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    root = Root()
    yield root
    root.end()


@pytest.fixture(scope="module")
def machine(root: Root) -> str:
    """One that stays for the whole module."""
    done = root("run", "--name", "stays")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"stays is ready after [0-9.]+ s \((kvm|emulation), address 10\.0\.2\.15\)\n", done.stdout)
    assert done.stderr.count("Acceleration: ") == 1
    assert [line.split(" after")[0] for line in done.stderr.splitlines()[1:] if line.startswith("stays:")][-2:] == [
        "stays: agent",
        "stays: address",
    ]
    return "stays"


def test_a_machine_goes_on_when_its_command_ended(root: Root, machine: str) -> None:
    (row,) = [row for row in json.loads(root.out("ps", "--json")) if row["name"] == machine]
    assert row["ready"]
    assert row["persistent"]
    assert row["uptime"] > 0


def test_a_name_that_is_taken_is_refused_and_its_machine_left_alone(root: Root, machine: str) -> None:
    for words in (["--name", machine], ["--rm", "--name", machine, "--", "true"]):
        done = root("run", *words)
        assert done.returncode == (125 if "--" in words else 1)
        assert f"there is a machine '{machine}' already" in done.stderr
        assert "--name" in done.stderr
    assert "Persistent:     yes" in root.out("dominfo", machine)
    assert "running" in root.out("domstate", machine)


def test_a_command_gives_its_streams_and_its_code_and_the_machine_is_gone(root: Root) -> None:
    done = root("run", "--rm", "--name", "cmd", "--", "sh", "-c", "echo to out; echo to err >&2; exit 7")
    assert done.returncode == 7
    assert done.stdout == "to out\n"
    assert done.stderr.endswith("to err\n")
    assert "cmd" not in root.names()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["sh", "-c", "kill -9 $$"], 137, ""),
        (["nosuchcommand"], 127, "'nosuchcommand' cannot be run in the guest: No such file or directory"),
        (["/etc/passwd"], 126, "cannot be run in the guest: Permission denied"),
        (["true"], 0, ""),
    ],
)
def test_exit_codes_of_a_command(root: Root, machine: str, words: list[str], code: int, message: str) -> None:
    done = root("exec", machine, "--", *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr


def test_a_command_that_takes_too_long_is_124(root: Root, machine: str) -> None:
    done = root("exec", machine, "--timeout", "0.5", "--", "sleep", "60")
    assert done.returncode == 124
    assert "did not end within 0.5 s" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_and_removes_the_machine(root: Root, number: int, code: int) -> None:
    process = root.start("run", "--rm", "--name", "sig", "--", "sleep", "300")
    assert process.stderr is not None
    while "address after" not in (line := process.stderr.readline()):
        assert line, "the machine did not come up"
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(20) == code
    deadline = time.monotonic() + 10
    while "sig" in root.names():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    "words",
    [
        ["--machine", "pc", "--cpu", "max", "--network", "none"],
        ["--machine", "microvm", "--vcpus", "2", "--memory", "128M"],
        ["--machine", "q35", "--vcpus", "2", "--cpu", "qemu64", "--memory", "128"],
    ],
)
def test_machine_types_and_sizes(root: Root, words: list[str]) -> None:
    done = root("run", "--rm", *words, "--", "sh", "-c", "nproc; ls /sys/class/net; grep MemTotal /proc/meminfo")
    assert done.returncode == 0, done.stderr
    cpus, *interfaces = done.stdout.split("MemTotal")[0].split()
    assert int(cpus) == (2 if "--vcpus" in words else 1)
    assert ("eth0" in interfaces) == ("none" not in words)
    assert (int(done.stdout.split()[-2]) < 140_000) == ("--memory" in words)


def test_ones_own_kernel_initramfs_and_arguments(root: Root) -> None:
    own = ["--kernel", str(root.tiny / "vmlinuz"), "--initrd", str(root.tiny / "initramfs")]
    done = root("run", "--rm", *own, "--append", "console=ttyS0 quiet mine=1", "--", "cat", "/proc/cmdline")
    assert done.returncode == 0, done.stderr
    assert "mine=1" in done.stdout


def test_a_disk_is_there_when_the_command_comes(root: Root) -> None:
    disk = root.path / "data.raw"
    disk.write_bytes(b"first" + bytes((4 << 20) - 5))
    for _ in range(3):
        done = root("run", "--rm", "--image", "tiny", "--disk", str(disk), "--", "head", "-c", "5", "/dev/vda")
        assert (done.returncode, done.stdout) == (0, "first"), done.stderr


def test_a_boot_that_breaks_says_where_and_why_at_once(root: Root) -> None:
    began = time.monotonic()
    done = root("run", "--rm", "--name", "broken", "--append", "rdinit=/nonexistent")
    assert done.returncode == 1
    assert "'broken' does not boot: the guest's kernel panicked" in done.stderr
    assert "Unable to mount root fs" in done.stderr
    assert time.monotonic() - began < 60
    assert "broken" not in root.names()


def test_on_a_terminal_the_console_is_attached_and_the_machine_outlives_it(root: Root) -> None:
    terminal = Terminal(root.command("run", "--name", "seen"), root.environ, columns=60)
    terminal.expect("Acceleration: ")
    terminal.expect("seen is ready after")
    terminal.expect(r"Escape character is \^\]")
    terminal.expect("seen:~# ")  # the prompt that was printed before anybody was attached
    terminal.type("uname -r\r")
    terminal.expect(r"uname -r\s+6\.\d+")
    terminal.type("\x1d")
    assert terminal.wait(20) == 0
    assert "'seen' goes on" in terminal.shown
    assert "running" in root.out("domstate", "seen")
    # What was drawn in place was erased; what stays fits the terminal.
    lines = [re.sub(r".*\r(?!$)|\x1b\[[0-9;]*[a-zA-Z]", "", line) for line in terminal.shown.split("\n")]
    assert max(len(line.rstrip("\r")) for line in lines[: lines.index(next(x for x in lines if "is ready" in x))]) <= 60


def test_ctrl_c_while_it_boots(root: Root) -> None:
    terminal = Terminal(root.command("run", "--rm", "--name", "stopped"), root.environ)
    terminal.expect("guest running")
    terminal.type("\x03")
    assert terminal.wait(20) == 130
    assert "stopped was removed" in terminal.shown
    assert "stopped" not in root.names()
