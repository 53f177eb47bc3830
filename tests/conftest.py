"""For all tests: quick ones first, and `from lab.harness import ...` works anywhere below tests/."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No time limit for one example: a busy machine is not a failure.
settings.register_profile("kvik", deadline=None)
settings.load_profile("kvik")

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from repeats import REPEATED, run_repeated  # noqa: E402  the path to it was just made

ORDER = ("unit", "functional", "interop", "security", "lab")  # the directories below tests/


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A mistake shows in the first seconds if it can; the lab boots only when all else is through."""

    def place(item: pytest.Item) -> int:
        try:
            directory = item.path.relative_to(HERE).parts[0]
        except ValueError:
            return 0
        return ORDER.index(directory) if directory in ORDER else len(ORDER) - 1

    items.sort(key=place)  # stable: the order within a directory stays


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """What boots machines or waits for other people's programs is repeated once if it fails."""
    if not item.path.is_relative_to(HERE) or item.path.relative_to(HERE).parts[0] not in ("functional", "interop"):
        return None
    run_repeated(item, nextitem, {"it failed": 1}, lambda report: "it failed")
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if repeated := config.stash.get(REPEATED, []):
        terminalreporter.section("repeated")
        for line in repeated:
            terminalreporter.write_line(line)


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
