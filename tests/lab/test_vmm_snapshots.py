"""Snapshots of a machine on kvik-vmm whose raw disk is the VMM's own, with a stock guest that writes all the time."""

from __future__ import annotations

import re

import pytest

from kvik.guest.tiny import TinyImage, kernel_arguments
from kvik.paths import Paths
from lab.harness import Lab
from lab.managed import in_lab, row

READY = 150.0  # seconds; 10 is usual in the lab
# Writes and reads back its own part of a disk, again and again, until /stop is there; what differs ends it.
BUSY = """
cat >/busy <<'end'
n=0
while ! test -e /stop; do
    n=$((n + 1))
    seq $n $((n + 20000)) >/$1.in
    dd if=/$1.in of=/dev/$1 bs=4k seek=1024 conv=fsync,notrunc 2>/dev/null || break
    dd if=/dev/$1 bs=4k skip=1024 count=24 iflag=direct 2>/dev/null | cmp -n 98304 - /$1.in || break
    echo $n >/$1.round
    usleep 100000
done
test -e /stop || echo failed >/failed
end
for d in vda vdb; do setsid sh /busy $d </dev/null >/dev/null 2>&1 & done
"""


@pytest.fixture
def lab(managed: Lab) -> Lab:
    return managed


def inside(lab: Lab, command: str) -> str:
    return lab.kvik("exec", "one", "--", "sh", "-c", command, timeout=READY).check().stdout


def answers(lab: Lab) -> None:
    for _ in range(30):
        if lab.kvik("exec", "one", "--", "true", timeout=READY).code == 0:
            return
        lab.sh("sleep 1")
    raise AssertionError("the guest's agent does not answer")


SUMS = "for d in vda vdb; do dd if=/dev/$d bs=4k count=128 iflag=direct 2>/dev/null | md5sum | cut -c-32; done;"


def write(first: int) -> str:
    """Numbers from `first` on at the start of each disk; says their checksums as it reads them there."""
    put = "for d in vda vdb; do dd if=/p of=/dev/$d bs=4k conv=fsync,notrunc 2>/dev/null; done;"
    return f"seq {first} 150000 | head -c 524288 >/p; {put} {SUMS}"


def on_host(lab: Lab, *paths: str) -> list[str]:
    """The same checksums of what images show, as QEMU reads them; the machine is off."""
    found = []
    for path in paths:
        kind = "raw" if path.endswith(".raw") else "qcow2"
        check = f"qemu-img check -q -f qcow2 {path}" if kind == "qcow2" else "true"
        copy = f"qemu-img convert -f {kind} -O raw {path} /tmp/shown && head -c 524288 /tmp/shown | md5sum"
        found.append(lab.sh(f"{check} && {copy}").split()[0])
    return found


ROUNDS = "test -e /failed && cat /failed; cat /vda.round /vdb.round;"


@pytest.mark.lab(deadline=400)
def test_a_raw_disk_goes_back_and_forth_under_a_guest_that_writes(lab: Lab, image: tuple[Paths, TinyImage]) -> None:
    lab.sh("truncate -s 16M /tmp/a.raw; qemu-img create -q -f qcow2 /tmp/b.qcow2 16M; rm -f /tmp/*.s[12] /tmp/*-now")
    paths, files = image
    words = ["--kernel", in_lab(files.kernel, paths), "--initrd", in_lab(files.initrd, paths), "--memory", "256"]
    words += ["--append", kernel_arguments("kvm", hostname="one"), "--disk", "/tmp/a.raw", "--disk", "/tmp/b.qcow2"]
    lab.kvik("run", "--vmm", "kvik", *words, "--network", "none", "--detach", "--name", "one", timeout=READY).check()
    answers(lab)
    # A choice that its driver makes by CONFIG_WCE, which whoever serves the disk has to know of.
    through = "echo 'write through' >/sys/block/vda/cache_type;"
    one = inside(lab, f"{write(1)} {through} {BUSY}").split()
    taken = lab.kvik("snapshot-create-as", "one", "s1", "--disk-only", timeout=READY).check().stdout
    assert re.search(r"held up for at most \d+\.\d ms", taken), taken
    two = inside(lab, f"{write(2)} echo two >/run/word").split()
    taken = lab.kvik("snapshot-create-as", "one", "s2", "--live", timeout=READY).check().stdout  # with its memory
    assert "held up for at most" in taken and "stood still" not in taken, taken
    print(taken)
    *three, first, second = inside(lab, f"{write(3)} echo three >/run/word; {ROUNDS}").split()
    assert one[0] == one[1] and len({one[0], two[0], three[0]}) == 3 and len(two) == len(three) == 2
    assert int(first) > 1 and int(second) > 1
    tree = lab.kvik("snapshot-list", "one", "--tree").check().stdout
    assert tree.split() == ["s1", "|", "+-", "s2"], tree
    assert lab.sh("pgrep -fc 'vmm/[b]lk/'").strip() == "1"  # the qcow2 disk's; the raw one is the VMM's own

    # Back with its memory: both disks are served by processes now, the driver goes on, and so does what it was at.
    lab.kvik("snapshot-revert", "one", "s2", timeout=READY).check()
    assert row(lab, "one")["state"] == "running" and lab.sh("pgrep -fc 'vmm/[b]lk/'").strip() == "2"
    answers(lab)
    back = inside(lab, f"cat /run/word /sys/block/vda/cache_type; {SUMS} {ROUNDS}").splitlines()
    assert back[:4] == ["two", "write through", *two] and len(back) == 6
    grows = f"for n in $(seq 100); do test $(cat /vda.round) -gt {back[4]} && break; sleep 0.2; done;"
    four = inside(lab, f"echo 'write back' >/sys/block/vda/cache_type; {write(4)} {grows} {ROUNDS} touch /stop").split()
    assert four[0] == four[1] and four[0] not in (one[0], two[0], three[0])
    assert len(four) == 4 and int(four[2]) > int(back[4])

    # Back to the first one, of the disks alone: it is off then, and nothing that s2 needs has gone.
    lab.kvik("snapshot-revert", "one", "s1", timeout=READY).check()
    assert row(lab, "one")["state"] == "shut off"
    plan = lab.kvik("snapshot-delete", "one", "s1", "--plan").check().stdout
    assert "forget snapshot s1" in plan and "leave /tmp/a.raw: other images rest on it" in plan, plan
    lab.kvik("snapshot-delete", "one", "s1", timeout=READY).check()
    assert on_host(lab, "/tmp/a.s1-now", "/tmp/b.s1-now") == one
    assert on_host(lab, "/tmp/a.s1", "/tmp/b.s1") == two
    lab.kvik("snapshot-delete", "one", "s2", timeout=READY).check()
    listed = lab.kvik("domblklist", "one").check().stdout
    assert "/tmp/a.raw\n" in listed and "/tmp/b.qcow2\n" in listed, listed
    assert on_host(lab, "/tmp/a.raw", "/tmp/b.qcow2") == one
    lab.kvik("undefine", "one").check()
