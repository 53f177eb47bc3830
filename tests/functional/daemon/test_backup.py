"""Checkpoints and backups as users make them: kvik's verbs and Debian's virsh on a real daemon and QEMU.

What was backed up is put together again and compared, byte for byte, with what the disk held at that moment.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvik.client import checkpoint as client
from kvik.errors import CheckpointInconsistent, KvikError

from .conftest import Kvikd, Make, until

SIZE = 4 << 20
MIB = 1 << 20


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="kvbak"))
    yield directory
    shutil.rmtree(directory)


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def start_backup(kvikd: Kvikd, name: str, xml: str, checkpoint: str = "", flags: int = 0) -> None:
    document = f"<domaincheckpoint><name>{checkpoint}</name></domaincheckpoint>" if checkpoint else None
    client.backup_begin(kvikd.connection.domain(name), xml, document, flags)


def ok(kvikd: Kvikd, *words: str) -> str:
    done = kvikd.kvik(*words)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def virsh(kvikd: Kvikd, *words: str) -> str:
    done = kvikd.virsh(*words)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout.strip()


def disk(path: Path, target: str = "vda", kind: str = "qcow2") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{kind}'/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>"
    )


class Guest:
    """Writes to its disks as a guest does: through the device. `holds` is what each disk holds now."""

    def __init__(self, kvikd: Kvikd, name: str, disks: int = 1) -> None:
        self.kvikd, self.name = kvikd, name
        self.holds = [bytearray(SIZE) for _ in range(disks)]

    def write(self, byte: int, offset: int, size: int, number: int = 0) -> None:
        device = f"/machine/peripheral/virtio-disk{number}/virtio-backend"
        command = f'qemu-io -d {device} "write -P {byte:#x} {offset} {size}"'
        said = self.kvikd.connection.domain(self.name).monitor_command(command, hmp=True)
        assert not said.strip(), said
        self.holds[number][offset : offset + size] = bytes([byte]) * size

    def is_in(self, path: Path | str, number: int = 0, *, then: bytes | None = None, kind: str = "qcow2") -> None:
        raw = Path(tempfile.mkstemp(prefix="kvraw")[1])
        try:
            raw.write_bytes(self.holds[number] if then is None else then)
            run("qemu-img", "compare", "-U", "-f", "raw", "-F", kind, str(raw), str(path))
        finally:
            raw.unlink()


def begin(kvikd: Kvikd, name: str, place: Path, xml: str, checkpoint: str = "", *options: str) -> str:
    (place / "backup.xml").write_text(xml)
    words = ["--backupxml", str(place / "backup.xml")]
    if checkpoint:
        (place / "checkpoint.xml").write_text(f"<domaincheckpoint><name>{checkpoint}</name></domaincheckpoint>")
        words += ["--checkpointxml", str(place / "checkpoint.xml")]
    return ok(kvikd, "backup-begin", name, *words, *options)


def push(path: Path, since: str = "", kind: str = "qcow2") -> str:
    incremental = f"<incremental>{since}</incremental>" if since else ""
    return (
        f"<domainbackup>{incremental}<disks><disk name='vda' type='file'><driver type='{kind}'/>"
        f"<target file='{path}'/></disk></disks></domainbackup>"
    )


def over(kvikd: Kvikd, name: str) -> str:
    """Waits for the end of the backup; how it ended."""
    domain = kvikd.connection.domain(name)
    until(lambda: domain.job_stats()[0] == 0)
    return {3: "completed", 4: "failed", 5: "cancelled"}[domain.job_stats(1)[0]]


def ask(kvikd: Kvikd, name: str, command: str, **arguments: Any) -> Any:
    """What QEMU answers."""
    text = json.dumps({"execute": command, "arguments": arguments})
    return json.loads(kvikd.connection.domain(name).monitor_command(text))["return"]


def bitmaps(kvikd: Kvikd, name: str) -> dict[str, list[str]]:
    told = ok(
        kvikd, "qemu-monitor-command", name, '{"execute": "query-named-block-nodes", "arguments": {"flat": true}}'
    )
    return {
        item["node-name"]: sorted(entry["name"] for entry in item.get("dirty-bitmaps", []))
        for item in json.loads(told)["return"]
        if item["node-name"].endswith("-format")
    }


def nothing_left(kvikd: Kvikd, name: str, *files: Path) -> None:
    """Of a backup that is over: no node, job, export, descriptor, file."""
    nodes = bitmaps(kvikd, name)
    assert not [node for node in nodes if node.startswith("backup-")]
    assert not [one for found in nodes.values() for one in found if one.startswith("backup-")]
    for command in ("query-jobs", "query-block-exports"):
        assert ask(kvikd, name, command) == []
    assert "backup:" not in str(ask(kvikd, name, "query-fdsets"))
    assert not [file for file in files if os.path.lexists(file)]
    assert not (kvikd.paths.checkpoints / name / "backup.json").exists()


def machine(kvikd: Kvikd, make: Make, place: Path, name: str, disks: int = 1) -> Any:
    paths = [place / f"{number}.qcow2" for number in range(disks)]
    for path in paths:
        run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE))
    domain = make(name, "".join(disk(path, f"vd{'abcd'[number]}") for number, path in enumerate(paths)), kernel=False)
    domain.start()
    return domain


def test_a_full_and_two_incremental_backups_make_the_disk_again(kvikd: Kvikd, make: Make, place: Path) -> None:
    domain = machine(kvikd, make, place, "pusher")
    guest = Guest(kvikd, "pusher")
    guest.write(0x11, 0, MIB)
    said = begin(kvikd, "pusher", place, push(place / "full.qcow2"), "one")
    assert said.splitlines()[0] == "Backup started"
    assert over(kvikd, "pusher") == "completed"
    first = bytes(guest.holds[0])
    guest.write(0x22, MIB + 65536, 65536)
    assert 'size="65536"' in ok(kvikd, "checkpoint-dumpxml", "pusher", "one", "--size").replace("'", '"')
    begin(kvikd, "pusher", place, push(place / "second.qcow2", "one"), "two")
    assert over(kvikd, "pusher") == "completed"
    second = bytes(guest.holds[0])
    # The machine was off in between, and wrote again.
    domain.destroy()
    domain.start()
    guest.write(0x33, 3 * MIB, 65536)
    guest.write(0x44, 0, 512)
    # Debian's virsh does the same.
    (place / "third.xml").write_text(push(place / "third.qcow2", "two"))
    assert virsh(kvikd, "backup-begin", "pusher", str(place / "third.xml")) == "Backup started"
    until(lambda: domain.job_stats()[0] == 0)
    assert virsh(kvikd, "domjobinfo", "pusher", "--completed").splitlines()[:2] == [
        "Job type:         Completed   ", "Operation:        Backup      ",
    ]  # fmt: skip
    assert virsh(kvikd, "checkpoint-create-as", "pusher", "extra") == "Domain checkpoint extra created"
    assert virsh(kvikd, "checkpoint-list", "pusher", "--tree").split() == ["one", "|", "+-", "two", "|", "+-", "extra"]
    assert "size='0'" in virsh(kvikd, "checkpoint-dumpxml", "pusher", "extra", "--size", "--no-domain")
    assert virsh(kvikd, "checkpoint-delete", "pusher", "extra") == "Domain checkpoint extra deleted"
    nothing_left(kvikd, "pusher")
    guest.is_in(place / "full.qcow2", then=first)
    for below, above, content in (("full", "second", second), ("second", "third", bytes(guest.holds[0]))):
        run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", f"{below}.qcow2", str(place / f"{above}.qcow2"))
        guest.is_in(place / f"{above}.qcow2", then=content)
    # Only what changed was copied: two clusters.
    told = json.loads(run("qemu-img", "map", "--output=json", str(place / "third.qcow2")))
    assert sum(item["length"] for item in told if item["depth"] == 0 and item["data"]) == 2 * 65536
    assert bitmaps(kvikd, "pusher") == {"virtio-disk0-1-format": ["one", "two"]}


def pull(place: Path, since: str = "", socket: str = "") -> str:
    incremental = f"<incremental>{since}</incremental>" if since else ""
    server = f"<server transport='unix' socket='{socket or place / 'nbd'}'/>"
    return (
        f"<domainbackup mode='pull'>{incremental}{server}<disks><disk name='vda' type='file'>"
        f"<scratch file='{place / 'scratch'}'/></disk></disks></domainbackup>"
    )


def dirty(place: Path, name: str = "vda", bitmap: str = "backup-vda") -> list[tuple[int, int]]:
    """What a client of the export reads of its bitmap: (offset, length) of what changed."""
    options = f"driver=nbd,server.type=unix,server.path={place / 'nbd'},export={name},x-dirty-bitmap=qemu:dirty-bitmap:"
    told = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options + bitmap))
    return [(item["start"], item["length"]) for item in told if not item["data"]]


def test_what_is_pulled_is_the_disk_as_it_was_whatever_the_guest_writes(kvikd: Kvikd, make: Make, place: Path) -> None:
    machine(kvikd, make, place, "puller")
    guest = Guest(kvikd, "puller")
    guest.write(0x11, 0, 2 * MIB)
    start_backup(kvikd, "puller", pull(place), "one")
    before = bytes(guest.holds[0])
    guest.write(0x22, 65536, 65536)
    assert (place / "nbd").stat().st_mode & 0o777 == 0o600
    assert (place / "scratch").stat().st_mode & 0o777 == 0o600
    guest.is_in(f"nbd+unix:///vda?socket={place / 'nbd'}", then=before, kind="raw")
    told = virsh(kvikd, "domjobinfo", "puller")
    assert "Operation:        Backup" in told and told.startswith("Job type:         Unbounded")
    shown = ElementTree.fromstring(virsh(kvikd, "backup-dumpxml", "puller"))
    item = shown.find("disks/disk")
    assert item is not None and item.attrib["exportname"] == "vda" and shown.get("mode") == "pull"
    assert "already running" in kvikd.virsh("backup-begin", "puller").stderr
    for words in (
        ("blockpull", "puller", "vda"),
        ("detach-disk", "puller", "vda"),
        ("blockjob", "puller", "vda", "--abort"),
    ):
        assert kvikd.kvik(*words).returncode == 1
    assert "has a backup under way" in kvikd.kvik("snapshot-create-as", "puller", "s", "--disk-only").stderr
    virsh(kvikd, "domjobabort", "puller")
    assert over(kvikd, "puller") == "completed"
    nothing_left(kvikd, "puller", place / "nbd", place / "scratch")
    # The same over TCP, with all that the document leaves out.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_backup(kvikd, "puller", f"<domainbackup mode='pull'><server name='localhost' port='{port}'/></domainbackup>")
    then = bytes(guest.holds[0])
    guest.write(0x44, 3 * MIB, 65536)
    guest.is_in(f"nbd://127.0.0.1:{port}/vda", then=then, kind="raw")
    kvikd.connection.domain("puller").abort_job()
    nothing_left(kvikd, "puller", *place.glob("0.qcow2.*"))
    # What changed since, and no more, by its bitmap; the daemon dies meanwhile, and the next one ends it.
    start_backup(kvikd, "puller", pull(place, "one"))
    before = bytes(guest.holds[0])
    guest.write(0x33, 0, 512)
    assert dirty(place) == [(65536, 65536), (3 * MIB, 65536)]
    kvikd.end(signal.SIGKILL)
    assert dirty(place) == [(65536, 65536), (3 * MIB, 65536)]
    kvikd.start()
    guest.is_in(f"nbd+unix:///vda?socket={place / 'nbd'}", then=before, kind="raw")
    kvikd.connection.domain("puller").abort_job()
    nothing_left(kvikd, "puller", place / "nbd", place / "scratch")
    assert over(kvikd, "puller") == "completed"
    guest.is_in(place / "0.qcow2")
    assert bitmaps(kvikd, "puller") == {"virtio-disk0-1-format": ["one"]}


def test_bitmaps_go_with_the_data_through_snapshots_and_merges(kvikd: Kvikd, make: Make, place: Path) -> None:
    domain = machine(kvikd, make, place, "merger")
    guest = Guest(kvikd, "merger")
    guest.write(0x11, 0, 2 * MIB)
    start_backup(kvikd, "merger", push(place / "full.qcow2"), "old")
    over(kvikd, "merger")
    full = bytes(guest.holds[0])

    def changed(since: str, based_on: bytes) -> set[int]:
        """The 64 KiB clusters of an incremental backup, which makes the disk of `based_on` (and is thrown away)."""
        path = place / f"since-{since}.qcow2"
        path.unlink(missing_ok=True)
        start_backup(kvikd, "merger", push(path, since))
        assert over(kvikd, "merger") == "completed"
        told = json.loads(run("qemu-img", "map", "--output=json", str(path)))
        found = {
            number
            for item in told
            if item["data"]
            for number in range(item["start"] // 65536, (item["start"] + item["length"]) // 65536)
        }
        made = bytearray(based_on)
        for number in found:
            run_ = slice(number * 65536, (number + 1) * 65536)
            made[run_] = guest.holds[0][run_]
        assert made == guest.holds[0], f"a backup since {since} lacks something"
        return found

    def write(number: int) -> None:
        guest.write(0x40 + number, number * 65536, 65536)

    write(3)
    snap = lambda name: ok(kvikd, "snapshot-create-as", "merger", name, "--disk-only", "--no-metadata")  # noqa: E731
    snap("s1")
    write(4)
    client.create(domain, "<domaincheckpoint><name>new</name></domaincheckpoint>")
    middle = bytes(guest.holds[0])
    write(5)
    snap("s2")
    write(6)
    assert changed("old", full) == {3, 4, 5, 6}
    assert changed("new", middle) == {5, 6}
    assert client.lookup(domain, "new").xml(4).count("size=") == 1
    # s1, in which the tracking of `new` began, into the base: what it tells must come along.
    ok(kvikd, "blockcommit", "merger", "vda", "--top", str(place / "0.s1"), "--base", str(place / "0.qcow2"), "--wait")
    assert changed("new", middle) >= {5, 6}
    assert changed("old", full) == {3, 4, 5, 6}
    # The machine ends; the bitmaps are in the images.
    domain.destroy()
    domain.start()
    assert changed("old", full) == {3, 4, 5, 6}
    write(7)
    # All of it to another image, and on.
    ok(kvikd, "blockcopy", "merger", "vda", "--dest", str(place / "moved.qcow2"), "--pivot")
    write(8)
    assert changed("new", middle) >= {5, 6, 7, 8}
    assert changed("old", full) == {3, 4, 5, 6, 7, 8}
    # On top of it once more, and all into the base while the guest writes there.
    snap("s3")
    write(9)
    client.create(domain, "<domaincheckpoint><name>top</name></domaincheckpoint>")
    late = bytes(guest.holds[0])
    write(10)
    ok(kvikd, "blockcommit", "merger", "vda", "--active", "--pivot")
    write(11)
    assert changed("top", late) >= {10, 11}
    assert changed("old", full) == {3, 4, 5, 6, 7, 8, 9, 10, 11}
    snap("s4")
    write(12)
    ok(kvikd, "blockpull", "merger", "vda", "--wait")
    assert changed("top", late) >= {10, 11, 12}
    assert changed("old", full) >= {3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
    assert {"new", "old", "top"} in map(set, bitmaps(kvikd, "merger").values())
    client.lookup(domain, "old").delete()
    assert all("old" not in found for found in bitmaps(kvikd, "merger").values())
    assert changed("top", late) >= {10, 11, 12}


def test_a_daemon_that_dies_leaves_nothing_half_done(kvikd: Kvikd, make: Make, place: Path) -> None:
    domain = machine(kvikd, make, place, "killed")
    guest = Guest(kvikd, "killed")
    guest.write(0x11, 0, 3 * MIB)
    facts = kvikd.paths.checkpoints / "killed" / "backup.json"
    # While a push goes on: the next daemon finds how it ended, or follows it until it does.
    start_backup(kvikd, "killed", push(place / "slow.qcow2"), "one")
    then = bytes(guest.holds[0])
    kvikd.end(signal.SIGKILL)
    kvikd.start()
    assert over(kvikd, "killed") == "completed"
    nothing_left(kvikd, "killed")
    guest.is_in(place / "slow.qcow2", then=then)
    # Before anybody was told that it began: all of it goes, the checkpoint too.
    start_backup(kvikd, "killed", pull(place), "two")
    kvikd.end(signal.SIGKILL)
    told = json.loads(facts.read_text())
    facts.write_text(json.dumps({**told, "phase": "starting"}))
    kvikd.start()
    nothing_left(kvikd, "killed", place / "nbd", place / "scratch")
    domain = kvikd.connection.domain("killed")
    assert [one.name for one in client.checkpoints(domain)] == ["one"]
    assert bitmaps(kvikd, "killed") == {"virtio-disk0-1-format": ["one"]}
    # A checkpoint that was being made: its bitmap is taken back.
    client.create(domain, "<domaincheckpoint><name>three</name></domaincheckpoint>")
    kvikd.end(signal.SIGKILL)
    document = facts.with_name("three.xml")
    document.rename(document.with_suffix(".pending"))
    kvikd.start()
    domain = kvikd.connection.domain("killed")
    assert [one.name for one in client.checkpoints(domain)] == ["one"]
    assert bitmaps(kvikd, "killed") == {"virtio-disk0-1-format": ["one"]}
    # The machine ends with the daemon away, amid a pull: the scratch image goes.
    domain.destroy()
    domain.start()
    start_backup(kvikd, "killed", pull(place))
    kvikd.end(signal.SIGKILL)
    pid = int(next((kvikd.paths.run / "qemu").glob("*killed.xml")).read_text().split('pid="')[1].split('"')[0])
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}/fd").exists())
    kvikd.start()
    domain = kvikd.connection.domain("killed")
    assert not [path for path in (place / "nbd", place / "scratch", facts) if os.path.lexists(path)]
    # That QEMU did not write its bitmaps: what changed since is not known, and no backup pretends to.
    domain.start()
    with pytest.raises(CheckpointInconsistent, match="inconsistent"):
        start_backup(kvikd, "killed", push(place / "lacking.qcow2", "one"))
    assert not (place / "lacking.qcow2").exists() and not facts.exists()
    assert "size=" not in client.lookup(domain, "one").xml(4)
    client.lookup(domain, "one").delete()
    assert bitmaps(kvikd, "killed") == {"virtio-disk0-1-format": []}


def test_what_cannot_be_backed_up_is_said_and_leaves_nothing(kvikd: Kvikd, make: Make, place: Path) -> None:
    raw = place / "raw.img"
    run("qemu-img", "create", "-q", "-f", "raw", str(raw), str(SIZE))
    path = place / "0.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE))
    domain = make("refused", disk(path) + disk(raw, "vdb", "raw"), kernel=False)
    with pytest.raises(KvikError, match="not running"):
        start_backup(kvikd, "refused", push(place / "b"))
    domain.start()
    (place / "there").touch()
    (place / "small").write_bytes(bytes(512))
    disks = "<domainbackup{}>{}<disks><disk name='vda' {}>{}</disk></disks></domainbackup>"
    target = f"<target file='{place}/b'/>"
    server = "<server name='localhost' port='10999' tls='yes'/>"
    for xml, reason in (
        ("<domaincheckpoint/>", "starts with <domainbackup>"),
        (push(place / "there"), "exists already"),
        (push(place / "b", "none"), "no domain checkpoint with matching name 'none'"),
        (disks.format("", "", "type='network'", ""), "network"),
        (disks.format("", "", "type='file' backupmode='incremental'", target), "requires setting 'incremental'"),
        (disks.format("", "", "", f"<scratch file='{place}/b'/>"), "has a <target>, no <scratch>"),
        (disks.format("", "", "", "<driver type='vmdk'/>" + target), "qcow2 or raw, not vmdk"),
        (disks.format("", "", "", "<target file='b'/>"), "absolute path"),
        (disks.format(" mode='pull'", server, "", ""), "over TLS needs ca-cert.pem, server-cert.pem"),
        (disks.format(" mode='pull'", "<server transport='unix'/>", "", ""), "needs socket="),
        (disks.format("", "<server/>", "", target), "has no <server>"),
        (disks.format("", "", "", target).replace("vda", "vdz"), "no disk named 'vdz'"),
        (disks.format(" mode='pull'", "<server name='localhost' port='70000'/>", "", ""), "no port 70000"),
        (push(place / "b", "none", "raw").replace("vda", "vdb"), "new raw image cannot say"),
    ):  # fmt: skip
        with pytest.raises(KvikError) as caught:
            start_backup(kvikd, "refused", xml)
        assert reason in str(caught.value), (xml, str(caught.value))
    with pytest.raises(KvikError, match="checkpoint for disk vdb unsupported for storage type raw"):
        start_backup(kvikd, "refused", push(place / "b"), "one")
    reuse = 1
    for xml, reason in ((push(path), "in use by machine 'refused'"), (push(place / "small"), "not a qcow2 image")):
        with pytest.raises(KvikError, match=reason):
            start_backup(kvikd, "refused", xml, flags=reuse)
    assert path.exists() and (place / "small").stat().st_size == 512
    nothing_left(kvikd, "refused", place / "b")
    assert client.checkpoints(domain) == []
    # All that there is, by nothing but the verb; a raw disk needs no bitmap.
    ok(kvikd, "backup-begin", "refused")
    assert over(kvikd, "refused") == "completed"
    assert len(list(place.glob("0.qcow2.*"))) == len(list(place.glob("raw.img.*"))) == 1
    # Who gives a push up is left without its file and without its checkpoint.
    domain.destroy()
    large = place / "large.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(large), "256M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x11 0 256M", str(large))
    domain = make("given-up", disk(large), kernel=False)
    domain.start()
    start_backup(kvikd, "given-up", push(place / "b"), "two")
    domain.abort_job()
    assert over(kvikd, "given-up") == "cancelled"
    assert client.checkpoints(domain) == []
    assert bitmaps(kvikd, "given-up") == {"virtio-disk0-1-format": []}
    nothing_left(kvikd, "given-up", place / "b")


def test_a_disk_with_its_own_thread_is_pushed_and_not_pulled(kvikd: Kvikd, make: Make, place: Path) -> None:
    path = place / "0.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE))
    threaded = disk(path).replace("type='qcow2'/>", "type='qcow2' iothread='1'/>")
    domain = make("threaded", threaded, kernel=False, extra="<iothreads>1</iothreads>")
    domain.start()
    guest = Guest(kvikd, "threaded")
    guest.write(0x11, 0, MIB)
    start_backup(kvikd, "threaded", push(place / "full.qcow2"), "one")
    assert over(kvikd, "threaded") == "completed"
    guest.write(0x22, MIB, 65536)
    kvikd.connection.register("job-completed", domain)
    start_backup(kvikd, "threaded", push(place / "second.qcow2", "one"))
    assert over(kvikd, "threaded") == "completed"
    assert domain.state().state == 1  # runs
    told = kvikd.connection.next_event(10.0)
    assert ("operation", 1, 9) in told.fields["params"] and ("success", 6, 1) in told.fields["params"]
    run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", "full.qcow2", str(place / "second.qcow2"))
    guest.is_in(place / "second.qcow2")
    # A client that leaves would end this QEMU, and the guest with it.
    with pytest.raises(KvikError, match="has an I/O thread"):
        start_backup(kvikd, "threaded", pull(place))
    domain.destroy()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a loop device stands for the backup's disk")
def test_a_raw_copy_on_a_device_is_brought_up_to_date(kvikd: Kvikd, make: Make, place: Path) -> None:
    (place / "device").write_bytes(bytes(SIZE))
    done = subprocess.run(
        ["losetup", "-f", "--show", str(place / "device")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs a loop device: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        machine(kvikd, make, place, "copied")
        guest = Guest(kvikd, "copied")
        guest.write(0x11, 0, MIB)
        to_device = push(device, "{}", "raw").replace("type='file'", "type='block'").replace("file=", "dev=")
        start_backup(kvikd, "copied", to_device.replace("<incremental>{}</incremental>", ""), "one")
        assert over(kvikd, "copied") == "completed"
        guest.write(0x22, 3 * MIB, 65536)
        start_backup(kvikd, "copied", to_device.format("one"), flags=1)
        assert over(kvikd, "copied") == "completed"
        nothing_left(kvikd, "copied")
        guest.is_in(device, kind="raw")
        kvikd.connection.domain("copied").destroy()
    finally:
        run("losetup", "-d", str(device))
