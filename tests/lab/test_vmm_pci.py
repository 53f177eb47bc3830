"""PCI and virtio as a stock Debian kernel sees them: enumeration, MSI-X, INTx, BAR moves, hot-plug."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lab.harness import REPOSITORY, SHARE, Completed, Lab
from lab.vmm_guest import BEGIN, END, initramfs

MODULES = ("virtio_pci", "virtio_rng", "acpiphp")
ENTROPY = """
cat /sys/class/misc/hw_random/rng_current
dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c
"""


def guest(lab: Lab, script: str, *words: str, append: str = "") -> tuple[str, dict[str, object]]:
    """What the script printed, and what the machine said at its end."""
    modules = [name for name in MODULES if name.replace("-", "_") in modules_of(lab)]
    (lab.share / "initrd").write_bytes(initramfs(script, modules))
    command = [
        *(sys.executable, str(REPOSITORY / "tests/lab/vmm_pci_machine.py"), str(lab.kernel.image), f"{SHARE}/initrd"),
        *(f"console=ttyS0 quiet panic=-1 {append}", *words),
    ]
    done: Completed = lab.run(command, timeout=100)
    assert BEGIN in done.stdout and END in done.stdout, done.stdout + done.stderr
    text = done.stdout.partition(BEGIN)[2].partition(END)[0].replace("\r", "")
    return text, json.loads(done.stderr.strip().splitlines()[-1])


def modules_of(lab: Lab) -> set[str]:
    return {path.stem.replace("-", "_") for path in Path(lab.kernel.modules).rglob("*.ko")}


@pytest.mark.lab(deadline=240)
def test_a_stock_kernel_lists_the_bus_and_drives_virtio_by_msix(lab: Lab) -> None:
    text, end = guest(
        lab,
        """
        for d in /sys/bus/pci/devices/*; do echo "${d##*/} $(cat $d/vendor) $(cat $d/device) $(cat $d/class)"; done
        """
        + ENTROPY
        + "cat /proc/interrupts\n"
        "dmesg | grep -iE 'pci|virtio' | grep -iE 'error|fail|invalid|conflict|BAR [0-9].*assign'",
    )
    assert "0000:00:00.0 0x1b36 0x0008 0x060000" in text
    assert "0x1af4 0x1044" in text and "0x1b36 0x00ad 0x0b4000" in text
    assert "virtio_rng.0" in text
    assert "\n256\n" in text
    lines = [line for line in text.splitlines() if "virtio" in line and "PCI-MSI" in line]
    assert lines, text
    assert any(int(line.split()[1]) > 0 for line in lines), text
    assert end["outcome"] == "guest-shutdown"


@pytest.mark.lab(deadline=240)
def test_without_msi_the_pin_works(lab: Lab) -> None:
    """Also of a restored machine."""
    text, _ = guest(lab, f"usleep 500000\n{ENTROPY}cat /proc/interrupts", "restored", append="pci=nomsi")
    assert "\n256\n" in text, text
    lines = [line for line in text.splitlines() if "virtio" in line]
    assert any("IO-APIC" in line and "fasteoi" in line and int(line.split()[1]) > 0 for line in lines), text


@pytest.mark.lab(deadline=240)
def test_bars_move_when_a_device_is_removed_and_found_again(lab: Lab) -> None:
    """While it is away another device comes and takes its addresses: Linux gives it others, and it works there."""
    text, _ = guest(
        lab,
        """
        bars() { echo "$1 $(cut -d' ' -f1 $d/resource | grep -v 0x0000000000000000 | tr '\\n' ' ')"; }
        d=$(dirname $(grep -l 0x1044 /sys/bus/pci/devices/*/device))
        name=${d##*/}
        bars first
        dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c
        echo 1 > $d/remove
        ls /sys/bus/pci/devices | grep -c $name
        echo "ready to plug"
        for i in $(seq 100); do grep -q 0x1044 /sys/bus/pci/devices/*/device && break; sleep 0.1; done
        sleep 1
        echo 1 > /sys/bus/pci/rescan
        for i in $(seq 100); do [ -e $d/driver ] && break; sleep 0.1; done
        sleep 1
        bars then
        cat /sys/class/misc/hw_random/rng_available
        for rng in $(cat /sys/class/misc/hw_random/rng_available); do
            echo $rng > /sys/class/misc/hw_random/rng_current
            dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c
        done
        """,
        "plug",
        "entropy",
    )
    places = {}
    for line in text.splitlines():
        word, *rest = line.split() or [""]
        if word in ("first", "then"):
            places[word] = set(rest)
    assert places["first"] and places["then"] and not places["first"] & places["then"], text
    assert "\n64\n" in text and "\n0\n" in text and text.split().count("256") == 2, text


@pytest.mark.lab(deadline=240)
def test_a_device_is_plugged_and_unplugged_while_linux_runs(lab: Lab) -> None:
    text, end = guest(
        lab,
        """
        count() { ls /sys/bus/pci/devices | wc -l; }
        before=$(count)
        echo "ready to plug"
        for i in $(seq 100); do [ $(count) -gt $before ] && break; sleep 0.1; done
        echo "plugged $(( $(count) - before ))"
        new=$(ls /sys/bus/pci/devices | tail -1)
        cat /sys/bus/pci/devices/$new/device
        head -1 /sys/bus/pci/devices/$new/resource
        echo "ready to unplug"
        for i in $(seq 100); do [ $(count) -eq $before ] && break; sleep 0.1; done
        echo "left $(( $(count) - before ))"
        """,
        "plug",
    )
    assert "plugged 1" in text and "0x00ad" in text, text
    assert "0x0000000000000000 0x0000000000000000" not in text, text  # its BAR got an address
    assert "left 0" in text, text
    assert ["DEVICE_DELETED", {"device": "late0", "path": "/machine/peripheral/late0"}] in end["events"]
