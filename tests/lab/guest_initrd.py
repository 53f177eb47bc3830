"""An initramfs for machines inside the lab: the lab's own kernel modules, busybox, and a script to run."""

from __future__ import annotations

import io
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from kvik.image.cpio import CpioWriter
from lab.kernel import Kernel

INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do
    insmod "/modules/$module" || echo "cannot load $module"
done </modules/order
. /script
poweroff -f
"""


def guest_initrd(kernel: Kernel, modules: Iterable[str], script: str, files: Mapping[str, Path] | None = None) -> bytes:
    """Loads `modules` with what they need, runs the shell `script`, powers off. `files`: place below / to file."""
    order = kernel.load_order(modules)
    stream = io.BytesIO()
    with CpioWriter(stream) as archive:
        archive.directories(["dev", "proc", "sys", "bin", "modules", "mnt", "tmp"])
        archive.device("dev/console", stat.S_IFCHR, 5, 1)
        archive.file("bin/busybox", kernel.busybox.read_bytes(), 0o755)
        archive.file("init", INIT.encode(), 0o755)
        archive.file("script", script.encode())
        archive.file("modules/order", "".join(f"{Path(path).name}\n" for path in order).encode())
        for path in order:
            archive.file(f"modules/{Path(path).name}", (kernel.modules / path).read_bytes())
        for place, source in (files or {}).items():
            archive.file(place, source.read_bytes(), 0o755)
    return stream.getvalue()
