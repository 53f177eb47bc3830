"""The daemon is killed at every change to a file and every command to QEMU of a block job, while the machine runs.

Afterwards the next daemon ends what was begun or goes on with it: both documents name the chain that QEMU has, the
guest sees what it saw, and nothing is left that nobody needs: files, block nodes, descriptors, jobs. KVIK_SWEEP=full in
the environment tries every step of all operations; otherwise one of some.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from axe import Axe
from fault_harness import Host, alive, disk_xml, eventually
from fault_harness import host as new_host

from kvik.client import snapshot
from kvik.errors import KvikError
from kvik.image.create import create
from kvik.image.opening import Opener

WHOLE = os.environ.get("KVIK_SWEEP") == "full"
# What CI tries, one step of each
SHARE = (
    "copy, pivot",
    "pull to a base",
    "commit of the active into a raw base, pivot",
    "all snapshots deleted",
)
BLOCK = 64 << 10
BLOCKS = 16
# virDomainBlockCopyFlags, virDomainBlockCommitFlags, virDomainBlockJobAbortFlags, virDomainSnapshotCreateFlags
SHALLOW, REUSE = 1, 2
COMMIT_SHALLOW, COMMIT_DELETE, COMMIT_ACTIVE = 1, 2, 4
PIVOT = 2
DISK_ONLY = 1 << 4
INACTIVE = 2


@dataclass
class Bench:
    """One machine on three images. `held`: what its disk shows, block by block."""

    host: Host
    held: list[int] = field(default_factory=list)
    base: str = "qcow2"  # its format

    @property
    def place(self) -> Path:
        return self.host.root / "images"

    def fresh(self) -> None:
        """The machine runs on top, middle and base, each of which has blocks of its own."""
        host, self.held = self.host, [0] * BLOCKS
        for domain in host.connection.domains():
            for item in snapshot.snapshots(domain):
                item.delete(2)  # METADATA_ONLY
            if domain.is_active():
                domain.destroy()
            domain.undefine()
        for path in self.place.iterdir():
            path.unlink()
        below: dict[str, str] = {}
        for number, name in enumerate(("base", "middle", "top"), 1):
            path, kind = self.place / name, self.format(name)
            create(str(path), kind, BLOCKS * BLOCK, **below)
            below = {"backing_file": str(path), "backing_format": kind}
            with Opener().open(str(path), kind, writable=True) as image:
                for block in (number, 3):  # one of its own, and one that hides the other's
                    image.write(block * BLOCK, bytes([number]) * BLOCK)
                    self.held[block] = number
        host.define("m", disk_xml(self.place / "top", format="qcow2"))
        host.connection.domain("m").start()
        for block in range(4, 6):
            self.write(block, 10 + block)

    def write(self, block: int, pattern: int) -> None:
        self.qemu_io(f"write -P {pattern} {block * BLOCK} {BLOCK}")
        self.held[block] = pattern

    def qemu_io(self, command: str) -> None:
        qdev = "/machine/peripheral/virtio-disk0/virtio-backend"
        said = self.host.connection.domain("m").monitor_command(f'qemu-io -d {qdev} "{command}"', hmp=True)
        assert not said, said

    def qmp(self, command: str, **arguments: Any) -> Any:
        text = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(self.host.connection.domain("m").monitor_command(text))["return"]

    # jobs

    def call(self, procedure: str, *values: Any) -> Any:
        return self.host.connection.call(procedure, self.host.connection.domain("m").ref, *values)

    def job(self) -> tuple[int, int, int] | None:
        """Type, current, end."""
        found, kind, _, current, end = self.call("DOMAIN_GET_BLOCK_JOB_INFO", "vda", 0)
        return (kind, current, end) if found else None

    def wait_ready(self) -> None:
        def ready() -> bool:
            job = self.job()
            assert job is not None
            return job[1] == job[2]

        eventually(ready, "the job is ready")

    def end(self, *, pivot: bool) -> None:
        self.wait_ready()
        self.call("DOMAIN_BLOCK_JOB_ABORT", "vda", PIVOT if pivot else 0)

    def wait_over(self) -> None:
        eventually(lambda: self.job() is None, "the job is over")

    def copy_to(self, name: str, flags: int = 0) -> None:
        xml = f"<disk type='file'><driver type='qcow2'/><source file='{self.place / name}'/></disk>"
        self.call("DOMAIN_BLOCK_COPY", "vda", xml, [], flags)

    # what is there

    def chain(self, flags: int = 0) -> list[str]:
        here = ElementTree.fromstring(self.host.connection.domain("m").xml(flags)).find("./devices/disk")
        found: list[str] = []
        while here is not None:
            source = here.find("source")
            if source is not None:
                found.append(Path(source.get("file", "")).name)
            here = here.find("backingStore")
        return found

    def indices(self) -> list[int]:
        disk = ElementTree.fromstring(self.host.connection.domain("m").xml()).find("./devices/disk")
        assert disk is not None and disk.find("mirror") is None
        found, here = [], disk
        first = disk.find("source")
        assert first is not None
        found.append(int(first.get("index", "0")))
        here = disk.find("backingStore")
        while here is not None and here.find("source") is not None:
            found.append(int(here.get("index", "0")))
            here = here.find("backingStore")
        return found

    def graph(self) -> list[int]:
        """Numbers of the images that QEMU reads, from the top down."""
        found = []
        (drive,) = (item for item in self.qmp("query-blockstats") if "virtio-disk0" in item.get("qdev", ""))
        here = drive
        while here is not None:
            found.append(int(here["node-name"].split("-")[2]))
            here = here.get("backing")
        return found

    def format(self, name: str) -> str:
        return self.base if name == "base" else "qcow2"

    def digest(self, path: Path) -> str:
        with Opener(share=True, lock=False).open(str(path), self.format(path.name)) as image:
            return hashlib.sha256(image.read(0, BLOCKS * BLOCK)).hexdigest()

    def expected(self) -> str:
        return hashlib.sha256(b"".join(bytes([pattern]) * BLOCK for pattern in self.held)).hexdigest()

    def open_files(self) -> tuple[set[str], set[str]]:
        """Images that QEMU has open, and those of them that it could write to."""
        found: tuple[set[str], set[str]] = (set(), set())
        process = Path(f"/proc/{self.host.pid('m')}")
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                path = Path(os.readlink(entry))
                if path.parent == self.place:
                    flags = re.search(r"flags:\s*(\d+)", (process / "fdinfo" / entry.name).read_text())
                    assert flags is not None
                    found[0].add(path.name)
                    if int(flags[1], 8) & os.O_ACCMODE:
                        found[1].add(path.name)
        return found


@dataclass(frozen=True)
class Operation:
    act: Callable[[Bench], None]
    outcomes: tuple[tuple[str, ...], ...]
    before: Callable[[Bench], None] = lambda bench: None
    pivot: bool = False
    stay: frozenset[str] = frozenset()  # files that may stay beside those of the chain
    base: str = "qcow2"


THREE = ("top", "middle", "base")


def copied(flags: int = 0, *, pivot: bool) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        bench.copy_to("copy", flags)
        bench.end(pivot=pivot)

    return act


def pulled(base: str | None) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        if base is None:
            bench.call("DOMAIN_BLOCK_PULL", "vda", 0, 0)
        else:
            bench.call("DOMAIN_BLOCK_REBASE", "vda", str(bench.place / base), 0, 0)
        bench.wait_over()

    return act


def committed(top: str | None, flags: int, *, pivot: bool | None = None) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        bench.call("DOMAIN_BLOCK_COMMIT", "vda", None, str(bench.place / top) if top else None, 0, flags)
        if pivot is None:
            bench.wait_over()
        else:
            bench.end(pivot=pivot)

    return act


def reused(bench: Bench) -> None:
    create(str(bench.place / "copy"), "qcow2", BLOCKS * BLOCK)


def snapshots(bench: Bench) -> None:
    domain = bench.host.connection.domain("m")
    for number, name in enumerate(("s1", "s2"), 7):
        snapshot.create(domain, f"<domainsnapshot><name>{name}</name></domainsnapshot>", DISK_ONLY)
        bench.write(number, 100 + number)


def deleted(name: str) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        domain = bench.host.connection.domain("m")
        if name in {item.name for item in snapshot.snapshots(domain)}:
            snapshot.lookup(domain, name).delete()

    return act


TAKEN = ("top.s2", "top.s1", *THREE)
OPERATIONS = {
    "copy, finish": Operation(copied(pivot=False), (THREE,), stay=frozenset({"copy"})),
    "copy, pivot": Operation(copied(pivot=True), (THREE, ("copy",)), pivot=True, stay=frozenset(THREE)),
    "copy of the top, pivot": Operation(
        copied(SHALLOW, pivot=True), (THREE, ("copy", "middle", "base")), pivot=True, stay=frozenset(THREE)
    ),
    "copy into what is there, pivot": Operation(
        copied(REUSE, pivot=True), (THREE, ("copy",)), reused, pivot=True, stay=frozenset({*THREE, "copy"})
    ),
    "pull": Operation(pulled(None), (THREE, ("top",)), stay=frozenset(THREE)),
    "pull to a base": Operation(pulled("base"), (THREE, ("top", "base")), stay=frozenset(THREE)),
    "commit": Operation(committed("middle", COMMIT_DELETE), (THREE, ("top", "base"))),
    "commit of the active, pivot": Operation(
        committed(None, COMMIT_ACTIVE, pivot=True), (THREE, ("base",)), pivot=True, stay=frozenset(THREE)
    ),
    "commit of the active into a raw base, pivot": Operation(
        committed(None, COMMIT_ACTIVE, pivot=True),
        (THREE, ("base",)),
        pivot=True,
        stay=frozenset(THREE),
        base="raw",
    ),
    "commit of the active into a raw base, kept": Operation(
        committed(None, COMMIT_ACTIVE, pivot=False), (THREE,), base="raw"
    ),
    "commit of the active into the next, pivot": Operation(
        committed(None, COMMIT_ACTIVE | COMMIT_SHALLOW | COMMIT_DELETE, pivot=True),
        (THREE, ("middle", "base")),
        pivot=True,
    ),
    "commit of the active, kept": Operation(committed(None, COMMIT_ACTIVE, pivot=False), (THREE,)),
    "snapshot deleted, its data goes up or down": Operation(
        deleted("s2"), (TAKEN, ("top.s1", *THREE), ("top.s2", *THREE)), snapshots
    ),
    "all snapshots deleted": Operation(
        lambda bench: [deleted(name)(bench) for name in ("s1", "s2")] and None,
        (TAKEN, ("top.s1", *THREE), ("top.s2", *THREE), THREE),
        snapshots,
    ),
}  # fmt: skip


def settled(bench: Bench, operation: Operation) -> None:
    """What the next daemon found is brought to its end."""

    def idle() -> bool:
        """Merges of snapshots go on by themselves."""
        job = bench.job()
        if job is not None and operation.before is not snapshots:
            two_phase = "<mirror" in bench.host.connection.domain("m").xml()
            if two_phase:
                bench.end(pivot=operation.pivot)
            else:
                bench.wait_over()
        found = bench.host.connection.call("DOMAIN_GET_JOB_INFO", bench.host.connection.domain("m").ref)
        return bench.job() is None and found[0] == 0

    eventually(idle, "the machine is idle")


def check(bench: Bench, operation: Operation, pid: int, said: str) -> None:
    host = bench.host
    assert host.pid("m") == pid and alive(pid), said
    settled(bench, operation)
    chain = bench.chain()
    assert tuple(chain) in operation.outcomes, (said, chain)
    assert bench.chain(INACTIVE)[0] == chain[0], (said, chain, bench.chain(INACTIVE))
    assert bench.chain(INACTIVE) in ([chain[0]], chain), said

    wanted = {f"virtio-disk0-{number}-{kind}" for number in bench.indices() for kind in ("format", "storage")}
    found: list[Any] = []

    def tidied() -> bool:
        nodes = {item["node-name"] for item in bench.qmp("query-named-block-nodes", flat=True)}
        files, written = bench.open_files()
        # The guest wrote to "top" and what came on it: QEMU keeps the descriptors that it got then.
        found[:] = [nodes, bench.qmp("query-jobs"), files, written & {"middle", "base"}]
        return found == right

    right = [wanted, [], set(chain), {chain[0]} & {"middle", "base"}]
    with contextlib.suppress(AssertionError):
        eventually(tidied, "nothing else is open", patience=3)
    assert found == right, said
    assert bench.graph() == bench.indices(), said
    bench.qemu_io("flush")
    assert bench.digest(bench.place / chain[0]) == bench.expected(), said
    bench.write(15, 15)
    bench.qemu_io("flush")
    assert bench.digest(bench.place / chain[0]) == bench.expected(), said
    needed = {*chain, *(kept_in(item.xml()) for item in snapshot.snapshots(host.connection.domain("m")))}

    def files() -> set[str]:
        return {path.name for path in bench.place.iterdir()} - operation.stay

    with contextlib.suppress(AssertionError):  # what snapshots need no more goes once the machine is idle
        eventually(lambda: files() == needed - operation.stay, "files that nothing needs are gone", patience=3)
    assert files() == needed - operation.stay, said
    assert all((bench.place / name).exists() for name in needed), said
    eventually(lambda: not host.trouble(), f"files and processes are right {said}", patience=5)


def kept_in(xml: str) -> str:
    found = ElementTree.fromstring(xml).find("./domain/devices/disk/source")
    assert found is not None
    return Path(found.get("file", "")).name


def attempted(bench: Bench, operation: Operation) -> bool:
    """True if the daemon lived."""
    with contextlib.suppress(KvikError, OSError):
        operation.act(bench)
        return True
    return False


@contextlib.contextmanager
def bench_with_axe() -> Any:
    with new_host() as host:
        axe = Axe(host.root / "axe")
        bench = Bench(host)
        bench.place.mkdir()
        start(host, axe)
        yield bench, axe


def start(host: Host, axe: Axe) -> None:
    script = str(Path(__file__).with_name("axe.py"))
    host.start(program=(script, str(axe.path)))


@pytest.mark.parametrize("name", OPERATIONS if WHOLE else SHARE)
def test_killed_at(name: str) -> None:
    operation = OPERATIONS[name]
    with bench_with_axe() as (bench, axe):
        host, bench.base = bench.host, operation.base
        bench.fresh()
        operation.before(bench)
        axe.set()
        operation.act(bench)
        count = axe.steps
        axe.set()
        assert count > 10, f"only {count} steps: the axe sees nothing"
        check(bench, operation, host.pid("m"), "after all of it")
        assert tuple(bench.chain()) == operation.outcomes[-1]
        for step in range(1, count + 1) if WHOLE else [2 * count // 3]:
            bench.fresh()
            operation.before(bench)
            pid = host.pid("m")
            axe.set(step)
            lived = attempted(bench, operation)
            what = f"killed at step {step} of {count}: {axe.last}"
            if lived:  # a step that is taken after the answer
                with contextlib.suppress(AssertionError):
                    eventually(lambda: not alive(host.daemon), "the daemon is dead", patience=0.3)
            else:
                eventually(lambda: not alive(host.daemon), f"the daemon is dead, {what}")
            axe.set()
            host.kill_daemon(signal.SIGKILL)
            start(host, axe)
            check(bench, operation, pid, what)
