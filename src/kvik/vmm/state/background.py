"""The machine into a stream as it is at one instant, while its guest goes on: what the VMM does for it.

    Background(...)    the guest runs: RAM is watched, nothing waits yet
    freeze()           the guest stands still: CPUs and devices are captured, RAM is protected against writing
                       the guest goes on; the saver (`vmm/saver`) writes RAM out, what is to be written to first

What the saver writes is what `saved_stream` would have written at that instant. docs/internals/vmm-state.md says why
every writer of RAM is seen, and which machines cannot have it.
"""

from __future__ import annotations

import os

from kvik.errors import HostError, OperationInvalid, OperationUnsupported
from kvik.vmm.state.capture import capture
from kvik.vmm.state.memory_file import CHUNK, is_zero
from kvik.vmm.state.outgoing import header, refuse_unseen_writers
from kvik.vmm.state.protection import Protection
from kvik.vmm.state.stream import END, HEADER, PAGES, STATE, frame, greeting
from kvik.vmm.state.values import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from kvik.vmm.machine import Machine
    from kvik.vmm.memory import GuestMemory

__all__ = ["Background"]

MAX_MAPPED = 96 << 20  # bytes of RAM that are a file's pages, which have to be copied while the guest stands still


class Background:
    """`channel`, `device`: as `Protection`'s. `served`: disks whose back ends protect RAM themselves, as their caller
    sees to. Raises `OperationUnsupported` with what stands in the way; then nothing has changed."""

    def __init__(self, machine: Machine, channel: int, device: int, served: Collection[str]) -> None:
        self._machine = machine
        self._frozen = False
        try:
            self._check(served)
            if machine.self_memory < 0:
                machine.self_memory = _open_self()
                machine.on_close.append(lambda: os.close(machine.self_memory))
        except BaseException:
            os.close(channel)
            os.close(device)
            raise
        self._protection = Protection(machine.memory, machine.loop, channel, device, self._ended)
        machine.background = self
        machine.before_end.append(self.cancel)  # a vCPU may wait to write

    def _check(self, served: Collection[str]) -> None:
        machine = self._machine
        machine.memory.require_whole("be saved")
        refuse_unseen_writers(machine)
        for name in machine.devices:
            device = machine.find(name)
            if getattr(device, "maps_ram", False) and name not in served:
                raise OperationUnsupported(
                    f"the back end of {name} ({device.kind}) maps memory by itself, and does not wait before it writes"
                )
        if machine.config.memory.hugepages > CHUNK:
            raise OperationUnsupported("the guest's memory is huge pages of more than 2 MiB")
        if sum(size for _, size in machine.memory.mapped) > MAX_MAPPED:
            raise OperationUnsupported("the guest's memory is a snapshot's file, mapped, which cannot be protected")

    def freeze(self) -> None:
        """The machine is paused. `HostError`; then the guest has what it had."""
        machine = self._machine
        if machine.status == "running" or self._frozen:
            raise OperationInvalid("the machine has to stand still while its memory is protected")
        memory = machine.memory
        fds: list[int] = []
        try:
            try:
                head = encode(header(machine))
                fds.append(os.memfd_create("kvik-head", os.MFD_CLOEXEC))
                _put(fds[0], greeting(0, 1, bytes(16)) + frame(HEADER, len(head)) + head)
                first = os.lseek(fds[0], 0, os.SEEK_CUR)
                state = encode(capture(machine))
                _put_mapped(memory, fds[0])
                fds.append(os.memfd_create("kvik-state", os.MFD_CLOEXEC))
                _put(fds[1], frame(END) + frame(STATE, len(state)) + state)
            except OSError as error:
                if isinstance(error, HostError):
                    raise
                raise HostError(
                    f"no memory for the machine's state: {error.strerror}", errno=error.errno or 0
                ) from error
            files = [[region.start, region.fd_offset] for region in memory.regions if region.fd >= 0]
            facts = {"first": first, "left": memory.mapped, "files": files}
            backing = [region.fd for region in memory.regions if region.fd >= 0]
            self._protection.protect(facts, [machine.self_memory, *fds, *backing])
            self._frozen = True
        finally:
            for fd in fds:
                os.close(fd)

    def cancel(self) -> None:
        self._protection.cancel()

    def _ended(self, why: str) -> None:
        if self._machine.background is self:
            self._machine.background = None
        if self.cancel in self._machine.before_end:
            self._machine.before_end.remove(self.cancel)
        if why and self._frozen:
            self._machine.log(f"the machine's memory was not saved: {why}")


def _open_self() -> int:
    try:
        return os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise OperationUnsupported(f"/proc/self/mem cannot be opened: {error.strerror}") from error


def _put_mapped(memory: GuestMemory, fd: int) -> None:
    """The parts of RAM that are a file's pages, which cannot be protected: all of them now."""
    for address, size in memory.mapped:
        end = address + size
        while address < end:
            piece = min((address // CHUNK + 1) * CHUNK, end) - address
            if not is_zero(memory.host_address(address, piece), piece):
                _put(fd, frame(PAGES, piece, address))
                _put(fd, memory.view(address, piece))
            address += piece


def _put(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
