"""The debugger's port with the real gdb, on a guest of three instructions."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest import CODE, DATA, machine, run_until
from restored import booted_only, either_way

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.gdb_server import GdbServer
from kvik.vmm.machine import Machine

GDB = shutil.which("gdb")
# KVM-PVM emulates instructions: it gives up at an int3 and sees no watchpoint.
true_kvm = pytest.mark.skipif(Path("/sys/module/kvm_pvm").exists(), reason="this host's KVM is KVM-PVM: no int3 exits")
pytestmark = either_way
needs_gdb = pytest.mark.skipif(GDB is None, reason="gdb is not installed: apt-get install gdb")


@pytest.fixture
def debugged(tmp_path: Path) -> Iterator[Machine]:
    made = machine()
    with made:
        GdbServer(made, f"unix:{tmp_path}/gdb")
        made.start()
        yield made


def gdb(made: Machine, path: Path, *commands: str) -> str:
    """What gdb prints; the machine's loop runs meanwhile."""
    words = [word for command in (f"target remote {path}/gdb", *commands) for word in ("-ex", command)]
    child = subprocess.Popen(
        [str(GDB), "-nx", "-batch", "-ex", "set confirm off", "-ex", "set architecture i386:x86-64", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"HOME": str(path), "PATH": "/usr/bin:/bin", "LC_ALL": "C"},
    )
    try:
        run_until(made, lambda: child.poll() is not None)
    finally:
        child.kill()
    assert child.stdout is not None
    text = child.stdout.read()
    child.stdout.close()
    print(text)
    return text


@needs_gdb
def test_registers_memory_and_going_on(debugged: Machine, tmp_path: Path) -> None:
    text = gdb(
        debugged,
        tmp_path,
        "info registers rbx cs cr3 efer",
        f"x/3i {CODE:#x}",
        f"set *(long*){DATA + 0x800:#x} = 0x1122334455667788",
        f"x/xg {DATA + 0x800:#x}",
        "set $r15 = 0x123456789abcdef0",
        "set $xmm3 = 0x77",
        "p/x $r15",
        "p/x $xmm3",
        "p/x $mxcsr",
        "info threads",
        "x/b 0x40000000",
        "detach",
    )
    assert re.search(r"rbx +0x200000", text) and re.search(r"cr3 +0x9000", text) and re.search(r"efer +0x500", text)
    assert re.search(r"inc +%rax", text) and re.search(r"mov +%rax,\(%rbx\)", text)
    assert "0x1122334455667788" in text and "= 0x123456789abcdef0" in text and "= 0x77" in text
    assert "0x1f80" in text  # MXCSR as the processor has it at reset
    assert "vCPU 0, thread" in text
    assert "Cannot access memory at address 0x40000000" in text  # the tables map it; no RAM is there
    assert debugged.status == "running"
    assert debugged.memory.u64(DATA + 0x800) == 0x1122334455667788
    before = debugged.memory.u64(DATA)
    run_until(debugged, lambda: debugged.memory.u64(DATA) != before)


@needs_gdb
@pytest.mark.parametrize("kind", [pytest.param("break", marks=true_kvm), "hbreak"])
def test_breakpoints(debugged: Machine, tmp_path: Path, kind: str) -> None:
    place = CODE + 3
    text = gdb(
        debugged, tmp_path, f"{kind} *{place:#x}", "continue", "p/x $rip", f"x/xb {place:#x}", "continue", "p $rax",
        "continue",
        "p $rax", "delete", "detach",
    )  # fmt: skip
    assert f"= {place:#x}" in text
    assert f"{place:#x}:\t0x48" in text  # gdb is shown the program, not the int3
    first, second = (int(value) for value in re.findall(r"\$[23] = (\d+)", text))
    assert second == first + 1  # once a round
    assert debugged.memory.read(place, 1) == b"\x48"
    assert debugged.status == "running"


