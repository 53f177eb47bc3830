"""blkdeviotune with every option it has, on a daemon with machines in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Kvik = Callable[..., tuple[int, str, str]]

DISK = "<disk type='file' device='disk'><source file='{}'/><target dev='{}' bus='virtio'/></disk>"
OPTIONS = """
--total-bytes-sec --read-bytes-sec --write-bytes-sec --total-iops-sec --read-iops-sec --write-iops-sec
--total-bytes-sec-max --read-bytes-sec-max --write-bytes-sec-max --total-iops-sec-max --read-iops-sec-max
--write-iops-sec-max --total-bytes-sec-max-length --read-bytes-sec-max-length --write-bytes-sec-max-length
--total-iops-sec-max-length --read-iops-sec-max-length --write-iops-sec-max-length --size-iops-sec
"""
NUMBERS = [option.removeprefix("--") for option in OPTIONS.split()]


@pytest.fixture
def machine(kvik_: Kvik, tmp_path: Path) -> Iterator[Kvik]:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(4096))
    disks = DISK.format(tmp_path / "a", "vda") + DISK.format(tmp_path / "b", "vdb")
    document = tmp_path / "tuned.xml"
    document.write_text(
        "<domain type='test'><name>tuned</name><memory>65536</memory><os><type>hvm</type></os>"
        f"<devices>{disks}</devices></domain>"
    )
    assert kvik_("define", str(document))[0] == 0
    yield kvik_
    kvik_("destroy", "tuned")
    assert kvik_("undefine", "tuned")[0] == 0


def tuned(kvik: Kvik, device: str, *words: str) -> dict[str, int | str]:
    code, out, errors = kvik("--json", "blkdeviotune", "tuned", device, *words)
    assert code == 0, errors
    return {name: value for name, value in json.loads(out).items() if value and name != "device"}


def change(kvik: Kvik, *words: str) -> str:
    code, _, errors = kvik("blkdeviotune", "tuned", *words)
    return errors if code else ""


def test_every_limit_is_set_and_told(machine: Kvik) -> None:
    for ways in (("total",), ("read", "write")):
        given = [name for name in NUMBERS if name.startswith(ways) or name == "size-iops-sec"]
        words = [word for name in given for word in (f"--{name}", "3K" if "max" in name else "2K")]
        assert not change(machine, "--device", "vda", *words, "--config")
        assert tuned(machine, "vda", "--config") == {
            name.replace("-", "_"): 3072 if "max" in name else 2048 for name in given
        }
    assert not change(machine, "vda", "--group-name", "g", "--read-bytes-sec", "7", "--current")
    assert "<group_name>g</group_name>" in machine("dumpxml", "tuned")[1]


def test_live_and_config_are_two_things_and_a_group_is_one(machine: Kvik) -> None:
    assert "not running" in change(machine, "vda", "--read-iops-sec", "4", "--live")
    assert machine("start", "tuned")[0] == 0
    assert not change(machine, "vda", "--read-iops-sec", "4", "--live")
    assert (tuned(machine, "vda"), tuned(machine, "vda", "--config")) == ({"read_iops_sec": 4}, {})
    assert not change(machine, "vda", "--read-iops-sec", "5", "--group-name", "g", "--live", "--config")
    assert not change(machine, "vdb", "--group-name", "g", "--live", "--config")
    expected = {"read_iops_sec": 5, "group_name": "g"}
    assert tuned(machine, "vdb") == tuned(machine, "vdb", "--config") == expected
    assert not change(machine, "vdb", "--write-bytes-sec", "9", "--config")
    assert tuned(machine, "vda", "--config") == expected | {"write_bytes_sec": 9}
    assert tuned(machine, "vda", "--live") == expected


def test_what_cannot_be_is_refused_and_changes_nothing(machine: Kvik) -> None:
    for words, why in (
        (["nope", "--read-iops-sec", "1"], "disk 'nope' was not found in the domain config"),
        (["vda", "--total-bytes-sec", "1", "--read-bytes-sec", "1"], "total and read/write of bytes_sec cannot be set"),
        (["vda", "--total-iops-sec", "5", "--total-iops-sec-max", "3"], "cannot be smaller than 'total_iops_sec'"),
        (["vda", "--read-iops-sec-max-length", "3"], "cannot be set if 'read_iops_sec_max' is not set"),
        (["vda", "--read-iops-sec-max", "3"], "cannot be set if 'read_iops_sec' is not set"),
        (["vda", "--read-bytes-sec", "99999999999999999"], "must be no more than 1000000000000000"),
        (["vda", "--read-bytes-sec", "x"], "Scaled numeric value 'x' for <read-bytes-sec> option is malformed"),
        (["vda", "--read-bytes-sec", "1", "--current", "--config"], "mutually exclusive"),
        (["vda", "--group-name", "g" * 256], "1 to 255 bytes"),
    ):
        assert why in change(machine, *words), words
        assert tuned(machine, "vda") == {}
