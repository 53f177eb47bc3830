"""The verbs of I/O threads with every option they have, on a daemon with machines in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

Kvik = Callable[..., tuple[int, str, str]]
DOCUMENT = """<domain type='test'><name>threaded</name><memory>65536</memory><iothreads>2</iothreads>
<os><type>hvm</type></os><devices>
<controller type='scsi' index='0' model='virtio-scsi'><driver iothread='1'/></controller></devices></domain>"""


@pytest.fixture
def kvik(kvik_: Kvik, tmp_path: Path) -> Iterator[Kvik]:
    document = tmp_path / "threaded.xml"
    document.write_text(DOCUMENT)
    assert kvik_("define", str(document))[0] == 0
    yield kvik_
    kvik_("destroy", "threaded")
    assert kvik_("undefine", "threaded")[0] == 0


def error(kvik: Kvik, verb: str, *words: str) -> str:
    code, _, errors = kvik(verb, "threaded", *words)
    return errors if code else ""


def test_threads_are_listed_added_set_bound_and_deleted(kvik: Kvik) -> None:
    everywhere = sorted(os.sched_getaffinity(0))
    assert json.loads(kvik("--json", "iothreadinfo", "threaded", "--config")[1]) == [
        {"iothread": 1, "affinity": everywhere},
        {"iothread": 2, "affinity": everywhere},
    ]
    assert not error(kvik, "iothreadadd", "4", "--config")
    assert "an IOThread is already using iothread_id '4'" in error(kvik, "iothreadadd", "--id", "4", "--current")
    given = ("--poll-max-ns", "9", "--poll-grow", "2", "--poll-shrink", "3", "--thread-pool-min", "4")
    assert not error(kvik, "iothreadset", "--id", "4", *given, "--thread-pool-max", "8", "--config")
    assert "can't be greater" in error(kvik, "iothreadset", "4", "--thread-pool-min", "9", "--current")
    assert "not between 0 and" in error(kvik, "iothreadset", "4", "--thread-pool-max", "-1", "--config")
    assert not error(kvik, "iothreadpin", "--iothread", "4", "--cpulist", "0", "--config")
    assert "Empty iothread cpumap" in error(kvik, "iothreadpin", "4", "0,^0", "--current")
    assert "Invalid cpulist 'x'" in error(kvik, "iothreadpin", "4", "x", "--current")
    assert "cannot find IOThread '3'" in error(kvik, "iothreadpin", "3", "r", "--config")
    root = ElementTree.fromstring(kvik("dumpxml", "threaded")[1])
    thread = root.findall("./iothreadids/iothread")[2]
    assert thread.attrib == {"id": "4", "thread_pool_min": "4", "thread_pool_max": "8"}
    poll = thread.find("poll")
    assert poll is not None and poll.attrib == {"max": "9", "grow": "2", "shrink": "3"}
    assert root.findtext("iothreads") == "3"
    assert "used by controller '0'" in error(kvik, "iothreaddel", "1", "--config")
    assert "cannot find IOThread '3'" in error(kvik, "iothreaddel", "--id", "3", "--current")
    assert not error(kvik, "iothreaddel", "4", "--config")
    root = ElementTree.fromstring(kvik("dumpxml", "threaded")[1])
    assert not root.findall("./cputune/iothreadpin") and len(root.findall("./iothreadids/iothread")) == 2


def test_what_cannot_be_is_refused(kvik: Kvik) -> None:
    assert "Invalid IOThread id value: '0'" in error(kvik, "iothreadadd", "0", "--config")
    assert "nothing to set" in error(kvik, "iothreadset", "1", "--config")
    for verb, *words in (("iothreadadd", "4"), ("iothreadset", "1", "--poll-grow", "1"), ("iothreadpin", "1", "0")):
        assert "is not running" in error(kvik, verb, *words, "--live"), verb
    assert "is not running" in error(kvik, "iothreadinfo", "--live")
    assert "mutually exclusive" in error(kvik, "iothreadinfo", "--live", "--current")
    assert kvik("start", "threaded")[0] == 0
    for verb, *words in (("iothreaddel", "2"), ("iothreadset", "1", "--poll-grow", "1"), ("iothreadadd", "4")):
        assert "have no I/O threads" in error(kvik, verb, *words, "--live"), verb