@needs_gdb
def test_single_steps(debugged: Machine, tmp_path: Path) -> None:
    text = gdb(
        debugged, tmp_path, f"hbreak *{CODE:#x}", "continue", "stepi", "stepi", "stepi", "p/x $rip", "stepi", "p/x $rip"
    )
    assert re.findall(r"\$\d = (0x[0-9a-f]+)", text) == [f"{CODE:#x}", f"{CODE + 3:#x}"]


@needs_gdb
@true_kvm
def test_a_watchpoint_on_memory(debugged: Machine, tmp_path: Path) -> None:
    text = gdb(debugged, tmp_path, f"watch *(long*){DATA:#x}", "continue", "p/x $rip", "delete", "detach")
    assert "Hardware watchpoint 1" in text and "Old value" in text and "New value" in text
    assert f"= {CODE + 6:#x}" in text  # behind the store
    assert debugged.status == "running"


@needs_gdb
def test_every_vcpu_is_a_thread_and_memory_is_also_physical(tmp_path: Path) -> None:
    made = machine(vcpus=2)
    with made:
        GdbServer(made, f"unix:{tmp_path}/gdb")
        made.start()
        text = gdb(
            made, tmp_path, "info threads", "thread 2", "p/x $rbx", "maintenance packet Qqemu.PhyMemMode:1",
            f"x/2xb {CODE:#x}", "monitor info exits", "detach",
        )  # fmt: skip
    assert "vCPU 0" in text and "vCPU 1" in text
    assert f"= {DATA + 0x1000:#x}" in text
    assert re.search(r"0x100000:\s+0x48\s+0xff", text)
    assert "vCPU 1:" in text


@needs_gdb
@pytest.mark.parametrize("kind", [pytest.param("break", marks=true_kvm), "hbreak"])
def test_what_gdb_left_behind_is_undone_when_it_dies(debugged: Machine, tmp_path: Path, kind: str) -> None:
    gdb(debugged, tmp_path, f"{kind} *{CODE + 3:#x}", "continue", "shell kill -9 $PPID")
    run_until(debugged, lambda: debugged.status == "running")
    assert debugged.memory.read(CODE, 8) == bytes.fromhex("48ffc0488903ebf8")
    before = debugged.memory.u64(DATA)
    run_until(debugged, lambda: debugged.memory.u64(DATA) != before)


def packet(body: bytes) -> bytes:
    return b"$" + body + b"#%02x" % (sum(body) & 0xFF)


@pytest.mark.parametrize(
    "junk",
    [b"$#", b"$" + b"a" * 100_000, b"\x00\xff" * 1000, packet(b"m-1,5"), packet(b"mffffffffffffffff,ffffffffffffffff"),
     packet(b"G00"), packet(b"P999=00"), packet(b"pffff"), packet(b"Z9,1,1"), packet(b"Z2,3,8"), packet(b"vCont;x:9"),
     packet(b"X0,5:\x7d"), packet(b"qXfer:features:read:target.xml:zz"), packet(b"Hg77"), packet(b"qRcmd,zz")],
)  # fmt: skip
def test_no_packet_harms_the_machine(debugged: Machine, tmp_path: Path, junk: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/gdb")
        client.setblocking(False)
        try:
            client.send(junk)
        except BlockingIOError:
            pass
        for _ in range(10):
            debugged.loop.run_once(0.005)
    run_until(debugged, lambda: debugged.status == "running")
    before = debugged.memory.u64(DATA)
    run_until(debugged, lambda: debugged.memory.u64(DATA) != before)


@booted_only
@pytest.mark.parametrize("place", ["", "1234", "tcp:1234", "tcp:localhost:x", "unix:"])
def test_places_that_are_none(place: str) -> None:
    with machine() as made, pytest.raises(InvalidArgument):
        GdbServer(made, place)


@booted_only
def test_a_place_that_cannot_be_had(tmp_path: Path) -> None:
    with machine() as made, pytest.raises(HostError):
        GdbServer(made, f"unix:{tmp_path}/none/gdb")
