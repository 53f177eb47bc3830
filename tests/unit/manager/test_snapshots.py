"""Snapshots of a machine that is off, on real images: taken, gone back to on both branches, deleted with their data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from manager_bench import Bench, document, until
from snapshot_bench import DISKS, SIZE, disk_xml, images, machine, shows, started, take, top, write

from kvik.conf.devices.disk import DiskSource
from kvik.conf.enums import DomainBlockJobType
from kvik.conf.enums import DomainCreateFlags as Start
from kvik.conf.enums import DomainSnapshotCreateFlags as Create
from kvik.conf.enums import DomainSnapshotDeleteFlags as Delete
from kvik.conf.enums import DomainSnapshotRevertFlags as Revert
from kvik.conf.snapshot import format_snapshot
from kvik.errors import (
    AlreadyExists,
    ConfigUnsupported,
    KvikError,
    NoSecret,
    NoSnapshot,
    OperationInvalid,
    ResourceBusy,
)
from kvik.hypervisor.driver import EventKind, Feature
from kvik.hypervisor.test.behaviour import Behaviour
from kvik.image.create import create as create_image
from kvik.image.lock import lock_image
from kvik.manager.block_copy import Destination, check_secrecy
from kvik.manager.block_following import BlockJob
from kvik.manager.snapshots import create, delete, revert
from kvik.storage import overlays


async def test_what_is_written_after_a_snapshot_is_gone_when_the_machine_goes_back_to_it(
    bench: Bench, tmp_path: Path
) -> None:
    domain = await machine(bench, tmp_path)
    write(domain, 0, b"one" * 1000)
    then = shows(domain)
    await take(domain, "s1")
    assert Path(top(domain)[0]).name == "disk.s1"
    assert shows(domain) == then
    write(domain, 100, b"two")
    assert shows(domain) != then
    await revert.revert(domain, "s1", 0)
    assert shows(domain) == then
    assert images(tmp_path) == {"disk.qcow2", "disk.s1-now"}, "the branch that nobody kept is gone, the base is not"
    assert domain.snapshots.current == "s1"


async def test_both_branches_stay_and_each_can_be_gone_back_to(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    states = {}
    for name, text in (("root", b"root"), ("left", b"left")):
        write(domain, 4096, text)
        states[name] = shows(domain)
        await take(domain, name)
    await revert.revert(domain, "root", 0)
    write(domain, 8192, b"right")
    states["right"] = shows(domain)
    await take(domain, "right")
    assert domain.snapshots.children("root") == ["left", "right"]
    for name in ("left", "right", "root", "right", "left"):
        await revert.revert(domain, name, 0)
        assert shows(domain) == states[name]
        write(domain, 0, os.urandom(512))  # never reaches a file that a snapshot is kept in
    for name in ("left", "right", "root"):
        await revert.revert(domain, name, 0)
        assert shows(domain) == states[name]


@pytest.mark.parametrize("format", ["qcow2", "raw"])
async def test_when_all_snapshots_are_deleted_the_disk_is_in_its_first_image_again(
    bench: Bench, tmp_path: Path, format: str
) -> None:
    domain = await machine(bench, tmp_path, format)
    for name in ("s1", "s2", "s3"):
        write(domain, 65536 * int(name[1]), name.encode() * 300)
        await take(domain, name)
    write(domain, 500, b"last")
    now = shows(domain)
    for name in ("s2", "s1", "s3"):
        await delete.delete(domain, name, 0)
        assert shows(domain) == now
    assert top(domain) == (str(tmp_path / f"disk.{format}"), format)
    assert images(tmp_path) == {f"disk.{format}"}
    assert not bench.paths.snapshots.joinpath("a").exists()


async def test_deleting_where_the_tree_branches_keeps_the_data_of_both(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    states = {}
    for name in ("s1", "s2"):
        write(domain, 0, name.encode())
        states[name] = shows(domain)
        await take(domain, name)
    await revert.revert(domain, "s1", 0)
    write(domain, 70000, b"other")
    states["s3"] = shows(domain)
    await take(domain, "s3")
    await delete.delete(domain, "s1", 0)
    assert domain.snapshots.children(None) == ["s2", "s3"]
    for name in ("s2", "s3"):
        await revert.revert(domain, name, 0)
        assert shows(domain) == states[name]
    await delete.delete(domain, "s2", 0)
    assert shows(domain) == states["s3"]
    await delete.delete(domain, "s3", 0)
    assert shows(domain) == states["s3"]
    assert images(tmp_path) == {"disk.qcow2"}


async def test_the_plan_says_what_then_happens_and_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    write(domain, 0, b"x" * 300000)
    await take(domain, "s1")
    write(domain, 0, b"y")
    await take(domain, "s2")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    lines = await delete.planned(domain, "s1", 0)
    assert lines[0] == "forget snapshot s1"
    assert lines[1] == "snapshot s2 then has no parent"
    assert f"from {tmp_path}/disk.s1 into {tmp_path}/disk.qcow2" in lines[2]
    assert lines[3] == f"remove {tmp_path}/disk.s1: {tmp_path}/disk.qcow2 stands for it"
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    await delete.delete(domain, "s1", 0)
    assert images(tmp_path) == {"disk.qcow2", "disk.s2"}
    document = domain.snapshots.snapshots["s2"].domain
    assert document is not None and document.devices.disks[0].source is not None
    assert document.devices.disks[0].source.file == str(tmp_path / "disk.qcow2")


async def test_a_file_that_another_machine_uses_stays(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    await take(domain, "s1")
    write(domain, 0, b"b needs this")
    await take(domain, "s2")
    other = await bench.manager.define(document("b", devices=disk_xml(tmp_path / "disk.s1", extra="<readonly/>")))
    seen = shows(other)
    await delete.delete(domain, "s1", Delete.CHILDREN)
    assert shows(other) == seen
    await bench.manager.undefine(other, 0)
    write(domain, 9, b"more")
    await take(domain, "s3")
    await delete.delete(domain, "s3", 0)
    assert images(tmp_path) == {"disk.qcow2"}


async def test_children_metadata_and_the_current_snapshot(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    for name in ("s1", "s2", "s3"):
        await take(domain, name)
    await delete.delete(domain, "s2", Delete.METADATA_ONLY)
    assert domain.snapshots.current == "s3"
    assert domain.snapshots.parent("s3") == "s1"
    assert images(tmp_path) == {"disk.qcow2", "disk.s1", "disk.s2", "disk.s3"}
    await delete.delete(domain, "s1", Delete.CHILDREN_ONLY)
    assert list(domain.snapshots.snapshots) == ["s1"]
    assert domain.snapshots.current == "s1"
    assert {"disk.qcow2", "disk.s1"} <= images(tmp_path), "what metadata alone was taken from is the user's"
    with pytest.raises(NoSnapshot):
        await delete.delete(domain, "s2", 0)


async def test_the_next_daemon_has_the_same_tree(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    await take(domain, "s1")
    await take(domain, "s2")
    await revert.revert(domain, "s1", 0)
    tree = domain.snapshots
    again = (await bench.reopen()).lookup_name("a").snapshots
    assert (again.current, again.made, again.originals) == (tree.current, tree.made, tree.originals)
    assert {name: again.parent(name) for name in again.snapshots} == {"s1": None, "s2": "s1"}


async def test_a_machine_with_snapshots_is_not_undefined_by_accident(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    await take(domain, "s1")
    with pytest.raises(OperationInvalid, match="cannot delete inactive domain with 1 snapshots"):
        await domain.undefine()
    await domain.undefine(2)
    assert images(tmp_path) == {"disk.qcow2", "disk.s1"}
    assert not bench.paths.snapshots.joinpath("a").exists()


REFUSED = [
    ("<disks><disk name='vdz'/></disks>", "no disk named 'vdz'"),
    ("<disks><disk name='vda'/><disk name='vda'/></disks>", "specified twice"),
    ("<disks><disk name='vda' snapshot='no'/></disks>", "no disk of machine 'a' is selected"),
    ("<disks><disk name='vda' snapshot='external'><driver type='vmdk'/></disk></disks>", "qcow2, not vmdk"),
    ("<disks><disk name='vda'><source file='relative'/></disk></disks>", "not absolute"),
    ("<disks><disk name='vda'><source file='/nowhere/x'/></disk></disks>", "there is no directory /nowhere"),
    ("<memory snapshot='external' file='/m'/>", "it has no memory"),
]


@pytest.mark.parametrize(("xml", "why"), REFUSED, ids=[why for _, why in REFUSED])
async def test_what_cannot_be_is_refused_and_nothing_is_left(bench: Bench, tmp_path: Path, xml: str, why: str) -> None:
    domain = await machine(bench, tmp_path)
    before = domain.config.text
    with pytest.raises(KvikError, match=why):
        await create.create(domain, f"<domainsnapshot><name>s</name>{xml}</domainsnapshot>", 0)
    assert images(tmp_path) == {"disk.qcow2"}
    assert domain.config.text == before
    assert not domain.snapshots.snapshots


async def test_names_and_files_that_are_taken(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    await take(domain, "s1")
    with pytest.raises(AlreadyExists):
        await take(domain, "s1")
    (tmp_path / "disk.s2").write_text("mine")
    with pytest.raises(ConfigUnsupported, match="already exists"):
        await take(domain, "s2")
    assert (tmp_path / "disk.s2").read_text() == "mine"
    for name in ("../x", ".x", "-x", "a/b", "a\nb"):
        with pytest.raises(KvikError):
            await take(domain, name)


async def test_the_name_of_a_deleted_snapshot_is_free_again(bench: Bench, tmp_path: Path) -> None:
    """Also where its image is still there, with what a later snapshot needs."""
    domain = await machine(bench, tmp_path)
    await take(domain, "kept")
    for _ in range(3):
        await take(domain, "daily")
        write(domain, 0, b"x" * 4096)  # so that the image below has less to be moved
        await delete.delete(domain, "daily", 0)
    await take(domain, "daily")
    assert len(images(tmp_path)) == 3


async def test_disks_whose_images_differ_in_their_suffix_only(bench: Bench, tmp_path: Path) -> None:
    first, second = tmp_path / "disk.qcow2", tmp_path / "disk.img"
    create_image(str(first), "qcow2", SIZE)
    create_image(str(second), "raw", SIZE)
    devices = disk_xml(first) + disk_xml(second, "vdb", "raw")
    domain = await bench.manager.define(document(devices=devices))
    for target in ("vda", "vdb"):
        write(domain, 0, target.encode(), target)
    before = [shows(domain, target) for target in ("vda", "vdb")]
    await take(domain, "s1")
    assert {top(domain, target)[0] for target in ("vda", "vdb")} == {f"{tmp_path}/disk.s1", f"{tmp_path}/disk.s1-1"}
    for target in ("vda", "vdb"):
        write(domain, 0, b"later", target)
    await take(domain, "s2")
    await revert.revert(domain, "s1", 0)
    assert [shows(domain, target) for target in ("vda", "vdb")] == before
    for name in ("s2", "s1"):
        await delete.delete(domain, name, 0)
    assert images(tmp_path) == {"disk.qcow2", "disk.img"}
    assert [shows(domain, target) for target in ("vda", "vdb")] == before


async def test_an_image_made_before_is_used_if_it_rests_on_the_disk(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    facts = overlays.look(str(tmp_path / "disk.qcow2"), "qcow2")
    overlays.create_overlay(str(tmp_path / "mine.qcow2"), facts)
    create_image(str(tmp_path / "other.qcow2"), "qcow2", SIZE)
    xml = "<domainsnapshot><name>s</name><disks><disk name='vda'><source file='{}'/></disk></disks></domainsnapshot>"
    with pytest.raises(ConfigUnsupported, match="does not rest on"):
        await create.create(domain, xml.format(tmp_path / "other.qcow2"), Create.REUSE_EXT)
    await create.create(domain, xml.format(tmp_path / "mine.qcow2"), Create.REUSE_EXT)
    assert top(domain)[0] == str(tmp_path / "mine.qcow2")
    await delete.delete(domain, "s", 0)
    assert images(tmp_path) == {"disk.qcow2", "mine.qcow2", "other.qcow2"}, "what snapshots did not make is the user's"


async def test_an_image_made_before_that_cannot_go_on_top_says_why(bench: Bench, tmp_path: Path) -> None:
    domain = await machine(bench, tmp_path)
    facts, path = overlays.look(str(tmp_path / "disk.qcow2"), "qcow2"), tmp_path / "mine.qcow2"
    xml = f"<domainsnapshot><disks><disk name='vda'><source file='{path}'/></disk></disks></domainsnapshot>"

    async def refused(why: str, remedy: str) -> None:
        with pytest.raises(KvikError, match=why) as error:
            await create.create(domain, xml, Create.REUSE_EXT)
        assert remedy in error.value.remedy and not domain.snapshots.snapshots

    await refused(f"cannot open {path}: No such file", "")
    overlays.create_overlay(str(path), facts)
    for bit, why in ((1, "was not closed by whoever wrote to it last"), (2, "is marked as damaged")):
        with path.open("r+b") as file:
            file.seek(79)  # the lowest of the incompatible features
            file.write(bytes([bit]))
        await refused(why, f"kvik img check -r all {path}")
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\0")
    with path.open("r+b") as file:
        lock_image(file.fileno(), str(path), write=True)
        await refused("is in use by another process", "fuser")
    path.unlink()
    create_image(str(path), "qcow2", 2 * SIZE, backing_file=str(tmp_path / "disk.qcow2"), backing_format="qcow2")
    await refused(f"has {2 * SIZE} bytes, and the disk that it is to go on with {SIZE}", "kvik img resize")
    path.unlink()
    create_image(str(path), "qcow2", SIZE, backing_file=str(tmp_path / "gone"), backing_format="qcow2")
    await refused(f"{tmp_path}/gone, on which {path} rests: No such file", "")
    path.unlink()
    overlays.create_overlay(str(path), facts)
    await create.create(domain, xml, Create.REUSE_EXT)
    assert top(domain)[0] == str(path)


async def test_disks_that_are_read_only_are_left_out(bench: Bench, tmp_path: Path) -> None:
    create_image(str(tmp_path / "a.qcow2"), "qcow2", SIZE)
    create_image(str(tmp_path / "b.raw"), "raw", SIZE)
    devices = disk_xml(tmp_path / "a.qcow2") + disk_xml(tmp_path / "b.raw", "vdb", "raw", "<readonly/>")
    domain = await bench.manager.define(document(devices=devices))
    await take(domain, "s1")
    disks = domain.snapshots.snapshots["s1"].disks
    assert disks is not None
    assert [(disk.name, disk.snapshot) for disk in disks.disks] == [("vda", "external"), ("vdb", "no")]


# Running machines -----------------------------------------------------------------------------------------------


async def test_a_running_machine_writes_to_the_new_image_and_says_so_in_both_documents(
    bench: Bench, tmp_path: Path
) -> None:
    domain = await started(bench, tmp_path)
    await take(domain, "s1", DISKS)
    assert domain.run is not None
    disk = domain.run.live.devices.disks[0]
    assert disk.source is not None and disk.source.file == str(tmp_path / "disk.s1") == top(domain)[0]
    assert disk.backing_store is not None and disk.backing_store.source is not None
    assert disk.backing_store.source.file == str(tmp_path / "disk.qcow2")
    assert bench.driver.machines["a"].images == {str(tmp_path / "disk.s1")}
    snapshot = domain.snapshots.snapshots["s1"]
    assert snapshot.state == "disk-snapshot"
    assert snapshot.taken is not None and snapshot.taken.pause == 1000
    manager = await bench.reopen()
    again = manager.lookup_name("a")
    assert again.run is not None
    source = again.run.live.devices.disks[0].source
    assert source is not None and source.file == str(tmp_path / "disk.s1")


async def test_what_is_encrypted_is_not_gone_on_with_in_plain_text(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    create_image(str(path), "raw", SIZE)
    secret = "<secret type='passphrase' uuid='00000000-0000-4000-8000-0000000000ff'/>"
    domain = await bench.manager.define(
        document(devices=disk_xml(path, format="raw", extra=f"<encryption format='luks'>{secret}</encryption>"))
    )
    with pytest.raises(NoSecret, match="no secret with matching uuid"):
        await take(domain, "s1")
    assert images(tmp_path) == {"disk.raw"} and not domain.snapshots.snapshots
    with pytest.raises(ConfigUnsupported, match="its copy would not be"):
        check_secrecy(domain.definition.devices.disks[0], Destination(source=DiskSource(file="/copy")))


async def test_no_image_comes_on_top_of_a_disk_that_is_being_copied(bench: Bench, tmp_path: Path) -> None:
    domain = await started(bench, tmp_path)
    before = images(tmp_path)
    assert domain.run is not None
    domain.run.block_jobs["vda"] = BlockJob("copy-vda-2", DomainBlockJobType.COPY, "vda")
    with pytest.raises(ResourceBusy, match="has a block job"):
        await take(domain, "s1", Create.DISK_ONLY)
    assert images(tmp_path) == before and not domain.snapshots.snapshots
    domain.run.block_jobs.clear()
    await take(domain, "s1", Create.DISK_ONLY)


async def test_what_the_vmm_refuses_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    domain = await started(bench, tmp_path)
    bench.driver.machines["a"].behaviour.refuses_snapshot = "no"
    before = domain.config.text
    with pytest.raises(KvikError):
        await take(domain, "s1", DISKS)
    assert images(tmp_path) == {"disk.qcow2"}
    assert domain.config.text == before and not domain.snapshots.snapshots and domain.snapshots.journal is None


@pytest.mark.parametrize("taken", [True, False])
async def test_a_vmm_that_stops_answering_is_asked_later(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Whether it did what it was told is its to say; until then nothing is removed."""
    domain = await started(bench, tmp_path)
    vmm = bench.driver.machines["a"]
    vmm.behaviour.command_deadline = 0.05
    original = vmm.put_on_top

    async def hangs(new: Any, old: Any, secrets: object, within: object) -> int:
        if taken:
            await original(new, old, {})
        vmm.hang()
        await vmm._command("nothing")
        return 0

    monkeypatch.setattr(vmm, "put_on_top", hangs)
    with pytest.raises(KvikError, match="does not say whether its snapshot was taken"):
        await take(domain, "s1", DISKS)
    assert images(tmp_path) == {"disk.qcow2", "disk.s1"}
    with pytest.raises(KvikError, match="cannot be ended now"):
        await take(domain, "s2", DISKS)
    vmm.release()
    monkeypatch.setattr(vmm, "put_on_top", original)
    domain = (await bench.reopen()).lookup_name("a")
    assert list(domain.snapshots.snapshots) == (["s1"] if taken else [])
    assert images(tmp_path) == ({"disk.qcow2", "disk.s1"} if taken else {"disk.qcow2"})


