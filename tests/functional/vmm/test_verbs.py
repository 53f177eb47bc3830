"""Every verb of kvik on a machine that runs on kvik-vmm, through the command and a real daemon, as the guide's table
promises (docs/guide/vmm.md, "Every verb").

One machine, one guest of 386 bytes that lets go what it is asked for (`acpi_guest.py`), one long dialogue: the steps
stand in the order in which they are run. The daemon lives in a network namespace of its own.
"""

from __future__ import annotations

import functools
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from acpi_guest import kernel
from guests import needs_kvm

from functional.daemon.conftest import Kvikd
from kvik.cli.verbs import VERBS
from kvik.host.process import find_program
from kvik.image.create import create

pytestmark = [
    pytest.mark.functional,
    pytest.mark.root,
    needs_kvm,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        find_program("ip") is None or not Path("/dev/net/tun").exists(), reason="needs iproute2 and tun"
    ),
]
GUIDE = Path(__file__).parents[3] / "docs/guide/vmm.md"
ANY_KVM = Path(__file__).with_name("any_kvm.py")
# sysfs shows the network namespace that it was mounted in; passt wants a way to somewhere.
NAMESPACE = """mount -t sysfs sysfs /sys && ip link set lo up
for bridge in br0 br1 out0; do ip link add $bridge type bridge && ip link set $bridge up; done
ip addr add 192.0.2.1/24 dev out0 && ip route add default via 192.0.2.2 dev out0"""
VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/bin/virtiofsd")
NO_AGENT = "the guest agent is not connected"

DOMAIN = """<domain type='kvm'><name>{name}</name>
<maxMemory slots='4' unit='MiB'>2048</maxMemory><memory unit='MiB'>64</memory>
<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
<vcpu current='1'>3</vcpu>
<cpu mode='host-passthrough'><numa><cell id='0' cpus='0-2' memory='65536' memAccess='shared'/></numa></cpu>
<os><type machine='kvik'>hvm</type><kernel>{root}/kernel</kernel></os>
<devices><emulator>kvik-vmm</emulator>{devices}
<serial type='pty'/><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<memballoon model='virtio'/></devices></domain>"""
OWN = """<disk type='file'><driver name='qemu' type='raw'/><source file='{root}/a.raw'/><target dev='vda'/></disk>
<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/></interface>"""
DEVICES = {
    "rng": "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
    "rng-config": "<rng model='virtio'><rate bytes='1024' period='1000'/><backend model='random'/></rng>",
    "ethernet": "<interface type='ethernet'><mac address='52:54:00:00:00:02'/></interface>",
    "user": "<interface type='user'><mac address='52:54:00:00:00:03'/></interface>",
    "filesystem": "<filesystem type='mount'><driver type='virtiofs'/><source dir='{root}/share'/><target dir='tag'/>"
    "</filesystem>",
    "memory": "<memory model='virtio-mem'><target><size unit='MiB'>256</size><node>0</node><block unit='MiB'>2</block>"
    "<requested unit='MiB'>64</requested></target></memory>",
    "memory-more": "<memory model='virtio-mem'><target><size unit='MiB'>256</size><node>0</node>"
    "<block unit='MiB'>2</block><requested unit='MiB'>128</requested></target></memory>",
    "memory-none": "<memory model='virtio-mem'><target><size unit='MiB'>256</size><node>0</node>"
    "<block unit='MiB'>2</block><requested unit='MiB'>0</requested></target></memory>",
    "disk": "<disk type='file'><driver name='qemu' type='raw'/><source file='{root}/a.raw'/><target dev='vda'/>"
    "<iotune><total_iops_sec>100</total_iops_sec></iotune></disk>",
    "disk-other": "<disk type='file'><driver name='qemu' type='raw'/><source file='{root}/b.raw'/><target dev='vda'/>"
    "</disk>",
    "bridge-other": "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br1'/>"
    "<model type='virtio'/></interface>",
    "bridge-none": "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br9'/></interface>",
    "direct": "<interface type='direct'><mac address='52:54:00:00:00:0a'/><source dev='br1' mode='bridge'/>"
    "</interface>",
    "balloon": "<memballoon model='virtio'><stats period='3'/></memballoon>",
    "channel": "<channel type='unix'><target type='virtio' name='org.x'/></channel>",
    "panic": "<panic model='isa'/>",
    "serial": "<serial type='pty'/>",
    "console": "<console type='pty'><target type='virtio'/></console>",
    "watchdog": "<watchdog model='i6300esb' action='reset'/>",
    "dimm": "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>",
    "cdrom": "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{root}/b.raw'/>"
    "<target dev='sda' bus='sata'/></disk>",
    "vsock": "<vsock model='virtio'><cid auto='yes'/></vsock>",
    "disk-qcow2": "<disk type='file'><driver name='qemu' type='qcow2'/><source file='{root}/c.qcow2'/>"
    "<target dev='vdc'/></disk>",
    "checkpoint": "<domaincheckpoint><name>c2</name><disks><disk name='vdc'/></disks></domaincheckpoint>",
    "pull": "<domainbackup mode='pull'><server transport='unix' socket='{root}/nbd'/><disks>"
    "<disk name='vdc' type='file'><scratch file='{root}/scratch.qcow2'/></disk></disks></domainbackup>",
    "backup": "<domainbackup><incremental>c1</incremental><disks><disk name='vdc' type='file'>"
    "<target file='{root}/backup.qcow2'/></disk></disks></domainbackup>",
}

