"""Encrypted volumes: LUKS as a whole and inside qcow2, written by a confined qemu-img, and read back by a free one."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvik.conf.storage_volume import format_volume
from kvik.errors import ConfigError, ConfigUnsupported, HostError, ImageError, NoSecret
from kvik.host import jail
from kvik.host.process import find_program
from kvik.host.tools import Completed
from kvik.storage import encryption, volumes
from kvik.storage.backend import Backend
from kvik.storage.pool import PoolObject
from kvik.storage.pools import Pools

pytestmark = pytest.mark.skipif(find_program("qemu-img") is None, reason="needs qemu-img (apt install qemu-utils)")

MIB = 1 << 20
UUID = "55806c7d-8e93-456f-829b-607d8c198300"
PASSPHRASE = b"open, sesame: 5d10"
MARK = b"nobody shall read this "
SEALED = (
    "<target><format type='{}'/><encryption format='luks'><secret type='passphrase' uuid='{}'/>{}</encryption></target>"
)


def xml(name: str, size: int, kind: str = "raw", more: str = "", below: str = "") -> str:
    target = SEALED.format(kind, UUID, more)
    return f"<volume><name>{name}</name><capacity>{size}</capacity><allocation>0</allocation>{target}{below}</volume>"


@pytest.fixture
async def pool(pools: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PoolObject:
    monkeypatch.setattr(encryption, "iteration_ms", 10)

    def secret(usage: str, which: object) -> bytes:
        assert usage == "volume"
        return PASSPHRASE

    pools.secret = secret
    (tmp_path / "p").mkdir()
    return await pools.create_xml(f"<pool type='dir'><name>p</name><target><path>{tmp_path}/p</path></target></pool>")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every word of every command line and environment that was run."""
    words: list[str] = []
    run = jail.run

    def recorded(argv: list[str], **more: object) -> Completed:
        words.extend([*argv, *os.environ.values()])
        return run(argv, **more)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(jail, "run", recorded)
    return words


def plain(path: Path, kind: str, directory: Path) -> bytes:
    """What is in it, for those who know the passphrase."""
    (directory / "passphrase").write_bytes(PASSPHRASE)
    key = "key-secret=s" if kind == "luks" else "encrypt.key-secret=s"
    source = f"driver={kind},{key},file.filename={path}"
    given = ["--object", f"secret,id=s,file={directory}/passphrase", "--image-opts", source]
    subprocess.run(["qemu-img", "convert", *given, "-O", "raw", directory / "out"], check=True)
    return (directory / "out").read_bytes()


async def test_made_shown_resized_and_wiped(pools: Pools, pool: PoolObject, told: list[str], tmp_path: Path) -> None:
    cipher = "<cipher name='aes' size='128' mode='cbc' hash='sha256'/><ivgen name='essiv' hash='sha256'/>"
    made = await volumes.create(pools, pool, xml("whole", 4 * MIB, more=cipher))
    inside = await volumes.create(pools, pool, xml("inside", 4 * MIB, "qcow2"))
    assert (made.size, made.format, inside.size, inside.format) == (4 * MIB, "raw", 4 * MIB, "qcow2")
    wanted = f"<encryption format='luks'>\n      <secret type='passphrase' uuid='{UUID}'/>"
    assert wanted in format_volume(made) and wanted in format_volume(inside)
    facts = subprocess.run(["qemu-img", "info", tmp_path / "p/whole"], capture_output=True, text=True, check=True)
    for words in ("cipher alg: aes-128", "cipher mode: cbc", "ivgen alg: essiv", "hash alg: sha256"):
        assert words in facts.stdout
    assert plain(tmp_path / "p/inside", "qcow2", tmp_path) == bytes(4 * MIB)
    # The passphrase is nowhere.
    assert told and not any(PASSPHRASE.decode() in word for word in told)
    for path in (tmp_path / "p/whole", tmp_path / "p/inside"):
        assert PASSPHRASE not in path.read_bytes() and path.stat().st_mode & 0o777 == 0o600
    for name in ("whole", "inside"):
        await volumes.resize(pools, pool, name, 6 * MIB)
        assert pool.volume(name).size == 6 * MIB and wanted in format_volume(pool.volume(name))
    assert len(plain(tmp_path / "p/whole", "luks", tmp_path)) == 6 * MIB
    assert plain(tmp_path / "p/inside", "qcow2", tmp_path) == bytes(6 * MIB)
    # Anew no document says what opens it; a secret that names its path does.
    await pool.refresh()
    assert "<encryption format='luks'/>" in format_volume(pool.volume("inside"))
    with pytest.raises(ConfigUnsupported, match="cannot be resized without its secret"):
        await volumes.resize(pools, pool, "inside", 8 * MIB)
    pools.secret_for = lambda path: UUID if path == f"{tmp_path}/p/inside" else None
    await pool.refresh()
    assert wanted in format_volume(pool.volume("inside")) and wanted not in format_volume(pool.volume("whole"))
    # Uploads and downloads are of the bytes as they lie there, as with libvirt; wiping takes the key with all else.
    async with volumes.open_bytes(pools, pool, "whole", 0, 0, writable=False) as opened:
        assert os.pread(opened.fd, 6, 0) == b"LUKS\xba\xbe"
    await volumes.wipe(pools, pool, "whole", 0)
    assert "<encryption" not in format_volume(pool.volume("whole"))
    assert (tmp_path / "p/whole").read_bytes().strip(b"\0") == b""