async def test_images_in_use_are_dealt_with_when_the_machine_is_off(bench: Bench, tmp_path: Path) -> None:
    domain = await started(bench, tmp_path)
    for name in ("s1", "s2"):
        await take(domain, name, DISKS)
    assert (await delete.planned(domain, "s1", 0))[-1].endswith("dealt with when it is off")
    await delete.delete(domain, "s1", 0)
    await delete.delete(domain, "s2", 0)
    assert images(tmp_path) == {"disk.qcow2", "disk.s1", "disk.s2"}
    await domain.destroy()
    await until(lambda: images(tmp_path) == {"disk.qcow2"})
    assert top(domain)[0] == str(tmp_path / "disk.qcow2")


async def test_quiescing_holds_the_file_systems_still_around_the_step(bench: Bench, tmp_path: Path) -> None:
    asked: list[str] = []
    bench.driver.behaviours["a"] = Behaviour(has_agent=False)
    domain = await started(bench, tmp_path)
    vmm = bench.driver.machines["a"]
    for name in ("freeze", "thaw"):
        vmm.behaviour.replies[f"guest-fsfreeze-{name}"] = lambda _, name=name: asked.append(name) or 1
    with pytest.raises(OperationInvalid, match="agent is not connected"):
        await take(domain, "early", DISKS | Create.QUIESCE)
    vmm.agent_connected = True
    vmm.tell(EventKind.AGENT, "connected")
    await take(domain, "s1", DISKS | Create.QUIESCE)
    assert asked == ["freeze", "thaw"]
    vmm.behaviour.refuses_snapshot = "no"
    with pytest.raises(KvikError):
        await take(domain, "s2", DISKS | Create.QUIESCE)
    assert asked == ["freeze", "thaw"] * 2, "whatever fails, the guest goes on"


