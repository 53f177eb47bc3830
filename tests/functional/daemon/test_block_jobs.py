"""Block jobs as users run them: kvik's verbs on a real daemon and QEMU, the documents and the files compared after."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvik.errors import KvikError

from .conftest import Kvikd, Make, until

SIZE = 4 << 20


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="kvblk"))
    yield directory
    shutil.rmtree(directory)


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def image(path: Path, byte: str = "", below: Path | None = None, *, offset: int = 0, size: int = SIZE) -> Path:
    """`size` bytes of `byte` from `offset` on, on top of `below`."""
    options = ["-b", str(below), "-F", "qcow2"] if below is not None else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(SIZE))
    if byte:
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 0x{byte} {offset} {size}", str(path))
    return path


@pytest.fixture
def chain(place: Path) -> list[Path]:
    """Three images, each with a MiB of its own: base (at 0), middle (at 1), top (at 2)."""
    made: list[Path] = []
    for number, name in enumerate(("base", "middle", "top")):
        below = made[-1] if made else None
        made.append(image(place / f"{name}.qcow2", f"1{number}", below, offset=number << 20, size=1 << 20))
    return made


def holds(path: Path, kind: str = "qcow2") -> None:
    """What the guest saw is there: byte 1N in MiB N."""
    for number in range(3):
        told = run("qemu-io", "-r", "-U", "-f", kind, "-c", f"read -P 0x1{number} {number << 20} 1M", str(path))
        assert "verification failed" not in told, (path, number, told)


def disk(path: Path, target: str = "vda", kind: str = "qcow2") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{kind}'/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>"
    )


def images_of(kvikd: Kvikd, name: str, *options: str) -> list[str]:
    """File names of a disk's chain, from the top down, in a document."""
    root = ElementTree.fromstring(ok(kvikd, "dumpxml", name, *options))
    here = root.find("./devices/disk")
    found: list[str] = []
    while here is not None:
        source = here.find("source")
        if source is not None:
            found.append(Path(source.get("file", "")).name)
        here = here.find("backingStore")
    return found


def ok(kvikd: Kvikd, *words: str) -> str:
    done = kvikd.kvik(*words)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def nodes(domain: Any, kvikd: Kvikd) -> set[str]:
    """The block nodes of QEMU that are images of disks."""
    told = ok(
        kvikd,
        "qemu-monitor-command",
        domain.name,
        '{"execute": "query-named-block-nodes", "arguments": {"flat": true}}',
    )
    return {item["node-name"] for item in json.loads(told)["return"] if item["node-name"].startswith("virtio-disk")}


def test_a_disk_moves_while_its_machine_runs(kvikd: Kvikd, make: Make, place: Path, chain: list[Path]) -> None:
    domain = make("mover", disk(chain[2]), kernel=False)
    domain.start()
    assert images_of(kvikd, "mover") == ["top.qcow2", "middle.qcow2", "base.qcow2"]
    said = ok(kvikd, "blockcopy", "mover", "vda", "--dest", str(place / "moved.qcow2"), "--pivot", "--verbose")
    assert said.strip() == "Successfully pivoted"
    assert images_of(kvikd, "mover") == images_of(kvikd, "mover", "--inactive") == ["moved.qcow2"]
    assert "mirror" not in ok(kvikd, "dumpxml", "mover")
    assert nodes(domain, kvikd) == {"virtio-disk0-4-format", "virtio-disk0-4-storage"}
    assert (place / "moved.qcow2").stat().st_mode & 0o777 == 0o600
    holds(place / "moved.qcow2")
    # Again, to another format, and with the copy kept while the machine stays where it is.
    raw = place / "raw.img"
    ok(kvikd, "blockcopy", "mover", "vda", "--dest", str(raw), "--format", "raw", "--wait")
    mirror = ElementTree.fromstring(ok(kvikd, "dumpxml", "mover")).find("./devices/disk/mirror")
    assert mirror is not None
    assert mirror.attrib == {"type": "file", "file": str(raw), "format": "raw", "job": "copy", "ready": "yes"}
    assert ok(kvikd, "blockjob", "mover", "vda").strip() == "Block Copy: [100 %]"
    assert ok(kvikd, "blockjob", "mover", "vda", "--raw") == kvikd.virsh("blockjob", "mover", "vda", "--raw").stdout
    assert kvikd.virsh("blockjob", "mover", "vda").stderr.strip() == "Block Copy: [100 %]"
    assert "already in active block job" in kvikd.kvik("blockpull", "mover", "vda").stderr
    assert "active block job" in kvikd.kvik("detach-disk", "mover", "vda").stderr
    ok(kvikd, "blockjob", "mover", "vda", "--abort")
    assert ok(kvikd, "blockjob", "mover", "vda").strip() == "No current block job for vda"
    assert images_of(kvikd, "mover") == ["moved.qcow2"]
    holds(raw, "raw")  # whole as of then, and kept
    # Only the top image: what lies below is shared.
    domain.destroy()
    domain = make("sharer", disk(chain[2]), kernel=False)
    domain.start()
    ok(kvikd, "blockcopy", "sharer", "vda", "--dest", str(place / "s.qcow2"), "--shallow", "--pivot")
    assert images_of(kvikd, "sharer") == ["s.qcow2", "middle.qcow2", "base.qcow2"]
    domain.destroy()
    told = json.loads(run("qemu-img", "info", "-U", "--output=json", str(place / "s.qcow2")))
    assert told["backing-filename"] == str(chain[1])
    holds(place / "s.qcow2")
    domain.start()
    assert images_of(kvikd, "sharer") == ["s.qcow2", "middle.qcow2", "base.qcow2"]


