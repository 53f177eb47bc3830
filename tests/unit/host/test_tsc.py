"""The rate of the time stamp counter."""

from __future__ import annotations

import platform

import pytest

from kvik.host import tsc


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has this counter")
def test_two_measurements_agree() -> None:
    one, two = tsc.tsc_khz(), tsc.tsc_khz()
    assert one is not None
    assert two is not None
    assert 200_000 < one < 20_000_000
    assert abs(one - two) < one * 0.02


def test_elsewhere_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert tsc.tsc_khz() is None


def test_forbidden_executable_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr("mmap.mmap", refuse)
    assert tsc.tsc_khz() is None
