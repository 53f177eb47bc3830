"""I/O threads of a real QEMU, changed by Debian's virsh: what QEMU has, where the threads run, what is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvik.errors import KvikError

from .conftest import Kvikd
from .test_changes import image

LIVE, CONFIG = 1, 2
THREADS = (
    "<iothreads>3</iothreads><iothreadids><iothread id='5' thread_pool_min='2' thread_pool_max='9'>"
    "<poll max='1000' grow='2' shrink='3'/></iothread></iothreadids>"
    "<defaultiothread thread_pool_min='1' thread_pool_max='12'/>"
    "<cputune><iothreadpin iothread='5' cpuset='0'/></cputune>"
)
DISK = (
    "<disk type='file' device='disk'><driver name='qemu' type='raw' iothread='{}' queues='2'/><source file='{}'/>"
    "<target dev='{}' bus='virtio'/></disk>"
)


def asked(kvikd: Kvikd, name: str, command: str, **arguments: Any) -> Any:
    line = json.dumps({"execute": command, "arguments": arguments})
    return json.loads(kvikd.virsh("qemu-monitor-command", name, line).stdout)["return"]


def threads(kvikd: Kvikd, name: str) -> dict[str, int]:
    return {item["id"]: item["thread-id"] for item in asked(kvikd, name, "query-iothreads")}


def pool(kvikd: Kvikd, name: str, thread: str, which: str) -> int:
    return int(asked(kvikd, name, "qom-get", path=f"/objects/{thread}", property=f"thread-pool-{which}"))


def test_threads_come_go_and_change_while_the_machine_runs(make: Any, kvikd: Kvikd, tmp_path: Path) -> None:
    domain = make("threaded", DISK.format(5, image(tmp_path / "a"), "vda"), kernel=False, extra=THREADS)
    domain.start()

    def virsh(*words: str) -> str:
        done = kvikd.virsh(words[0], "threaded", *words[1:])
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    made = threads(kvikd, "threaded")
    assert set(made) == {"iothread5", "iothread1", "iothread2"}
    assert os.sched_getaffinity(made["iothread5"]) == {0}
    assert (pool(kvikd, "threaded", "iothread5", "min"), pool(kvikd, "threaded", "iothread5", "max")) == (2, 9)
    assert pool(kvikd, "threaded", "main-loop", "max") == 12
    assert " 5             0\n" in virsh("iothreadinfo")
    told = kvikd.virsh("domstats", "--iothread", "threaded").stdout
    assert "iothread.count=3" in told and "iothread.5.poll-max-ns=1000" in told and "iothread.5.poll-grow=2" in told
    virsh("iothreadadd", "8", "--live", "--config")
    virsh("iothreadset", "8", "--thread-pool-min", "70", "--thread-pool-max", "80", "--poll-max-ns", "77", "--live")
    assert (pool(kvikd, "threaded", "iothread8", "min"), pool(kvikd, "threaded", "iothread8", "max")) == (70, 80)
    assert asked(kvikd, "threaded", "qom-get", path="/objects/iothread8", property="poll-max-ns") == 77
    virsh("iothreadset", "8", "--thread-pool-min", "3", "--thread-pool-max", "4", "--live")
    virsh("iothreadpin", "8", "0", "--live")
    assert os.sched_getaffinity(threads(kvikd, "threaded")["iothread8"]) == {0}
    # A disk that comes may be served by it; then it cannot go.
    domain.attach_device(DISK.format(8, image(tmp_path / "b"), "vdb"), LIVE)
    with pytest.raises(KvikError, match="cannot remove IOThread 8 since it is being used by disk 'vdb'"):
        domain.delete_iothread(8, LIVE)
    with pytest.raises(KvikError, match="names I/O thread 9, which the machine has not"):
        domain.attach_device(DISK.format(9, image(tmp_path / "c"), "vdc"), LIVE)
    virsh("iothreaddel", "2", "--live")
    assert set(threads(kvikd, "threaded")) == {"iothread5", "iothread1", "iothread8"}
    # The next daemon knows all of it.
    kvikd.end()
    kvikd.start()
    live, kept = (
        ElementTree.fromstring(kvikd.virsh("dumpxml", "threaded", *more).stdout) for more in ((), ("--inactive",))
    )
    listed = {item.get("id"): item for item in live.iterfind("./iothreadids/iothread")}
    assert list(listed) == ["5", "1", "8"] and live.findtext("iothreads") == "3"
    assert (listed["8"].get("thread_pool_min"), listed["8"].get("thread_pool_max")) == ("3", "4")
    assert {item.get("iothread"): item.get("cpuset") for item in live.iterfind("./cputune/iothreadpin")} == {
        "5": "0",
        "8": "0",
    }
    assert [item.get("id") for item in kept.iterfind("./iothreadids/iothread")] == ["5", "1", "2", "8"]
