"""Tests here import their helper as `guest`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

import restored  # behind the path
from disk_world import World
from running import Running
from verbs_machine import Machine


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("true_kvm") is not None and Path("/sys/module/kvm_pvm").exists():
        pytest.skip("this host's KVM is KVM-PVM, which is no true x86 here: runs in the lab")


@pytest.fixture(params=["booted", "restored"])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """How the test's machines come to be: `restored.either_way`."""
    restored.directory = tmp_path_factory.mktemp("saved") if request.param == "restored" else None
    yield request.param
    restored.directory = None


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def run(code: bytes, *options: str, **named: Any) -> Running:
        made.append(Running(tmp_path, code, *options, **named))
        return made[-1]

    yield run
    for one in made:
        one.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    await made.close()


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """For the dialogue with every verb, and for those that need more than a line."""
    made = Machine()
    try:
        yield made
    finally:
        made.close()
