"""Run as a program in a namespace: one call on the host's interfaces, killed (SIGKILL) at its Nth step.

killed_change.py ROOT N ACTION     a step is a file written or removed, a process started, a change of the kernel's
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvik.host import handover
from kvik.host.netlink import Netlink
from kvik.network.interfaces import pending
from kvik.network.interfaces.formats import tree
from kvik.network.interfaces.interfaces import Interfaces
from kvik.paths import Paths

steps = 0


def counted(function: Callable[..., Any], last: int) -> Callable[..., Any]:
    """`function`, with a step before it; what follows one is the step before the next."""

    def call(*args: Any, **kwargs: Any) -> Any:
        global steps  # noqa: PLW0603
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def main() -> None:
    root, last, action = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for module, names in (
        (pending, ("atomic_write", "remove_file", "spawn")),
        (tree, ("atomic_write", "remove_file")),
        (handover, ("send_together",)),
        (Netlink, ("change",)),
    ):
        for name in names:
            setattr(module, name, counted(getattr(module, name), last))
    interfaces = Interfaces(Paths.system(root))
    if action == "bridge":
        interfaces.bridge("eth0", interfaces.wanted("br0", False, 0), True, 30)
        interfaces.commit()
    elif action == "unbridge":
        interfaces.unbridge("br0", True, 30)
        interfaces.commit()
    elif action == "commit":
        interfaces.commit()
    elif action == "recover":
        interfaces.pending.recover()
    else:
        raise AssertionError(action)


main()
