"""What a side process that ends says becomes the error, with what to do where that is known."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvik.hypervisor.sidecars.group import NO_ROUTE, Command, Sidecars


@pytest.mark.parametrize(
    ("kind", "said", "remedy"),
    [
        ("passt", "No external routable interface for IPv4", NO_ROUTE),
        ("passt", "Failed to bind port 22", ""),
        ("swtpm", "No external routable interface for IPv4", ""),
    ],
)
def test_its_own_words_are_the_reason(tmp_path: Path, kind: str, said: str, remedy: str) -> None:
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    sidecars = Sidecars("web")
    member = sidecars.spawn(Command(kind, "net0", ["/bin/sh", "-c", f"echo {said!r} >&2; exit 3"]), log)
    member.process.wait(10)
    error = sidecars.failure(log)
    assert error is not None and remedy == error.remedy
    assert f"{kind} of net0 ended while machine web was starting (exit code 3): {said}" in str(error)
    sidecars.kill()
    os.close(log)