async def test_a_copy_is_encrypted_with_all_that_lies_below_its_source(
    pools: Pools, pool: PoolObject, told: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "p"
    (path / "base").write_bytes(MARK * 1000 + bytes(2 * MIB - 1000 * len(MARK)))
    await pool.refresh()
    below = f"<backingStore><path>{path}/base</path><format type='raw'/></backingStore>"
    await volumes.create(
        pools, pool, f"<volume><name>top</name><target><format type='qcow2'/></target>{below}</volume>"
    )
    copied = await volumes.copy(pools, pool, xml("whole", 2 * MIB), pool, "top")
    assert (copied.size, copied.format) == (2 * MIB, "raw")
    again = await volumes.copy(pools, pool, xml("inside", 2 * MIB, "qcow2"), pool, "whole")
    assert again.format == "qcow2" and again.backing_store is None
    for name, kind in (("whole", "luks"), ("inside", "qcow2")):
        assert plain(path / name, kind, tmp_path) == (path / "base").read_bytes()
        assert MARK not in (path / name).read_bytes()
    assert not any(PASSPHRASE.decode() in word for word in told)
    # Without a secret of its own a copy is the same bytes, and never plain text.
    same = "<volume><name>same</name><capacity>{}</capacity><target><format type='{}'/>{}</target></volume>"
    await volumes.copy(pools, pool, same.format(MIB, "raw", "<encryption format='luks'/>"), pool, "whole")
    assert (path / "same").read_bytes() == (path / "whole").read_bytes()
    await volumes.delete(pools, pool, "same")
    with pytest.raises(ImageError, match="is encrypted"):
        await volumes.copy(pools, pool, same.format(MIB, "raw", ""), pool, "inside")
    assert not (path / "same").exists()


async def test_what_cannot_be_leaves_nothing(pools: Pools, pool: PoolObject, tmp_path: Path) -> None:
    secret = f"<secret type='passphrase' uuid='{UUID}'/>"
    cases = (
        ("raw", "luks", "", ConfigError, "no secret provided for luks encryption"),
        ("raw", "luks", secret * 2, ConfigError, "too many secrets for luks encryption"),
        ("raw", "qcow", secret, ConfigUnsupported, "unsupported volume encryption format qcow"),
        ("raw", "default", secret, ConfigUnsupported, "unsupported volume encryption format default"),
        ("qcow2", "luks2", secret, ConfigUnsupported, "unsupported volume encryption format luks2"),
        ("raw", "luks", "<secret type='passphrase'/>", ConfigError, "named by its uuid or by its usage"),
        ("raw", "luks", secret + "<cipher name='aes,x=y' size='256'/>", ConfigError, "no name of a cipher"),
        ("raw", "luks", secret + "<cipher name='aes' size='100'/>", ConfigError, "128, 192 or 256"),
        ("raw", "luks", secret + "<cipher name='rot13' size='256'/>", HostError, "cannot be encrypted"),
    )
    for kind, format_, inner, error, words in cases:
        target = f"<target><format type='{kind}'/><encryption format='{format_}'>{inner}</encryption></target>"
        with pytest.raises(error, match=words):
            await volumes.create(pools, pool, f"<volume><name>v</name><capacity>{MIB}</capacity>{target}</volume>")

    def none(usage: str, which: object) -> bytes:
        raise NoSecret(f"secret '{UUID}' does not have a value")

    pools.secret = none
    await pool.destroy()
    pool = await pools.create_xml(f"<pool type='dir'><name>p</name><target><path>{tmp_path}/p</path></target></pool>")
    with pytest.raises(NoSecret):
        await volumes.create(pools, pool, xml("v", MIB))
    assert not [*(tmp_path / "p").iterdir()] and not pool.volumes()


async def test_a_client_that_goes_away_leaves_a_whole_volume_or_none(
    pools: Pools, pool: PoolObject, tmp_path: Path
) -> None:
    # One that lies on another, which is named and not opened: it is not there.
    below = f"<backingStore><path>{tmp_path}/base</path><format type='raw'/></backingStore>"
    work = asyncio.ensure_future(volumes.create(pools, pool, xml("v", MIB, "qcow2", below=below)))
    while not [*(tmp_path / "p").iterdir()]:
        await asyncio.sleep(0.01)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert [each.name for each in (tmp_path / "p").iterdir()] == ["v"]
    made = pool.volume("v")
    assert made.backing_store is not None and made.backing_store.path == f"{tmp_path}/base"
    (tmp_path / "base").write_bytes(MARK * 100 + bytes(MIB - 100 * len(MARK)))
    assert plain(tmp_path / "p/v", "qcow2", tmp_path) == (tmp_path / "base").read_bytes()


async def test_a_partition_is_encrypted_and_larger_by_its_header(
    pools: Pools, pool: PoolObject, loop: Callable[[int], str], told: list[str], tmp_path: Path
) -> None:
    def build(backend: Backend) -> None:
        backend.build()

    device = loop(64 * MIB)
    source = f"<source><device path='{device}'/><format type='gpt'/></source><target><path>/dev</path></target>"
    parts = await pools.define(f"<pool type='disk'><name>d</name>{source}</pool>")
    await parts.build(build)
    await parts.start()
    first, second, third = (f"{Path(device).name}p{number}" for number in (1, 2, 3))
    document = xml(first, 8 * MIB).replace("<format type='raw'/>", "").replace("<allocation>0</allocation>", "")
    made = await volumes.create(pools, parts, document)
    assert made.physical is not None
    assert 8 * MIB <= made.size < made.physical.value <= 10 * MIB and made.type == "block"
    wanted = f"<encryption format='luks'>\n      <secret type='passphrase' uuid='{UUID}'/>"
    assert wanted in format_volume(made)
    # Filled from a plain file, and copied to another partition and a file, byte by byte.
    (tmp_path / "p/base").write_bytes(MARK * 1000 + bytes(4 * MIB - 1000 * len(MARK)))
    await pool.refresh()
    await volumes.copy(pools, parts, document.replace(first, second).replace(str(8 * MIB), str(4 * MIB)), pool, "base")
    node = Path("/dev") / second
    assert plain(node, "luks", tmp_path)[: 4 * MIB] == (tmp_path / "p/base").read_bytes()
    assert MARK not in node.read_bytes() and not any(PASSPHRASE.decode() in word for word in told)
    same = "<volume><name>{}</name><capacity>{}</capacity><target><encryption format='luks'/></target></volume>"
    copied = await volumes.copy(pools, parts, same.format(third, MIB), parts, second)
    assert copied.size >= 4 * MIB and plain(Path("/dev") / third, "luks", tmp_path)[:23] == MARK
    copied = await volumes.copy(pools, pool, same.format("file", MIB), parts, second)
    assert copied.size >= 4 * MIB and plain(tmp_path / "p/file", "luks", tmp_path)[:23] == MARK
    # Out of it again, for who has the secret: into a qcow2 that is encrypted itself.
    await volumes.copy(pools, pool, xml("inside", MIB, "qcow2"), parts, second)
    assert plain(tmp_path / "p/inside", "qcow2", tmp_path)[: 1000 * len(MARK)] == MARK * 1000
    await parts.refresh()
    assert parts.volume(first).size == made.size and "<encryption format='luks'/>" in format_volume(parts.volume(first))
    await volumes.wipe(pools, parts, first, 0)
    assert "<encryption" not in format_volume(parts.volume(first))
    assert parts.volume(first).size == made.physical.value
    with pytest.raises(HostError, match="cannot be encrypted"):
        await volumes.create(
            pools, parts, xml(f"{Path(device).name}p4", MIB, more="<cipher name='rot13' size='256'/>")
            .replace("<format type='raw'/>", "")
        )  # fmt: skip
    assert sorted(parts.contents.volumes) == [first, second, third]
    for name in (third, second, first):
        await volumes.delete(pools, parts, name)
    await parts.destroy()
