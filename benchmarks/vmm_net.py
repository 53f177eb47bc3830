"""virtio-net of kvik-vmm beside QEMU's, in the lab: one guest kernel, one initramfs, one tap each, runs interleaved.

    PYTHONPATH=src python benchmarks/vmm_net.py [--runs 5] [--seconds 2]

Needs gcc (a static program is the load and its peer) and what the lab needs. Figures are ratios: the lab is an
emulated host.
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

MODES = ("tx", "rx", "rr")
PAIRS = (("kvik-vmm vhost", "qemu vhost", 1.0), ("kvik-vmm own", "qemu own", 0.7))
RESULT = re.compile(r"RESULT (\w+) ([\d.]+)(?: ([\d.]+) (\d+))?")
SPACE, TAP = "kvik-bench", "kb0"
APPEND = "console=ttyS0 quiet panic=-1 pci=noearly"


def load_program() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "load"
        subprocess.run(["gcc", "-O2", "-static", "-o", out, HERE / "vmm_net_guest.c"], check=True)
        return out.read_bytes()


def guest_script(seconds: float) -> str:
    loads = "\n".join(f"/load {mode} 10.78.0.1 {seconds}" for mode in MODES)
    return f"ip link set eth0 up\nip addr add 10.78.0.2/24 dev eth0\nping -c 2 -i 0.2 10.78.0.1 >/dev/null\n{loads}"


def commands(kernel: Path, memory: int, cpus: int) -> dict[str, list[str]]:
    def ours(vhost: str) -> list[str]:
        return vmm_command(
            *("--kernel", str(kernel), "--initrd", f"{SHARE}/initrd", "--append", APPEND, "--serial", "stdio"),
            *("--memory", f"{memory}M", "--cpus", str(cpus), "--net", f"tap,ifname={TAP},vhost={vhost}"),
        )

    def theirs(vhost: str) -> list[str]:
        return [
            *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-M", "microvm,pcie=on,acpi=on"),
            *("-m", str(memory), "-smp", str(cpus), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-no-reboot", "-serial", "stdio", "-kernel", str(kernel), "-initrd", f"{SHARE}/initrd"),
            *("-append", APPEND, "-netdev", f"tap,id=n,ifname={TAP},script=no,downscript=no,vhost={vhost}"),
            *("-device", "virtio-net-pci,netdev=n"),
        ]

    return {
        "kvik-vmm own": ours("off"),
        "qemu own": theirs("off"),
        "kvik-vmm vhost": ours("on"),
        "qemu vhost": theirs("on"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of each load")
    parser.add_argument("--only", default="", help="of what the name contains this")
    parser.add_argument("--cpus", type=int, default=1)
    options = parser.parse_args()
    figures: dict[str, dict[str, list[float]]] = {}
    program = load_program()
    with Lab(LabOptions(modules=("tun", "vhost_net"))) as lab:
        initrd = initramfs(guest_script(options.seconds), ("virtio_pci", "virtio_net"), {"load": program})
        (lab.share / "initrd").write_bytes(initrd)
        (lab.share / "load").write_bytes(program)
        lab.sh(
            f"""
            cp {SHARE}/load /tmp/load; chmod 755 /tmp/load
            ip netns add {SPACE}
            ip -n {SPACE} link set lo up
            ip -n {SPACE} tuntap add {TAP} mode tap vnet_hdr
            ip -n {SPACE} addr add 10.78.0.1/24 dev {TAP}
            ip -n {SPACE} link set {TAP} up
            """
        )
        inside = ["ip", "netns", "exec", SPACE]
        peer = lab.spawn([*inside, "/tmp/load", "serve"], timeout=3600)
        for _ in range(options.runs):
            for name, command in commands(lab.kernel.image, 256, options.cpus).items():
                if options.only not in name:
                    continue
                done = lab.run([*inside, *command], timeout=120)
                found = RESULT.findall(done.stdout)
                if [mode for mode, *_ in found] != list(MODES):
                    sys.exit(f"{name}: only {found}\n{done.stdout}\n{done.stderr}")
                print(name, *(" ".join(words) for words in found), sep=", ", flush=True)
                for mode, rate, *_ in found:
                    figures.setdefault(name, {}).setdefault(mode, []).append(float(rate))
        peer.signal()
    for mine, peer_name, times in PAIRS:
        if mine not in figures or peer_name not in figures:
            continue
        report = Report(f"virtio-net: {mine} beside {peer_name}")
        for mode in MODES:
            scale, unit = (1.0, "trips/s") if mode == "rr" else (1e-6, "MB/s")
            a, b = ([scale * rate for rate in figures[name][mode]] for name in (mine, peer_name))
            report.more(
                {"tx": "TCP from the guest", "rx": "TCP to it", "rr": "UDP round trips"}[mode], a, b, unit, times
            )
        report.show()


if __name__ == "__main__":
    main()
