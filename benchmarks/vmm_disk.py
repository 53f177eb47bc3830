"""virtio-blk of kvik-vmm beside QEMU's: same kernel, same initramfs, same file, in the lab, interleaved.

    PYTHONPATH=src python benchmarks/vmm_disk.py [--runs 5] [--seconds 2] [--tmpfs | --cold]

The disk is a block device of the lab in its page cache, as an image in a file system would be: somebody holds it open,
since Linux drops a block device's pages with its last descriptor. --cold: nobody does, so reads come from the medium
and writes fill an empty cache. --tmpfs: a file in tmpfs, where io_uring hands every request to a worker thread.

Needs gcc (a static program is the load) and what the lab needs. Figures are ratios: the lab is an emulated host.
"""

from __future__ import annotations

import argparse
import contextlib
import os
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
SIZE = 64  # MiB
Key = tuple[str, int, int]


def guest_program() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "load"
        subprocess.run(["gcc", "-O2", "-static", "-o", out, HERE / "vmm_disk_guest.c"], check=True)
        return out.read_bytes()


def commands(kernel: Path, memory: int, disk: str) -> dict[str, list[str]]:
    append = "console=ttyS0 quiet panic=-1 pci=noearly"  # see lab.vmm_guest
    ours = vmm_command(
        *("--kernel", str(kernel), "--initrd", f"{SHARE}/initrd", "--append", append, "--serial", "stdio"),
        *("--memory", f"{memory}M", "--disk", disk),
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
                f"if=none,id=d,file={disk},format=raw,aio={aio}",
                "-device",
                "virtio-blk-pci,drive=d,iothread=t",
            ),
        ]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--tmpfs", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--peers", default="qemu threads,qemu io_uring", help="beside which QEMU")
    parser.add_argument("--loads", default="", help="only those whose name and depth begin so: randread-8")
    options = parser.parse_args()
    loads = [load for load in LOADS if f"{load[0]}-{load[2]}".startswith(options.loads)]
    peers = options.peers.split(",")
    script = "\n".join(f"/load /dev/vda {mode} {block} {depth} {options.seconds}" for mode, block, depth in loads)
    figures: dict[str, dict[Key, list[float]]] = {}
    disk = "/tmp/bench.raw" if options.tmpfs else "/dev/vda"
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "disk"
        place.write_bytes(os.urandom(SIZE << 20))
        lab = stack.enter_context(Lab(LabOptions() if options.tmpfs else LabOptions(disks=(place,))))
        initrd = initramfs(script, ("virtio_pci", "virtio_blk"), {"load": guest_program()})
        (lab.share / "initrd").write_bytes(initrd)
        # Everything is in the page cache before anybody is measured.
        holder = (
            None if options.cold else lab.spawn(["sh", "-c", f"touch {disk}; exec sleep 3600 <{disk}"], timeout=3600)
        )
        lab.sh(f"dd if=/dev/urandom of={disk} bs=1M count={SIZE} 2>/dev/null; cat {disk} >/dev/null")
        for _ in range(options.runs):
            for name, command in commands(lab.kernel.image, 256, disk).items():
                if name != "kvik-vmm" and name not in peers:
                    continue
                for _ in range(2):  # once more, when a nested machine stood still
                    done = lab.run(command, timeout=300)
                    found = RESULT.findall(done.stdout)
                    if len(found) == len(loads):
                        break
                    print(f"{name}: only {len(found)} results\n{done.stdout}\n{done.stderr}", file=sys.stderr)
                else:
                    sys.exit(1)
                print(name, *(" ".join(words) for words in found), sep="  ", file=sys.stderr, flush=True)
                for mode, block, depth, rate in found:
                    key = (mode, int(block), int(depth))
                    figures.setdefault(name, {}).setdefault(key, []).append(float(rate))
        if holder is not None:
            holder.signal()
    for peer in peers:
        report = Report(f"virtio-blk beside {peer}")
        for key in loads:
            mode, block, depth = key
            scale, unit = (1.0, "IOPS") if block == 4096 else (block / 1e6, "MB/s")
            mine, theirs = ([scale * rate for rate in figures[name][key]] for name in ("kvik-vmm", peer))
            report.more(f"{mode} {block >> 10}k, depth {depth}", mine, theirs, unit, 1.0)
        report.show()


if __name__ == "__main__":
    main()