def test_images_are_merged_in_each_direction(kvikd: Kvikd, make: Make, place: Path, chain: list[Path]) -> None:
    top = image(place / "last.qcow2", below=chain[2])
    domain = make("merger", disk(top), kernel=False)
    domain.start()
    assert images_of(kvikd, "merger") == ["last.qcow2", "top.qcow2", "middle.qcow2", "base.qcow2"]
    # A lower image into the one below it, and its file removed.
    ok(kvikd, "blockcommit", "merger", "vda", "--top", "vda[2]", "--shallow", "--wait", "--delete")
    assert images_of(kvikd, "merger") == ["last.qcow2", "middle.qcow2", "base.qcow2"]
    assert not chain[2].exists()
    told = json.loads(run("qemu-img", "info", "-U", "--output=json", str(top)))
    assert told["backing-filename"] == str(chain[1]) and told["backing-filename-format"] == "qcow2"
    # Everything between the top and the base into the top, by its name relative to it.
    ok(kvikd, "blockpull", "merger", "vda", "--base", str(chain[0]), "--keep-relative", "--wait")
    assert images_of(kvikd, "merger") == ["last.qcow2", "base.qcow2"]
    told = json.loads(run("qemu-img", "info", "-U", "--output=json", str(top)))
    assert told["backing-filename"] == "base.qcow2"
    ok(kvikd, "qemu-monitor-command", "merger", "--hmp", "qemu-io virtio-disk0-1-format flush")
    holds(top)
    # The top itself into its base, first without and then with the change-over.
    assert "requires active flag" in kvikd.kvik("blockcommit", "merger", "vda").stderr
    said = ok(kvikd, "blockcommit", "merger", "vda", "--keep-overlay")
    assert said.strip() == "Commit complete, overlay image kept"
    assert images_of(kvikd, "merger") == ["last.qcow2", "base.qcow2"]
    ok(kvikd, "blockcommit", "merger", "vda", "--active", "--pivot", "--verbose")
    assert images_of(kvikd, "merger") == images_of(kvikd, "merger", "--inactive") == ["base.qcow2"]
    assert len(nodes(domain, kvikd)) == 2
    holds(chain[0])
    # All of it once more, with nothing left below.
    domain.destroy()
    alone = image(place / "alone.qcow2", below=chain[0])
    domain = make("puller", disk(alone), kernel=False)
    domain.start()
    # Whoever watches the growth of its top image is told once.
    ok(kvikd, "domblkthreshold", "puller", "vda[2]", "64K")
    ok(kvikd, "domblkthreshold", "puller", "vda", "300K")
    kvikd.connection.register("block-threshold", domain)
    assert ok(kvikd, "blockpull", "puller", "vda", "--wait").strip() == "Pull complete"
    told = [kvikd.connection.next_event(10.0) for _ in range(2)]
    assert [event.fields["dev"] for event in told] == ["vda[1]", "vda"]
    assert told[0].fields["path"] == str(alone) and told[0].fields["threshold"] == 300 << 10
    assert images_of(kvikd, "puller") == ["alone.qcow2"]
    assert "nothing to pull" in kvikd.kvik("blockpull", "puller", "vda").stderr
    domain.destroy()
    assert "backing-filename" not in run("qemu-img", "info", "--output=json", str(alone))
    holds(alone)


