"""The run loop: one thread a vCPU.

    guest mode    the CPU runs the guest's instructions
    kernel mode   KVM deals with what it can: memory, timers, interrupt controllers, irqfd, ioeventfd
    user mode     `VcpuThread._loop` deals with the rest, and goes back

Stopping a vCPU ("kick"): set what it shall do, set `immediate_exit`, send its thread a signal. The flag catches it
just before KVM_RUN, the signal amid it; the thread looks at `request` each time KVM_RUN was interrupted. It parks only
there, because only then is the last port or memory access finished (api.rst 5: "the corresponding operations are
complete after re-entry").
"""

from __future__ import annotations

import _thread
from time import sleep

from kvik.kvm.constants import ExitReason
from kvik.kvm.descriptor import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable

    from kvik.kvm.vcpu import Vcpu
    from kvik.vmm.machine import Machine
else:
    import _signal  # what is behind `signal`, which is slow to import

__all__ = ["KICK_SIGNAL", "SLEEP", "VcpuThread", "prepare_signal"]

KICK_SIGNAL: int = _signal.SIGRTMIN
_PARK, _END, SLEEP = 1, 2, 4  # what is asked of a thread; SLEEP: to park as well, for another reason
_IO, _MMIO, _INTR, _HLT = ExitReason.IO, ExitReason.MMIO, ExitReason.INTR, ExitReason.HLT
_DEBUG, _SHUTDOWN, _SYSTEM_EVENT = ExitReason.DEBUG, ExitReason.SHUTDOWN, ExitReason.SYSTEM_EVENT
REASONS = 64  # more than the kernel has exit reasons


def prepare_signal() -> None:
    """Let the kick signal interrupt KVM_RUN instead of ending the process. Call on the main thread, once."""
    _signal.signal(KICK_SIGNAL, _ignore)


def _ignore(*_: object) -> None: ...


