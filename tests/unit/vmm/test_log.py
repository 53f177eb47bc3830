"""The machine's log: structured, never forged, never flooded."""

from __future__ import annotations

import json
import os

from hypothesis import given
from hypothesis import strategies as st

from kvik.vmm.log import MAX_LINE, Log, LogLimit


class Captured(Log):
    def __init__(self, *, json: bool = False) -> None:
        self.reader, writer = os.pipe()
        super().__init__(writer, name="vm1", json=json)

    def lines(self) -> list[str]:
        os.close(self.fd)
        with os.fdopen(self.reader, encoding="utf-8") as stream:
            return stream.read().splitlines()


def test_a_line_has_time_level_machine_message_and_fields() -> None:
    log = Captured()
    log.write("warning", "a device failed", device="disk0", reason="bad descriptor")
    (line,) = log.lines()
    when, rest = line.split(" ", 1)
    assert when.endswith("Z") and when[10] == "T"
    assert rest == 'warning vm1 "a device failed" device=disk0 reason="bad descriptor"'


def test_json_lines() -> None:
    log = Captured(json=True)
    log.write("info", "started", vcpus=2, sandbox=True)
    told = json.loads(log.lines()[0])
    assert (told["level"], told["machine"], told["message"], told["vcpus"], told["sandbox"]) == (
        "info",
        "vm1",
        "started",
        2,
        True,
    )


@given(st.text(max_size=3000), st.text(max_size=3000))
def test_nobody_forges_a_line(message: str, value: str) -> None:
    log = Log()
    for as_json in (False, True):
        log.json = as_json
        line = log.line("info", message, 1.5, {"from_guest": value})
        assert line.isascii() and line.isprintable() and len(line) < MAX_LINE
        if as_json:
            told = json.loads(line)
            assert message.startswith(told["message"])


def test_a_flood_is_a_few_lines_and_a_number() -> None:
    now = [0.0]
    log = Captured()
    limit = LogLimit(log, burst=3, rate=1.0, clock=lambda: now[0])
    assert [limit.write("warning", "again", n=n) for n in range(100)].count(True) == 3
    assert limit.write("warning", "something else")
    now[0] += 1.0
    assert limit.write("warning", "again")
    lines = log.lines()
    assert len(lines) == 5 and lines[-1].endswith("left_out=97")


def test_made_up_messages_share_one_budget() -> None:
    limit = LogLimit(Log(os.open("/dev/null", os.O_WRONLY)), burst=2, clock=lambda: 0.0)
    written = sum(limit.write("info", f"message {number}") for number in range(10_000))
    assert written <= 256 + 2
    os.close(limit._log.fd)


def test_a_log_that_nobody_reads_stops_nobody() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    Log(writer).write("info", "to nobody")
    os.close(writer)
