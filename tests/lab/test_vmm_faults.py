"""A stock kernel on kvik-vmm, in the sandbox, while the host's storage fails under it."""

from __future__ import annotations

import shlex

from lab.harness import SHARE, Lab
from lab.kernel import ensure_kernel
from lab.vmm_guest import initramfs, vmm_command

MODULES = ("virtio_pci", "virtio_blk")

# The guest writes "now" to its third disk; then the second one is cut off under it.
HOST = """
mkdir -p /tmp/small; mount -t tmpfs -o size=2m small /tmp/small
truncate -s 8M /tmp/small/full; dd if=/dev/zero of=/tmp/cut bs=1M count=4 2>/dev/null; truncate -s 1M /tmp/word
(for turn in $(seq 600); do
    if head -c 3 /tmp/word | grep -q now; then truncate -s 1M /tmp/cut; exit; fi
    sleep 0.1
done) &
exec {command} </dev/null
"""

GUEST = """
dd if=/dev/zero of=/dev/vda bs=1M count=8 conv=fsync 2>/dev/null || echo a full disk is told
dd if=/dev/vdb of=/dev/null bs=1M count=4 2>/dev/null && echo all of it reads
echo now | dd of=/dev/vdc bs=512 conv=fsync,sync 2>/dev/null
tries=0
while echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vdb skip=3 bs=1M count=1 of=/dev/null 2>/dev/null; do
    tries=$((tries + 1)); [ $tries -lt 100 ] || break; sleep 0.1
done
[ $tries -lt 100 ] && echo a disk that was cut off is told
dd if=/dev/vdb bs=512K count=1 of=/dev/null 2>/dev/null && echo the rest still reads
"""


def test_a_disk_that_is_full_or_cut_off_is_told_to_the_guest_and_no_more(lab: Lab) -> None:
    (lab.share / "initrd").write_bytes(initramfs(GUEST, MODULES))
    command = vmm_command(
        *("--kernel", str(ensure_kernel().image), "--initrd", f"{SHARE}/initrd"),
        *("--append", "console=ttyS0 quiet panic=-1 pci=noearly", "--serial", "stdio"),
        *("--disk", "/tmp/small/full,werror=report", "--disk", "/tmp/cut", "--disk", "/tmp/word"),
    )
    done = lab.run(["sh", "-c", HOST.format(command=shlex.join(command))], timeout=120)
    lab.sh("umount /tmp/small; rm -f /tmp/cut /tmp/word")
    assert done.code == 0, f"{done.stdout}\n{done.stderr}"
    for words in ("a full disk is told", "all of it reads", "a disk that was cut off is told", "the rest still reads"):
        assert words in done.stdout, done.stdout
