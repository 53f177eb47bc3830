"""A disk image boots by itself: Debian's OVMF on kvik-vmm, on a true KVM, to Linux's userspace."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.guest.tiny import TinyImage
from kvik.paths import Paths
from lab.harness import SHARE, Lab
from lab.managed import row
from lab.vmm_guest import END, initramfs
from lab.vmm_uefi_disk import VARIABLES, missing, write_disk

PERIOD = "/sys/module/kvm/parameters/min_timer_period_us"
SCRIPT = """
[ -d /sys/firmware/efi ] && echo "by UEFI"
dmesg | grep -o 'SMBIOS 3.*present'
dmesg | grep -o 'ACPI: DSDT .*KVIK' | head -1
grep -l 0x1042 /sys/bus/pci/devices/*/device
"""


@pytest.fixture(scope="module")
def disk(image: tuple[Paths, TinyImage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if lacking := missing():
        pytest.skip(lacking)
    place = tmp_path_factory.mktemp("disk")
    return write_disk(place, image[1].kernel, initramfs(SCRIPT), "console=ttyS0 quiet panic=-1 pci=noearly")


@pytest.fixture
def slowly(lab: Lab) -> Iterator[None]:
    """The lab's QEMU 7.2 aborts when a guest of ours writes CR8 while an interrupt is pending, which OVMF does at the
    end of each tick (docs/internals/vmm-firmware.md). Fewer ticks, and none is pending then."""
    before = lab.sh(f"cat {PERIOD}").strip()
    lab.sh(f"echo 100000 > {PERIOD}")
    yield
    lab.sh(f"echo {before} > {PERIOD}")


def check(console: str) -> None:
    for words in ("by UEFI", "SMBIOS 3", "ACPI: DSDT", "/sys/bus/pci/devices/0000:00:", END):  # the path: of the disk
        assert words in console, console


@pytest.mark.usefixtures("slowly")
@pytest.mark.lab(deadline=300)
def test_one_command_boots_a_disk_image(managed: Lab, disk: Path) -> None:
    """`kvik run` with a qcow2 disk and no kernel: the machine gets UEFI firmware, variables of its own, and a process
    that reads the image."""
    shutil.copy(disk, managed.share / "disk.raw")
    managed.sh(f"qemu-img convert -f raw -O qcow2 {SHARE}/disk.raw /tmp/disk.qcow2; rm {SHARE}/disk.raw")
    words = ["--disk", "/tmp/disk.qcow2", "--memory", "512M", "--network", "none", "--name", "fw", "--detach"]
    managed.kvik("run", "--vmm", "kvik", *words, timeout=150).check()
    for _ in range(50):
        if row(managed, "fw")["state"] == "shut off":
            break
        managed.sh("sleep 3")
    check(managed.sh("cat /var/log/kvik/qemu/fw-serial.log"))
    changed = managed.sh(f"cmp /var/lib/kvik/qemu/nvram/fw_VARS.fd {VARIABLES} || true")
    assert "differ: byte" in changed  # the firmware wrote its variables, and they are in the file
    managed.kvik("undefine", "fw", "--nvram").check()
    managed.sh("! test -e /var/lib/kvik/qemu/nvram/fw_VARS.fd; rm /tmp/disk.qcow2")
