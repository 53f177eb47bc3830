"""Control of a Debian guest on kvik-vmm: stop and go, reset, buttons, interrupts, dumps, figures, balloon, debugger."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from lab.harness import Lab
from lab.kernel import ensure_kernel
from lab.vmm_guest import BEGIN, vmm
from lab.vmm_live import SHARE, Live

pytestmark = pytest.mark.lab(deadline=300)
MIB = 1 << 20


@pytest.fixture(scope="module")
def generic() -> Path:
    return ensure_kernel().image


CONTROL = """
(for n in $(seq 3000); do echo "tick <$n> nmi <$(grep NMI /proc/interrupts | tr -s ' ' | cut -d' ' -f3)>\
 total <$(grep MemTotal /proc/meminfo | tr -dc 0-9)>"; sleep 0.3; done) &
head -c 24 /dev/input/event0 > /tmp/event
echo pressed
"""


def ticks(live: Live) -> int:
    return len(re.findall("tick <", live.console))


def test_a_guest_is_stopped_interrupted_measured_shrunk_reset_and_powered_off(lab: Lab, generic: Path) -> None:
    modules = ("virtio_pci", "virtio_balloon", "button", "evdev")
    with Live(
        lab, generic, CONTROL, "--balloon=id=balloon0,deflate-on-oom=off", "--cpus", "2", modules=modules
    ) as live:
        total = int(live.until(r"tick <2> nmi <0> total <(\d+)>")[1])
        _, events = live.qmp({"execute": "stop"}, event="STOP")
        assert (
            live.do("query-status") == {"status": "paused", "running": False, "singlestep": False}
            or not live.do("query-status")["running"]
        )
        time.sleep(0.5)  # what was on its way to the file
        before = live.console
        time.sleep(1.5)
        assert live.console == before
        live.qmp({"execute": "cont"}, event="RESUME")
        live.until(rf"tick <{ticks(live) + 2}>")
        live.do("inject-nmi")
        live.until(r"nmi <[1-9]")
        figures = live.do("query-stats", target="vcpu")
        assert [item["qom-path"] for item in figures] == [f"/machine/unattached/device[{n}]" for n in (0, 1)]
        counted = {item["name"]: item["value"] for item in figures[0]["stats"]}
        assert counted["io"] > 100 and counted["exits"] >= counted["io"]
        live.qmp({"execute": "balloon", "arguments": {"value": 384 * MIB}}, event="BALLOON_CHANGE")
        for _ in range(100):
            if live.do("query-balloon")["actual"] == 384 * MIB:
                break
            time.sleep(0.2)
        assert live.do("query-balloon")["actual"] == 384 * MIB
        live.until(rf"total <{total - 128 * 1024}>")
        _, events = live.qmp({"execute": "system_reset"}, event="RESET")
        assert events[-1]["data"] == {"guest": False, "reason": "host-qmp-system-reset"}
        live.until(rf"{BEGIN}.*{BEGIN}.*tick <2> nmi <0>")  # from the first line again, and no NMI is left over
        _, events = live.qmp({"execute": "system_powerdown"}, event="SHUTDOWN")
        assert events[-1]["data"] == {"guest": True, "reason": "guest-shutdown"}
        assert "pressed" in live.console


def test_a_dump_is_read_by_readelf_and_gdb(lab: Lab, generic: Path, tmp_path: Path) -> None:
    token = "a-token-that-only-this-guest-has"
    script = f"kept='{token}'; echo \"ready $kept\"; sleep 600"
    with Live(lab, generic, script, "--cpus", "2", memory="256M") as live:
        live.until(f"ready {token}")
        _, events = live.qmp(
            {"execute": "getfd", "arguments": {"fdname": "core"}, "fd": f"{SHARE}/core"},
            {"execute": "dump-guest-memory", "arguments": {"paging": False, "protocol": "fd:core"}},
            event="DUMP_COMPLETED",
            seconds=60,
        )
        assert events[-1]["data"]["result"]["status"] == "completed", events
        assert live.do("query-status")["running"]
    core = lab.share / "core"
    text = subprocess.run(["readelf", "-W", "-h", "-l", "-n", core], capture_output=True, text=True, check=True).stdout
    assert "CORE (Core file)" in text and "Advanced Micro Devices X86-64" in text
    assert len(re.findall(r"NT_PRSTATUS", text)) == 2
    loads = re.findall(r"LOAD +0x\w+ 0x\w+ 0x(\w+) 0x(\w+)", text)
    assert sum(int(size, 16) for _, size in loads) >= 255 * MIB and int(loads[0][0], 16) == 0
    assert token.encode() in core.read_bytes()
    if shutil.which("gdb"):
        commands = (f"core-file {core}", "info threads", "p/x $rip", "p/x $cs")
        words = [word for command in commands for word in ("-ex", command)]
        environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        said = subprocess.run(
            ["gdb", "-nx", "-batch", *words], capture_output=True, text=True, check=False, env=environment
        ).stdout
        assert len(re.findall(r"(?m)^[* ] \d+ +(LWP|process|Thread)", said)) == 2, said
        assert re.search(r"= 0xffffffff[89a-f]", said) and "= 0x10" in said  # Linux idles in its own text
    core.unlink()


@pytest.fixture(scope="module")
def symbols(labs: object, generic: Path) -> dict[str, int]:
    """Where the kernel's functions are: PVH moves nothing."""
    lab = labs.get()
    script = "grep -wE 'start_kernel|kernel_init|rest_init|system_state|linux_banner' /proc/kallsyms"
    said = vmm(lab, generic, script, "--memory", "256M").check().stdout
    return {name: int(place, 16) for place, name in re.findall(r"([0-9a-f]{16}) \w (\w+)", said)}


