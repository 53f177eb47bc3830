"""Machines on kvik-vmm, on a true KVM, under our daemon: `kvik run`, the life cycle, devices, and virsh."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvik.guest.tiny import TinyImage, kernel_arguments
from kvik.paths import Paths
from lab.harness import REPOSITORY, Lab
from lab.managed import in_lab, row

READY = 150.0  # seconds; 10 is usual in the lab
EMULATOR = "kvik-vmm"  # the daemon's own
VMM = REPOSITORY / "src/kvik/vmm/__main__.py"
PIDS = "pgrep -x kvik-vmm"


@pytest.fixture
def lab(managed: Lab) -> Lab:
    return managed


def run(lab: Lab, name: str) -> None:
    lab.kvik("run", "--vmm", "kvik", "--network", "none", "--detach", "--name", name, timeout=READY).check()


def wait_for_agent(lab: Lab) -> None:
    for _ in range(30):
        lab.sh("sleep 1")
        if lab.kvik("exec", "one", "--", "true", timeout=READY).code == 0:
            return
    raise AssertionError("the guest's agent does not answer")


@pytest.mark.lab(deadline=300)
def test_one_command_runs_a_command_in_a_machine_on_kvik_vmm(lab: Lab) -> None:
    done = lab.kvik("run", "--vmm", "kvik", "--network", "none", "--rm", "--", "uname", "-a", timeout=READY).check()
    assert done.stdout.startswith("Linux tiny-1 ") and "cloud-amd64" in done.stdout
    assert lab.sh("uname -r").strip() not in done.stdout
    assert json.loads(lab.kvik("list", "--all", "--json").check().stdout) == []
    assert lab.run(["sh", "-c", PIDS]).code == 1


@pytest.mark.lab(deadline=400)
def test_the_life_cycle_of_a_machine_on_kvik_vmm(lab: Lab) -> None:
    run(lab, "one")
    found = row(lab, "one")
    assert found["state"] == "running" and found["ready"] and found["acceleration"] == "kvm"
    xml = lab.kvik("dumpxml", "one").check().stdout
    assert f"<emulator>{EMULATOR}</emulator>" in xml and "machine='kvik-1'" in xml
    clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    assert lab.kvik("exec", "one", "--", "cat", clock, timeout=READY).check().stdout == "kvm-clock\n"

    lab.kvik("suspend", "one").check()
    assert row(lab, "one")["state"] == "paused"
    lab.kvik("resume", "one").check()
    assert row(lab, "one")["state"] == "running"

    # the daemon is killed, the machine goes on, and the next command finds it again
    pid = lab.sh(PIDS).strip()
    lab.sh("pkill -KILL -f [k]vik.daemon")
    assert row(lab, "one")["state"] == "running"
    assert lab.sh(PIDS).strip() == pid
    assert lab.kvik("exec", "one", "--", "echo", "still here", timeout=READY).check().stdout == "still here\n"

    status = lab.kvik("qemu-monitor-command", "one", '{"execute": "query-status"}').check().stdout
    assert json.loads(status)["return"]["status"] == "running"
    figures = lab.kvik("domstats", "one").check().stdout
    assert "cpu.time=" in figures and "vcpu.current=1" in figures

    lab.kvik("destroy", "one").check()
    assert row(lab, "one")["state"] == "shut off"
    lab.kvik("undefine", "one").check()
    assert lab.run(["sh", "-c", PIDS]).code == 1


@pytest.mark.lab(deadline=400)
def test_the_guest_powers_off_and_reboots(lab: Lab) -> None:
    run(lab, "one")
    pid = lab.sh(PIDS).strip()
    lab.kvik("reboot", "one", "--mode", "agent").check()
    wait_for_agent(lab)  # it goes with the old system and comes with the new one
    assert lab.sh(PIDS).strip() == pid
    lab.kvik("shutdown", "one", "--mode", "acpi").check()
    for _ in range(60):
        if row(lab, "one")["state"] == "shut off":
            break
        lab.sh("sleep 0.5")
    assert row(lab, "one")["state"] == "shut off"
    assert lab.run(["sh", "-c", PIDS]).code == 1


GROWING = """<domain type='kvm'><name>one</name><memory unit='MiB'>256</memory>
<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking><vcpu current='1'>2</vcpu>
<os><type machine='kvik'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{cmdline}</cmdline></os>
<devices><emulator>kvik-vmm</emulator><serial type='pty'/>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<memballoon model='virtio'><stats period='1'/></memballoon></devices></domain>"""
DISK = "<disk type='file'><driver name='qemu' type='raw'/><source file='/tmp/b.raw'/><target dev='vdb'/></disk>"
SHARE = "<filesystem><driver type='virtiofs'/><source dir='/run/lab/share'/><target dir='tag'/></filesystem>"


@pytest.mark.lab(deadline=400)
def test_what_comes_and_goes_while_the_guest_runs_is_seen_by_it(lab: Lab, image: tuple[Paths, TinyImage]) -> None:
    """A disk, a processor, a shared directory, memory by the balloon; and what the agent tells, through its verbs."""
    paths, tiny = image
    lab.sh("truncate -s 16M /tmp/b.raw")
    (lab.share / "share").mkdir(exist_ok=True)
    (lab.share / "share/word").write_text("shared\n")
    (lab.share / "disk.xml").write_text(DISK)
    (lab.share / "share.xml").write_text(SHARE)
    kernel, initrd, words = in_lab(tiny.kernel, paths), in_lab(tiny.initrd, paths), kernel_arguments("kvm")
    (lab.share / "one.xml").write_text(GROWING.format(kernel=kernel, initrd=initrd, cmdline=words))
    lab.kvik("create", "/run/lab/one.xml", timeout=READY).check()
    for _ in range(60):
        if lab.kvik("exec", "one", "--", "true", timeout=READY).code == 0:
            break
        lab.sh("sleep 1")

    def guest(script: str) -> str:
        return lab.kvik("exec", "one", "--", "sh", "-c", script, timeout=READY).check().stdout

    def soon(test: str) -> str:
        return guest(f"for n in $(seq 50); do {test} && echo yes && exit; sleep 0.2; done; dmesg | tail")

    before = guest("ls /sys/block").split()
    lab.kvik("attach-device", "one", "/run/lab/disk.xml", "--live").check()
    size = "for n in $(seq 50); do cat /sys/block/vd*/size && exit; sleep 0.2; done"
    assert guest(f"modprobe virtio_blk; {size}").split() == ["32768"]
    guest("dd if=/dev/zero of=/dev/vda bs=4k count=64 oflag=direct 2>/dev/null; sync")
    counted = lab.kvik("domblkstat", "one", "vdb").check().stdout
    assert int(counted.split("wr_bytes")[1].split()[0]) >= 64 * 4096
    lab.kvik("detach-disk", "one", "vdb", "--live").check()
    assert guest("ls /sys/block").split() == before

    cpu1 = "/sys/devices/system/cpu/cpu1"
    lab.kvik("setvcpus", "one", "2", "--live").check()
    assert soon(f"echo 1 > {cpu1}/online; grep -q 1 {cpu1}/online") == "yes\n"
    assert guest("nproc") == "2\n"
    lab.kvik("setvcpus", "one", "1", "--live").check()
    assert soon(f"! test -e {cpu1}/online") == "yes\n"
    assert lab.kvik("vcpucount", "one", "--active", "--live").check().stdout.split() == ["1"]

    lab.kvik("attach-device", "one", "/run/lab/share.xml", "--live").check()
    mount = "modprobe virtiofs; mkdir -p /mnt; mount -t virtiofs tag /mnt 2>/dev/null"
    assert soon(mount) == "yes\n"
    assert guest("cat /mnt/word; umount /mnt") == "shared\n"
    lab.kvik("detach-device", "one", "/run/lab/share.xml", "--live").check()

    lab.kvik("setmem", "one", "192M", "--live").check()
    for _ in range(50):
        figures = lab.kvik("dommemstat", "one").check().stdout
        if f"actual {192 << 10}\n" in figures and "usable" in figures:
            break
        lab.sh("sleep 0.2")
    assert f"actual {192 << 10}\n" in figures and "usable" in figures
    for verb in ("domtime", "domhostname", "domfsinfo", "guestinfo"):
        assert lab.kvik(verb, "one").check().stdout.strip(), verb
    lab.kvik("domifaddr", "one", "--source", "agent").check()
    pinged = lab.kvik("qemu-agent-command", "one", '{"execute": "guest-ping"}').check().stdout
    assert json.loads(pinged) == {"return": {}}
    lab.kvik("destroy", "one").check()


PLUGGED = "<disk type='file'><driver name='qemu' type='qcow2'/><source file='/tmp/c.qcow2'/><target dev='vdc'/></disk>"


def inside(lab: Lab, command: str) -> str:
    return lab.kvik("exec", "one", "--", "sh", "-c", command, timeout=READY).check().stdout


BLK = "pgrep -f 'vmm/[b]lk/.*id=virtio-disk0'"
# Writes pieces of 32 KiB and reads each back, flushing one in five, until it is told to stop; then reads all of them.
TURNS = """
n=0
while ! [ -e /stop ]; do
    n=$((n + 1)); at=$((40 + n * 7 % 300))
    seq $n $((n + 9000)) | head -c 32768 >/all/$at
    flush=; [ $((n % 5)) = 0 ] && flush=conv=fsync
    dd if=/all/$at of=/dev/vda bs=32k seek=$at count=1 oflag=direct $flush 2>/dev/null || echo write $n >>/bad
    dd if=/dev/vda bs=32k skip=$at count=1 iflag=direct 2>/dev/null | cmp - /all/$at || echo turn $n >>/bad
    echo $n >/turn
