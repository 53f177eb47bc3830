"""Storage that does not answer (a file system of a process that is stopped, as an NFS server that is gone): the daemon
goes on for everybody else, whoever asked is told which path it is, and nothing is left when the storage is back.

No test measures time: what waited for that storage would wait for ever.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_harness import CLI, Host, alive, disk_xml, eventually

from kvik.image.create import create
from kvik.storage.overlays import look

pytestmark = pytest.mark.skipif(
    shutil.which("bindfs") is None or not Path("/dev/fuse").exists(),
    reason="needs FUSE and bindfs (apt install bindfs)",
)
DAEMON = """
from kvik.host import reach
from kvik.manager import recover
reach.PATIENCE, recover.CURIOSITY, recover.RETRY = 1.0, 1.0, 0.3
from kvik.daemon.main import main
raise SystemExit(main())
"""
SILENT = "does not answer"


class Share:
    """A directory that a process serves; its files are those of `data`."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.data, self.path = host.root / "data", host.root / "share"
        for directory in (self.data, self.path):
            directory.mkdir()
        options = "attr_timeout=0,entry_timeout=0,negative_timeout=0"
        self.server = host.spawn("bindfs", "-f", "-o", options, str(self.data), str(self.path))
        eventually(lambda: f" {self.path} fuse" in host.enter("cat", "/proc/self/mounts"), "the share is mounted")

    def image(self, name: str) -> Path:
        with (self.data / name).open("wb") as file:
            file.truncate(1 << 20)
        return self.path / name

    def stop(self) -> None:
        os.kill(self.server, signal.SIGSTOP)

    def answer(self) -> None:
        os.kill(self.server, signal.SIGCONT)

    def end(self) -> None:
        self.answer()
        self.host.enter("umount", "-l", str(self.path))
        eventually(lambda: not alive(self.server), "end of the share")


@pytest.fixture
def share(private_host: Host) -> Iterator[Share]:
    private_host.start(program=("-c", DAEMON))
    share = Share(private_host)
    for name in ("web", "db"):
        private_host.define(name, disk_xml(private_host.image(f"{name}.img")))
    private_host.define("far", disk_xml(share.image("far.img")))
    yield share
    share.answer()
    private_host.end_machines()
    eventually(lambda: not open_on(private_host, share), "the daemon has let go of the share")
    share.end()


def open_on(host: Host, share: Share) -> list[str]:
    found = []
    for fd in Path(f"/proc/{host.daemon}/fd").iterdir():
        try:
            found.append(str(fd.readlink()))
        except FileNotFoundError:
            continue
    return [path for path in found if path.startswith(f"{share.path}/")]


def everybody_else_goes_on(host: Host) -> None:
    host.kvik("list", "--all")
    host.kvik("domstats")
    host.kvik("start", "db")
    host.kvik("suspend", "db")
    host.kvik("resume", "db")
    host.kvik(
        "snapshot-create-as", "db", "s1", "--disk-only", "--no-metadata", "--diskspec", f"vda,file={host.root}/s1"
    )
    host.kvik("destroy", "db")
    host.kvik("undefine", "db")
    (host.root / "s1").unlink()
    host.define("db", disk_xml(host.root / "db.img"))


def test_a_machine_whose_image_does_not_answer_is_its_own_trouble(private_host: Host, share: Share) -> None:
    host = private_host
    share.stop()
    starting = host.spawn(*CLI, "-c", host.uri, "start", "far", output=host.root / "far.out")
    everybody_else_goes_on(host)
    assert host.exit_code(starting) == 1
    assert f"{share.path}/far.img" in (said := (host.root / "far.out").read_text()) and SILENT in said
    host.kvik("start", "far", fails=f"{share.path}/far.img.*{SILENT}")  # known by now
    assert host.state("far") == "shut off"
    everybody_else_goes_on(host)
    share.answer()
    eventually(lambda: not open_on(host, share), "what came too late is closed")
    host.kvik("start", "far")
    assert host.state("far") == "running"


def test_whatever_looks_at_that_storage_says_so(private_host: Host, share: Share) -> None:
    host = private_host
    host.kvik("start", "web")
    share.image("other.img")
    (host.root / "pool").mkdir()
    share.stop()
    disk = host.document("disk", disk_xml(share.path / "other.img", "vdb"))
    for asked in (
        ("attach-device", "web", disk, "--live"),
        ("blockcopy", "web", "vda", f"{share.path}/copy.img", "--format", "raw"),
        ("snapshot-create-as", "far", "s1", "--disk-only"),
        ("snapshot-create-as", "web", "s1", "--disk-only", "--diskspec", f"vda,file={share.path}/s1"),
        ("vol-info", f"{share.path}/far.img"),
        ("backup-begin", "web", host.document("backup", backup(share.path / "backup.img"))),
    ):
        host.kvik(*asked, fails=f"{share.path}.*{SILENT}")
    everybody_else_goes_on(host)
    assert host.state("web") == "running"
    share.answer()
    host.kvik("attach-device", "web", disk, "--live")
    assert "other.img" in host.kvik("domblklist", "web")


