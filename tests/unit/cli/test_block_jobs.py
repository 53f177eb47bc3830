"""blockcopy, blockpull, blockcommit, blockjob, blockresize: what they send, wait for and say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvik.client.events import DomainEvent, DomainRef

READY, COMPLETED, FAILED, CANCELED = 3, 0, 1, 2


@pytest.fixture
def block(kvik: Any) -> Any:
    """A daemon that has one job, half done, and tells of its end at the first question."""
    procedures = ("COPY", "PULL", "REBASE", "COMMIT", "JOB_ABORT", "JOB_SET_SPEED", "RESIZE")
    kvik.connection.low |= dict.fromkeys((f"DOMAIN_BLOCK_{name}" for name in procedures), ())
    kvik.connection.low["DOMAIN_GET_BLOCK_JOB_INFO"] = (1, 2, 3, 50, 100)
    return kvik


def ends(block: Any, *statuses: int | None) -> None:
    """What each look at the events brings: a status of vda's job, or nothing."""
    left = list(statuses)

    def next_event(timeout: float | None = None) -> Any:
        status = left.pop(0)
        if status is None:
            return None
        fields = {"dst": "vda", "type": 2, "status": status}
        return DomainEvent("block-job-2", DomainRef("tiny-1", b"", 3), 1, fields)

    block.connection.replies["next_event"] = next_event


def sent(block: Any, procedure: str) -> list[tuple[Any, ...]]:
    """Arguments after the domain."""
    return [call[3:] for call in block.connection.calls if call[:2] == ("call", procedure)]


COPY = "<disk type='file'>\n  <source file='/new'/>\n  <driver type='qcow2'/>\n</disk>\n"


@pytest.mark.parametrize(
    ("line", "procedure", "arguments", "printed"),
    [
        ("blockcopy tiny-1 vda --dest /new", "DOMAIN_BLOCK_COPY", ("vda", COPY, [], 0), "Block Copy started"),
        (
            "blockcopy tiny-1 vda /new 5 --shallow --reuse-external --transient-job --synchronous-writes "
            "--format qcow2 --granularity 65536 --buf-size 1048576",
            "DOMAIN_BLOCK_COPY",
            ("vda", COPY, [("bandwidth", 4, 5 << 20), ("granularity", 2, 65536), ("buf-size", 4, 1 << 20)], 15),
            "Block Copy started",
        ),
        (
            "blockcopy tiny-1 vda --dest /dev/x --blockdev --bytes --bandwidth 64K --reuse-external",
            "DOMAIN_BLOCK_COPY",
            ("vda", "<disk type='block'>\n  <source dev='/dev/x'/>\n  <driver type='raw'/>\n</disk>\n",
             [("bandwidth", 4, 65536)], 2),
            "Block Copy started",
        ),
        ("blockcopy tiny-1 vda --xml @xml", "DOMAIN_BLOCK_COPY", ("vda", "<disk/>", [], 0), "Block Copy started"),
        ("blockpull tiny-1 --path vda 7", "DOMAIN_BLOCK_PULL", ("vda", 7, 0), "Block Pull started"),
        (
            "blockpull tiny-1 vda --base /b --keep-relative --bytes --bandwidth 1M",
            "DOMAIN_BLOCK_REBASE",
            ("vda", "/b", 1 << 20, 16 | 64),
            "Block Pull started",
        ),
        (
            "blockcommit tiny-1 vda --base /b --top /t --shallow --delete --keep-relative --bytes --bandwidth 9",
            "DOMAIN_BLOCK_COMMIT",
            ("vda", "/b", "/t", 9, 1 | 2 | 8 | 16),
            "Block Commit started",
        ),
        (
            "blockcommit tiny-1 vda --active",
            "DOMAIN_BLOCK_COMMIT",
            ("vda", None, None, 0, 4),
            "Active Block Commit started",
        ),
        ("blockjob tiny-1 vda --abort", "DOMAIN_BLOCK_JOB_ABORT", ("vda", 0), ""),
        ("blockjob tiny-1 vda --pivot --async", "DOMAIN_BLOCK_JOB_ABORT", ("vda", 3), ""),
        ("blockjob tiny-1 vda --bandwidth 4", "DOMAIN_BLOCK_JOB_SET_SPEED", ("vda", 4, 0), ""),
        ("blockjob tiny-1 vda --bytes --bandwidth 4K", "DOMAIN_BLOCK_JOB_SET_SPEED", ("vda", 4096, 1), ""),
        (
            "blockjob tiny-1 vda",
            "DOMAIN_GET_BLOCK_JOB_INFO",
            ("vda", 0),
            "Block Copy: [ 50 %]    Bandwidth limit: 3145728 bytes/s (3.000 MiB/s)",
        ),
        (
            "blockjob tiny-1 vda --raw --bytes",
            "DOMAIN_GET_BLOCK_JOB_INFO",
            ("vda", 1),
            " type=Block Copy\n bandwidth=3\n cur=50\n end=100\n",
        ),
        ("blockjob tiny-1 vda --info --json", "DOMAIN_GET_BLOCK_JOB_INFO", ("vda", 0), '"cur": 50'),
        ("blockresize tiny-1 vda 10", "DOMAIN_BLOCK_RESIZE", ("vda", 10240, 1), "Block device 'vda' is resized"),
        ("blockresize tiny-1 vda --size 1G", "DOMAIN_BLOCK_RESIZE", ("vda", 1 << 30, 1), "is resized"),
        ("blockresize tiny-1 vda --capacity", "DOMAIN_BLOCK_RESIZE", ("vda", 0, 3), "is resized"),
    ],
)  # fmt: skip
def test_what_is_sent(
    block: Any, tmp_path: Path, *, line: str, procedure: str, arguments: tuple[Any, ...], printed: str
) -> None:
    (tmp_path / "d.xml").write_text("<disk/>")
    assert block(*line.replace("@xml", str(tmp_path / "d.xml")).split()) == 0, block.err
    assert sent(block, procedure) == [arguments]
    assert printed in block.out