WORKS, AGENT = "works", "agent"
QUERY = 'qemu-monitor-command m \'{"execute": "%s"}\''
# (command, WORKS or AGENT or what the error says, what it prints). "@x": the file of a device or document.
STEPS: list[tuple[str, str, str]] = [
    # a definition
    ("define @m", WORKS, "Domain 'm' defined"),
    ("list --all", WORKS, "shut off"),
    ("domxml-to-native qemu-argv --domain m", WORKS, "--cpus 1,maximum=3"),
    ("desc m --config --title words", WORKS, "Domain title updated successfully"),
    ("desc m --config --title", WORKS, "words"),
    ("metadata m --uri urn:a --key k --set '<a/>' --config", WORKS, "Metadata modified"),
    ("edit m", WORKS, "Domain 'm' XML configuration edited"),
    ("desc m", WORKS, "edited"),
    ("autostart m", WORKS, "marked as autostarted"),
    ("autostart m --disable", WORKS, "unmarked as autostarted"),
    ("domrename m n", WORKS, ""),
    ("domrename n m", WORKS, ""),
    ("setmaxmem m 65536 --config", WORKS, ""),
    ("attach-device m @rng-config --config", WORKS, "attached"),
    # snapshots while it is off; the last one that is deleted leaves the disk in its raw image
    ("snapshot-create-as m s1", WORKS, "Domain snapshot s1 created"),
    ("snapshot-create-as m s2", WORKS, "created"),
    ("snapshot-create m", WORKS, "created"),
    ("snapshot-list m --tree", WORKS, "+- "),
    ("snapshot-info m s1", WORKS, "external"),
    ("snapshot-dumpxml m s1", WORKS, "<domainsnapshot>"),
    ("snapshot-current m --snapshotname s1", WORKS, "set as current"),
    ("snapshot-parent m s2", WORKS, "s1"),
    ("snapshot-edit m s1", "", ""),  # the editor of this test writes for machines
    ("snapshot-revert m s1", WORKS, "reverted"),
    ("snapshot-delete m s1 --children", WORKS, "deleted"),
    ("start m", WORKS, "started"),
    # checkpoints and backups, of a disk that another process serves
    ("checkpoint-create m", "unsupported for storage type raw", ""),
    ("backup-begin m", "disk vda of machine m is one that kvik-vmm reads and writes itself", ""),
    ("attach-device m @disk-qcow2 --live", WORKS, "attached"),
    ("checkpoint-create-as m c1 --diskspec vdc", WORKS, "created"),
    ("checkpoint-create m @checkpoint", WORKS, "created"),
    ("checkpoint-list m --tree", WORKS, "+- c2"),
    ("checkpoint-dumpxml m c1 --size", WORKS, "size='0'"),
    ("checkpoint-edit m c1", "", ""),  # the editor of this test writes for machines
    ("checkpoint-info m c1", WORKS, "Children:       1"),
    ("checkpoint-parent m c2", WORKS, "c1"),
    ("backup-begin m @backup", WORKS, "started"),
    ("backup-begin m @pull", WORKS, "started"),
    ("backup-dumpxml m", WORKS, "exportname='vdc'"),
    ("domjobabort m", WORKS, ""),
    ("checkpoint-delete m c1 --children", WORKS, "deleted"),
    ("blockcommit m vdc --top @below.qcow2 --shallow --wait", WORKS, "Commit complete"),
    ("blockcommit m vdc --base @middle.qcow2 --active --pivot", WORKS, "Successfully pivoted"),
    ("blockpull m vdc --wait", WORKS, "Pull complete"),
    ("blockcopy m vdc @copy.raw --format raw --finish", WORKS, "Successfully copied"),
    ("blockcopy m vdc @copy.qcow2 --wait", WORKS, "Now in mirroring phase"),
    ("blockjob m vdc", WORKS, "Block Copy: [100"),
    ("blockjob m vdc --pivot", WORKS, ""),
    ("domblklist m", WORKS, "copy.qcow2"),
    ("detach-disk m vdc --live", WORKS, "detached"),
    # what it is
    ("domid m", WORKS, "1"),
    ("domname 1", WORKS, "m"),
    ("domuuid m", WORKS, "-"),
    ("dominfo m", WORKS, "Acceleration:   kvm"),
    ("domstate m", WORKS, "running"),
    ("domcontrol m", WORKS, "ok"),
    ("domjobinfo m", WORKS, "None"),
    ("domjobabort m", "no job is active", ""),
    ("dumpxml m", WORKS, "<emulator>kvik-vmm</emulator>"),
    ("ttyconsole m", WORKS, "/dev/pts/"),
    ("schedinfo m", WORKS, "posix"),
    ("ps", WORKS, "kvm"),
    ("top -n 1", WORKS, "m"),
    ("metadata m --uri urn:a", WORKS, "<a"),
    ("domstats m", WORKS, "vcpu.0.state=1"),
    # run state
    ("suspend m", WORKS, "suspended"),
    ("domstate m", WORKS, "paused"),
    ("resume m", WORKS, "resumed"),
    ("reset m", WORKS, "was reset"),
    ("reboot m", WORKS, "is being rebooted"),
    ("reboot m --mode agent", NO_AGENT, ""),
    ("domstate m", WORKS, "running"),
    # processors and memory
    ("vcpucount m --active --live", WORKS, "1"),
    ("setvcpus m 3 --live", WORKS, ""),
    ("vcpucount m --active --live", WORKS, "3"),
    ("vcpuinfo m", WORKS, "VCPU:           2"),
    (QUERY % "query-cpus-fast", WORKS, '"cpu-index": 2'),
    ("setvcpus m 2 --live", WORKS, ""),
    ("setvcpus m 4 --live", "more than the 3 that machine 'm' can have", ""),
    ("setvcpus m 2 --config", WORKS, ""),
    ("setmem m 32M --live", WORKS, ""),
    ("setmem m 128M --live", "more than the", ""),
    ("dommemstat m --period 2 --live", WORKS, ""),
    ("dommemstat m", WORKS, "actual"),
    # disks
    ("attach-disk m @b.raw vdb --live", WORKS, "attached"),
    ("domblklist m", WORKS, "b.raw"),
    ("domblkinfo m vdb", WORKS, "4194304"),
    ("domblkstat m vdb", WORKS, "rd_req"),
    ("domblkerror m", WORKS, "No errors found"),
    ("blockresize m vdb 8M", WORKS, "is resized"),
    ("domblkinfo m vdb", WORKS, "8388608"),
    ("blockcopy m vdb @b-copy.qcow2 --format qcow2 --finish", WORKS, "Successfully copied"),
    ("blockpull m vdb", "no backing file", ""),
    ("domblkthreshold m vdb 1M", "has grown is not watched", ""),
    ("blockjob m vdb", WORKS, "No current block job for vdb"),
    ("iothreadinfo m", "there are no I/O threads to change", ""),
    ("iothreadadd m 1 --live", "there are no I/O threads to change", ""),
    ("iothreadset m 1 --poll-grow 1 --live", "there are no I/O threads to change", ""),
    ("iothreadpin m 1 0 --live", "there are no I/O threads to change", ""),
    ("iothreaddel m 1 --live", "there are no I/O threads to change", ""),
    ("blkdeviotune m vdb --total-iops-sec 500 --live", WORKS, ""),
    ("blkdeviotune m vdb", WORKS, "total_iops_sec : 500"),
    ("blkdeviotune m vdb --read-iops-sec 5 --live", "limits reads and writes together", ""),
    ("update-device m @disk --live", WORKS, "updated"),
    (QUERY % "query-block", WORKS, '"iops": 100'),
    ("update-device m @disk-other --live", "the image of disk vda cannot change while the machine runs", ""),
    ("detach-disk m vdb --live", WORKS, "detached"),
    ("change-media m vda --eject", "only a CD-ROM or floppy drive has media", ""),
    # interfaces
    ("attach-interface m bridge br1 --mac 52:54:00:00:00:09 --live", WORKS, "attached"),
    ("domiflist m", WORKS, "br1"),
    ("domif-setlink m 52:54:00:00:00:09 down", WORKS, "updated"),
    ("domif-getlink m 52:54:00:00:00:09", WORKS, "down"),
    ("domifstat m vnet0", WORKS, "rx_bytes"),
    ("domiftune m vnet0 --inbound 500 --live", WORKS, ""),
    ("domiftune m vnet0", WORKS, "inbound.average: 500"),
    ("update-device m @bridge-other --live", WORKS, "updated"),
    ("update-device m @bridge-none --live", "network interface br9: No such device", ""),
    ("detach-interface m bridge --mac 52:54:00:00:00:09 --live", WORKS, "detached"),
    ("attach-device m @direct --live", WORKS, "attached"),
    ("domiflist m", WORKS, "macvtap0"),
    ("domiftune m macvtap0 --outbound 300 --live", WORKS, ""),
    ("dumpxml m", WORKS, "<outbound average='300'/>"),
    ("detach-device m @direct --live", WORKS, "detached"),
    ("domifaddr m --source agent", AGENT, ""),
    ("ip m --source agent", AGENT, ""),
    # other devices
    ("attach-device m @rng --live", WORKS, "attached"),
    ("detach-device-alias m rng1 --live", WORKS, "sent"),
    ("attach-device m @ethernet --live", WORKS, "attached"),
    ("detach-device m @ethernet --live", WORKS, "detached"),
    ("attach-device m @memory --live", WORKS, "attached"),
    ("update-device m @memory-more --live", WORKS, "updated"),
    (QUERY % "query-memory-devices", WORKS, '"requested-size": 134217728'),
    ("detach-device m @memory-more --live", "cannot unplug virtiomem0 while the guest may use 128 MiB of it", ""),
    ("update-device m @memory-none --live", WORKS, "updated"),
    ("detach-device m @memory-none --live", WORKS, "detached"),
    ("update-device m @balloon --live", WORKS, "updated"),
    ("dumpxml m", WORKS, "<stats period='3'/>"),
    ("attach-device m @balloon --live", "there is a memballoon already", ""),
    ("attach-device m @panic --live", "cannot plug a panic into running machine m: it is made at the start", ""),
    ("attach-device m @watchdog --live", "cannot plug a watchdog into running machine m", ""),
    ("attach-device m @serial --live", "cannot plug a serial into running machine m", ""),
    ("attach-device m @console --live", "cannot plug a console into running machine m: the ports of its console", ""),
    ("attach-device m @channel --live", "cannot plug a channel into running machine m: the ports of its console", ""),
    ("attach-device m @dimm --live", "has no memory of model 'dimm'", ""),
    ("attach-device m @cdrom --live", "has no CD drives", ""),
    # the guest and its console
    ("inject-nmi m", WORKS, ""),
    ("screenshot m @shot", "machine m runs on kvik-vmm, which has neither screen nor keyboard", ""),
    ("send-key m KEY_A", "machine m runs on kvik-vmm, which has neither screen nor keyboard", ""),
    ("domdisplay m", "No graphical display found", ""),
    ("vncdisplay m", "Failed to get VNC port", ""),
    ("qemu-monitor-command m --hmp info status", WORKS, "VM status: running"),
    ('qemu-agent-command m \'{"execute": "guest-ping"}\'', AGENT, ""),
    ("domtime m", AGENT, ""),
    ("domhostname m", AGENT, ""),
    ("domfsinfo m", AGENT, ""),
    ("guestinfo m", AGENT, ""),
    ("exec m -- true", AGENT, ""),
    # a snapshot while it runs, of a raw disk: with its figures, limits and size as before
    ("snapshot-create-as m s3 --disk-only", WORKS, "Domain snapshot s3 created"),
    ("domblklist m", WORKS, "a.s3"),
    ("domblkinfo m vda", WORKS, "Capacity:"),
    ("domblkstat m vda", WORKS, "rd_req"),
    ("blkdeviotune m vda --total-iops-sec 400 --live", WORKS, ""),
    ("blkdeviotune m vda", WORKS, "total_iops_sec : 400"),
    ("blockresize m vda 8M", WORKS, "resized"),
    (QUERY % "query-named-block-nodes", WORKS, '"virtual-size": 8388608'),
    # put aside with its memory; the guest goes on as it was
    ("managedsave m --verbose", WORKS, "state saved"),
    ("managedsave-dumpxml m", WORKS, "<name>m</name>"),
    ("managedsave-edit m", "", ""),  # the editor of this test writes for machines
    ("managedsave-define m @m", "", ""),  # what was plugged is not in the first document
    ("managedsave-remove m", WORKS, "Removed managedsave image"),
    ("start m", WORKS, "started"),
    ("save m @m.save", WORKS, "saved to"),
    ("save-image-dumpxml @m.save", WORKS, "<name>m</name>"),
    ("save-image-edit @m.save", "", ""),
    ("save-image-define @m.save @c", "", ""),  # of another machine: refused
    ("restore @m.save", WORKS, "restored from"),
    ("blockcommit m vda --active --pivot", "keeps snapshot 's3'", ""),
    ("snapshot-delete m s3", WORKS, "deleted"),
    ("domblklist m", WORKS, "a.raw"),
    # its end
    ("shutdown m --mode initctl", "by its agent or by ACPI only", ""),
    ("shutdown m --mode agent", NO_AGENT, ""),
    ("shutdown m --mode acpi", WORKS, "is being shutdown"),
    ("undefine m", WORKS, "undefined"),
    ("create @c", WORKS, "created"),
    ("destroy c", WORKS, "destroyed"),
    ("doctor", "", "acceleration"),
]
# The guide's table of devices: what is plugged as its row says.
PLUGGED = {
    "disk": ["attach-disk m @b.raw vdb --live"],
    "interface": [
        "attach-interface m bridge br1 --mac 52:54:00:00:00:09 --live", "attach-device m @ethernet --live",
        "attach-device c @user --live",
    ],
    "rng": ["attach-device m @rng --live"],
    "filesystem": ["attach-device c @filesystem --live"],
    "memory": ["attach-device m @memory --live"],
    "vsock": [],  # no host of the tests has the module
    "memballoon": ["attach-device m @balloon --live"],
    "channel, console, serial": [f"attach-device m @{name} --live" for name in ("channel", "console", "serial")],
    "watchdog, panic": ["attach-device m @watchdog --live", "attach-device m @panic --live"],
}  # fmt: skip
# These need a terminal, or something beside them; each has a test of its own below.
ALONE = {"ssh", "console", "event", "run"}