def qcow2(path: Path, below: Path | None = None) -> Path:
    kind = "raw" if below is not None and below.suffix == ".img" else "qcow2"
    names = {"backing_file": str(below), "backing_format": kind} if below is not None else {}
    create(str(path), "qcow2", 1 << 20, **names)
    return path


def lower(path: Path, below: str) -> str:
    kind = "qcow2" if path.suffix != ".img" else "raw"
    return f"<backingStore type='file'><format type='{kind}'/><source file='{path}'/>{below}</backingStore>"


def test_what_other_machines_need_is_known_without_their_storage(private_host: Host, share: Share) -> None:
    """Snapshots are deleted and merged, images and volumes removed; what one of those machines rests on is not."""
    host = private_host

    def of(machine: str) -> list[str]:
        return sorted(path.name for path in host.root.glob(f"{machine}.s*"))

    for machine, name in (("web", "s1"), ("web", "s2"), ("db", "s1")):
        host.kvik("snapshot-create-as", machine, name, "--disk-only")
    qcow2(share.data / "running")
    host.define("running", disk_xml(share.path / "running", format="qcow2"))
    host.kvik("start", "running")
    qcow2(share.data / "linked", host.root / "db.s1")
    chain = lower(host.root / "db.s1", lower(host.root / "db.img", "<backingStore/>"))
    host.define("linked", disk_xml(share.path / "linked", extra=chain, format="qcow2"))
    (host.root / "pool").mkdir()
    host.kvik("pool-create-as", "pool", "dir", "--target", str(host.root / "pool"))
    host.kvik("vol-create-as", "pool", "old.img", "1M")
    share.stop()
    host.kvik("snapshot-delete", "web", "s2")
    assert len(of("web")) == 1
    host.kvik("snapshot-delete", "web", "s1")
    assert of("web") == []
    host.kvik("snapshot-delete", "db", "s1")  # a linked machine rests on its image, which stays
    assert of("db") == ["db.s1"]
    host.kvik("start", "web")
    host.kvik("snapshot-create-as", "web", "s3", "--disk-only")
    host.kvik("snapshot-delete", "web", "s3")
    assert of("web") == []
    host.kvik("blockcopy", "web", "vda", str(host.root / "moved.img"), "--wait", "--pivot")
    host.kvik("vol-delete", "old.img", "--pool", "pool")
    share.answer()
    host.kvik("undefine", "linked")
    for name in ("s4", "s5"):
        host.kvik("snapshot-create-as", "db", name, "--disk-only")
    host.kvik("snapshot-delete", "db", "s4")
    assert of("db") == ["db.s5"]  # nothing else is needed any more


def test_an_image_that_may_rest_on_anything_is_named_and_nothing_is_removed(private_host: Host, share: Share) -> None:
    host = private_host
    host.kvik("snapshot-create-as", "web", "s1", "--disk-only")
    qcow2(share.data / "odd", host.root / "web.s1")  # its document does not say so
    host.define("odd", disk_xml(share.path / "odd", format="qcow2"))
    share.stop()
    named = f"{share.path}/odd .machine 'odd'..*{SILENT}"
    host.kvik("snapshot-delete", "web", "s1", fails=named)
    host.kvik("snapshot-create-as", "web", "s2", "--disk-only")
    host.kvik("snapshot-delete", "web", "s2", fails=named)
    assert (host.root / "web.s1").exists() and (host.root / "web.s2").exists()
    share.answer()
    host.kvik("snapshot-create-as", "web", "s3", "--disk-only")
    host.kvik("snapshot-delete", "web", "s3")
    assert not (host.root / "web.s2").exists()
    below = look(str(share.data / "odd"), "qcow2").backing
    assert below is not None and Path(below).exists()
    host.kvik("undefine", "odd")


def backup(path: Path) -> str:
    return f"<domainbackup><disks><disk name='vda' type='file'><target file='{path}'/></disk></disks></domainbackup>"


def test_a_start_is_given_up_and_a_daemon_comes_back(private_host: Host, share: Share) -> None:
    host = private_host
    host.kvik("start", "far")
    host.kvik("start", "web")
    vmm = host.pid("far")
    host.define("far2", disk_xml(share.image("far2.img")))
    share.stop()
    starting = host.spawn(*CLI, "-c", host.uri, "start", "far2", output=host.root / "far2.out")
    host.kvik("list", "--all")
    host.kill_daemon()
    assert host.exit_code(starting) == 1
    host.start(program=("-c", DAEMON))
    everybody_else_goes_on(host)
    assert host.state("far") == host.state("web") == "running"
    assert host.pid("far") == vmm
    share.answer()
    eventually(lambda: alive(vmm) and host.state("far") == "running", "it goes on")
    # Which images it has is known again: nobody else gets one.
    host.define("thief", disk_xml(share.path / "far.img"))
    eventually(lambda: "its images were looked at" in host.log("far"), "its images are known")
    host.kvik("start", "thief", fails="is in use by machine 'far'")
