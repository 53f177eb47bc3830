"""Disks and the small virtio devices of kvik-vmm under Debian's stock kernel, on a true KVM."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from lab.conftest import Labs
from lab.harness import HERE, SHARE, Completed, Lab, LabOptions
from lab.kernel import ensure_kernel
from lab.vmm_dialogue import SAY
from lab.vmm_guest import initramfs, vmm, vmm_command

MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_balloon", "virtio_rng")


@pytest.fixture
def kernel() -> Path:
    return ensure_kernel().image


# blkzero DEVICE OFFSET LENGTH: busybox has no program that asks for zeroes.
BLKZERO = r"""
#include <fcntl.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
int main(int argc, char **argv)
{
    uint64_t range[2] = {strtoull(argv[2], 0, 0), strtoull(argv[3], 0, 0)};
    int fd = open(argv[1], O_RDWR);
    if (fd < 0 || ioctl(fd, BLKZEROOUT, range)) { perror(argv[1]); return 1; }
    return 0;
}
"""


def play(lab: Lab, script: str, *options: str, modules: tuple[str, ...], files: dict[str, bytes] | None = None) -> str:
    """Boot with the script, whose `turn`s are answered by `vmm_disk_turns`; the console."""
    (lab.share / "initrd").write_bytes(initramfs(SAY + script, modules, files))
    append = "console=ttyS0 quiet panic=-1 pci=noearly"
    command = vmm_command(
        "--kernel", str(lab.kernel.image), "--initrd", f"{SHARE}/initrd", "--append", append, *options
    )
    done: Completed = lab.python(HERE / "vmm_disk_turns.py", json.dumps(command), timeout=130)
    assert done.code == 0, f"{done.stdout}\n{done.stderr}"
    return done.stderr


@pytest.mark.lab(deadline=300)
def test_disks_keep_their_word_whatever_serves_them(labs: Labs, tmp_path: Path) -> None:
    """Threads, io_uring, the main loop, O_DIRECT on block devices, two queues with two vCPUs; and what goes wrong."""
    (tmp_path / "zero.c").write_text(BLKZERO)
    try:
        subprocess.run(["gcc", "-O2", "-static", "-o", tmp_path / "zero", tmp_path / "zero.c"], check=True)
    except FileNotFoundError:
        pytest.skip("no gcc for the guest's program")
    places = tuple(tmp_path / f"disk{number}" for number in range(2))
    for place in places:
        place.write_bytes(bytes(4 << 20))
    lab = labs.get(LabOptions(disks=places))
    try:
        lab.sh(
            """
            cd /tmp; truncate -s 4M a.raw b.raw c.raw
            mkdir small; mount -t tmpfs -o size=2M tmpfs small; truncate -s 4M small/f.raw
            dd if=/dev/urandom of=gone.raw bs=1M count=1 2>/dev/null
            """
        )
        script = """
            for d in a b c d e; do
                dd if=/dev/urandom of=/dev/vd$d bs=16k count=128 oflag=direct 2>/dev/null &
                dd if=/dev/urandom of=/dev/vd$d bs=16k count=128 seek=128 conv=fsync 2>/dev/null &
            done
            wait; sync; echo 3 >/proc/sys/vm/drop_caches
            for d in a b c d e; do
                dd if=/dev/vd$d bs=4k iflag=direct 2>/dev/null | md5sum >/tmp/$d.1 &
                md5sum </dev/vd$d >/tmp/$d.2 &
            done
            wait
            for d in a b c d e; do cmp /tmp/$d.1 /tmp/$d.2 || echo differ $d; done
            turn checksums $(for d in a b c d e; do echo vd$d=$(cut -d' ' -f1 /tmp/$d.1); done)
            for d in a b c; do blkdiscard -o 1048576 -l 1048576 /dev/vd$d; done
            turn discarded vda vdb vdc
            for d in a b c d e; do /zero /dev/vd$d 2097152 1048576; done
            turn zeroed vda vdb vdc vdd vde
            turn resize
            until [ $(cat /sys/block/vda/size) = 12288 ]; do sleep 0.1; done
            turn throttle 20
            before=$(cut -d. -f1 /proc/uptime)
            dd if=/dev/vdb of=/dev/null bs=4k count=100 iflag=direct 2>/dev/null
            after=$(cut -d. -f1 /proc/uptime)
            [ $((after - before)) -ge 3 ] && echo throttled
            turn throttle 0
            dd if=/dev/urandom of=/tmp/f bs=64k count=64 2>/dev/null
            dd if=/tmp/f of=/dev/vdf bs=64k oflag=direct 2>/dev/null &
            turn full
            wait
            turn filled_up $(md5sum </tmp/f | cut -d' ' -f1)
            turn vanish
            dd if=/dev/vdg of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null || echo vanished
            turn still_there
        """
        console = play(
            lab,
            script,
            *("--memory", "256M", "--cpus", "2"),
            *("--disk", "/tmp/a.raw,aio=threads,cache=writethrough", "--disk", "/tmp/b.raw,cache=writethrough"),
            *("--disk", "/tmp/c.raw,iothread=off", "--disk", "/dev/vda,cache=none,aio=io_uring"),
            *("--disk", "/dev/vdb,cache=none,aio=threads,packed=on"),
            *("--disk", "/tmp/small/f.raw,werror=enospc", "--disk", "/tmp/gone.raw"),
            modules=MODULES,
            files={"zero": (tmp_path / "zero").read_bytes()},
        )
        for word in ("throttled", "vanished", "the guest ends"):
            assert word in console, console
        assert "differ" not in console, console
    finally:
        labs.discard(lab)


@pytest.mark.lab(deadline=240)
def test_memory_comes_back_by_balloon_reporting_and_virtio_mem(lab: Lab) -> None:
    script = """
        total() { while read name size unit; do [ $name = MemTotal: ] && echo $size; done </proc/meminfo; }
        mount -t tmpfs -o size=400M tmpfs /tmp
        dd if=/dev/urandom of=/tmp/fill bs=1M count=200 2>/dev/null
        turn filled
        rm /tmp/fill
        turn freed
        turn inflate 320
        turn inflate 512
        dd if=/dev/zero of=/tmp/fill bs=1M count=250 2>/dev/null && echo deflated; rm /tmp/fill
        before=$(total)
        echo online_movable >/sys/devices/system/memory/auto_online_blocks
        gained() { echo $(($(total) - before)); }
        turn plug 128
        for i in $(seq 100); do [ $(gained) -gt 120000 ] && echo plugged && break; sleep 0.1; done
        turn plug 0
        for i in $(seq 100); do [ $(gained) -lt 4000 ] && echo unplugged && break; sleep 0.1; done
    """
    console = play(
        lab,
        script,
        *("--memory", "512M,hotplug=512M", "--balloon", "", "--virtio-mem", "256M"),
        modules=("virtio_pci", "virtio_balloon", "virtio_mem"),
    )
    for word in ("deflated", "\nplugged", "unplugged", "the guest ends"):
        assert word in console, console


@pytest.mark.lab(deadline=240)
def test_a_directory_through_virtiofsd(lab: Lab, kernel: Path) -> None:
    lab.sh("mkdir -p /tmp/shared; echo from-the-host >/tmp/shared/one")
    daemon = lab.spawn(
        ["/usr/lib/qemu/virtiofsd", "--socket-path=/tmp/fs.sock", "-o", "source=/tmp/shared", "-o", "sandbox=chroot"],
        timeout=240,
    )
    try:
        lab.sh("for i in $(seq 100); do [ -S /tmp/fs.sock ] && break; sleep 0.1; done; [ -S /tmp/fs.sock ]")
        done = vmm(
            lab,
            kernel,
            "mkdir /m; mount -t virtiofs box /m; cat /m/one; echo from-the-guest >/m/two; umount /m",
            *("--memory", "256M,shared=on", "--fs", "box,socket=/tmp/fs.sock"),
            modules=("virtio_pci", "virtiofs"),
            timeout=200,
        )
        assert "from-the-host" in done.stdout, done.stdout + done.stderr
        assert lab.sh("cat /tmp/shared/two") == "from-the-guest\n"
    finally:
        daemon.signal()
        daemon.wait()
        lab.sh("rm -rf /tmp/shared /tmp/fs.sock")


@pytest.mark.lab(deadline=240)
def test_a_stock_kernel_uses_disks_console_balloon_and_rng(lab: Lab, kernel: Path) -> None:
    """On a restored machine; that a booted one does so other tests here show."""
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
        restored=True,
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
