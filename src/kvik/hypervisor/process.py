"""Starting a VMM's process, and its last words if it does not come up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvik.errors import HypervisorError, KvikError, OperationTimeout
from kvik.host import process
from kvik.host.process import BASE_ENVIRONMENT, ProcessHandle, describe_exit
from kvik.hypervisor import words
from kvik.hypervisor.descriptors import with_paths

__all__ = ["announce", "died", "environment", "execute", "spawn"]


def environment(directory: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The whole environment: nothing of the daemon's leaks into it. A later daemon knows the process by its HOME."""
    return {**BASE_ENVIRONMENT, "HOME": str(directory), "TMPDIR": str(directory), **(more or {})}


def spawn(
    argv: Sequence[str],
    fds: Sequence[int],
    directory: Path,
    log_fd: int,
    *,
    product: str,
    env: Mapping[str, str] | None = None,
) -> tuple[ProcessHandle, int]:
    """The running process, and where its own words begin in the log. Raises `HostError`."""
    position = announce(argv, log_fd, product=product, env=env)
    return execute(argv, fds, directory, log_fd, env=env), position


def announce(argv: Sequence[str], log_fd: int, *, product: str, env: Mapping[str, str] | None = None) -> int:
    """Say in the log what is started; where its own words begin there."""
    return words.write_header(log_fd, f"starting up, {product}", argv, env)


def execute(
    argv: Sequence[str], fds: Sequence[int], directory: Path, log_fd: int, *, env: Mapping[str, str] | None = None
) -> ProcessHandle:
    """Raises `HostError`."""
    return process.spawn(argv, env=environment(directory, env), stdout=log_fd, stderr=log_fd, pass_fds=fds, cwd="/")


async def died(
    name: str,
    handle: ProcessHandle,
    log_fd: int,
    position: int,
    cause: KvikError,
    *,
    product: str,
    images: Mapping[int, str] | None = None,
    remedy_for: Callable[[str], str] = lambda said: "",
) -> KvikError:
    """What to raise when the start failed with `cause`: the VMM's own words if it has ended. `images`: fdset -> file;
    `remedy_for` knows what to do about those words."""
    with contextlib.suppress(KvikError):
        # The end of the monitor's stream is seen a moment before the process can be reaped.
        await handle.wait_async(0.0 if isinstance(cause, OperationTimeout) else 1.0)
    if handle.alive:
        return cause
    said = with_paths(words.since(log_fd, position), images or {})
    text = f"{product} ended while machine {name} was starting ({describe_exit(handle.code)})"
    if not said:
        return HypervisorError(f"{text} and said nothing")
    return HypervisorError(f"{text}: {said}", remedy=remedy_for(said))
