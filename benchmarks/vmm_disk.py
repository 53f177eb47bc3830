"""virtio-blk of kvik-vmm beside QEMU's: same kernel, same initramfs, same file, in the lab, interleaved.

    PYTHONPATH=src python benchmarks/vmm_disk.py [--runs 5] [--seconds 2]

Needs gcc (a static program is the load) and what the lab needs. Figures are ratios: the lab is an emulated host.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "src")]

from report import Report  # noqa: E402

from lab.harness import SHARE, Lab, LabOptions  # noqa: E402 - found by the line above
from lab.vmm_guest import initramfs, vmm_command  # noqa: E402

LOADS = [("randread", 4096, depth) for depth in (1, 8, 32)]
LOADS += [("randwrite", 4096, depth) for depth in (1, 32)]
LOADS += [("seqread", 1 << 18, 4), ("seqwrite", 1 << 18, 4)]
RESULT = re.compile(r"RESULT (\w+) (\d+) (\d+) ([\d.]+)")
DISK = "/tmp/bench.raw"
Key = tuple[str, int, int]


def guest_program() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "load"
        subprocess.run(["gcc", "-O2", "-static", "-o", out, HERE / "vmm_disk_guest.c"], check=True)
        return out.read_bytes()


def commands(kernel: Path, memory: int) -> dict[str, list[str]]:
    append = "console=ttyS0 quiet panic=-1"
    ours = vmm_command(
        *("--kernel", str(kernel), "--initrd", f"{SHARE}/initrd", "--append", append, "--serial", "stdio"),
        *("--memory", f"{memory}M", "--disk", DISK),
    )
    out = {"kvik-vmm": ours}
    for aio in ("threads", "io_uring"):
        out[f"qemu {aio}"] = [
            *(
                "qemu-system-x86_64",
                "-accel",
                "kvm",
                "-cpu",
                "host",
                "-M",
                "microvm,pcie=on,acpi=on",
                "-m",
                str(memory),
            ),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-kernel", str(kernel), "-initrd", f"{SHARE}/initrd", "-append", append, "-object", "iothread,id=t"),
            *(
                "-drive",
                f"if=none,id=d,file={DISK},format=raw,aio={aio}",
                "-device",
                "virtio-blk-pci,drive=d,iothread=t",
            ),
        ]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    options = parser.parse_args()
    script = "\n".join(f"/load /dev/vda {mode} {block} {depth} {options.seconds}" for mode, block, depth in LOADS)
    figures: dict[str, dict[Key, list[float]]] = {}
    with Lab(LabOptions()) as lab:
        initrd = initramfs(script, ("virtio_pci", "virtio_blk"), {"load": guest_program()})
        (lab.share / "initrd").write_bytes(initrd)
        lab.sh(f"dd if=/dev/urandom of={DISK} bs=1M count=64 2>/dev/null")
        for _ in range(options.runs):
            for name, command in commands(lab.kernel.image, 256).items():
                done = lab.run(command, timeout=300)
                found = RESULT.findall(done.stdout)
                if len(found) != len(LOADS):
                    sys.exit(f"{name}: only {len(found)} results\n{done.stdout}\n{done.stderr}")
                for mode, block, depth, rate in found:
                    key = (mode, int(block), int(depth))
                    figures.setdefault(name, {}).setdefault(key, []).append(float(rate))
    for peer in ("qemu threads", "qemu io_uring"):
        report = Report(f"virtio-blk beside {peer}")
        for key in LOADS:
            mode, block, depth = key
            scale, unit = (1.0, "IOPS") if block == 4096 else (block / 1e6, "MB/s")
            mine, theirs = ([scale * rate for rate in figures[name][key]] for name in ("kvik-vmm", peer))
            report.more(f"{mode} {block >> 10}k, depth {depth}", mine, theirs, unit, 1.0)
        report.show()


if __name__ == "__main__":
    main()