class VcpuThread:
    """One vCPU and its thread. `exits` counts by exit reason."""

    def __init__(self, machine: Machine, index: int, vcpu: Vcpu, apic_id: int = 0) -> None:
        self.machine, self.index, self.vcpu, self.apic_id = machine, index, vcpu, apic_id
        self.name = ""  # the id that it was plugged with
        self.thread_id = 0  # the kernel's; 0 before it runs
        self.exits = [0] * REASONS
        self.parked = False
        self.on_start: Callable[[], None] | None = None  # run first, on the thread (its seccomp filter)
        self.on_debug: Callable[[VcpuThread], None] | None = None  # a breakpoint or a step, on the thread
        self._ident = 0
        self._request = 0
        self._lock = _thread.allocate_lock()  # over `_request` and `parked`
        self._came = _thread.allocate_lock()  # released by the thread when it has parked
        self._came.acquire()
        self._wake = _thread.allocate_lock()  # released for a parked thread to look again
        self._wake.acquire()
        self._ended = _thread.allocate_lock()
        self._ended.acquire()
        self._begun = _thread.allocate_lock()  # released by the thread when nothing but the guest is before it
        self._begun.acquire()

    # From other threads ------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._ident = _thread.start_new_thread(self._main, ())

    def wait_begun(self) -> None:
        """Leave it the interpreter until it is about to enter guest mode: the caller has much to do that can wait, and
        the two would take turns. Not for long, whatever happens to the thread."""
        self._begun.acquire(timeout=0.1)

    def kick(self) -> None:
        """Make KVM_RUN return, now or as soon as it is entered."""
        self.vcpu.immediate_exit = True
        if self._ident:
            _signal.pthread_kill(self._ident, KICK_SIGNAL)

    def ask_to_park(self, reason: int = _PARK) -> None:
        with self._lock:
            self._request |= reason
            parked = self.parked
        if not parked:
            self.kick()

    def wait_parked(self) -> None:
        """After `ask_to_park`: until it stands still."""
        while self._ident:
            with self._lock:
                if self.parked:
                    return
            if not self._came.acquire(timeout=0.02):
                self.kick()  # for a kernel that looks at the signal only, when it came just before KVM_RUN

    def unpark(self, reason: int = _PARK) -> None:
        with self._lock:
            self._request &= ~reason
            if self._request & (_PARK | SLEEP):
                return
            self.parked = False
        self._look_again()

    def end(self) -> None:
        """End the thread and wait for it."""
        if not self._ident:
            return
        with self._lock:
            self._request |= _END
        self._look_again()
        while not self._ended.acquire(timeout=0.02):
            self.kick()
        self._ident = 0

    def _look_again(self) -> None:
        if self._wake.locked():
            self._wake.release()

    # On the vCPU's own thread ------------------------------------------------------------------------------------

    def hold(self) -> None:
        """From a device's callback: do not go on in guest mode until the machine says so."""
        with self._lock:
            self._request |= _PARK
        self.vcpu.immediate_exit = True

    def _main(self) -> None:
        self.thread_id = _thread.get_native_id()
        try:
            if self.on_start is not None:
                try:
                    self.on_start()
                except Exception as error:
                    self.machine.vcpu_cannot_start(self, error)
                    return
            self._begun.release()
            while True:
                try:
                    self._loop()
                    return
                except KvmError as error:
                    self._fail(str(error))
                except Exception as error:
                    # A bug of a device, most likely: stop here, keep everything for whoever looks.
                    self._fail(f"{type(error).__name__}: {error}", error)
                if not self._serve():
                    return
        finally:
            with self._lock:
                self.parked = True
            self._ended.release()

    def _loop(self) -> None:
        machine, vcpu, exits, loop = self.machine, self.vcpu, self.exits, self.machine.loop
        enter = vcpu.enter if machine.trace is None else machine.trace.wrap(self)
        while True:
            reason = enter()
            if loop.crowded:  # its exits make work faster than it is done: then the guest waits, not the host's memory
                sleep(0.001)
            exits[reason & REASONS - 1] += 1
            if reason == _IO:
                self._port_access()
            elif reason == _MMIO:
                self._memory_access()
            elif reason == _INTR:
                if self._request and not self._serve():
                    return
                vcpu.immediate_exit = False
                if self._request:  # it came just now: what kicked us may have been undone by the line above
                    vcpu.immediate_exit = True
            elif reason == _DEBUG and self.on_debug is not None:
                self.on_debug(self)
            elif reason == _SHUTDOWN:  # a triple fault: the guest's last resort to reboot
                self.hold()
                machine.request_reset("guest-reset")
            elif reason == _SYSTEM_EVENT:
                self.hold()
                machine.system_event(vcpu.exit())
            elif reason == _HLT:  # only without an interrupt controller in the kernel
                self.hold()
                machine.halted(self)
            else:
                self._fail(f"{vcpu.exit()}")

    def _port_access(self) -> None:
        out, size, port, count, offset = self.vcpu.io()
        data, ports = self.vcpu.page, self.machine.ports
        for at in range(offset, offset + size * count, size):
            if out:
                ports.write(port, size, int.from_bytes(data[at : at + size], "little"))
            else:
                data[at : at + size] = ports.read(port, size).to_bytes(size, "little")

    def _memory_access(self) -> None:
        address, size, write, data = self.vcpu.mmio()
        if write:
            self.machine.mmio.write(address, size, int.from_bytes(data[:size], "little"))
        else:
            data[:size] = self.machine.mmio.read(address, size).to_bytes(size, "little")

    def _serve(self) -> bool:
        """Do what was requested; False to end."""
        while True:
            with self._lock:
                if self._request & _END:
                    return False
                if not self._request & (_PARK | SLEEP):
                    self.parked = False
                    return True
                self.parked = True
                if self._came.locked():
                    self._came.release()
            self._wake.acquire()

    def _fail(self, text: str, error: BaseException | None = None) -> None:
        self.hold()
        self.machine.vcpu_failed(self, text, error)
