"""Machines of kvik-vmm in the lab: an initramfs that runs a script of ours and powers off, and how to run it."""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvik.image.cpio import CpioWriter
from lab.harness import HERE, SHARE, Completed, Lab
from lab.kernel import ensure_kernel

__all__ = ["BEGIN", "END", "initramfs", "vmm", "vmm_command"]

BEGIN, END = "--- the guest begins", "--- the guest ends"

# The word "powered" is printed by nobody but a guest that got here.
INIT = """#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in {modules}; do insmod /modules/$module; done
echo '{begin}'
{script}
echo '{end}'
sync
poweroff -f
sleep 60
"""


def initramfs(script: str, modules: Sequence[str] = (), files: Mapping[str, bytes] | None = None) -> bytes:
    """A cpio archive: the lab's busybox, the generic kernel's modules (with what they need), programs of the caller's,
    and the script as root."""
    kernel = ensure_kernel()
    paths = kernel.load_order(modules) if modules else []
    stream = io.BytesIO()
    with CpioWriter(stream) as archive:
        archive.directories(["bin", "modules", "dev"])
        archive.device("dev/console", 0o020000, 5, 1)
        archive.file("bin/busybox", kernel.busybox.read_bytes(), 0o755)
        archive.symlink("bin/sh", "busybox")
        for path in paths:
            archive.file(f"modules/{path.rpartition('/')[2]}", (kernel.modules / path).read_bytes())
        names = " ".join(path.rpartition("/")[2] for path in paths)
        text = INIT.format(begin=BEGIN, end=END, script=script, modules=names)
        for place, content in (files or {}).items():
            archive.file(place, content, 0o755)
        archive.file("init", text.encode(), 0o755)
    return stream.getvalue()


def vmm_command(*options: str) -> list[str]:
    return [sys.executable, "-m", "kvik.vmm.main", *options]


def vmm(
    lab: Lab,
    kernel: Path | str,
    script: str,
    *options: str,
    modules: Sequence[str] = (),
    append: str = "",
    timeout: float = 90.0,
    restored: bool = False,
) -> Completed:
    """Boot a kernel of the host's tree with the script; `stdout` is the guest's console. The machine ends itself.
    `restored`: the script runs on a machine that was saved where it begins, and restored in another process."""
    if restored:
        script = f"usleep 500000\n{script}"  # saved meanwhile: the timer rings in the other process
    (lab.share / "initrd").write_bytes(initramfs(script, modules))
    # noearly: the lab's CPU is an AMD of family 15, for which Linux looks for a GART on 256 PCI buses: 33,000 exits.
    cmdline = f"console=ttyS0 quiet panic=-1 pci=noearly {append}".strip()
    command = vmm_command(
        *("--kernel", str(kernel), "--initrd", f"{SHARE}/initrd", "--append", cmdline, "--serial", "stdio", *options)
    )
    if restored:
        return lab.run([sys.executable, str(HERE / "vmm_restored.py"), BEGIN, json.dumps(command)], timeout=timeout)
    return lab.run(["sh", "-c", f"exec {shlex.join(command)} </dev/null"], timeout=timeout)
