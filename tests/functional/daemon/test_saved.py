"""Machines saved with their memory: what the guest knew it knows again, whoever asks and whatever fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvik.client import saved

from .conftest import AGENT, CONSOLE, until

RAN, PAUSED, OFF = 1, 3, 5
COUNTING = "i=0; while true; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done"


def count_up(domain: Any) -> None:
    """A process in the guest that remembers how far it has counted, and where."""
    domain.exec(["sh", "-c", f"({COUNTING}) >/dev/null 2>&1 </dev/null & echo $! > /tmp/pid"])
    until(lambda: count(domain) > 3)


def count(domain: Any) -> int:
    found = domain.exec(["cat", "/tmp/count"]).stdout.strip()
    return int(found or 0)


def is_the_same(domain: Any, before: int) -> None:
    """The process that counted goes on from where it was."""
    assert domain.exec(["sh", "-c", "kill -0 $(cat /tmp/pid) && echo there"]).stdout.strip() == b"there"
    now = count(domain)
    assert now >= before
    until(lambda: count(domain) > now)


def words(kvikd: Any, *arguments: str, fails: str = "") -> str:
    found = kvikd.kvik(*arguments)
    assert (found.returncode != 0) == bool(fails), found.stdout + found.stderr
    assert fails in found.stderr, found.stderr
    return str(found.stdout)


def test_a_saved_guest_goes_on_where_it_was(make: Any, kvikd: Any, tmp_path: Path) -> None:
    domain = make.ready("counts", CONSOLE + AGENT)
    count_up(domain)
    before = count(domain)
    path = tmp_path / "counts.saved"
    path.write_text("what was there before")
    said = words(kvikd, "save", "counts", str(path), "--verbose")
    assert f"Domain 'counts' saved to {path}" in said
    assert (domain.state().state, domain.state().reason) == (OFF, 5)
    assert path.stat().st_mode & 0o777 == 0o600 and os.listdir(tmp_path) == ["counts.saved"]
    assert "<name>counts</name>" in words(kvikd, "save-image-dumpxml", str(path))
    assert words(kvikd, "restore", str(path)) == f"Domain restored from {path}\n\n"
    assert (domain.state().state, domain.state().reason) == (RAN, 3)
    is_the_same(domain, before)
    # once more: what was restored can be saved
    saved.save(domain, str(path), None, 4)
    saved.restore(kvikd.connection, str(path))
    assert domain.state().state == PAUSED
    domain.resume()
    is_the_same(domain, before)
