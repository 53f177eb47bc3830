"""What bitmaps of a chain are taken for, and what of checkpoints is kept on disk: nothing here runs a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvik.conf.backup import format_backup, parse_backup
from kvik.conf.checkpoint import Checkpoint, CheckpointDisk, CheckpointDisks, TrackedImage, TrackedImages
from kvik.conf.devices.disk import BackingStore, Disk, DiskDriver, DiskSource, DiskTarget, Format
from kvik.errors import CheckpointInconsistent, ConfigError
from kvik.hypervisor.driver import Bitmap
from kvik.manager.backup.job import BackupJob
from kvik.manager.checkpoints import chain
from kvik.manager.checkpoints.store import CheckpointStore

GOOD = Bitmap(65536, 0, recording=True, persistent=True, inconsistent=False)
STALE = Bitmap(65536, 0, recording=True, persistent=True, inconsistent=True)
FROZEN = Bitmap(65536, 0, recording=False, persistent=True, inconsistent=False)
PASSING = Bitmap(65536, 0, recording=True, persistent=False, inconsistent=False)


def disk() -> Disk:
    """/top (3) on /middle (2) on /base (1)."""
    base = BackingStore(type="file", index=1, format=Format(type="qcow2"), source=DiskSource(file="/base"))
    middle = BackingStore(
        type="file", index=2, format=Format(type="qcow2"), source=DiskSource(file="/middle"), backing_store=base
    )
    return Disk(
        driver=DiskDriver(type="qcow2"),
        source=DiskSource(file="/top", index=3),
        backing_store=middle,
        target=DiskTarget(dev="vda", bus="virtio"),
    )


def checkpoint(first: str, name: str = "c") -> Checkpoint:
    return Checkpoint(
        name=name,
        creation_time=7,
        disks=CheckpointDisks(disks=[CheckpointDisk(name="vda", checkpoint="bitmap", bitmap="b")]),
        images=TrackedImages(images=[TrackedImage(disk="vda", path=first)]),
    )


def test_a_chain_tells_everything_or_is_refused() -> None:
    everywhere = {1: {"b": GOOD}, 2: {"b": GOOD}, 3: {"b": GOOD}}
    assert chain.sources(disk(), checkpoint("/top"), everywhere) == [(3, "b")]
    assert chain.sources(disk(), checkpoint("/middle"), everywhere) == [(3, "b"), (2, "b")]
    assert chain.sources(disk(), checkpoint("/base"), everywhere) == [(3, "b"), (2, "b"), (1, "b")]
    # What lies below where tracking began is nobody's business.
    assert chain.sources(disk(), checkpoint("/middle"), {**everywhere, 1: {}}) == [(3, "b"), (2, "b")]
    for image in (1, 2, 3):
        for bad, reason in (({}, "has no bitmap"), ({"b": STALE}, "inconsistent"), ({"b": FROZEN}, "did not record"),
                            ({"b": PASSING}, "did not record")):  # fmt: skip
            with pytest.raises(CheckpointInconsistent, match=reason) as caught:
                chain.sources(disk(), checkpoint("/base"), {**everywhere, image: bad})
            assert "full backup" in caught.value.remedy
    with pytest.raises(CheckpointInconsistent, match="began in /gone, which is none of the disk's"):
        chain.sources(disk(), checkpoint("/gone"), everywhere)
    other = checkpoint("/base")
    other.disks = CheckpointDisks(disks=[CheckpointDisk(name="vda", checkpoint="no")])
    with pytest.raises(CheckpointInconsistent, match="does not track that disk"):
        chain.sources(disk(), other, everywhere)


def test_what_was_being_made_is_told_from_what_is_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "m")
    assert len(store.load()[0]) == 0
    store.write(checkpoint("/a", "whole"))
    store.write(checkpoint("/a", "half"), pending=True)
    store.write(checkpoint("/a", "late"), pending=True)
    text = (tmp_path / "m" / "late.pending").read_text()
    (tmp_path / "m" / "late.xml").write_text(text)  # killed before the other was removed
    (tmp_path / "m" / "damaged.xml").write_text("<domaincheckpoint>")
    (tmp_path / "m" / "other.xml").write_text(text)
    found, warnings = store.load()
    assert set(found.all) == {"whole", "late"} and set(found.pending) == {"half"}
    assert len(warnings) == 2 and not (tmp_path / "m" / "late.pending").exists()
    assert found.all["whole"].image_of("vda") == "/a" and found.all["whole"].bitmap_of("vda") == "b"
    for name in ("whole", "half", "late"):
        store.remove(name)
    assert not list((tmp_path / "m").glob("*.pending"))


def test_a_backups_facts_are_checked(tmp_path: Path) -> None:
    xml = (
        "<domainbackup mode='pull'><incremental>c</incremental><server transport='unix' socket='/s'/><disks>"
        "<disk name='vda' backup='yes' type='file' backupmode='incremental' incremental='c' exportname='vda' "
        "exportbitmap='b'><driver type='qcow2'/><scratch file='/x'/></disk><disk name='vdb' backup='no'/></disks>"
        "</domainbackup>"
    )
    backup = parse_backup(xml)
    assert parse_backup(format_backup(backup)) == backup and [item.name for item in backup.chosen] == ["vda"]
    job = BackupJob(backup, created=["/x"], checkpoint="c", began=1.5)
    facts = job.facts()
    store = CheckpointStore(tmp_path / "m")
    store.write_backup(facts)
    again = BackupJob.from_facts(store.read_backup() or {})
    assert again.facts() == facts and again.jobs == ["backup-vda"]
    for wrong in ({"created": ["relative"]}, {"phase": "done"}, {"began": "x"}, {"document": "<a/>"}, {"held": None},
                  {"checkpoint": 1}):  # fmt: skip
        with pytest.raises(ValueError):
            BackupJob.from_facts({**facts, **wrong})
    store.remove_backup()
    assert store.read_backup() is None and not (tmp_path / "m").exists()
    with pytest.raises(ConfigError, match="starts with <domainbackup>"):
        parse_backup("<domaincheckpoint/>")
