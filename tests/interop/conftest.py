"""Gives each test module a daemon of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from kvikd_process import Kvikd


@pytest.fixture(scope="module")
def kvikd() -> Iterator[Kvikd]:
    daemon = Kvikd()
    yield daemon
    assert "failed unexpectedly" not in daemon.messages(), daemon.messages()
    assert daemon.end() == 0
