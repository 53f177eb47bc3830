"""A guest for tests of state: a PVH kernel of 26 bytes that counts in memory and echoes its serial line.

`through_snapshot` turns a running machine into one that was saved, ended and restored: what a test checks of a machine
that booted, it can check of that one too.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import restored as restored_at
from guest import run_until

from kvik.errors import HostError
from kvik.vmm.build import build
from kvik.vmm.config import BootConfig, CharConfig, CpuConfig, MachineConfig, MemoryConfig, RngConfig
from kvik.vmm.layout import KERNEL, MIB
from kvik.vmm.machine import Machine
from unit.vmm.test_boot import elf

COUNTER = 0x300_0000
PATTERN = 0x310_0000
# mov esi, COUNTER; 1: inc dword [esi]; mov edx, 0x3FD; in al, dx; test al, 1; jz 1b; mov edx, 0x3F8; in al, dx;
# out dx, al; jmp 1b
ECHO = bytes.fromhex("be00000003 ff06 bafd030000 ec a801 74f4 baf8030000 ec ee ebeb".replace(" ", ""))


DIRTY, ERRORS, PAGES = 0x200_0000, 0x300_1000, 512
# xor ebx, ebx; 1: mov esi, DIRTY; mov ecx, PAGES; 2: cmp [esi], ebx; je 3f; inc dword [ERRORS]; 3: inc dword [esi];
# add esi, 4096; dec ecx; jnz 2b; inc ebx; mov [COUNTER], ebx; jmp 1b. A page that lost an update is an error for ever.
WRITER = bytes.fromhex(
    "31db be00000002 b900020000 391e 7406 ff0500100003 ff06 81c600100000 49 75eb 43 891d00000003 ebd8".replace(" ", "")
)


# The same over 16 MiB: more than a thin connection carries in a second.
BIG_PAGES = 4096
BIG_WRITER = WRITER.replace(bytes.fromhex("b900020000"), bytes.fromhex("b900100000"))


class Guest:
    """A machine with the far end of its serial line."""

    def __init__(self, machine: Machine, line: socket.socket) -> None:
        self.machine, self.line = machine, line

    def counter(self) -> int:
        return self.machine.memory.u32(COUNTER)

    def echo(self, text: bytes) -> None:
        """What goes in comes out: the vCPU runs, port I/O works, the line is connected."""
        self.line.sendall(text)
        heard = b""

        def all_heard() -> bool:
            nonlocal heard
            try:
                heard += self.line.recv(4096)
            except BlockingIOError:
                pass
            return len(heard) >= len(text)

        run_until(self.machine, all_heard)
        assert heard == text

    def check(self) -> None:
        """What is true of this guest whether it booted or was restored."""
        before = self.counter()
        run_until(self.machine, lambda: self.counter() != before)
        self.echo(b"hello")


def config(
    directory: Path, line: socket.socket, code: bytes = ECHO, cpus: CpuConfig | None = None, **memory: Any
) -> MachineConfig:
    text = code.rjust(0x850 + len(code), b"\x90").ljust(4096, b"\x90")
    kernel = directory / ({ECHO: "kernel", WRITER: "writer"}.get(code, "big-writer"))
    if not kernel.exists():
        kernel.write_bytes(elf(text=text, entry=KERNEL + 0x850))
    return MachineConfig(
        name="state",
        cpus=cpus or CpuConfig(),
        memory=MemoryConfig(size=64 * MIB, **memory),
        boot=BootConfig(kernel=str(kernel)),
        serials=[CharConfig(backend=f"fd={line.detach()}")],
        rng=[RngConfig()],
    )


@contextmanager
def booted(directory: Path, **memory: Any) -> Iterator[Guest]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        machine = build(config(directory, theirs, **memory))
    except HostError as error:
        pytest.skip(str(error))
    with machine, ours:
        machine.start()
        yield Guest(machine, ours)


@contextmanager
def awaiting(directory: Path, uri: str, **memory: Any) -> Iterator[Guest]:
    """A machine like those of `booted`, to be filled from `uri`."""
    from kvik.vmm.state.migration import await_incoming

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with build(config(directory, theirs, **memory), boot=False) as machine, ours:
        await_incoming(machine, uri)
        yield Guest(machine, ours)


@contextmanager
def restored(directory: Path, **given: Any) -> Iterator[Guest]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    host = MachineConfig(serials=[CharConfig(backend=f"fd={theirs.detach()}")], **given)
    with Machine.restore(str(directory), host) as machine, ours:
        yield Guest(machine, ours)


@contextmanager
def running(directory: Path, **memory: Any) -> Iterator[Guest]:
    """A guest that runs: booted, or restored where machines shall be that (the module `restored`)."""
    with (booted if restored_at.directory is None else through_snapshot)(directory, **memory) as guest:
        yield guest


@contextmanager
def through_snapshot(directory: Path, compression: str = "none", **memory: Any) -> Iterator[Guest]:
    """Boot, run, save, end, restore, start."""
    saved = directory / "on the way"
    with booted(directory, **memory) as guest:
        if memory.get("code", ECHO) is ECHO:
            guest.check()
        else:
            run_until(guest.machine, guest.counter)
        guest.machine.save(str(saved), compression)
    with restored(saved) as guest:
        guest.machine.start()
        yield guest
    shutil.rmtree(saved)
