"""SIGTERM ends a run of tests as Ctrl-C does: fixtures are torn down, and with them what the tests started."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import FrameType

import pytest


def interrupt_on_sigterm(config: pytest.Config) -> None:
    """For this process and, if it is one that has workers (`pytest -n`), for those: they are its only children."""
    ours = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != ours:  # a child that a test forked, and ends
            os._exit(128 + number)
        if config.pluginmanager.has_plugin("dsession"):
            for task in Path("/proc/self/task").glob("*/children"):
                for pid in task.read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGTERM)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
