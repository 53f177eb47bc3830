"""A stock Debian kernel, saved, restored, rewound and migrated on a true KVM, checking itself all the time."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

from lab.harness import REPOSITORY, SHARE, Lab
from lab.vmm_guest import initramfs

# Sums of memory and of what it wrote to the disk, five times a second, by its own timer; and an echo.
SCRIPT = """
dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
exec 3<&0
( while read word <&3; do echo "heard $word"; [ "$word" = end ] && touch /stop; done ) &
i=0
while [ ! -e /stop ]; do
    i=$((i + 1))
    echo "number $i" | dd of=/dev/vda bs=512 conv=sync 2>/dev/null; sync
    echo 3 > /proc/sys/vm/drop_caches
    read word disk < /dev/vda
    [ "$disk" = "$i" ] && disk=same
    set -- $(md5sum < /tmp/data)
    echo "tick $i $1 $disk"
    usleep 200000
done
dmesg | grep -iE 'soft lockup|rcu.*stall|clocksource.*unstable|BUG:' || echo "nothing wrong"
"""

TREE = {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}/tests"}
TICK = re.compile(r"tick (\d+) ([0-9a-f]{32}) (same|\d+)")


@pytest.mark.lab(deadline=300)
def test_a_stock_kernel_lives_through_save_restore_rewind_and_migration(lab: Lab) -> None:
    (lab.share / "initrd").write_bytes(initramfs(SCRIPT, ["virtio_pci", "virtio_blk", "virtio_rng"]))
    lab.sh("rm -rf /tmp/state; mkdir /tmp/state; truncate -s 16M /tmp/state/disk")
    done = lab.run(
        [
            *(sys.executable, "-m", "lab.vmm_state_machine", str(lab.kernel.image)),
            *(f"{SHARE}/initrd", "console=ttyS0 quiet panic=-1", "/tmp/state/disk", "/tmp/state"),
        ],
        timeout=200,
        env=TREE,
    )
    assert done.code == 0, done.stdout[-3000:] + done.stderr
    figures = json.loads(done.stderr.strip().splitlines()[-1])
    print(figures)
    # A line is cut where a step ends. A machine that moved goes on in the middle of it, one that was restored or
    # rewound where it was saved: what is not whole is not looked at.
    steps = re.split(r"\n== (\w+)\n", done.stdout)
    said = dict(zip(steps[1::2], steps[2::2], strict=True))
    said["moved"] = said.pop("migrate") + said.pop("postcopy")
    ticks = {step: TICK.findall(text) for step, text in said.items()}
    assert all(ticks.values()), done.stdout
    # 8 MiB of its memory, the same all the way
    assert len({memory for step in ticks.values() for _, memory, _ in step}) == 1, done.stdout
    # The disk is not restored or rewound with the guest: there it may hold a number that the guest has yet to write.
    assert {disk for step in ("boot", "moved") for _, _, disk in ticks[step]} == {"same"}, done.stdout
    assert figures["migration"]["status"] == "completed" and figures["outcome"] == "guest-shutdown"
    postcopy = figures["postcopy"]
    assert postcopy["status"] == "completed" and postcopy["ram"]["postcopy-requests"] > 0, postcopy
    assert figures["pages"][-1] > 0
    assert "nothing wrong" in done.stdout
    numbers = [int(number) for number, _, _ in ticks["moved"]]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # none twice, none lost


# Reads of the disk, random numbers, and writes to the disk with all that said by the serial line: each counts.
AT_WORK = """
echo 0 > /tmp/read; echo 0 > /tmp/random
exec 3<&0
( while read word <&3; do echo "heard $word"; [ "$word" = end ] && touch /stop; done ) &
( n=0; while :; do n=$((n + 1)); dd if=/dev/vda of=/dev/null bs=4k count=8 skip=$((n % 1000)) iflag=direct 2>/dev/null
    echo $n > /tmp/read; done ) &
( n=0; while :; do n=$((n + 1)); dd if=/dev/hwrng of=/dev/null bs=64 count=1 2>/dev/null; echo $n > /tmp/random
    usleep 3000; done ) &
i=0
while [ ! -e /stop ]; do
    i=$((i + 1))
    echo "number $i" | dd of=/dev/vda bs=512 conv=sync 2>/dev/null; sync
    read reads < /tmp/read; read random < /tmp/random
    echo "tick $i $reads $random"
    usleep 50000
done
"""
HAND_OVERS = int(os.environ.get("KVIK_HAND_OVERS", "4"))  # more by hand: 60 take five minutes


@pytest.mark.lab(deadline=400)
def test_a_guest_that_moves_again_and_again_never_stands_still(lab: Lab) -> None:
    (lab.share / "initrd").write_bytes(initramfs(AT_WORK, ["virtio_pci", "virtio_blk", "virtio_rng"]))
    lab.sh("rm -rf /tmp/state; mkdir /tmp/state; truncate -s 16M /tmp/state/disk")
    done = lab.run(
        [
            *(sys.executable, "-m", "lab.vmm_hand_over", str(lab.kernel.image), f"{SHARE}/initrd"),
            *("console=ttyS0 quiet panic=-1 pci=noearly", "/tmp/state/disk", "/tmp/state", str(HAND_OVERS)),
        ],
        timeout=340,
        env=TREE,
    )
    assert done.code == 0, done.stdout[-3000:] + done.stderr
    assert f"{HAND_OVERS} moves: guest-shutdown" in done.stderr
