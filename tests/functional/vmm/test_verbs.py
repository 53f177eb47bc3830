"""Every verb of kvik on a machine that runs on kvik-vmm, through the command and a real daemon, as the guide's table
promises (docs/guide/vmm.md, "Every verb").

One machine, one guest of 386 bytes that lets go what it is asked for (`acpi_guest.py`), one long dialogue: the steps
stand in the order in which they are run. The daemon lives in a network namespace of its own.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from verbs_machine import MARKS, Machine

from kvik.cli.verbs import VERBS

pytestmark = MARKS
GUIDE = Path(__file__).parents[3] / "docs/guide/vmm.md"
NO_AGENT = "the guest agent is not connected"

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
# These need a terminal, or something beside them; each has a test of its own in test_verbs_alone.py.
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
