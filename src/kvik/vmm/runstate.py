"""Whether the guest runs, why it does not, and who holds it: QEMU's RunState (qapi/run-state.json).

status         stop        cont       guest powers off   reset        panic            bug of ours
prelaunch      -           running    -                  -            -                -
running        paused      -          shutdown           running      guest-panicked   internal-error
paused         -           running    shutdown           paused       -                -
shutdown, ...  -           refused before a reset                     (reset leads to paused)
"""

from __future__ import annotations

from kvik.errors import OperationInvalid
from kvik.vmm.loop import EventLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from kvik.vmm.device import Device
    from kvik.vmm.vcpu import VcpuThread

__all__ = ["ENDED", "RunState"]

# Status words in which vCPUs may not run before a reset.
ENDED = ("shutdown", "internal-error", "guest-panicked")


class RunState:
    """The part of a machine that lets its vCPUs and devices go, and stops them. On the thread of the loop, but for
    `emit` and `ending`."""

    def __init__(self) -> None:
        self.status = "prelaunch"
        self.devices: dict[str, Device] = {}
        self.vcpus: list[VcpuThread] = []  # those that are there, by ascending index
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []
        self.loop = EventLoop()
        self.may_not_run = ""  # why `resume` is refused: the guest runs elsewhere, or lacks memory
        self._holds = 0  # `paused` contexts
        self._stalled = False
        self._going = False  # vCPUs run, or may
        self._closed = False

    def pause(self, status: str = "paused") -> None:
        """Stop the guest, for a reason that becomes the status. Idempotent."""
        if self.status == "running":
            self.status = status
            self._apply()
            self.emit("STOP")

    def resume(self) -> None:
        if self.status == "running":
            return
        if self.status in ENDED:
            raise OperationInvalid(f"the machine cannot go on: its status is {self.status}", remedy="reset it first")
        if self.may_not_run:
            raise OperationInvalid(f"the guest cannot go on here: {self.may_not_run}")
        self.status = "running"
        self._apply()
        self.emit("RESUME")

    def _apply(self) -> None:
        """Let the guest run if the status says so and nobody holds it; stop it if not."""
        go = self.status == "running" and self._holds == 0
        if go == self._going:
            return
        self._going = go
        if go:
            for device in self.devices.values():
                device.resume()
            for thread in self.vcpus:
                thread.unpark()
            return
        for thread in self.vcpus:
            thread.ask_to_park()
        for thread in self.vcpus:
            thread.wait_parked()
        for device in self.devices.values():
            device.pause()

    def stall(self) -> None:
        """Stop the guest without waiting for it: what waits for a page that does not come cannot park."""
        if self.status == "running":
            self.status = "paused"
            self._stalled = True
            for thread in self.vcpus:
                thread.ask_to_park()
            self.emit("STOP")

    def unstall(self) -> None:
        """Go on after `stall`."""
        if self._stalled:
            self._stalled = False
            if self.status == "paused":
                self.status = "running"
                for thread in self.vcpus:
                    thread.unpark()
                self.emit("RESUME")

    @property
    def ending(self) -> bool:
        """Whether nothing of the guest will run any more. Any thread."""
        return self._closed or self.status == "shutdown"

    def hold(self) -> None:
        """Stand still, whatever the status says, until `release`. OperationInvalid where that could not be waited for:
        parts of the guest may wait for memory that does not come (`stall`)."""
        if self._stalled and not self.ending:
            raise OperationInvalid(f"the machine cannot stand still: {self.may_not_run}")
        self._holds += 1
        self._apply()

    def release(self) -> None:
        self._holds -= 1
        self._apply()

    def paused(self) -> _Paused:
        """`with machine.paused():` all vCPUs are parked and devices quiet; the status stays what it is."""
        return _Paused(self.hold, self.release)

    @property
    def still(self) -> bool:
        """Whether nothing of the guest runs."""
        return not self._going

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        """Tell the listeners, on the loop's thread."""
        if not self.loop.in_loop() and self.loop.running:
            self.loop.call_soon(lambda: self.emit(name, data))
            return
        for listener in self.listeners:
            listener(name, data or {})


class _Paused:
    """A pair of calls as a context."""

    __slots__ = ("_begin", "_end")

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