def gdb(lab: Lab, *commands: str, seconds: int = 40) -> str:
    """In the lab; what it printed, also when its time was over."""
    words = [word for command in ("target remote /tmp/gdb.sock", *commands) for word in ("-ex", command)]
    done = lab.run(
        ["timeout", "-s", "KILL", str(seconds), "gdb", "-nx", "-batch", "-ex", "set architecture i386:x86-64", *words],
        timeout=seconds + 30,
    )
    return done.stdout + done.stderr


needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed: apt-get install gdb")


@needs_gdb
def test_a_debugger_sees_a_kernel_from_its_first_step(lab: Lab, generic: Path, symbols: dict[str, int]) -> None:
    """The entry in 32-bit mode, steps there, and later the running kernel's registers and text by virtual address."""
    with Live(lab, generic, "echo up; sleep 600", "--paused", "--gdb", "unix:/tmp/gdb.sock", "--cpus", "2") as live:
        live.qmp({"execute": "query-status"})
        said = gdb(lab, "p/x $cr0", "p/x $pc", "stepi", "p/x $pc", "stepi", "p/x $pc", "detach")
        places = re.findall(r"= (0x[0-9a-f]+)", said)
        assert places[0] == "0x11", said  # protected, paging off
        assert len(set(places[1:])) == 3, said
        live.until("up")
        said = gdb(lab, f"x/s {symbols['linux_banner']:#x}", "info threads", "p/x $cr3", "p/x $cs", "detach")
        assert "Linux version" in said and "vCPU 1" in said, said
        assert live.do("query-status")["running"]


@needs_gdb
def test_breakpoints_in_a_kernel(lab: Lab, generic: Path, symbols: dict[str, int]) -> None:
    """Hardware at start_kernel, software at kernel_init, a watchpoint on system_state.

    QEMU's emulation of SVM lacks what they need: VMRUN does not arm the breakpoints of the DR7 that it loads
    (svm_helper.c), and an int3 is looked for among the intercepts of INT n instead of exception 3 (excp_helper.c).
    """
    with Live(lab, generic, "echo up; sleep 600", "--paused", "--gdb", "unix:/tmp/gdb.sock") as live:
        live.qmp({"execute": "query-status"})
        said = gdb(
            lab, f"hbreak *{symbols['start_kernel']:#x}", "continue", "p/x $pc", f"break *{symbols['kernel_init']:#x}",
            "continue", "p/x $pc", f"watch *(int*){symbols['system_state']:#x}", "delete 1 2", "continue", "p/x $pc",
            "delete", "detach", seconds=12,
        )  # fmt: skip
        hits = [int(place, 16) for place in re.findall(r"\$\d+ = (0x[0-9a-f]+)", said)]
        if not hits:
            live.until("up")  # it ran past the place, and runs
            pytest.skip(
                "hbreak did not stop the guest: the lab's emulation of SVM does not arm the DR7 that VMRUN loads"
            )
        assert hits[:2] == [symbols["start_kernel"], symbols["kernel_init"]] and "New value" in said, said
        live.until("up")
