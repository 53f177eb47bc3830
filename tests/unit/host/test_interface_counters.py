"""Counters of the host's interfaces: what /proc/net/dev says, however it says it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvik.host.interface_counters import Counters, interface_counters, parse_counters

ROW = b" 1   2    3    4    5     6          7         8       11      12    13    14    15     16       17         18"


def test_received_and_sent_are_told_apart() -> None:
    assert parse_counters(ROW) == Counters(1, 2, 3, 4, 11, 12, 13, 14)


@given(st.binary(max_size=200))
def test_any_line_is_counters_or_none(row: bytes) -> None:
    found = parse_counters(row)
    assert found is None or all(isinstance(value, int) for value in found)


def test_the_loopback_counts_here_and_what_does_not_exist_has_none() -> None:
    assert interface_counters("lo") is not None
    assert interface_counters("no-such-link") is None
    assert interface_counters("../../etc") is None
