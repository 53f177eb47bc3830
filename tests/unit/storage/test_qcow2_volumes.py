"""Volumes in qcow2: made as their document says, shown as their header says, copied byte by byte."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from world import opened, pool_xml

from kvik.conf.storage_volume import format_volume
from kvik.errors import ConfigError, ConfigUnsupported, InvalidArgument, OperationInvalid, OperationUnsupported
from kvik.image.opening import Opener
from kvik.storage import volumes
from kvik.storage.pool import PoolObject
from kvik.storage.pools import Pools

MIB = 1 << 20
World = tuple[Pools, PoolObject, Path]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path / "root") as pools:
        (tmp_path / "p").mkdir()
        pool = await pools.create_xml(pool_xml("p", tmp_path / "p"))
        yield pools, pool, tmp_path / "p"


def xml(name: str, size: int | None, target: str = "", more: str = "") -> str:
    capacity = f"<capacity>{size}</capacity>" if size is not None else ""
    return (
        f"<volume><name>{name}</name>{capacity}<target><format type='qcow2'/>{target}</target>{more}</volume>"
    )  # fmt: skip


async def test_it_is_made_as_its_document_says(world: World) -> None:
    pools, pool, path = world
    target = "<compat>1.1</compat><clusterSize unit='KiB'>128</clusterSize><features><lazy_refcounts/></features>"
    made = await volumes.create(pools, pool, xml("q", 5 * MIB, target))
    assert (made.size, made.format) == (5 * MIB, "qcow2")
    text = format_volume(made)
    for part in ("<compat>1.1</compat>", "<clusterSize unit='B'>131072</clusterSize>", "<lazy_refcounts/>"):
        assert part in text
    old = await volumes.create(pools, pool, xml("old", MIB, "<compat>0.10</compat>"))
    assert old.target is not None and old.target.compat == "0.10" and old.target.features is None
    full = await volumes.create(pools, pool, xml("full", 64 * MIB), preallocate_metadata=True)
    assert full.physical is not None and full.physical.value > 64 * MIB  # each cluster has its place
    assert (path / "q").stat().st_mode & 0o7777 == 0o600


async def test_it_has_the_size_of_what_it_is_based_on_and_keeps_that(world: World) -> None:
    pools, pool, path = world
    await volumes.create(pools, pool, xml("base", 3 * MIB))
    below = f"<backingStore><path>{path}/base</path><format type='qcow2'/></backingStore>"
    top = await volumes.create(pools, pool, xml("top", None, more=below))
    assert top.size == 3 * MIB
    assert f"<path>{path}/base</path>\n    <format type='qcow2'/>" in format_volume(top)
    with pytest.raises(OperationInvalid, match="volume 'top' of pool 'p' is based on it"):
        await volumes.delete(pools, pool, "base")
    copied = await volumes.copy(pools, pool, xml("copy", None), pool, "top")
    assert (path / "copy").read_bytes() == (path / "top").read_bytes()
    assert copied.size == 3 * MIB and copied.backing_store == top.backing_store
    (path / "raw").write_bytes(b"QFI\xfb" + bytes(2 * MIB - 4))  # a guest may write any header into its disk
    below = f"<backingStore><path>{path}/raw</path></backingStore>"
    top = await volumes.create(pools, pool, xml("ontop", None, more=below))
    assert top.size == 2 * MIB and top.backing_store is not None and top.backing_store.format is not None
    assert top.backing_store.format.type == "raw"


async def test_what_cannot_be_leaves_nothing(world: World) -> None:
    pools, pool, path = world
    (path / "fake").write_bytes(bytes(1000))
    for name, more in (
        ("gone", f"<backingStore><path>{path}/nothing</path><format type='raw'/></backingStore>"),
        ("dir", f"<backingStore><path>{path}</path><format type='raw'/></backingStore>"),
        ("vmdk", f"<backingStore><path>{path}/fake</path><format type='vmdk'/></backingStore>"),
    ):
        with pytest.raises(ConfigError):
            await volumes.create(pools, pool, xml(name, MIB, more=more))
    await volumes.create(pools, pool, xml("q", MIB))
    with pytest.raises(ConfigUnsupported, match="shares no blocks"):
        await volumes.copy(pools, pool, xml("c", None, "<compat>0.10</compat>"), pool, "q", reflink=True)
    assert sorted(each.name for each in path.iterdir()) == ["fake", "q"]


def contents(path: Path) -> bytes:
    """Of the disk in a qcow2 file, with what is below it."""
    with Opener(lock=False).open(str(path), "qcow2") as image:
        return bytes(image.read(0, image.size))


async def test_a_copy_in_another_format_reads_the_same(world: World) -> None:
    pools, pool, path = world
    data = os.urandom(MIB) + bytes(MIB) + b"end".ljust(512, b"\0")
    (path / "v").write_bytes(data)
    await pool.refresh()
    await volumes.copy(pools, pool, xml("q", 4 * MIB, "<compat>0.10</compat>"), pool, "v")
    assert contents(path / "q") == data.ljust(4 * MIB, b"\0")
    target = pool.volume("q").target
    assert target is not None and target.compat == "0.10"
    raw = "<volume><name>r</name><allocation>0</allocation><target><format type='raw'/></target></volume>"
    made = await volumes.copy(pools, pool, raw, pool, "q")
    assert (path / "r").read_bytes() == contents(path / "q")
    assert made.allocated < 2 * MIB  # zeros stay holes
    await volumes.copy(pools, pool, xml("other", None, "<clusterSize unit='KiB'>4</clusterSize>"), pool, "q")
    assert contents(path / "other") == contents(path / "q")
    # with what is below it, if that is a volume, too
    below = f"<backingStore><path>{path}/q</path><format type='qcow2'/></backingStore>"
    await volumes.create(pools, pool, xml("top", None, more=below))
    await volumes.copy(pools, pool, raw.replace("<name>r", "<name>flat"), pool, "top")
    assert (path / "flat").read_bytes() == contents(path / "q")
    secret = path.parent / "secret"
    secret.write_bytes(b"root:".ljust(512, b"x"))
    await volumes.create(
        pools, pool, xml("thief", None, more=f"<backingStore><path>{secret}</path><format type='raw'/></backingStore>")
    )
    with pytest.raises(OperationInvalid, match="is no volume of an active pool: it is not read"):
        await volumes.copy(pools, pool, raw.replace("<name>r", "<name>stolen"), pool, "thief")
    assert not (path / "stolen").exists()


async def test_a_copy_has_its_tables_made_before(world: World) -> None:
    pools, pool, path = world
    data = b"data".ljust(512, b"x") + bytes(8 * MIB - 512)
    (path / "v").write_bytes(data)
    await pool.refresh()
    for name, source in (("q", "v"), ("same", "q")):
        made = await volumes.copy(pools, pool, xml(name, None), pool, source, preallocate_metadata=True)
        assert contents(path / name) == data
        assert made.physical is not None and made.physical.value > 8 * MIB  # each cluster has its place
    with pytest.raises(InvalidArgument, match="not supported for raw"):
        raw = "<volume><name>r</name><target><format type='raw'/></target></volume>"
        await volumes.copy(pools, pool, raw, pool, "q", preallocate_metadata=True)


async def test_a_copy_that_is_to_share_blocks_where_it_cannot(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pools, pool, path = world

    def refuse(fd: int, command: int, source: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("kvik.storage.sparse.fcntl.ioctl", refuse)
    await volumes.create(pools, pool, xml("q", MIB))
    with pytest.raises(OperationUnsupported, match="cannot share a volume's blocks") as refused:
        await volumes.copy(pools, pool, xml("c", None), pool, "q", reflink=True)
    assert "--reflink" in refused.value.remedy
    assert sorted(item.name for item in path.iterdir()) == ["q"]


async def test_an_image_is_made_bigger_and_smaller(world: World) -> None:
    pools, pool, path = world
    await volumes.create(pools, pool, xml("q", MIB))
    await volumes.resize(pools, pool, "q", 2 * MIB)
    assert pool.volume("q").size == 2 * MIB
    await volumes.resize(pools, pool, "q", MIB, delta=True, allocate=True)
    assert pool.volume("q").size == 3 * MIB and pool.volume("q").allocated >= MIB
    with pytest.raises(InvalidArgument, match="shrink"):
        await volumes.resize(pools, pool, "q", MIB)
    await volumes.resize(pools, pool, "q", MIB, shrink=True)
    assert pool.volume("q").size == MIB and contents(path / "q") == bytes(MIB)


async def test_a_damaged_one_is_shown_and_can_be_deleted(world: World) -> None:
    pools, pool, path = world
    await volumes.create(pools, pool, xml("q", MIB))
    with (path / "q").open("r+b") as file:
        file.seek(20)
        file.write((99).to_bytes(4, "big"))  # clusters of 2^99 bytes
    await pool.refresh()
    assert pool.volume("q").format == "qcow2"
    await volumes.delete(pools, pool, "q")
    assert not (path / "q").exists()
