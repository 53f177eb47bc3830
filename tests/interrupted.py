"""SIGTERM and SIGHUP end a run of tests as Ctrl-C does: fixtures are torn down, and with them what tests started."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import FrameType

import pytest


def interrupt_on_signals(config: pytest.Config) -> None:
    """The first signal interrupts, later ones do not interrupt what clears up.

    A process with workers (`pytest -n`) tells them, its only children. A worker may be told three times: by the
    terminal, by that process, and by execnet, which sends itself SIGINT when its peer is gone.
    """
    ours, heard = os.getpid(), False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if os.getpid() != ours:  # a child that a test forked, and ends
            os._exit(128 + number)
        if heard:
            return
        heard = True
        if config.pluginmanager.has_plugin("dsession"):
            for task in Path("/proc/self/task").glob("*/children"):
                for pid in task.read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGTERM)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
    if "PYTEST_XDIST_WORKER" in os.environ:
        signal.signal(signal.SIGINT, interrupt)