def test_what_cannot_be_copied_is_said_and_leaves_nothing(
    kvikd: Kvikd, make: Make, place: Path, chain: list[Path]
) -> None:
    make("other", disk(image(place / "theirs.qcow2")), kernel=False).start()
    domain = make("refused", disk(chain[2]), kernel=False)
    (place / "there").touch()
    assert "not running" in kvikd.kvik("blockcopy", "refused", "vda", "--dest", "/x").stderr
    domain.start()
    before = ok(kvikd, "dumpxml", "refused")

    def refused(procedure: str, *values: Any) -> str:
        with pytest.raises(KvikError) as caught:
            kvikd.connection.call(procedure, domain.ref, "vda", *values)
        return str(caught.value)

    shallow, reuse, active = 1, 2, 4
    for path, kind, flags, reason in (
        (place / "there", "qcow2", 0, "already exists and is not a block device"),
        (place / "none", "", reuse, "is not said, and never guessed"),
        (place / "theirs.qcow2", "qcow2", reuse, "in use by machine 'other'"),
        (chain[0], "qcow2", reuse, "in use by machine 'refused'"),
        (place / "there", "qcow2", reuse, "not a qcow2 image"),
        (place / "no/dir", "qcow2", 0, "No such file"),
        (Path("relative"), "qcow2", 0, "absolute"),
        (place / "x", "vmdk", 0, "cannot be made"),
        (place / "x", "raw", shallow, "which format raw cannot"),
    ):
        driver = f"<driver type='{kind}'/>" if kind else ""
        xml = f"<disk type='file'><source file='{path}'/>{driver}</disk>"
        assert reason in refused("DOMAIN_BLOCK_COPY", xml, [], flags), (path, flags)
    xml = f"<disk type='file'><source file='{place}/x'/></disk>"
    assert "power of 2" in refused("DOMAIN_BLOCK_COPY", xml, [("granularity", 2, 1000)], 0)
    top, middle, base = (str(path) for path in reversed(chain))
    for lower, upper, flags, reason in (
        (None, "vda[9]", 0, "could not find image"),
        (None, base, 0, "has no backing file"),
        (top, middle, 0, "is not below"),
        (None, middle, active, "is not active"),
        (None, None, 0, "requires active flag"),
    ):
        assert reason in refused("DOMAIN_BLOCK_COMMIT", lower, upper, 0, flags)
    assert "that the guest writes to" in refused("DOMAIN_BLOCK_REBASE", top, 0, 0)
    assert "does not have an active block job" in refused("DOMAIN_BLOCK_JOB_ABORT", 0)
    assert "would cut off the end" in refused("DOMAIN_BLOCK_RESIZE", 1024, 0)
    assert "has no disk 'vdz'" in kvikd.kvik("blockcopy", "refused", "vdz", "--dest", "/x").stderr
    assert ok(kvikd, "dumpxml", "refused") == before
    assert sorted(path.name for path in place.iterdir()) == [
        "base.qcow2", "middle.qcow2", "theirs.qcow2", "there", "top.qcow2",
    ]  # fmt: skip
    assert "could not find image" in kvikd.kvik("domblkthreshold", "refused", "vda[9]", "1").stderr
    ok(kvikd, "blockresize", "refused", "vda", "8M")
    assert "8388608" in ok(kvikd, "domblkinfo", "refused", "vda")


def test_the_next_daemon_takes_a_job_up(kvikd: Kvikd, make: Make, place: Path, chain: list[Path]) -> None:
    domain = make("survivor", disk(chain[2]), kernel=False)
    domain.start()
    # A copy waits between two buffers only, and what drains the disk (its reset by the firmware) ends that wait: the
    # usual buffer of 16 MiB would hold all there is.
    limits = ("--bytes", "--bandwidth", "65536", "--buf-size", "65536")
    ok(kvikd, "blockcopy", "survivor", "vda", "--dest", str(place / "c.qcow2"), *limits)
    assert kvikd.end(signal.SIGKILL) == -signal.SIGKILL
    kvikd.start()
    shown = ok(kvikd, "blockjob", "survivor", "vda", "--info", "--bytes")
    assert shown.startswith("Block Copy: [ ") and "Bandwidth limit: 65536 bytes/s (64.000 KiB/s)" in shown
    ok(kvikd, "blockjob", "survivor", "vda", "--bandwidth", "0")
    until(lambda: "100 %" in ok(kvikd, "blockjob", "survivor", "vda"))
    assert kvikd.end(signal.SIGKILL) == -signal.SIGKILL
    kvikd.start()
    until(lambda: "ready='yes'" in ok(kvikd, "dumpxml", "survivor"))
    ok(kvikd, "blockjob", "survivor", "vda", "--pivot")
    assert images_of(kvikd, "survivor") == images_of(kvikd, "survivor", "--inactive") == ["c.qcow2"]
    holds(place / "c.qcow2")
    assert len(nodes(domain, kvikd)) == 2
