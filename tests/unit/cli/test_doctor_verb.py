"""doctor in the table of verbs; what it finds is tested with the host's probe."""

from __future__ import annotations

import json
from typing import Any

import pytest


class FakeReport:
    usable = False
    findings = ()

    def as_dict(self) -> dict[str, object]:
        return {"usable": False}


@pytest.mark.parametrize("words", [["--fresh"], ["--all"], []])
def test_doctor(kvik: Any, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    asked: dict[str, object] = {}

    def examine(paths: object, *, fresh: bool) -> FakeReport:
        asked["fresh"] = fresh
        return FakeReport()

    def write(report: FakeReport, out: Any, *, explain_all: bool) -> None:
        asked["all"] = explain_all
        out.write("findings\n")

    monkeypatch.setattr("kvik.host.doctor.examine", examine)
    monkeypatch.setattr("kvik.cli.doctor.write", write)
    assert kvik("doctor", *words) == 1
    assert kvik.out == "findings\n"
    assert asked == {"fresh": "--fresh" in words, "all": "--all" in words}
    assert kvik("--json", "doctor", *words) == 1
    assert json.loads(kvik.out) == {"usable": False}
