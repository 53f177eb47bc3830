"""Runs in the lab: the host's side of `test_vmm_disks.py`, one function for each word that a guest says."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from vmm_dialogue import Dialogue, eventually

MIB = 1 << 20
FILES = {"vda": "/tmp/a.raw", "vdb": "/tmp/b.raw", "vdc": "/tmp/c.raw", "vdd": "/dev/vda", "vde": "/dev/vdb"}
IDS = {name: f"disk{number}" for number, name in enumerate((*FILES, "vdf", "vdg"))}


def checksums(machine: Dialogue, words: list[str]) -> None:
    """`name=sum ...` as the guest reads each disk: the host reads the same from the file."""
    assert len(words) == len(FILES)
    for word in words:
        name, _, theirs = word.partition("=")
        with open(FILES[name], "rb") as stream:
            assert hashlib.file_digest(stream, "md5").hexdigest() == theirs, name
        writethrough = name in ("vda", "vdb")  # then a driver need not flush
        assert writethrough or machine.stats(IDS[name])["flush_operations"] > 0, name


def discarded(machine: Dialogue, words: list[str]) -> None:
    for name in words:
        with open(FILES[name], "rb") as stream:
            stream.seek(MIB)
            assert stream.read(MIB) == bytes(MIB), name
            assert os.fstat(stream.fileno()).st_blocks * 512 <= 3 * MIB, name
        assert machine.stats(IDS[name])["unmap_bytes"] == MIB


def zeroed(machine: Dialogue, words: list[str]) -> None:
    for name in words:
        with open(FILES[name], "rb") as stream:
            stream.seek(2 * MIB)
            assert stream.read(MIB) == bytes(MIB), name
            assert stream.read(1) != b"", name


def resize(machine: Dialogue, words: list[str]) -> None:
    machine.qmp("block_resize", device="disk0", size=6 * MIB)
    assert os.stat(FILES["vda"]).st_size == 6 * MIB


def throttle(machine: Dialogue, words: list[str]) -> None:
    rates = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    machine.qmp("block_set_io_throttle", device="disk1", **(rates | {"iops": int(words[0])}))


def full(machine: Dialogue, words: list[str]) -> None:
    """The guest writes more than the host has room for: it stops, the host gets room, and it goes on."""
    eventually(lambda: machine.qmp("query-status")["status"] == "io-error")
    found = [event["data"] for event in machine.events if event["event"] == "BLOCK_IO_ERROR"]
    assert found and found[0]["device"] == IDS["vdf"] and found[0]["nospace"] and found[0]["action"] == "stop"
    subprocess.run(["mount", "-o", "remount,size=16M", "/tmp/small"], check=True)
    machine.qmp("cont")


def filled_up(machine: Dialogue, words: list[str]) -> None:
    with open("/tmp/small/f.raw", "rb") as stream:
        assert hashlib.file_digest(stream, "md5").hexdigest() == words[0]


def vanish(machine: Dialogue, words: list[str]) -> None:
    os.truncate("/tmp/gone.raw", 0)


def still_there(machine: Dialogue, words: list[str]) -> None:
    assert machine.qmp("query-status")["status"] == "running"
    assert machine.stats(IDS["vdg"])["failed_rd_operations"] > 0


# Memory ---------------------------------------------------------------------------------------------------------------

before = [0]


def filled(machine: Dialogue, words: list[str]) -> None:
    before[0] = machine.resident()
    assert before[0] > 200 * MIB


def freed(machine: Dialogue, words: list[str]) -> None:
    """Free page reporting: what the guest freed, the host has again soon."""
    eventually(lambda: machine.resident() < before[0] - 120 * MIB)


def inflate(machine: Dialogue, words: list[str]) -> None:
    machine.qmp("balloon", value=int(words[0]) * MIB)
    eventually(lambda: machine.qmp("query-balloon")["actual"] == int(words[0]) * MIB)


def plug(machine: Dialogue, words: list[str]) -> None:
    path = "/machine/peripheral/mem0"
    machine.qmp("qom-set", path=path, property="requested-size", value=int(words[0]) * MIB)
    eventually(lambda: machine.qmp("qom-get", path=path, property="size") == int(words[0]) * MIB)


TURNS: dict[str, Callable[[Dialogue, list[str]], Any]] = {
    function.__name__: function
    for function in (
        *(checksums, discarded, zeroed, resize, throttle, full, filled_up, vanish, still_there),
        *(filled, freed, inflate, plug),
    )
}

if __name__ == "__main__":
    Dialogue(json.loads(sys.argv[1])).run(TURNS)
