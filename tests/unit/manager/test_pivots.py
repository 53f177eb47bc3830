"""What a disk is about to change over to, on disk: found again, settled, or asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from manager_bench import Bench, document
from snapshot_bench import SIZE, disk_xml

from kvik.conf.devices.disk import Disk
from kvik.conf.enums import DomainBlockJobAbortFlags as Abort
from kvik.conf.tree import clone
from kvik.errors import HostError, OperationFailed, OperationInvalid
from kvik.image.create import create as create_image
from kvik.manager.domain import DomainObject
from kvik.manager.snapshots import create, files
from kvik.manager.storage import users
from kvik.manager.store import Store


async def intended(bench: Bench, place: Path) -> DomainObject:
    """The machine is off, and its disk was being changed over to another image when it ended."""
    for name in ("old", "new"):
        create_image(str(place / name), "qcow2", SIZE)
    domain = await bench.manager.define(document(devices=disk_xml(place / "old")))
    before = domain.definition.devices.disks[0]
    await bench.manager.pivots.intend(domain, before, moved(before, place / "new"))
    return domain


def moved(disk: Disk, path: Path) -> Disk:
    after = clone(disk)
    assert after.source is not None
    after.source.file = str(path)
    return after


def image(domain: DomainObject) -> str:
    source = domain.definition.devices.disks[0].source
    assert source is not None and source.file is not None
    return Path(source.file).name


@pytest.mark.parametrize(("flags", "name"), [(Abort.PIVOT, "new"), (0, "old")])
async def test_it_is_refused_by_name_until_somebody_says(bench: Bench, tmp_path: Path, flags: int, name: str) -> None:
    await intended(bench, tmp_path)
    manager = await bench.reopen()
    assert any("cannot be known" in warning for warning in manager.warnings)
    domain = manager.lookup_name("a")
    for refused in (
        domain.start,
        lambda: create.create(domain, "<domainsnapshot><name>s1</name></domainsnapshot>", 0),
        lambda: domain.rename("other"),
    ):
        with pytest.raises(OperationFailed, match=f"from {tmp_path}/old to {tmp_path}/new") as error:
            await refused()
        assert "blockjob a vda --pivot" in error.value.remedy and "--abort" in error.value.remedy
    both = {f"{tmp_path}/old", f"{tmp_path}/new"}
    assert {top.path for top in files.tops(manager)} == both
    assert f"{tmp_path}/new" in {path for path, _, _ in users(manager)}
    with pytest.raises(OperationInvalid):
        await domain.block_job_abort("vdb", flags)
    await domain.block_job_abort("vda", flags)
    assert image(domain) == name and not list(bench.paths.pivots.iterdir())
    await domain.start()
    with pytest.raises(OperationInvalid):
        await domain.block_job_abort("vda", flags)


async def test_a_definition_that_names_another_image_settles_it(bench: Bench, tmp_path: Path) -> None:
    domain = await intended(bench, tmp_path)
    await bench.manager.define(document(devices=disk_xml(tmp_path / "new")))
    await domain.start()
    assert not list(bench.paths.pivots.iterdir())


async def test_what_is_known_and_cannot_be_written_is_tried_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = await intended(bench, tmp_path)
    (pivot,) = bench.manager.pivots.of(domain)
    pivot.switched = True

    async def full(store: Store, name: str, text: str) -> None:
        raise HostError("no space left", errno=28)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save_definition", full)
        with pytest.raises(OperationFailed, match="cannot be changed: no space left"):
            await domain.start()
    assert image(domain) == "old"
    # nor is another change begun meanwhile
    after = pivot.after
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save_definition", full)
        with pytest.raises(OperationFailed, match="cannot be changed"):
            await bench.manager.pivots.intend(domain, after, moved(after, tmp_path / "third"))
    await domain.start()
    assert image(domain) == "new" and not list(bench.paths.pivots.iterdir())


async def test_what_is_damaged_is_set_aside_and_what_nobody_has_any_more_goes(bench: Bench, tmp_path: Path) -> None:
    domain = await intended(bench, tmp_path)
    (path,) = bench.paths.pivots.iterdir()
    whole = path.read_bytes()
    for number, data in enumerate((b"", whole[:50], b'{"machine":"x"}', whole.replace(b"vda", b"vdb", 1))):
        (bench.paths.pivots / f"damaged-{number}.json").write_bytes(data)
    manager = await bench.reopen()
    assert sum("damaged-" in warning for warning in manager.warnings) == 4
    domain = manager.lookup_name("a")
    assert len(manager.pivots.of(domain)) == 1
    await domain.undefine()
    assert not list(bench.paths.pivots.glob("*.json"))
