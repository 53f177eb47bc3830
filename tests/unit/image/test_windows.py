"""The helpers that look at many entries or bytes at once find what looking at each finds."""

from __future__ import annotations

import random
import threading
from array import array

import pytest

from kvik.image.pipeline import in_order
from kvik.image.qcow2.tables import run_end, zero_end
from kvik.image.windows import used


@pytest.mark.parametrize("size", [512, 65536, 2 << 20])
def test_runs_of_entries_end_where_they_end(size: int) -> None:
    chance = random.Random(size)
    for _ in range(10):
        table = array("Q", bytes(8192 * 8))
        at = 0
        while at < 8192:
            count = min(8192 - at, chance.choice([1, 2, 5, 20, 511, 512, 513, 1500]))
            place = chance.randrange(1, 1 << 20) * size | chance.choice([0, 1 << 63])
            for i in range(count):
                table[at + i] = place + i * size if chance.random() < 0.999 else 7
            at += count + chance.choice([0, 0, 1, 511, 512, 600, 2000])
        for _ in range(20):
            first = chance.randrange(8192)
            end = chance.randrange(first + 1, 8193)
            last = first + 1
            while last < end and table[last] == table[first] + size * (last - first):
                last += 1
            assert run_end(table, first, end, size) == last
            last = first
            while last < end and not table[last]:
                last += 1
            assert zero_end(table, first, end) == last


def test_what_is_not_zero_is_found() -> None:
    chance = random.Random(1)
    for _ in range(200):
        buffer = bytearray(64 << 10)
        for _ in range(chance.randrange(5)):
            buffer[chance.randrange(len(buffer))] = 1
        unit = chance.choice([512, 4096, 65536])
        start = chance.randrange(0, 32 << 10) & -512
        end = chance.randrange(start + 512, len(buffer)) & -512
        runs = list(used(buffer, start, end, unit))
        assert [run[1] for run in runs[:-1]] == [run[0] for run in runs[1:]]
        assert (runs[0][0], runs[-1][1]) == (start, end)
        for first, last, is_data in runs:
            assert any(buffer[first:last]) == is_data
        for at in range(start, end):
            if buffer[at]:
                assert any(first <= at < last and is_data for first, last, is_data in runs)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_errors_where_they_belong(workers: int) -> None:
    slots: list[int] = []

    def work(job: int, slot: int) -> int:
        slots.append(slot)
        if job == 57:
            raise ValueError(job)
        return job * job

    before = threading.active_count()
    found = []
    with pytest.raises(ValueError, match="57"):
        for job, result in in_order(range(100), work, workers, 2 * workers):
            found.append((job, result))
    assert found == [(job, job * job) for job in range(57)]
    assert set(slots) <= set(range(max(1, 2 * workers)))
    assert threading.active_count() == before
