"""Disks and the small virtio devices of kvik-vmm under Debian's stock kernel, on a true KVM."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.harness import Lab
from lab.kernel import ensure_kernel
from lab.vmm_guest import vmm

MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_balloon", "virtio_rng")


@pytest.fixture
def kernel() -> Path:
    return ensure_kernel().image


@pytest.mark.lab(deadline=240)
def test_a_stock_kernel_uses_disks_console_balloon_and_rng(lab: Lab, kernel: Path) -> None:
    lab.sh("cd /tmp && dd if=/dev/urandom of=one.raw bs=64k count=16 2>/dev/null && truncate -s 4M two.raw")
    script = """
        echo serial $(cat /sys/block/vda/serial) queues $(ls /sys/block/vda/mq | wc -l) ro $(cat /sys/block/vdc/ro)
        md5sum /dev/vda
        dd if=/dev/vda of=/dev/vdb bs=64k seek=1 oflag=direct 2>/dev/null && sync
        echo port $(cat /sys/class/virtio-ports/vport*/name)
        for port in /sys/class/virtio-ports/*; do
            [ "$(cat $port/name)" = org.qemu.guest_agent.0 ] && echo from-the-guest >/dev/${port##*/}
        done
        echo random $(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c)
        echo balloon $(ls /sys/bus/virtio/drivers/virtio_balloon | grep -c virtio)
    """
    done = vmm(
        lab,
        kernel,
        script,
        *(
            "--memory",
            "256M",
            "--cpus",
            "2",
            "--disk",
            "/tmp/one.raw,serial=abc,queues=2",
            "--rng",
            "",
            "--balloon",
            "",
        ),
        *("--disk", "/tmp/two.raw,aio=threads", "--disk", "/tmp/one.raw,readonly=on,lock=off"),
        *("--channel", "org.qemu.guest_agent.0,backend=file:/tmp/channel.out"),
        modules=MODULES,
        timeout=200,
    )
    words = done.stdout
    assert "serial abc queues 2 ro 1" in words, words + done.stderr
    assert lab.sh("md5sum </tmp/one.raw").split()[0] in words
    assert "port org.qemu.guest_agent.0" in words
    assert "random 64" in words
    assert "balloon 1" in words
    assert lab.sh("cat /tmp/channel.out") == "from-the-guest\n"
    lab.sh("dd if=/tmp/two.raw bs=64k skip=1 count=16 2>/dev/null | cmp - /tmp/one.raw")
    lab.sh("rm /tmp/one.raw /tmp/two.raw /tmp/channel.out")


@pytest.mark.lab(deadline=240)
def test_a_qcow2_disk_served_by_qemu_storage_daemon(lab: Lab, kernel: Path) -> None:
    lab.sh("qemu-img create -q -f qcow2 /tmp/q.qcow2 8M")
    daemon = lab.spawn(
        [
            *("qemu-storage-daemon", "--blockdev", "driver=file,node-name=f,filename=/tmp/q.qcow2"),
            *("--blockdev", "driver=qcow2,node-name=q,file=f"),
            *("--export", "type=vhost-user-blk,id=e,node-name=q,writable=on,addr.type=unix,addr.path=/tmp/q.sock"),
        ],
        timeout=240,
    )
    try:
        lab.sh("for i in $(seq 100); do [ -S /tmp/q.sock ] && break; sleep 0.1; done")
        done = vmm(
            lab,
            kernel,
            "dd if=/init of=/dev/vda bs=512 seek=8 2>/dev/null; sync; echo size $(cat /sys/block/vda/size)",
            *("--memory", "256M,shared=on", "--vhost-user-blk", "/tmp/q.sock"),
            modules=MODULES,
            timeout=200,
        )
        assert "size 16384" in done.stdout, done.stdout + done.stderr
    finally:
        daemon.signal()
        daemon.wait()
    lab.sh("qemu-img convert -f qcow2 -O raw /tmp/q.qcow2 /tmp/q.raw; grep -q busybox /tmp/q.raw; rm /tmp/q.*")
