"""Fixtures of the lab tests, their deadlines, and what a failure shows.

`lab` is the default lab, booted by the first test that wants it and kept for the rest; a test file that needs another
one asks `labs` for it by its `LabOptions`. A lab that died is booted anew for the next test.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from types import FrameType
from typing import Any

import pytest

from kvik.guest.tiny import TinyImage
from kvik.paths import Paths
from lab.harness import Lab, LabError, LabOptions, LabUnavailable
from lab.managed import clear, host_image, put_image
from repeats import run_repeated

HERE = __file__.rpartition("/")[0]
DEADLINE = 180.0  # seconds for one test with its fixtures; `@pytest.mark.lab(deadline=...)` says otherwise
REPEATS = 3  # of a test whose lab's kernel died under it
AGAIN = 2  # of one that failed; about 1 in 25 does, somewhere in the emulated host
ALIVE = 2  # labs at once: each holds its memory and a share of the CPUs


class Labs:
    """The labs of one test session, by their options."""

    def __init__(self) -> None:
        self._labs: dict[LabOptions, Lab] = {}
        self._unavailable = ""
        self._threads = ThreadPoolExecutor(ALIVE)  # they stay: a lab ends with the thread that started it

    def get(self, options: LabOptions | None = None) -> Lab:
        """The running lab with these options, booted now if there is none. Skips where no lab can be."""
        options = options or LabOptions()
        if self._unavailable:
            pytest.skip(self._unavailable)
        lab = self._labs.pop(options, None)
        if lab is not None and not lab.alive:
            lab.close()
            lab = None
        if lab is None:
            while len(self._labs) >= ALIVE:
                self._labs.pop(next(iter(self._labs))).close()  # the one used longest ago
            lab = Lab(options)
            try:
                lab.start()
            except LabUnavailable as error:
                self._unavailable = f"no lab: {error}"
                pytest.skip(self._unavailable)
        self._labs[options] = lab
        return lab

    def beside(self, *wanted: LabOptions) -> list[Lab]:
        """New labs, no two with equal options, booted at the same time; others end. Skips where no lab can be."""
        assert len(wanted) <= ALIVE
        if self._unavailable:
            pytest.skip(self._unavailable)
        self.close()
        made = [Lab(options) for options in wanted]
        with ExitStack() as undo:
            for lab in made:
                undo.callback(lab.close)
            starting = [self._threads.submit(lab.start) for lab in made]
            wait(starting)
            try:
                for each in starting:
                    each.result()
            except LabUnavailable as error:
                self._unavailable = f"no lab: {error}"
                pytest.skip(self._unavailable)
            undo.pop_all()
        self._labs = dict(zip(wanted, made, strict=True))
        return made

    def discard(self, lab: Lab) -> None:
        """End a lab that a test changed beyond use."""
        self._labs = {options: other for options, other in self._labs.items() if other is not lab}
        lab.close()

    def close(self) -> None:
        while self._labs:
            self._labs.popitem()[1].close()

    def tail(self) -> Iterator[tuple[str, str]]:
        """What running (or dead) labs have to say, for the report of a failure."""
        for lab in self._labs.values():
            text = lab.console()
            if lab.alive:
                with contextlib.suppress(LabError):
                    text += "--- dmesg\n" + lab.run(["dmesg"], 10).stdout[-8192:]
            yield f"lab ({'running' if lab.alive else 'ended'})", text


LABS = pytest.StashKey[Labs]()


@pytest.fixture(scope="session")
def labs(request: pytest.FixtureRequest) -> Iterator[Labs]:
    pool = request.config.stash[LABS] = Labs()
    yield pool
    pool.close()


@pytest.fixture
def lab(labs: Labs) -> Lab:
    return labs.get()


@pytest.fixture
def new_lab(labs: Labs) -> Lab:
    """One in which nothing ran before: for what makes a used one stand still more often than not."""
    labs.close()
    return labs.get()


@pytest.fixture(scope="session")
def image() -> tuple[Paths, TinyImage]:
    return host_image()


@pytest.fixture
def managed(labs: Labs, image: tuple[Paths, TinyImage]) -> Iterator[Lab]:
    """The default lab for machines under our daemon."""
    lab = labs.get()
    put_image(lab, image[0])
    yield lab
    clear(lab)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if str(item.path).startswith(HERE) and item.get_closest_marker("lab") is None:
            item.add_marker(pytest.mark.lab)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """A lab test is repeated in a new lab: twice if it failed, three times if its lab died by itself.

    A machine in a machine in an emulator stands still now and then, or sees its host's kernel panic below it, in
    QEMU's emulation of SVM (docs/internals/lab.md tells what is known).
    """
    if item.get_closest_marker("lab") is None:
        return None

    def new_lab() -> None:
        if (pool := item.config.stash.get(LABS, None)) is not None:
            pool.close()

    run_repeated(item, nextitem, {_PANICKED: REPEATS, _FAILED: AGAIN}, _excuse, new_lab)
    return True


_PANICKED, _FAILED = "the lab's own kernel or QEMU gave up", "it failed"
_LAB_DIED = ("Kernel panic", "tcg_handle_interrupt: assertion failed")  # docs/internals/vmm-firmware.md has the latter


def _excuse(report: pytest.TestReport) -> str:
    ended = [text for name, text in report.sections if name == "lab (ended)"]
    return _PANICKED if any(words in text for text in ended for words in _LAB_DIED) else _FAILED


class DeadlineExceeded(BaseException):
    """No `except Exception` of what is tested may swallow it."""


@contextlib.contextmanager
def deadline(item: pytest.Item) -> Generator[None]:
    """An alarm for each phase of a lab test: one that hangs fails, and the rest go on."""
    marker = item.get_closest_marker("lab")
    if marker is None:
        yield
        return
    seconds = float(marker.kwargs.get("deadline", DEADLINE))

    def expired(number: int, frame: FrameType | None) -> None:
        raise DeadlineExceeded(f"not finished after {seconds:g} s")

    before: Any = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


Phase = Generator[None, object, object]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Phase:
    with deadline(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Phase:
    with deadline(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and (pool := item.config.stash.get(LABS, None)) is not None:
        report.sections.extend(pool.tail())
    return report
