"""A machine gets another name; snapshots, checkpoints and managed save go with it, whatever happens meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path
from uuid import uuid4

import pytest
from guillotine import cut
from manager_bench import Bench, document
from snapshot_bench import SIZE, disk_xml, shows, take, write

from kvik.conf.checkpoint import Checkpoint, CheckpointDisk, CheckpointDisks
from kvik.errors import AlreadyExists, HostError, OperationInvalid
from kvik.host import files
from kvik.image.create import create as create_image
from kvik.manager.checkpoints.store import store_of
from kvik.manager.domain import DomainObject
from kvik.manager.saved import machine as saved
from kvik.manager.snapshots import delete, revert


async def grown(bench: Bench, place: Path) -> DomainObject:
    """With firmware, two snapshots, a checkpoint and a managed save."""
    create_image(str(place / "disk.qcow2"), "qcow2", SIZE)
    (place / "code.fd").write_bytes(b"code")
    (place / "vars.fd").write_bytes(b"first")
    firmware = f"<loader readonly='yes' type='pflash'>{place}/code.fd</loader><nvram>{place}/vars.fd</nvram>"
    xml = document(devices=disk_xml(place / "disk.qcow2")).replace("</type></os>", f"</type>{firmware}</os>")
    domain = await bench.manager.define(xml)
    await domain.set_autostart(True)
    await take(domain, "s1")
    write(domain, 0, b"second")
    await take(domain, "s2")
    disks = CheckpointDisks(disks=[CheckpointDisk(name="vda", checkpoint="bitmap")])
    checkpoint = Checkpoint(name="c1", creation_time=7, disks=disks, domain=domain.definition)
    store_of(domain).write(checkpoint)
    domain.checkpoints.all["c1"] = checkpoint
    await domain.start()
    await saved.managed_save(domain, 0)
    return domain


async def check(bench: Bench, place: Path, name: str) -> None:
    """Nothing of it is lost, and nothing is left under another name."""
    domain = bench.manager.lookup_name(name)
    assert domain.autostart and domain.definition.name == name
    assert list(domain.snapshots.snapshots) == ["s1", "s2"] and domain.snapshots.current == "s2"
    assert list(domain.checkpoints.all) == ["c1"]
    for directory in (bench.paths.snapshots, bench.paths.checkpoints):
        assert [path.name for path in directory.iterdir()] == [name]
    for snapshot in domain.snapshots.snapshots.values():
        assert snapshot.domain is not None and snapshot.domain.name == name
        assert snapshot.taken is not None and Path(snapshot.taken.nvram or "").read_bytes() == b"first"
    assert domain.has_managed_save
    assert [path.name for path in bench.paths.saves.iterdir()] == [f"{name}.save"]
    await domain.start()
    await domain.destroy()
    assert not domain.has_managed_save
    before = shows(domain)
    (place / "vars.fd").write_bytes(b"changed")
    await revert.revert(domain, "s1", 0)
    assert (place / "vars.fd").read_bytes() == b"first"
    assert shows(domain) != before and domain.definition.name == name


async def test_snapshots_and_checkpoints_go_with_the_machine(bench: Bench, tmp_path: Path) -> None:
    domain = await grown(bench, tmp_path)
    await domain.rename("c")
    # Another machine with the name of before has nothing of it.
    other = await bench.manager.define(document("a", uuid="00000000-0000-4000-8000-00000000000f"))
    assert not other.snapshots.snapshots and not other.checkpoints.all
    await other.undefine()
    await bench.reopen()
    await check(bench, tmp_path, "c")
    domain = bench.manager.lookup_name("c")
    for name in ("s1", "s2"):
        await delete.delete(domain, name, 0)
    assert not bench.paths.snapshots.joinpath("c").exists()


async def test_killed_at_any_change_to_a_file_it_has_one_of_the_names(tmp_path: Path) -> None:
    where, kept = tmp_path / "now", tmp_path / "before"
    (where / "disks").mkdir(parents=True)
    bench = Bench(where)
    await bench.open()
    await grown(bench, where / "disks")
    await bench.manager.close()
    shutil.copytree(where, kept, symlinks=True)
    names = []
    for steps in range(100):
        shutil.rmtree(where)
        shutil.copytree(kept, where, symlinks=True)
        bench = Bench(where)
        domain = (await bench.open()).lookup_name("a")
        fell = await cut(bench, steps, domain.rename("c"))
        manager = await bench.open()
        (survivor,) = manager.domains()
        names.append(survivor.name)
        try:
            await check(bench, where / "disks", survivor.name)
        except AssertionError as error:
            raise AssertionError(f"after {steps} steps: {error}") from error
        finally:
            await manager.close()
        if not fell:
            assert names == sorted(names) and set(names) == {"a", "c"}
            return
    pytest.fail("it never came to its end")


async def test_what_is_left_under_the_new_name_is_not_taken_over(bench: Bench, tmp_path: Path) -> None:
    domain = await grown(bench, tmp_path)
    left = bench.paths.snapshots / "c" / "s9.mem"
    left.parent.mkdir()
    left.write_bytes(b"of a machine that is gone")
    with pytest.raises(AlreadyExists, match="what is left of another machine 'c'"):
        await domain.rename("c")
    assert left.exists()
    shutil.rmtree(left.parent)
    await check(bench, tmp_path, "a")


async def test_what_the_host_refuses_leaves_the_old_name(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = await grown(bench, tmp_path)
    write_file = files.atomic_write

    def refuse(path: Path, data: bytes, **options: bool) -> None:
        if Path(path).name == "c.xml":
            raise HostError(f"cannot write {path}: No space left on device", errno=28)
        write_file(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_write", refuse)
        with pytest.raises(HostError, match="No space left"):
            await domain.rename("c")
    await bench.reopen()
    await check(bench, tmp_path, "a")


async def test_one_that_runs_keeps_its_name(bench: Bench, tmp_path: Path) -> None:
    domain = await grown(bench, tmp_path)
    await domain.start()
    with pytest.raises(OperationInvalid, match="is running"):
        await domain.rename("c")
    assert bench.manager.lookup_name("a") is domain


async def test_another_machine_of_the_old_name_has_firmware_variables_of_its_own(bench: Bench, tmp_path: Path) -> None:
    """Those of the renamed one lie by its old name still."""
    (tmp_path / "code.fd").write_bytes(b"code")
    usual = bench.paths.nvram / "a_VARS.fd"
    firmware = f"<loader readonly='yes' type='pflash'>{tmp_path}/code.fd</loader><nvram>{usual}</nvram>"
    xml = document().replace("</type></os>", f"</type>{firmware}</os>")
    first = await bench.manager.define(xml)
    await bench.manager.define(xml)  # the same one again
    assert first.definition.os.nvram is not None and first.definition.os.nvram.value == str(usual)
    await first.rename("b")
    second = await bench.manager.define(xml.replace(first.uuid_text, str(uuid4())))
    assert second.definition.os.nvram is not None
    assert second.definition.os.nvram.value == str(usual.with_name(f"a-{second.uuid_text[:8]}_VARS.fd"))