@functools.cache
def table() -> dict[str, tuple[str, str]]:
    """verb -> (works, agent or refused; the third column)"""
    text = GUIDE.read_text().split("## Every verb\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| (.*?) *\|$", text, re.MULTILINE)
    return {verb: (word, note) for verb, word, note in rows}


def test_the_table_of_devices_says_what_the_steps_do() -> None:
    text = GUIDE.read_text().split("| device |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([a-z][a-z, ]*) \|.*?\| (yes|no) \|", text, re.MULTILINE)
    assert {name for name, _ in rows} == set(PLUGGED)
    said = {line: kind for line, kind, _ in STEPS}
    for name, word in rows:
        for line in PLUGGED[name]:
            assert ("yes" if said.get(line, WORKS) == WORKS else "no") == word, (name, line)


class Machine:
    """The daemon, and the files that the steps name."""

    def __init__(self) -> None:
        become = f'{NAMESPACE}\nshift 3; exec {sys.executable} {ANY_KVM} daemon "$@"'  # for: python -m kvik.daemon
        self.daemon = Kvikd("unshare", "--mount", "--net", "sh", "-c", become, "sh")
        self.root = self.daemon.root
        (self.root / "share").mkdir()
        (self.root / "kernel").write_bytes(kernel())
        (self.root / "editor").write_text(
            "#!/bin/sh\nsed -i 's|</name>|</name><description>edited</description>|' $1\n"
        )
        (self.root / "editor").chmod(0o755)
        for name in ("a.raw", "b.raw"):
            with (self.root / name).open("wb") as image:
                image.truncate(4 << 20)
        create(str(self.root / "lowest.qcow2"), "qcow2", 4 << 20)
        for name, below in (
            ("middle.qcow2", "lowest.qcow2"),
            ("below.qcow2", "middle.qcow2"),
            ("c.qcow2", "below.qcow2"),
        ):
            backing = str(self.root / below)
            create(str(self.root / name), "qcow2", 4 << 20, backing_file=backing, backing_format="qcow2")
        self.write("m", DOMAIN.format(name="m", root=self.root, devices=OWN.format(root=self.root)))
        self.write("c", DOMAIN.format(name="c", root=self.root, devices=""))
        for name, text in DEVICES.items():
            self.write(name, text.format(root=self.root))

    def write(self, name: str, text: str) -> None:
        (self.root / f"{name}.xml").write_text(text)

    def words(self, line: str) -> list[str]:
        def place(word: str) -> str:
            name = word.removeprefix("@")
            return word if name == word else str(self.root / (name if "." in name else f"{name}.xml"))

        return [place(word) for word in shlex.split(line)]

    def command(self, line: str) -> list[str]:
        words = self.words(line)
        start = [str(ANY_KVM), "cli"] if words[0] == "run" else ["-m", "kvik.cli.main"]
        return [sys.executable, *start, "-c", self.daemon.uri, *words]

    @property
    def environ(self) -> dict[str, str]:
        return {**self.daemon.environ, "NO_COLOR": "1", "EDITOR": str(self.root / "editor"), "LANG": "C.UTF-8"}

    def __call__(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(line), env=self.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip

    def out(self, line: str) -> str:
        done = self(line)
        assert done.returncode == 0, (line, done.stderr)
        return done.stdout

    def until(self, line: str, wanted: str) -> None:
        end = time.monotonic() + 30
        while wanted not in (said := self.out(line)):
            assert time.monotonic() < end, (line, wanted, said)

    def close(self) -> None:
        try:
            for domain in self.daemon.connection.domains(1):
                domain.destroy()
            assert "failed unexpectedly" not in self.daemon.messages(), self.daemon.messages()
        finally:
            assert self.daemon.end() == 0
            shutil.rmtree(self.root, ignore_errors=True)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    made = Machine()
    try:
        yield made
    finally:
        made.close()


def test_every_verb_of_a_machine_has_its_row_and_its_step() -> None:
    wanted = {
        verb
        for verb, (_, group, _) in VERBS.items()
        if group in ("machine", "domain", "monitor", "events", "snapshot", "checkpoint", "backup")
    }
    assert set(table()) == wanted
    assert {line.split()[0] for line, _, _ in STEPS} | ALONE == wanted
    for verb, (word, note) in table().items():
        kinds = {kind for line, kind, _ in STEPS if line.split()[0] == verb}
        if word == "refused":
            assert note and not kinds & {WORKS, AGENT, ""}, verb
        else:
            assert verb in ALONE or kinds & {word, ""}, verb


def test_every_verb_does_what_the_table_says(machine: Machine) -> None:
    for line, kind, printed in STEPS:
        done = machine(line)
        said = (line, done.stdout, done.stderr)
        word, note = table()[line.split()[0]]
        if word == "refused":
            assert note in done.stderr, said
        if kind == WORKS:
            assert done.returncode == 0, said
        elif kind == AGENT:
            assert done.returncode != 0 and NO_AGENT in done.stderr and "hint: install" in done.stderr, said
        elif kind:
            assert done.returncode != 0 and kind in done.stdout + done.stderr, said
        assert printed in done.stdout, said
        assert "Traceback" not in done.stderr, said
        if line == "backup-begin m @backup":
            machine.until("domjobinfo m", "None")
        if line.startswith("setvcpus m 2 --live"):
            machine.until("vcpucount m --active --live", "2")  # when the guest has let it go
            machine.until(QUERY % "query-cpus-fast", '"cpu-index": 1')
        elif line.startswith("shutdown m --mode acpi"):
            machine.until("domstate m", "shut off")


@pytest.fixture
def running(machine: Machine) -> Iterator[Machine]:
    machine.out("create @c")
    yield machine
    machine.out("destroy c")


def test_the_console_is_the_serial_line(running: Machine) -> None:
    ours, theirs = pty.openpty()
    client = subprocess.Popen(running.command("console c"), env=running.environ, stdin=theirs, stdout=theirs)
    os.close(theirs)
    seen = b""

    def sees(wanted: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 30
        while wanted not in seen:
            assert select.select([ours], [], [], end - time.monotonic())[0], seen
            seen += os.read(ours, 4096)

    try:
        sees(b"Escape character")
        os.write(ours, b"echo?")
        sees(b"echo?")
        seen = b""
        running.out("inject-nmi c")
        sees(b"N")
        os.write(ours, b"\x1d")
        assert client.wait(30) == 0
    finally:
        client.kill()
        client.wait()
        os.close(ours)


def test_events_are_told_as_they_happen(running: Machine) -> None:
    listener = subprocess.Popen(
        running.command("event --all --loop --timeout 60"), env=running.environ, stdout=subprocess.PIPE, text=True
    )
    assert listener.stdout is not None
    try:
        # The listener says nothing when it listens: a change now and then, until it has heard of one.
        end = time.monotonic() + 30
        while not select.select([listener.stdout], [], [], 0.3)[0]:
            assert time.monotonic() < end
            running.out("suspend c")
            running.out("resume c")
        assert re.search(r"event '.*' for domain 'c': (Suspended|Resumed)", listener.stdout.readline())
    finally:
        listener.kill()
        listener.wait()
        listener.stdout.close()


def test_a_shared_directory_and_passt_bring_their_processes_and_take_them_along(running: Machine) -> None:
    def beside(name: str) -> bool:
        return any(name in argv for argv in processes(running.root))

    if find_program("passt"):
        running.out("attach-device c @user --live")
        assert beside("passt")
        running.out("detach-device c @user --live")
        assert not beside("passt")
    if any(Path(place).exists() for place in VIRTIOFSD):
        running.out("attach-device c @filesystem --live")
        assert beside("virtiofsd")
        running.out("detach-device c @filesystem --live")
        assert not beside("virtiofsd")


def test_a_later_daemon_lets_go_what_an_earlier_one_plugged(running: Machine) -> None:
    running.out("attach-device c @rng --live")
    running.out("attach-device c @memory --live")
    if virtiofsd := any(Path(place).exists() for place in VIRTIOFSD):
        running.out("attach-device c @filesystem --live")
    running.daemon.end(signal.SIGKILL)
    running.daemon.start()
    document = running.out("dumpxml c")
    assert "<rng " in document and "<memory model='virtio-mem'" in document
    running.out("update-device c @memory-none --live")
    for name in ("rng", "memory", *(["filesystem"] if virtiofsd else [])):
        running.out(f"detach-device c @{name} --live")
    document = running.out("dumpxml c")
    assert "<rng " not in document and "<filesystem" not in document and "virtio-mem" not in document
    assert not any("virtiofsd" in argv for argv in processes(running.root))
    running.out("update-device c @balloon --live")


def processes(root: Path) -> list[str]:
    """Command lines of the machine's side processes, by the log that they write to."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and str((entry / "fd/2").readlink()).startswith(f"{root}/"):
                found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found


@pytest.mark.skipif(Path("/dev/vhost-vsock").exists(), reason="this host has vhost_vsock")
def test_a_vsock_where_the_host_has_none_is_refused_with_the_module_that_is_missing(running: Machine) -> None:
    done = running("attach-device c @vsock --live")
    assert done.returncode == 1 and "hint: modprobe vhost_vsock" in done.stderr


def test_run_boots_a_kernel_on_kvik_vmm(machine: Machine) -> None:
    try:
        done = machine(f"run --vmm kvik --kernel {machine.root}/kernel --network none --name r --detach --timeout 1")
        assert "r" in machine.out("list --name").split(), (done.stdout, done.stderr)
        assert "<emulator>kvik-vmm</emulator>" in machine.out("dumpxml r")
    finally:
        machine("destroy r")
        machine("undefine r")


MODELS = {
    "custom": ("<cpu mode='custom'><model>{0}</model></cpu>", "--cpu {0}"),
    "host-model": ("<cpu mode='host-model'/>", "--cpu {0}"),
    "host-passthrough": (
        "<cpu mode='host-passthrough'><feature policy='disable' name='aes'/></cpu>",
        "--cpu host,-aes",
    ),
}


@pytest.mark.parametrize("mode", MODELS)
def test_cpu_models_of_a_document_are_those_that_the_host_can_be(machine: Machine, mode: str) -> None:
    listed = machine.out("cpu-models x86_64 --emulatorbin kvik-vmm").split()
    told = machine.out("domcapabilities --emulatorbin kvik-vmm")
    nearest = re.search(r"<mode name='host-model' supported='yes'>\s*<model fallback='forbid'>(.*?)<", told)
    assert nearest is not None and nearest[1] in listed
    cpu, words = MODELS[mode]
    document = DOMAIN.format(name="cpu", root=machine.root, devices="")
    document = re.sub("<cpu .*</cpu>", cpu.format(nearest[1]), document).replace(
        "<maxMemory slots='4' unit='MiB'>2048</maxMemory>", ""
    )
    machine.write("cpu", document)
    machine.out("create @cpu")
    try:
        (log,) = machine.root.rglob("qemu/cpu.log")
        assert words.format(nearest[1]) in log.read_text()
        assert (nearest[1] in machine.out("dumpxml cpu")) is (mode != "host-passthrough")
    finally:
        machine.out("destroy cpu")
        log.unlink()


def test_a_cpu_model_that_is_not_there_is_refused_with_those_that_are(machine: Machine) -> None:
    document = DOMAIN.format(name="cpu", root=machine.root, devices="")
    machine.write("cpu", document.replace("mode='host-passthrough'>", "mode='custom'><model>core2duo</model>"))
    done = machine("define @cpu")
    assert done.returncode == 1 and "at /domain/cpu/model: kvik-vmm has no CPU model 'core2duo'" in done.stderr
    assert "x86-64-v1" in done.stderr
