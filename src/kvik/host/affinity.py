"""Which CPUs of the host a thread may run on: sched_setaffinity(2)."""

from __future__ import annotations

import os
from collections.abc import Iterable

from kvik.errors import HostError

__all__ = ["affinity", "set_affinity"]


def affinity(thread: int) -> frozenset[int]:
    """`thread` is Linux's thread id. Raises `HostError` for one that is gone."""
    try:
        return frozenset(os.sched_getaffinity(thread))
    except OSError as error:
        raise HostError(
            f"where thread {thread} may run cannot be read: {error.strerror}", errno=error.errno or 0
        ) from error


def set_affinity(thread: int, cpus: Iterable[int]) -> None:
    """Raises `HostError`, for one that is gone or CPUs of which this host has none."""
    chosen = sorted(set(cpus))
    try:
        os.sched_setaffinity(thread, chosen)
    except OSError as error:
        raise HostError(
            f"thread {thread} cannot be bound to CPUs {', '.join(map(str, chosen)) or '(none)'}: {error.strerror}",
            errno=error.errno or 0,
            remedy="kvik cpu-stats and /sys/devices/system/cpu/online show which CPUs this host has",
        ) from error
