"""A virtio device whose queues another process serves: base of `vhost_user_blk` and `fs`.

When the back end goes away, the device needs a reset, the event VHOST_USER_DISCONNECTED tells it, and the machine goes
on. When the guest then resets the device, its back end is connected anew, if somebody has started it again.

Where somebody sees to it that another comes (`comes_again`), and the back end notes which requests it has, the device
waits instead: requests stay in the rings until `connect_anew`, which hands the notes over to the new back end.
"""

from __future__ import annotations

import os
import time

from kvik.errors import InvalidArgument, KvikError, OperationInvalid
from kvik.vmm.faults import GuestFault
from kvik.vmm.layout import PAGE
from kvik.vmm.vhost_user import VhostUser
from kvik.vmm.virtio.device import VirtioDevice
from kvik.vmm.virtio.queue import EVENT_IDX, INDIRECT_DESC, RING_RESET, VERSION_1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.machine import Machine
    from kvik.vmm.vhost import DirtyLog
    from kvik.vmm.vhost_user import Inflight

__all__ = ["VhostUserDevice"]

SETTLES = 2.0  # seconds that a back end has for the requests it took before its queue was stopped
SETTLES_AT_RESET = 0.2  # the same when it is the guest that stops it, over and over if it likes


class VhostUserDevice(VirtioDevice):
    """`source`: the back end's socket, or a connected descriptor. `known`: feature bits a subclass lets through."""

    known = 0
    queue_size = 256
    maps_ram = True  # another process does, by itself
    extra_queues = 0  # beside the request queues
    comes_again = False  # another back end, when this one has gone: see `connect_anew`
    _call_fds: dict[int, int]
    _running: set[int]

    def __init__(self, name: str, source: str | int, queues: int = 1) -> None:
        self.source = source
        self.back_end: VhostUser | None = VhostUser(source)
        self._call_fds = {}  # our own eventfds, where the transport has no irqfd to give
        self._running = set()
        self._memory_told = False
        self.disconnects = 0
        self.log: DirtyLog | None = None
        self.waiting = ""  # why there is no back end just now; requests wait for the next
        self._inflight: Inflight | None = None  # the back end's notes of requests that it has
        self._unfinished: set[int] = set()  # queues with requests that the back end still had when they were stopped
        if queues < 1 or queues + self.extra_queues > max(self.back_end.queues, 1 + self.extra_queues):
            self.back_end.close()
            raise InvalidArgument(f"{name}: its back end has {self.back_end.queues} queues, not {queues}")
        self.queue_sizes = (self.queue_size,) * (queues + self.extra_queues)
        self.features = self.back_end.features & self.known
        self.ring_features = VERSION_1 | self.back_end.features & (EVENT_IDX | INDIRECT_DESC)
        super().__init__(name)
        try:
            self.load_config(self.back_end)
        except BaseException:
            self.back_end.close()
            raise

    def load_config(self, back_end: VhostUser) -> None:
        """Fill the configuration space."""

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        assert self.back_end is not None
        self.memory.require_free("be mapped by another process")
        self.back_end.set_memory(self.memory)
        self.memory.on_change.append(self._table_changed)
        self.loop.add_reader(self.back_end.fileno(), self._heard)

    # Life of the queues ------------------------------------------------------------------------------------------

    def activate(self) -> None:
        if self.waiting:
            return
        try:
            back_end = self._connected()
            back_end.set_features(self._told_features, log=self.log is not None)
            if self.comes_again and back_end.tracks:
                if self._inflight is None:
                    self._inflight = back_end.get_inflight(len(self.queue_sizes), max(self.queue_sizes))
                back_end.set_inflight(self._inflight)
            self.activating(back_end)
            for queue in self.queues:
                if queue.ready:
                    self._start_queue(back_end, queue.index)
        except KvikError as error:
            self._lost(str(error))

    def activating(self, back_end: VhostUser) -> None:
        """The features are told, and no queue runs yet."""

    @property
    def _told_features(self) -> int:
        """A queue that is reset is one that was taken back: the back end need not know of it."""
        return self.acked & ~RING_RESET

    def _connected(self) -> VhostUser:
        if self.back_end is None:
            back_end = VhostUser(self.source) if isinstance(self.source, str) else None
            if back_end is None:
                raise InvalidArgument(f"{self.name}: its back end was given as a descriptor, and has gone")
            self._take_up(back_end)
            self.back_end = back_end
        return self.back_end

    def _take_up(self, back_end: VhostUser) -> None:
        """A new one. Closed where it cannot serve what the driver chose. Raises `KvikError`."""
        try:
            self.memory.require_free("be mapped by another process")
            if self._told_features & ~(back_end.features | VERSION_1):
                raise InvalidArgument(f"{self.name}: the new back end lacks features of the one before")
            back_end.set_memory(self.memory)
            if self.log is not None:
                back_end.set_log(self.log.fd, self.log.size)
        except BaseException:
            back_end.close()
            raise
        self.loop.add_reader(back_end.fileno(), self._heard)

    def connect_anew(self, fd: int) -> None:
        """`fd` is connected to a new back end, which goes on where the one that has gone was. It is taken in any case.
        Raises `OperationInvalid`, `InvalidArgument`, `KvikError`; then the device goes on waiting."""
        back_end = VhostUser(fd)
        with self.lock:
            if not self.waiting:
                back_end.close()
                raise OperationInvalid(f"{self.name} does not wait for a back end")
            if not back_end.tracks:
                back_end.close()
                raise InvalidArgument(f"{self.name}: the new back end cannot go on with requests of the one before")
            self._take_up(back_end)
            self.back_end, self.waiting = back_end, ""
            if self.machine is not None:
                self.machine.log(f"{self.name}: has a new back end")
            if self.active and not self.paused:
                self._start_again()

    def give_up(self, reason: str) -> None:
        """No other back end comes: the device fails. Raises `OperationInvalid` for one that does not wait."""
        with self.lock:
            if not self.waiting:
                raise OperationInvalid(f"{self.name} does not wait for a back end")
            self.waiting = ""
            self._tell_lost(reason, waits=False)
            self.needs_reset(reason)

    def _start_again(self) -> None:
        self._unfinished.clear()
        self.activate()
        for index in list(self._running):  # what was answered meanwhile was told to nobody
            self.transport.signal_queue(index)

    def _start_queue(self, back_end: VhostUser, index: int) -> None:
        queue = self.queues[index]
        try:
            addresses = self._addresses(index)
        except GuestFault as fault:
            self.needs_reset(str(fault))
            return
        base = queue.state()["next_avail"]
        log = queue.used if self.log is not None else -1
        kick, call = self.transport.notifier_fd(index), self._call_fd(index)
        self._running.add(index)
        back_end.start_queue(index, queue.size, base, addresses, kick=kick, call=call, log=log)
        os.eventfd_write(kick, 1)  # for what the driver put before anybody listened

    def _addresses(self, index: int) -> tuple[int, int, int]:
        queue, memory = self.queues[index], self.memory
        return (
            memory.host_address(queue.desc, 16 * queue.size),
            memory.host_address(queue.used, 6 + 8 * queue.size),
            memory.host_address(queue.avail, 6 + 2 * queue.size),
        )

    def _call_fd(self, index: int) -> int:
        fd = self.transport.interrupt_fd(index)
        if fd is not None:
            return fd
        own = self._call_fds.get(index, -1)
        if own < 0:
            own = self._call_fds[index] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self.loop.add_reader(own, lambda: self._called(index, own))
        return own

    def _called(self, index: int, fd: int) -> None:
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return
        if self.active:
            self.transport.signal_queue(index)

    def interrupt_changed(self, index: int) -> None:
        if self.back_end is not None and index in self._running:
            try:
                self.back_end.set_call(index, self._call_fd(index))
            except KvikError as error:
                self._lost(str(error))

    def _stop_queues(self) -> None:
        """Take the queues back. Where the back end is gone, the rings' own indices must do."""
        for index in sorted(self._running):
            self._stop_queue(index)
        if not self.active:
            self._unfinished.clear()  # nothing that is asked later depends on them
            self._forget_inflight()

    def _forget_inflight(self) -> None:
        """The driver has taken the rings back: what was in flight is its own again."""
        inflight, self._inflight = self._inflight, None
        if inflight is not None:
            os.close(inflight.fd)

    def _stop_queue(self, index: int) -> None:
        if index not in self._running:
            return  # the back end was lost meanwhile, which took all of them back
        self._running.discard(index)
        queue = self.queues[index]
        position = {}
        if self.back_end is not None:
            try:
                base = self.back_end.stop_queue(index)
                used = self._settled(index, base)
                position = {"next_avail": base, "next_used": used, "signalled": used}
            except (KvikError, GuestFault) as error:
                self._lost(str(error))
        if position:
            queue._set_position(position)
        self.transport.release_notifier(index)

    def queue_reset(self, index: int) -> None:
        self._stop_queue(index)
        self._unfinished.discard(index)  # the driver has given them up

    def queue_enabled(self, index: int) -> None:
        if self.back_end is not None:
            try:
                self._start_queue(self.back_end, index)
            except KvikError as error:
                self._lost(str(error))

    def _settled(self, index: int, base: int) -> int:
        """The used index, when all that the back end took is answered: it may let go of a queue before."""
        queue = self.queues[index]
        end = time.monotonic() + (SETTLES if self.active else SETTLES_AT_RESET)
        while (used := self.memory.u16(queue.used + 2)) != base:
            # More than a queue holds cannot be: the guest has written there.
            if time.monotonic() > end or (base - used) & 0xFFFF > queue.size:
                self._unfinished.add(index)
                break
            time.sleep(0.0005)
        return used

    def deactivate(self) -> None:
        self._stop_queues()

    def reset(self) -> None:
        super().reset()
        if self._running:
            self._stop_queues()
        self._forget_inflight()

    def pause(self) -> None:
        with self.lock:
            self.paused = True
            self._stop_queues()

    def resume(self) -> None:
        with self.lock:
            self.paused = False
            if self.active and not self._running and not self.waiting:
                self._start_again()

    def queue_kicked(self, index: int) -> None:
        """The back end hears the kicks; one that came here first is passed on."""
        if index in self._running:
            os.eventfd_write(self.transport.notifier_fd(index), 1)

    def state(self) -> State:
        if self.waiting and self.active:
            raise OperationInvalid(
                f"{self.name}: it waits for its back end to be started again: {self.waiting}", remedy="try again"
            )
        if self._unfinished:
            raise OperationInvalid(
                f"{self.name}: its back end has not answered all requests", remedy="try again: its storage is slow"
            )
        return super().state()

    def _table_changed(self) -> None:
        if self.back_end is not None:
            try:
                if self.log is not None and self._end_of_memory() > self.log.size * 8 * PAGE:
                    self.start_log()  # a larger one, before the back end could write beyond this one
                self.back_end.set_memory(self.memory)
            except KvikError as error:
                self._lost(str(error))

    # The log of what it writes: for `state.dirty` ------------------------------------------------------------------

    @property
    def logs(self) -> bool:
        """Whether what the back end writes into RAM can be known."""
        return self.back_end is None or self.back_end.logs

    @property
    def writes_unseen(self) -> bool:
        return not self.logs

    def _end_of_memory(self) -> int:
        return max(region.end for region in self.memory.regions)

    def start_log(self) -> None:
        from kvik.vmm.vhost import DirtyLog

        with self.lock:
            old, self.log = self.log, DirtyLog(self._end_of_memory(), memfd=True)
            self._relog()
            if old is not None:
                old.take(lambda address: None, self.memory.touched)
                old.close()

    def take_log(self) -> None:
        """Tell the machine's dirty log of all pages written since the last call."""
        with self.lock:
            log, back_end = self.log, self.back_end
            if log is None:
                return

            def other(address: int) -> None:
                if back_end is not None:
                    back_end.set_log(log.fd, log.size)

            try:
                log.take(other, self.memory.touched)
            except KvikError as error:
                self._lost(str(error))

    def stop_log(self) -> None:
        with self.lock:
            log, self.log = self.log, None
            if log is not None:
                self._relog()
                log.close()

    def _relog(self) -> None:
        """Tell a back end that serves already; one that is started later hears it then."""
        back_end = self.back_end
        if back_end is None:
            return
        try:
            if self.log is not None:
                back_end.set_log(self.log.fd, self.log.size)
            if not self._running:
                return
            back_end.set_features(self._told_features, log=self.log is not None)
            for index in sorted(self._running):
                used = self.queues[index].used if self.log is not None else -1
                back_end.set_addresses(index, self._addresses(index), log=used)
        except (KvikError, GuestFault) as error:
            self._lost(str(error))

    # The back end's life -----------------------------------------------------------------------------------------

    def _heard(self) -> None:
        with self.lock:
            if self.back_end is not None and self.back_end.hung_up():
                self._lost(f"its back end at {self.back_end.name} has gone")

    def _lost(self, reason: str) -> None:
        back_end, self.back_end = self.back_end, None
        if back_end is not None:
            self.loop.remove_reader(back_end.fileno())
            tracked = self._inflight is not None or not self.active
            waits = self.comes_again and back_end.tracks and tracked and not self.broken
            back_end.close()
            self.disconnects += 1
            self._tell_lost(reason, waits=waits)
            if waits:
                self.waiting = reason
                self._unfinished |= self._running  # their requests, and where they are, only the next one can tell
                self._stop_queues()
                return
        if not self.waiting:
            self.needs_reset(reason)

    def _tell_lost(self, reason: str, *, waits: bool) -> None:
        if self.machine is not None:
            self.machine.log(f"{self.name}: {reason}{', and waits for the next' if waits else ''}")
            data = {"device": self.name, "reason": reason}
            self.machine.emit("VHOST_USER_DISCONNECTED", data | ({"waiting": True} if waits else {}))

    def close(self) -> None:
        with self.lock:
            super().close()
            if self.machine is not None and self._table_changed in self.memory.on_change:
                self.memory.on_change.remove(self._table_changed)
            self.stop_log()
            self._forget_inflight()
            back_end, self.back_end = self.back_end, None
            if back_end is not None:
                if self.machine is not None:
                    self.loop.remove_reader(back_end.fileno())
                back_end.close()
            for fd in self._call_fds.values():
                self.loop.remove_reader(fd)
                os.close(fd)
            self._call_fds.clear()

    def stats(self) -> dict[str, int]:
        return {
            **super().stats(),
            "connected": int(self.back_end is not None),
            "disconnects": self.disconnects,
            "waiting": int(bool(self.waiting)),
        }