@pytest.mark.parametrize(
    ("line", "statuses", "code", "printed", "after"),
    [
        ("blockcopy tiny-1 vda /new --wait --verbose", [None, READY], 0, "Now in mirroring phase", []),
        ("blockcopy tiny-1 vda /new --pivot", [READY], 0, "Successfully pivoted", [("vda", 2)]),
        ("blockcopy tiny-1 vda /new --finish", [READY], 0, "Successfully copied", [("vda", 0)]),
        ("blockcopy tiny-1 vda /new --wait", [FAILED], 1, "Copy failed", []),
        ("blockcopy tiny-1 /images/a.qcow2 /new --wait", [CANCELED], 1, "Copy aborted", []),
        ("blockpull tiny-1 vda --wait", [None, COMPLETED], 0, "Pull complete", []),
        ("blockpull tiny-1 vda --wait --verbose", [FAILED], 1, "Pull failed", []),
        ("blockcommit tiny-1 vda --top /t --wait --verbose", [COMPLETED], 0, "Commit complete", []),
        ("blockcommit tiny-1 vda --active --wait", [READY], 0, "Now in synchronized phase", []),
        ("blockcommit tiny-1 vda --pivot", [READY], 0, "Successfully pivoted", [("vda", 2)]),
        ("blockcommit tiny-1 vda --keep-overlay", [READY], 0, "overlay image kept", [("vda", 0)]),
    ],
)
def test_what_is_waited_for(
    block: Any, *, line: str, statuses: list[int | None], code: int, printed: str, after: list[tuple[Any, ...]]
) -> None:
    ends(block, *statuses)
    assert block(*line.split()) == code and printed in block.out + block.err
    assert ("the machine's log" in block.err) == (FAILED in statuses)  # nothing went wrong where it was aborted
    assert sent(block, "DOMAIN_BLOCK_JOB_ABORT") == after
    assert ("register", "block-job-2", block.connection.running) in block.connection.calls


@pytest.mark.parametrize("verb", ["blockcopy tiny-1 vda /new", "blockpull tiny-1 vda", "blockcommit tiny-1 vda"])
def test_a_job_that_takes_too_long_is_aborted(block: Any, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    ends(block, None, None, CANCELED)
    assert block(*verb.split(), "--timeout", "3", "--async") == 1
    assert sent(block, "DOMAIN_BLOCK_JOB_ABORT")[0] == ("vda", 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("blockcopy tiny-1 vda", "need either destination or xml"),
        ("blockcopy tiny-1 vda /n --xml x", "mutually exclusive"),
        ("blockcopy tiny-1 vda /n --pivot --finish", "mutually exclusive"),
        ("blockcopy tiny-1 vda --xml x --format raw", "mutually exclusive"),
        ("blockcopy tiny-1 vda /n --verbose", "missing --wait option"),
        ("blockcopy tiny-1 vda /n --timeout 0", "invalid timeout"),
        ("blockcommit tiny-1 vda --pivot --keep-overlay", "mutually exclusive"),
        ("blockpull tiny-1 vda --async", "missing --wait option"),
        ("blockpull tiny-1 vda 5M", "malformed"),
        ("blockjob tiny-1 vda --abort --info", "conflict between"),
        ("blockjob tiny-1 vda --pivot --bytes", "--bytes requires"),
        ("blockresize tiny-1 vda", "either is required"),
        ("blockresize tiny-1 vda 5 --capacity", "mutually exclusive"),
    ],
)
def test_what_makes_no_sense_is_refused(block: Any, line: str, reason: str) -> None:
    assert block(*line.split()) != 0 and reason in block.err
    assert not [call for call in block.connection.calls if call[0] == "call"]


def test_no_job(block: Any) -> None:
    block.connection.low["DOMAIN_GET_BLOCK_JOB_INFO"] = (0, 0, 0, 0, 0)
    assert block("blockjob", "tiny-1", "vda") == 0 and "No current block job for vda" in block.out
    assert block("blockjob", "tiny-1", "vda", "--raw") == 0 and not block.out.strip()


def test_the_document_is_shown_instead(block: Any) -> None:
    assert block("blockcopy", "tiny-1", "vda", "/new", "--print-xml") == 0 and COPY in block.out
    assert not sent(block, "DOMAIN_BLOCK_COPY")