done
for at in $(ls /all); do
    dd if=/dev/vda bs=32k skip=$at count=1 iflag=direct 2>/dev/null | cmp - /all/$at || echo piece $at >>/bad
done
[ -e /bad ] || echo ok >/bad
cat /bad >/ended
"""


def turns(lab: Lab) -> int:
    return int(inside(lab, "cat /turn 2>/dev/null || echo 0"))


@pytest.mark.lab(deadline=400)
def test_disks_of_any_format_come_and_go_while_the_guest_runs(lab: Lab, image: tuple[Paths, TinyImage]) -> None:
    """One qcow2 disk from the start, which makes the memory one that another process can map, and grows; one that is
    plugged in, with a serial number; and the first one's kvik-blk killed again and again, once with the daemon, while
    the guest writes to it and reads back."""
    lab.sh("for n in a c; do qemu-img create -q -f qcow2 /tmp/$n.qcow2 8M; done")
    paths, files = image
    kernel, initrd = in_lab(files.kernel, paths), in_lab(files.initrd, paths)
    words = ["--kernel", kernel, "--initrd", initrd, "--append", kernel_arguments("kvm", hostname="one")]
    disk = ["--disk", "/tmp/a.qcow2", "--network", "none", "--detach", "--name", "one"]
    lab.kvik("run", "--vmm", "kvik", *words, *disk, timeout=READY).check()
    wait_for_agent(lab)
    assert inside(lab, "cat /sys/block/vda/size") == "16384\n"
    inside(lab, "seq 60000 >/p; dd if=/p of=/dev/vda bs=4k count=64 oflag=direct conv=fsync 2>/dev/null")
    lab.kvik("blockresize", "one", "vda", "16M").check()
    assert inside(lab, "for n in $(seq 50); do grep -q 32768 /sys/block/vda/size && break; sleep 0.2; done;"
                       " cat /sys/block/vda/size") == "32768\n"  # fmt: skip
    inside(lab, "dd if=/p of=/dev/vda bs=64k count=4 seek=200 oflag=direct conv=fsync 2>/dev/null")
    (lab.share / "disk.xml").write_text(PLUGGED.replace("<target", "<serial>plugged</serial><target"))
    before = inside(lab, "ls /sys/block")
    lab.kvik("attach-device", "one", "/run/lab/disk.xml", "--live").check()
    # The guest calls it by the first free name.
    found = inside(lab, "for n in $(seq 50); do cat /sys/block/vdb/size && exit; sleep 0.2; done").split()
    assert found == ["16384"]
    assert inside(lab, "cat /sys/block/vdb/serial") == "plugged"
    assert "wr_req" in lab.kvik("domblkstat", "one", "vdc").check().stdout
    inside(lab, "dd if=/p of=/dev/vdb bs=4k count=64 oflag=direct conv=fsync 2>/dev/null")
    lab.kvik("detach-disk", "one", "vdc", "--live").check()
    assert inside(lab, "ls /sys/block") == before
    assert not lab.sh("pgrep -f 'qemu-storage-[d]aemon' || true")
    inside(lab, f"cat >/turns <<'E'\n{TURNS}\nE\nmkdir /all; (sh /turns </dev/null >/dev/null 2>&1 &)")
    for kill in range(4):
        before = turns(lab)
        pid = lab.sh(f"{BLK} | tee /tmp/blk; kill -KILL $(cat /tmp/blk)").strip()
        if kill == 2:
            lab.sh("pkill -KILL -f [k]vik.daemon")
            lab.sh("sleep 1")
        lab.kvik("domstate", "one").check()
        lab.sh(f'for n in $(seq 200); do new=$({BLK}) && [ "$new" != {pid} ] && exit; sleep 0.1; done; exit 1')
        for _ in range(50):
            if turns(lab) > before + 3:
                break
            lab.sh("sleep 0.2")
        else:
            raise AssertionError(f"it stands still after {before} turns\n" + lab.sh("cat /var/log/kvik/qemu/one.log"))
    assert (
        inside(lab, "touch /stop; for n in $(seq 100); do [ -e /ended ] && break; sleep 0.2; done; cat /ended")
        == "ok\n"
    )
    print(f"{turns(lab)} turns")
    assert "No errors found" in lab.kvik("domblkerror", "one").check().stdout
    assert lab.sh("grep -c 'kvik-blk of virtio-disk0 was started again' /var/log/kvik/qemu/one.log") == "4\n"
    lab.kvik("destroy", "one").check()
    for name in ("a", "c"):
        lab.sh(
            f"""
            qemu-img check -q -f qcow2 /tmp/{name}.qcow2
            qemu-img convert -f qcow2 -O raw /tmp/{name}.qcow2 /tmp/{name}.raw
            seq 60000 | cmp -n 262144 - /tmp/{name}.raw
            """
        )
    lab.sh("seq 60000 | cmp -n 262144 - /tmp/a.raw 0 13107200")  # in what came with the new size


BACKUP = """<domainbackup>{since}<disks><disk name='vda' type='file'><target file='/tmp/{name}.qcow2'/></disk></disks>
</domainbackup>"""
PULL = """<domainbackup mode='pull'><incremental>two</incremental><server transport='unix' socket='/tmp/nbd'/>
<disks><disk name='vda' type='file'><scratch file='/tmp/scratch.qcow2'/></disk></disks></domainbackup>"""
SUM = "dd if=/dev/vda bs=64k {} iflag=direct 2>/dev/null | md5sum"


@pytest.mark.lab(deadline=400)
def test_a_disk_is_backed_up_while_the_guest_writes(lab: Lab, image: tuple[Paths, TinyImage]) -> None:
    """In full while it writes, by kvik; what changed over a live snapshot, by kvik; pulled, by Debian's virsh."""
    if lab.run(["sh", "-c", "command -v virsh"]).code:
        pytest.skip("virsh is not installed: apt install libvirt-clients")
    lab.sh("qemu-img create -q -f qcow2 /tmp/b.qcow2 16M")
    paths, files = image
    kernel, initrd = in_lab(files.kernel, paths), in_lab(files.initrd, paths)
    words = ["--kernel", kernel, "--initrd", initrd, "--append", kernel_arguments("kvm", hostname="one")]
    disk = ["--disk", "/tmp/b.qcow2", "--network", "none", "--detach", "--name", "one"]
    lab.kvik("run", "--vmm", "kvik", *words, *disk, timeout=READY).check()
    wait_for_agent(lab)

    def write(name: str, text: str) -> str:
        (lab.share / name).write_text(text)
        return f"/run/lab/{name}"

    def back_up(name: str, since: str = "") -> None:
        wanted = BACKUP.format(name=name, since=f"<incremental>{since}</incremental>" if since else "")
        made = write("checkpoint.xml", f"<domaincheckpoint><name>{name}</name></domaincheckpoint>")
        begin = ("backup-begin", "one", "--backupxml", write("backup.xml", wanted), "--checkpointxml", made)
        assert lab.kvik(*begin).check().stdout == "Backup started\n\n"
        for _ in range(100):
            if "None" in lab.kvik("domjobinfo", "one").check().stdout:
                break
            lab.sh("sleep 0.2")
        assert "Completed" in lab.kvik("domjobinfo", "one", "--completed").check().stdout

    def sum_of(source: str, count: str = "count=256") -> str:
        lab.sh(f"qemu-img convert -O raw {source} /tmp/raw")
        return lab.sh(f"dd if=/tmp/raw bs=64k {count} 2>/dev/null | md5sum")

    write_on = "(while ! test -e /stop; do dd if=/dev/urandom of=/dev/vda bs=64k count=64 seek=128 oflag=direct; done)"
    first = inside(
        lab,
        f"dd if=/dev/urandom of=/dev/vda bs=64k count=128 conv=fsync 2>/dev/null; {SUM.format('count=128')};"
        f"{write_on} >/dev/null 2>&1 &",
    )
    back_up("one")
    assert sum_of("/tmp/one.qcow2", "count=128") == first
    inside(lab, "touch /stop; sleep 1; dd if=/dev/urandom of=/dev/vda bs=4k count=3 seek=1000 oflag=direct")
    lab.kvik("snapshot-create-as", "one", "s1", "--disk-only").check()
    change = "dd if=/dev/urandom of=/dev/vda bs={} count={} seek={} oflag=direct 2>/dev/null;"
    whole = inside(lab, change.format("4k", 3, 2000) + SUM.format(""))
    back_up("two", "one")
    lab.sh("qemu-img rebase -u -F qcow2 -b /tmp/one.qcow2 /tmp/two.qcow2; qemu-img check -q /tmp/two.qcow2")
    assert sum_of("/tmp/two.qcow2") == whole

    whole = inside(lab, change.format("64k", 1, 7) + SUM.format(""))
    virsh = f"virsh -c 'qemu+unix:///system?socket={Paths.system().socket}'"
    lab.sh(f"{virsh} backup-begin one {write('pull.xml', PULL)}")
    inside(lab, change.format("64k", 200, 0))
    export = "driver=nbd,server.type=unix,server.path=/tmp/nbd,export=vda"
    assert sum_of(f"--image-opts {export}") == whole
    changed = f"{export},x-dirty-bitmap=qemu:dirty-bitmap:backup-vda"
    told = json.loads(lab.sh(f"qemu-img map --output=json --image-opts {changed}"))
    assert [(item["start"], item["length"]) for item in told if not item["data"]] == [(7 << 16, 1 << 16)]
    assert "exportname='vda'" in lab.sh(f"{virsh} backup-dumpxml one")
    lab.sh(f"{virsh} domjobabort one; test ! -e /tmp/nbd; test ! -e /tmp/scratch.qcow2")
    assert lab.sh(f"{virsh} checkpoint-list one --name").split() == ["one", "two"]
    lab.kvik("checkpoint-delete", "one", "one", "--children").check()
    lab.kvik("destroy", "one").check()
    lab.sh("qemu-img check -q /tmp/b.qcow2")


