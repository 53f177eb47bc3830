"""Starting QEMU's process, and its last words if it does not come up."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from kvik.errors import HypervisorError, KvikError, OperationTimeout
from kvik.host import process
from kvik.host.process import BASE_ENVIRONMENT, ProcessHandle, describe_exit
from kvik.hypervisor import words
from kvik.hypervisor.descriptors import with_paths
from kvik.hypervisor.qemu.argv.build import CommandLine

__all__ = ["died", "environment", "remedy_for", "spawn"]


def environment(line: CommandLine, directory: Path) -> dict[str, str]:
    """QEMU's whole environment: nothing of the daemon's leaks into it."""
    return {**BASE_ENVIRONMENT, "HOME": str(directory), "TMPDIR": str(directory), **line.env}


def spawn(line: CommandLine, directory: Path, log_fd: int, version: str) -> tuple[ProcessHandle, int]:
    """The running process, and where its own words begin in the log. Raises `HostError`."""
    position = words.write_header(log_fd, f"starting up, QEMU {version}", line.argv, line.env)
    handle = process.spawn(
        line.argv, env=environment(line, directory), stdout=log_fd, stderr=log_fd, pass_fds=line.fds, cwd="/"
    )
    return handle, position


async def died(
    name: str, handle: ProcessHandle, log_fd: int, position: int, cause: KvikError, *, images: Mapping[int, str]
) -> KvikError:
    """What to raise when the start failed with `cause`: QEMU's own words if it has ended. `images`: fdset -> file."""
    with contextlib.suppress(KvikError):
        # The end of the monitor's stream is seen a moment before the process can be reaped.
        await handle.wait_async(0.0 if isinstance(cause, OperationTimeout) else 1.0)
    if handle.alive:
        return cause
    said = with_paths(words.since(log_fd, position), images)
    how = describe_exit(handle.code)
    if not said:
        return HypervisorError(f"QEMU ended while machine {name} was starting ({how}) and said nothing")
    return HypervisorError(f"QEMU ended while machine {name} was starting ({how}): {said}", remedy=remedy_for(said))


# What QEMU says -> what a person can do
_REMEDIES = (
    (
        'Failed to get "write" lock',
        "another machine or program uses this image; stop it, or mark the disk <shareable/>",
    ),
    ('Failed to get shared "write" lock', "another machine or program uses this image"),
    ("Address already in use", "another program has this port; choose another one or autoport='yes'"),
    ("Cannot allocate memory", "give the machine less <memory> or free some on the host"),
    ("Could not access KVM kernel module", "kvik doctor says what is wrong with /dev/kvm"),
    ("cannot set up guest memory", "give the machine less <memory> or free some on the host"),
    ("failed to find romfile", "install the firmware: apt install seabios ipxe-qemu"),
    ("invalid kernel header", "<kernel> must name a Linux kernel (bzImage), or an ELF kernel with a PVH entry"),
    ("could not load PC BIOS", "install the firmware: apt install seabios"),
)


def remedy_for(said: str) -> str:
    return next((remedy for text, remedy in _REMEDIES if text in said), "")
