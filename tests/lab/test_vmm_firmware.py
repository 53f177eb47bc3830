"""A disk image boots by itself: Debian's OVMF on kvik-vmm, on a true KVM, to Linux's userspace."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from kvik.guest.tiny import TinyImage
from kvik.paths import Paths
from lab.harness import SHARE, Lab
from lab.vmm_guest import END, initramfs, vmm_command
from lab.vmm_uefi_disk import CODE, VARIABLES, missing, write_disk

PERIOD = "/sys/module/kvm/parameters/min_timer_period_us"
SCRIPT = """
[ -d /sys/firmware/efi ] && echo "by UEFI"
dmesg | grep -o 'SMBIOS 3.*present'
dmesg | grep -o 'ACPI: DSDT .*KVIK' | head -1
grep -l 0x1042 /sys/bus/pci/devices/*/device
"""


@pytest.mark.lab(deadline=300)
def test_firmware_boots_a_disk_image(lab: Lab, image: tuple[Paths, TinyImage], tmp_path: Path) -> None:
    if lacking := missing():
        pytest.skip(lacking)
    disk = write_disk(tmp_path, image[1].kernel, initramfs(SCRIPT), "console=ttyS0 quiet panic=-1 pci=noearly")
    for source, name in ((disk, "disk.raw"), (VARIABLES, "vars.fd")):
        shutil.copy(source, lab.share / name)
    lab.sh(f"cp {SHARE}/disk.raw {SHARE}/vars.fd /tmp/; rm {SHARE}/disk.raw")
    command = vmm_command(
        *("--firmware", str(CODE), "--nvram", "/tmp/vars.fd", "--disk", "/tmp/disk.raw", "--memory", "512M"),
        *("--serial", "stdio"),
    )
    # The lab's QEMU 7.2 aborts when a guest of ours writes CR8 while an interrupt is pending, which OVMF does at the
    # end of each tick (docs/internals/vmm-firmware.md). Fewer ticks, and none is pending then.
    before = lab.sh(f"cat {PERIOD}").strip()
    lab.sh(f"echo 50000 > {PERIOD}")
    try:
        done = lab.run(["sh", "-c", f"exec {shlex.join(command)} </dev/null"], timeout=200)
        changed = lab.run(["cmp", "-s", "/tmp/vars.fd", f"{SHARE}/vars.fd"]).code
    finally:
        lab.sh(f"echo {before} > {PERIOD}; rm -f /tmp/disk.raw /tmp/vars.fd {SHARE}/vars.fd")
    assert END in done.stdout and done.code == 0, done.stdout + done.stderr
    for words in ("by UEFI", "SMBIOS 3", "ACPI: DSDT", "/sys/bus/pci/devices/0000:00:"):  # the last: the virtio disk
        assert words in done.stdout, done.stdout
    assert changed == 1  # the firmware wrote its variables, and they are in the file
