"""Debian's kernels on kvik-vmm, on a true KVM: the ways in, processors, memory, NUMA, SMBIOS, ACPI events, resets."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path

import pytest

from kvik.errors import HostError, NotFound
from kvik.guest.tiny import TinyImage, tiny
from kvik.paths import Paths
from lab.harness import SHARE, Lab
from lab.kernel import cache_directory, ensure_kernel
from lab.vmm_guest import BEGIN, END, initramfs, vmm, vmm_command

pytestmark = pytest.mark.lab(deadline=240)
SETUP = "console=ttyS0 quiet panic=-1 pci=noearly"  # noearly: see vmm_guest


@pytest.fixture(scope="module")
def generic() -> Path:
    """Debian's generic kernel, uncompressed."""
    return ensure_kernel().image


@pytest.fixture(scope="module")
def cloud() -> str:
    """Debian's cloud kernel as it is packaged: a bzImage. The path is the one in the lab."""
    try:
        image: TinyImage = tiny(Paths.system(cache_directory() / "root"))
    except (HostError, NotFound) as error:
        pytest.skip(f"no cloud kernel: {error}")
    return f"/run/lower{image.kernel}"


def between(text: str) -> str:
    """What the script printed."""
    assert BEGIN in text and END in text, text[-4000:]
    return text.partition(BEGIN)[2].partition(END)[0].replace("\r", "")


@pytest.mark.parametrize("restored", [False, True], ids=["booted", "restored"])
def test_an_elf_kernel_enters_by_pvh_and_powers_off_through_acpi(lab: Lab, generic: Path, restored: bool) -> None:
    script = """
    echo cpus $(nproc)
    echo serial $(cat /sys/class/dmi/id/product_serial) uuid $(cat /sys/class/dmi/id/product_uuid)
    echo clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
    dmesg | grep -E 'ACPI: (Interpreter|PM|MCFG)|x2apic|MMCONFIG|ACPI (BIOS )?(Error|Warning)|firmware bug'
    grep Ged /proc/interrupts
    """
    identity = "6f8e2a4c-9d0b-4f57-8c9a-0d1f5e3b7a21"
    options = ("--memory", "512M", "--cpus", "2", "--smbios", "serial=ds=nocloud", "--uuid", identity)
    done = vmm(lab, generic, script, *options, restored=restored).check()
    said = between(done.stdout)
    assert "cpus 2\n" in said and f"serial ds=nocloud uuid {identity}" in said and "clock kvm-clock" in said
    assert "x2apic enabled" in said and "(supports S0 S5)" in said and "ACPI:Ged" in said
    assert "reserved" in said.partition("MMCONFIG")[2]
    assert not re.search(r"Error|Warning|firmware bug", said, re.IGNORECASE), said
    assert "Power down" in done.stdout


def test_a_bzimage_enters_in_64_bit_mode_and_moves_itself(lab: Lab, cloud: str) -> None:
    cpus = 4
    script = """
    echo cpus $(nproc)
    echo text $(grep ' _text$' /proc/kallsyms)
    dmesg | grep 'crng init done' | head -1
    """
    unmoved = "ffffffff81000000"
    for _ in range(2):  # one in 512 stays by chance
        done = vmm(lab, cloud, script, "--memory", "512M", "--cpus", str(cpus), "--boot", "protocol=bzimage").check()
        said = between(done.stdout)
        assert f"cpus {cpus}\n" in said
        text = re.search(r"text ([0-9a-f]{16})", said)[1]
        assert "0.000000] random: crng init done" in said  # seeded by us, before the first line of the kernel
        if text != unmoved:
            break
    assert text != unmoved


def test_many_processors_on_few(lab: Lab, generic: Path) -> None:
    """64 on the lab's two: every one of them comes up and does something."""
    cpus = 64
    script = f"""
    echo cpus $(nproc)
    for cpu in $(seq 0 {cpus - 1}); do taskset -c $cpu true && echo ran; done | wc -l
    """
    done = vmm(lab, generic, script, "--memory", "1G", "--cpus", str(cpus), timeout=200).check()
    assert between(done.stdout).split() == ["cpus", str(cpus), str(cpus)]
    print(f"{cpus} vCPUs: {done.seconds:.1f} s from start to end")


