"""kvik-blk behind QEMU's own front end (vhost-user-blk-pci), with a stock kernel: killed, QEMU connects to the next one
and gives it the memory of requests in flight."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvik
from kvik.host.process import find_program
from kvik.image.create import create
from lab.kernel import LabUnavailable, ensure_kernel
from lab.vmm_guest import initramfs

QEMU = find_program("qemu-system-x86_64")
pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(
        not (QEMU and find_program("qemu-img")),
        reason="needs QEMU and qemu-img (apt install qemu-system-x86 qemu-utils)",
    ),
]
PROGRAM = Path(kvik.__file__).parent / "vmm" / "blk" / "__main__.py"
DEADLINE = 150.0  # seconds; the guest is emulated
TURNS = 14
SCRIPT = f"""
n=0
while [ $n -lt {TURNS} ]; do
    n=$((n + 1)); at=$((n * 7 % 100)); seq $n $((n + 9000)) | head -c 32768 >/w
    dd if=/w of=/dev/vda bs=32k seek=$at count=1 oflag=direct 2>/dev/null || echo bad write
    dd if=/dev/vda bs=32k skip=$at count=1 iflag=direct 2>/dev/null | cmp - /w || echo bad data
    echo "turn $n."
done
"""


class Disk:
    """One kvik-blk after another that listens at the same place."""

    def __init__(self, root: Path) -> None:
        self.path, self.place, self.redo = root / "disk.qcow2", root / "socket", root / "redo"
        create(str(self.path), "qcow2", 8 << 20)
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.place.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listening, self.path.open("r+b") as image, self.redo.open("a+b") as redo:
            listening.bind(str(self.place))
            listening.listen()
            fds = (image.fileno(), listening.fileno(), redo.fileno())
            words = [f"--image={fds[0]},qcow2", f"--socket={fds[1]}", f"--redo={fds[2]}"]
            return subprocess.Popen([sys.executable, "-I", "-S", PROGRAM, *words], pass_fds=fds)

    def replace(self) -> None:
        """Stopped first, so that requests wait for an answer."""
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        self.process.kill()
        self.process.wait()
        self.process = self.start()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()


def test_qemu_goes_on_with_another_process(disk: Disk, tmp_path: Path) -> None:
    try:
        kernel = ensure_kernel().image
    except LabUnavailable as error:
        pytest.skip(str(error))
    (tmp_path / "initrd").write_bytes(initramfs(SCRIPT, ("virtio_pci", "virtio_blk")))
    argv = [str(QEMU), "-accel", "tcg", "-cpu", "max", "-machine", "pc", "-m", "512"]
    argv += ["-object", "memory-backend-memfd,id=m,size=512M,share=on", "-numa", "node,memdev=m"]
    argv += ["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]
    argv += ["-kernel", str(kernel), "-initrd", str(tmp_path / "initrd"), "-append", "console=ttyS0 quiet panic=-1"]
    argv += ["-chardev", f"socket,id=c,path={disk.place},reconnect=1"]
    argv += ["-device", "vhost-user-blk-pci,chardev=c,num-queues=1,disable-legacy=on"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as qemu:
        try:
            assert qemu.stdout is not None
            said, kills, end = b"", 0, time.monotonic() + DEADLINE
            os.set_blocking(qemu.stdout.fileno(), False)
            while f"turn {TURNS}.".encode() not in said:
                assert time.monotonic() < end and qemu.poll() is None, said.decode()
                said += qemu.stdout.read() or b""
                if kills < 2 and f"turn {3 + 4 * kills}.".encode() in said:
                    kills += 1
                    disk.replace()
                time.sleep(0.02)
        finally:
            qemu.kill()
    assert kills == 2 and b"bad" not in said, said.decode()
    disk.process.terminate()
    assert disk.process.wait(20) == 0
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", disk.path], check=True)
