"""For all tests: their order, repetitions and `pytest -n`; `from lab.harness import ...` works anywhere below tests."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# No time limit for one example: a busy machine is not a failure.
settings.register_profile("kvik", deadline=None)
settings.load_profile("kvik")

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from interrupted import interrupt_on_signals  # noqa: E402  the path to these was just made
from order import directory, place  # noqa: E402
from repeats import Repeats, run_repeated  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    interrupt_on_signals(config)
    if not hasattr(config, "workerinput"):  # a worker of `-n` has nobody to tell
        config.pluginmanager.register(Repeats(config))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Any:
    from schedule import Schedule

    return Schedule(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: place(item.path))  # stable: the order within a directory stays


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """What boots machines or waits for other people's programs is repeated once if it fails."""
    if directory(item.path) not in ("functional", "interop"):
        return None
    run_repeated(item, nextitem, {"it failed": 1}, lambda report: "it failed")
    return True


@pytest.fixture(autouse=True)
def _logging_stays_as_it_was() -> Iterator[None]:
    """`-d`, `-l` and a daemon set up logging for their whole process, which here is every other test's as well."""
    logger, before = logging.getLogger("kvik"), logging.raiseExceptions
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    yield
    for handler in logger.handlers:
        if handler not in handlers:
            handler.close()
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate
    logging.raiseExceptions = before