async def test_halt_ends_the_machine_after_its_snapshot(bench: Bench, tmp_path: Path) -> None:
    domain = await started(bench, tmp_path)
    await take(domain, "s1", DISKS | Create.HALT)
    assert not domain.is_active
    await revert.revert(domain, "s1", 1)
    assert domain.is_active


async def test_going_back_ends_the_machine_that_runs(bench: Bench, tmp_path: Path) -> None:
    domain = await started(bench, tmp_path)
    await take(domain, "s1", DISKS)
    await take(domain, "s2", DISKS)
    await revert.revert(domain, "s1", 0)
    assert not domain.is_active
    assert top(domain)[0] == str(tmp_path / "disk.s1-now")


async def test_a_driver_that_cannot_says_what_to_do(bench: Bench, tmp_path: Path) -> None:
    bench.driver.without = {Feature.SNAPSHOTS}
    domain = await started(bench, tmp_path)
    with pytest.raises(KvikError, match="kvik shutdown a"):
        await take(domain, "s1", DISKS)


async def test_the_firmwares_variables_go_back_with_the_disks(bench: Bench, tmp_path: Path) -> None:
    create_image(str(tmp_path / "disk.qcow2"), "qcow2", SIZE)
    variables, code = tmp_path / "vars.fd", tmp_path / "code.fd"
    code.write_bytes(b"code")
    variables.write_bytes(b"first")
    firmware = f"<loader readonly='yes' type='pflash'>{code}</loader><nvram>{variables}</nvram>"
    xml = document(devices=disk_xml(tmp_path / "disk.qcow2")).replace("</type></os>", f"</type>{firmware}</os>")
    domain = await bench.manager.define(xml)
    await take(domain, "s1")
    variables.write_bytes(b"second")
    await take(domain, "s2")
    variables.write_bytes(b"third")
    await revert.revert(domain, "s1", 0)
    assert variables.read_bytes() == b"first"
    (tmp_path / "mine").write_bytes(b"not for a snapshot")
    text = format_snapshot(domain.snapshots.snapshots["s2"], secure=True)
    kept = domain.snapshots.snapshots["s2"].taken
    assert kept is not None and kept.nvram is not None
    await create.create(domain, text.replace(kept.nvram, str(tmp_path / "mine")), Create.REDEFINE)
    await revert.revert(domain, "s2", 0)
    assert variables.read_bytes() == b"second", "a document cannot name files of the host"
    for name in ("s1", "s2"):
        await delete.delete(domain, name, 0)
    assert (tmp_path / "mine").exists()
    assert not bench.paths.snapshots.joinpath("a").exists()


