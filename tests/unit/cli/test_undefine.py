"""undefine with the volumes of a machine's disks, on a daemon with machines in memory and pools on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Kvik = Callable[..., tuple[int, str, str]]

DISK = "<disk type='{}' device='{}'><source {}/><target dev='{}' bus='scsi'/>{}</disk>"


@pytest.fixture
def machine(kvik_: Kvik, tmp_path: Path) -> Iterator[Kvik]:
    """On two volumes of a pool, an image beside it, a shared volume and a CD in the pool."""
    pool, beside = tmp_path / "pool", tmp_path / "beside"
    pool.mkdir()
    beside.write_bytes(bytes(4096))
    assert kvik_("pool-create-as", "p", "dir", "--target", str(pool))[0] == 0
    for name in ("one", "two", "shared", "cd"):
        assert kvik_("vol-create-as", "p", name, "64K")[0] == 0
    disks = (
        DISK.format("file", "disk", f"file='{pool}/one'", "sda", "")
        + DISK.format("volume", "disk", "pool='p' volume='two'", "sdb", "")
        + DISK.format("file", "disk", f"file='{beside}'", "sdc", "")
        + DISK.format("file", "disk", f"file='{pool}/shared'", "sdd", "<shareable/>")
        + DISK.format("file", "cdrom", f"file='{pool}/cd'", "sde", "<readonly/>")
    )
    document = tmp_path / "stored.xml"
    document.write_text(
        "<domain type='test'><name>stored</name><memory>65536</memory><os><type>hvm</type></os>"
        f"<devices>{disks}</devices></domain>"
    )
    assert kvik_("define", str(document))[0] == 0
    yield kvik_
    kvik_("destroy", "stored")
    kvik_("undefine", "stored")
    assert kvik_("pool-destroy", "p")[0] == 0


def there(place: Path) -> set[str]:
    return {path.name for path in place.rglob("*") if path.is_file()} - {"stored.xml"}


def test_all_go_but_what_others_may_need_and_what_is_in_no_pool(machine: Kvik, tmp_path: Path) -> None:
    code, out, errors = machine("undefine", "stored", "--remove-all-storage", "--delete-storage-volume-snapshots")
    assert code == 0, errors
    assert out.splitlines()[:3] == [
        "Domain 'stored' has been undefined",
        f"Volume 'sda'({tmp_path}/pool/one) removed.",
        "Volume 'sdb'(two) removed.",
    ]
    assert f"'sdc'({tmp_path}/beside) is in no active pool. Remove it manually." in errors
    assert "'sdd'" in errors and "--storage sde" in errors
    assert there(tmp_path) == {"beside", "shared", "cd"}


def test_those_that_are_named(machine: Kvik, tmp_path: Path) -> None:
    named = f"sde,{tmp_path}/pool/one"
    code, out, errors = machine("undefine", "stored", "--storage", named, "--wipe-storage")
    assert code == 0 and not errors and out.count("removed.") == 2
    assert there(tmp_path) == {"beside", "two", "shared"}


def test_one_that_cannot_go_is_said_and_the_others_go(machine: Kvik, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    words = ("top", "64K", "--format", "qcow2", "--backing-vol", "one", "--backing-vol-format", "raw")
    assert machine("vol-create-as", "p", *words)[0] == 0
    code, out, errors = machine("undefine", "stored", "--storage", "sda,sdb")
    assert code == 1 and out.count("removed.") == 1
    assert f"Failed to remove storage volume 'sda'({pool}/one)" in errors and "is based on it" in errors
    assert there(tmp_path) == {"beside", "one", "shared", "cd", "top"}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--storage", "sda,sdz"), "Volume 'sdz' was not found in domain's definition"),
        (("--storage", "sda", "--remove-all-storage"), "mutually exclusive"),
        (("--wipe-storage",), "requires --storage or --remove-all-storage"),
        (("--delete-storage-volume-snapshots",), "requires --storage or --remove-all-storage"),
    ],
)
def test_what_cannot_be_is_said_before_anything_goes(
    machine: Kvik, tmp_path: Path, words: tuple[str, ...], why: str
) -> None:
    code, _, errors = machine("undefine", "stored", *words)
    assert code == 1 and why in errors
    assert machine("domuuid", "stored")[0] == 0
    assert len(there(tmp_path)) == 5


def test_a_machine_that_runs_keeps_its_volumes(machine: Kvik, tmp_path: Path) -> None:
    assert machine("start", "stored")[0] == 0
    code, _, errors = machine("undefine", "stored", "--remove-all-storage")
    assert code == 1 and "only on stopped domains" in errors
    assert len(there(tmp_path)) == 5


def test_a_file_in_no_pool_is_no_volume_that_could_be_deleted(machine: Kvik, tmp_path: Path) -> None:
    for verb in ("vol-delete", "vol-wipe"):
        code, _, errors = machine(verb, f"{tmp_path}/beside")
        assert code == 1 and f"'{tmp_path}/beside' is in no pool" in errors
    assert "beside" in there(tmp_path)
