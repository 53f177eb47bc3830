"""Tests here import their helper as `guest`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from running import Running  # behind the path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def run(code: bytes, *options: str, **named: Any) -> Running:
        made.append(Running(tmp_path, code, *options, **named))
        return made[-1]

    yield run
    for one in made:
        one.close()