async def test_variables_are_made_anew_from_their_template(bench: Bench, tmp_path: Path) -> None:
    create_image(str(tmp_path / "disk.qcow2"), "qcow2", SIZE)
    variables, template, code = tmp_path / "vars.fd", tmp_path / "template.fd", tmp_path / "code.fd"
    code.write_bytes(b"code")
    template.write_bytes(b"pristine")
    variables.write_bytes(b"used")
    variables.chmod(0o640)
    loader = f"<loader readonly='yes' type='pflash'>{code}</loader>"
    firmware = f"{loader}<nvram template='{template}'>{variables}</nvram>"
    xml = document(devices=disk_xml(tmp_path / "disk.qcow2")).replace("</type></os>", f"</type>{firmware}</os>")
    domain = await bench.manager.define(xml)
    await take(domain, "s1")
    await domain.start()
    assert variables.read_bytes() == b"used"
    with pytest.raises(OperationInvalid, match="already running"):
        await domain.start(flags=Start.START_RESET_NVRAM)
    assert variables.read_bytes() == b"used", "not under a machine that runs"
    await domain.destroy()
    await domain.start(flags=Start.START_RESET_NVRAM)
    assert variables.read_bytes() == b"pristine" and variables.stat().st_mode & 0o777 == 0o640
    await revert.revert(domain, "s1", 0)
    assert variables.read_bytes() == b"used"
    await revert.revert(domain, "s1", Revert.RESET_NVRAM)
    assert variables.read_bytes() == b"pristine"
    template.unlink()
    variables.write_bytes(b"used")
    await domain.start()
    with pytest.raises(KvikError, match=r"template\.fd"):
        await revert.revert(domain, "s1", Revert.RESET_NVRAM)
    assert domain.is_active, "said before anything ends"
    await domain.destroy()
    with pytest.raises(KvikError, match=r"template\.fd"):
        await domain.start(flags=Start.START_RESET_NVRAM)
    assert variables.read_bytes() == b"used" and not domain.is_active
