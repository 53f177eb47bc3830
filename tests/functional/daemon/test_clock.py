"""The guest's clock is what the document says."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvik.errors import KvikError

from .conftest import until


def guest_time(domain: Any) -> str:
    return str(domain.exec(["/bin/date", "+%Y-%m-%d %H"]).stdout.decode().strip())


def test_an_adjusted_clock_keeps_what_the_guest_sets(make: Any) -> None:
    year = 365 * 86400
    domain = make.ready("later", extra=f"<clock offset='variable' adjustment='{year}' basis='utc'/>")
    now = time.time()
    expected = [time.strftime("%Y-%m-%d %H", time.gmtime(now + year + slack)) for slack in (-60, 0, 60)]
    assert guest_time(domain) in expected
    domain.exec(["/bin/sh", "-c", "date -s '2040-01-01 00:00:00'; hwclock -w -u"])
    until(lambda: f"adjustment='{year}'" not in domain.xml())
    words = domain.xml().split("<clock ", 1)[1].split(">", 1)[0]
    adjustment = int(words.split("adjustment='", 1)[1].split("'", 1)[0])
    assert abs(adjustment - (2208988800 - time.time())) < 120
    assert f"adjustment='{year}'" in domain.xml(2)


def test_a_time_zone(make: Any, kvikd: Any) -> None:
    domain = make.ready("nepal", extra="<clock offset='timezone' timezone='Asia/Kathmandu'/>")
    now = time.time() + 5.75 * 3600
    assert guest_time(domain) in [time.strftime("%Y-%m-%d %H", time.gmtime(now + slack)) for slack in (-60, 0, 60)]
    with pytest.raises(KvikError, match="no time zone 'Asia/Nowhere'"):
        kvikd.connection.define(make.xml("x", extra="<clock offset='timezone' timezone='Asia/Nowhere'/>"))
