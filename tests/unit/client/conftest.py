"""The fake daemon, closed after each test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_daemon import FakeDaemon


@pytest.fixture
def daemon() -> Iterator[Callable[..., FakeDaemon]]:
    made: list[FakeDaemon] = []

    def make(**answers: Any) -> FakeDaemon:
        made.append(FakeDaemon(**answers))
        return made[-1]

    yield make
    for one in made:
        one.close()
