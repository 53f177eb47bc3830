"""Every golden document is one that a real QEMU accepts, but for those that need what a host seldom has."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data" / "qemu"
NEEDS = {
    "cpu-features": "KVM",
    "disk-network": "remote servers",
    "disk-nvme-host": "an NVMe controller to give away",
    "disk-vhostuser": "a vhost-user server",
    "disk-virtio-options": "a loop device",
    "filesystem-virtiofs": "a virtiofsd of somebody else's",
    "hostdev": "devices to give away",
    "interface-socket": "an address of its own",
    "interface-tap": "taps",
    "interface-vhostuser-vdpa": "vDPA hardware",
    "passed-descriptors": "taps",
    "panic-vsock": "/dev/vhost-vsock",
    "hugepages": "reserved huge pages",
    "rng-balloon-watchdog": "an entropy server",
    "serial-types": "a server to connect to",
    "serial-types-2": "a serial port",
    "tpm": "a swtpm of somebody else's",
    "tpm-passthrough": "a TPM",
}


def no_kernel() -> bytes:
    """A header that QEMU takes for a Linux kernel of boot protocol 2.15, and nothing behind it."""
    data = bytearray(1 << 20)
    data[0x1F1] = 4  # sectors of setup code
    data[0x202:0x206] = b"HdrS"
    data[0x206:0x208] = (0x020F).to_bytes(2, "little")
    data[0x211] = 1  # loaded high
    data[0x22C:0x230] = (0x7FFFFFFF).to_bytes(4, "little")  # the initrd may lie anywhere
    return bytes(data)


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.xml")))
async def test_qemu_accepts(name: str, lab, place: Path) -> None:
    if NEEDS.get(name):
        pytest.skip(f"needs {NEEDS[name]}")
    images = place / "images"
    images.mkdir()
    for image in ("a", "b"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(images / f"{image}.qcow2"), "4M"], check=True)
    for raw in ("a.raw", "c.iso", "f.img", "vmlinuz", "initrd.img", "vm,linuz", 'a,readonly=on"}, {\\ \nx.raw'):
        (images / raw).write_bytes(bytes(1474560))
    for kernel in ("vmlinuz", "vm,linuz"):
        (images / kernel).write_bytes(no_kernel())
    xml = (DATA / f"{name}.xml").read_text()
    xml = (
        xml.replace("/images/", f"{images}/").replace("dir='/images'", f"dir='{images}'").replace("/run/", f"{place}/")
    )
    xml = xml.replace("<domain type='kvm'", "<domain type='qemu'")
    machine = await lab.start(xml, paused=True)
    assert await machine.state() in ("prelaunch", "paused")
    await machine.quit()
    assert not list(lab.directory.iterdir())