def test_numa_nodes_and_memory_above_4_gib(lab: Lab, cloud: str) -> None:
    """8 GiB in a lab of 3: what the guest does not touch the host does not have to have. On a restored machine."""
    script = """
    grep MemTotal /proc/meminfo
    for node in /sys/devices/system/node/node[0-9]; do
        echo ${node##*/} cpus $(cat $node/cpulist) distance $(cat $node/distance) $(grep MemTotal $node/meminfo)
    done
    grep -E 'physical id|core id' /proc/cpuinfo | tr '\\n\\t' '  '
    """
    numa = ("--numa", "memory=3G,cpus=0-1,distances=10:25", "--numa", "memory=5G,cpus=2-3,distances=25:10")
    done = vmm(lab, cloud, script, "--memory", "8G", "--cpus", "4,sockets=2,cores=2", *numa, restored=True).check()
    said = between(done.stdout)
    assert int(re.search(r"MemTotal: +(\d+) kB", said)[1]) > 7_500_000
    assert "node0 cpus 0-1 distance 10 25" in said and "node1 cpus 2-3 distance 25 10" in said
    sizes = [int(kib) for kib in re.findall(r"Node \d MemTotal: +(\d+)", said)]
    assert 2_700_000 < sizes[0] < 3_200_000 and 4_800_000 < sizes[1] < 5_300_000
    assert sorted(re.findall(r"physical id +: (\d) core id +: (\d)", said)) == [
        ("0", "0"),
        ("0", "1"),
        ("1", "0"),
        ("1", "1"),
    ]


def test_a_named_model_hides_what_it_does_not_list(lab: Lab, cloud: str) -> None:
    """Nor does a restored machine show it, whose CPU is the saved one."""
    script = "grep -m1 flags /proc/cpuinfo; grep -m1 'model name' /proc/cpuinfo"
    done = vmm(lab, cloud, script, "--memory", "512M", "--cpu", "x86-64-v2,+aes", restored=True).check()
    said = between(done.stdout)
    flags = set(said.partition(":")[2].split())
    assert {"sse4_2", "popcnt", "cx16", "aes", "hypervisor"} <= flags
    assert not {"svm", "bmi1", "rdrand", "xsave", "sha_ni", "smap"} & flags
    assert "kvik x86-64-v2" in said


def start(lab: Lab, kernel: str, script: str, *options: str, modules: tuple[str, ...] = ()) -> str:
    """Start a machine that goes on, with its console in a file; the file as the lab sees it."""
    (lab.share / "initrd").write_bytes(initramfs(script, modules))
    console = f"{SHARE}/console"
    (lab.share / "console").write_text("")
    command = vmm_command(
        *("--kernel", kernel, "--initrd", f"{SHARE}/initrd", "--append", SETUP, "--serial", f"file:{console}"),
        *("--memory", "512M", *options),
    )
    lab.sh(f"{shlex.join(command)} </dev/null >/tmp/vmm.out 2>&1 & echo $! > /tmp/vmm.pid")
    return console


def until(lab: Lab, pattern: str, seconds: float = 90.0) -> str:
    """Wait until the console has the pattern; all of it."""
    end = time.monotonic() + seconds
    while True:
        text = (lab.share / "console").read_text(errors="replace")
        if re.search(pattern, text, re.DOTALL):
            return text
        alive = lab.run(["sh", "-c", "kill -0 $(cat /tmp/vmm.pid)"]).code == 0
        assert alive and time.monotonic() < end, text[-3000:] + lab.sh("cat /tmp/vmm.out")
        time.sleep(0.5)


def end(lab: Lab) -> str:
    """Terminate the machine; what it said."""
    lab.sh(  # some have ended with their guest by now
        "kill -TERM $(cat /tmp/vmm.pid) || true; "
        "for n in $(seq 100); do kill -0 $(cat /tmp/vmm.pid) || break; sleep 0.1; done"
    )
    return lab.sh("cat /tmp/vmm.out")


def test_a_reboot_starts_the_machine_anew(lab: Lab, generic: Path) -> None:
    start(lab, str(generic), "reboot -f", "--cpus", "2")
    try:
        text = until(lab, f"{BEGIN}.*{BEGIN}.*Restarting")
        assert text.count("Restarting system") >= 2
    finally:
        said = end(lab)
    assert "Traceback" not in said, said


def test_a_guests_reboot_can_end_the_machine(lab: Lab, generic: Path) -> None:
    done = vmm(lab, generic, "reboot -f", "--memory", "512M", "--on-reboot", "shutdown").check()
    assert "Restarting system" in done.stdout


def test_the_power_button_reaches_the_guest(lab: Lab, generic: Path) -> None:
    script = """
    echo waiting
    head -c 24 /dev/input/event0 > /tmp/event && echo pressed
    """
    start(lab, str(generic), script, "--qmp", "/tmp/qmp", modules=("button", "evdev"))
    try:
        until(lab, "waiting")
        lab.sh(
            """python3 -c "
import socket
s = socket.socket(socket.AF_UNIX); s.connect('/tmp/qmp'); f = s.makefile('rw'); f.readline()
for c in ('qmp_capabilities', 'system_powerdown'):
    f.write('{\\"execute\\": \\"%s\\"}\\n' % c); f.flush(); print(f.readline())
" """
        )
        until(lab, "pressed")
    finally:
        said = end(lab)
    assert "Traceback" not in said, said
