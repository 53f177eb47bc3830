"""The machine into a pipe, as one channel of a migration carries it (`stream`), with nobody there to answer.

Who kept what came out plays the source to a machine that is started with --incoming: it sends all of it, and RUN once
that machine has said DONE. Nothing is forked and no file is opened: a confined machine needs no leave for it.
"""

from __future__ import annotations

import os

from kvik.vmm.state.capture import capture
from kvik.vmm.state.memory_file import data_runs
from kvik.vmm.state.outgoing import header, refuse_unseen_writers
from kvik.vmm.state.stream import END, HEADER, PAGES, STATE, frame, greeting
from kvik.vmm.state.values import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvik.vmm.machine import Machine

__all__ = ["save_stream_steps"]


def save_stream_steps(machine: Machine, fd: int) -> Iterator[int]:
    """The machine stands still meanwhile, and then goes on if it did before. In steps; yields the bytes of RAM that
    are done. Raises `OSError` (EPIPE: nobody reads), `OperationUnsupported`."""
    machine.memory.require_whole("be saved")
    refuse_unseen_writers(machine)
    with machine.paused():
        head = encode(header(machine))
        _put(fd, greeting(0, 1, bytes(16)) + frame(HEADER, len(head)) + head)
        done = 0
        for region in machine.memory.regions:
            for offset, size in data_runs(region):
                _put(fd, frame(PAGES, size, region.start + offset))
                _put(fd, region.view[offset : offset + size])
                yield done + offset
            done += region.size
        state = encode(capture(machine))
        _put(fd, frame(END) + frame(STATE, len(state)) + state)
        yield done


def _put(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