@pytest.mark.lab(deadline=400)
def test_debians_virsh_runs_one(lab: Lab) -> None:
    if lab.run(["sh", "-c", "command -v virsh"]).code:
        pytest.skip("virsh is not installed: apt install libvirt-clients")
    run(lab, "one")
    socket = Paths.system().socket
    virsh = f"virsh -c 'qemu+unix:///system?socket={socket}'"
    assert lab.sh(f"{virsh} list --name").split() == ["one"]
    assert EMULATOR in lab.sh(f"{virsh} dumpxml one")
    lab.sh(f"{virsh} suspend one; {virsh} resume one")
    assert "running" in lab.sh(f"{virsh} domstate one")
    assert "kvik-1" in lab.sh(f"{virsh} domcapabilities --emulatorbin {EMULATOR}")
    lab.sh(f"{virsh} destroy one")
    assert row(lab, "one")["state"] == "shut off"


def test_capabilities_name_both_vmms(lab: Lab) -> None:
    text = Path("/run/lab/kvik-vmm")  # found by path as well, and asked for its CPU models
    (lab.share / text.name).write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {VMM} "$@"\n')
    (lab.share / text.name).chmod(0o755)
    caps = lab.kvik("capabilities").check().stdout
    assert f"<emulator>{EMULATOR}</emulator>" in caps and "qemu-system-x86_64" in caps
    assert "canonical='kvik-1'" in caps
    told = lab.kvik("domcapabilities", "--emulatorbin", str(text)).check().stdout
    assert f"<path>{text}</path>" in told and "<domain>kvm</domain>" in told
