"""The rate of the time stamp counter is the one that the kernel found."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from kvik.host.tsc import tsc_khz


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86 only")
def test_the_rate_is_plausible_and_the_same_each_time() -> None:
    rate = tsc_khz()
    assert rate is not None and 500_000 < rate < 8_000_000
    tsc_khz.cache_clear()
    again = tsc_khz()
    assert again is not None and abs(again - rate) < rate / 1000
    found = re.search(r"cpu MHz\s*: ([0-9.]+)", Path("/proc/cpuinfo").read_text())
    if found is not None:  # not the same thing, but never ten times as much
        assert 0.2 < rate / 1000 / float(found[1]) < 10
