"""virtio-vsock with the kernel's datapath: the guest has an address (CID) that AF_VSOCK sockets of the host reach."""

from __future__ import annotations

import errno

from kvik.errors import HostError
from kvik.vmm.vhost import Rings, Vhost
from kvik.vmm.virtio.config import Field
from kvik.vmm.virtio.device import RING_FEATURES, VirtioDevice
from kvik.vmm.virtio.queue import EVENT_IDX, INDIRECT_DESC, VERSION_1
from kvik.vmm.virtio.vsock import EVENT, RX, TX, check_cid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State

_HANDLED = VERSION_1 | EVENT_IDX | INDIRECT_DESC


class VhostVsockDevice(VirtioDevice):
    """HostError where there is no vhost-vsock, or another machine has the CID."""

    kind = "virtio-vsock"
    device_id = 19
    pci_class = 0x078000
    queue_sizes = (128, 128, 16)
    config_fields = (Field("guest_cid", 0, 8),)

    def __init__(self, name: str, cid: int, *, fd: int = -1) -> None:
        check_cid(name, cid)
        self.cid = cid
        self._paused = False
        self._tell_reset = False
        self._vhost = Vhost("/dev/vhost-vsock", fd)
        try:
            self._vhost.set_guest_cid(cid)
        except OSError as error:
            self._vhost.close()
            remedy = "choose another" if error.errno == errno.EADDRINUSE else ""
            raise HostError(
                f"{name}: the CID {cid} cannot be had: {error.strerror}", errno=error.errno or 0, remedy=remedy
            ) from error
        self._offered = self._vhost.features()
        self.ring_features = RING_FEATURES & self._offered & _HANDLED
        self.rings = Rings(self, {RX: (self._vhost, 0), TX: (self._vhost, 1)})
        super().__init__(name)
        self.config["guest_cid"] = cid

    def activate(self) -> None:
        self.loop.call_soon(self._start)

    def _start(self) -> None:
        with self.lock:
            if not self.active or self._paused or self.rings.running:
                return
            if self.machine is not None and self.machine.still:
                self._paused = True
                return
            try:
                self.rings.start(self.acked & self._offered & _HANDLED)
                self._vhost.set_vsock_running(True)
            except OSError as error:
                self._stop()
                self.needs_reset(f"vhost-vsock: {error}")
                return
            if self._tell_reset:
                self._announce_reset()

    def _stop(self) -> None:
        if not self.rings.running:
            return
        try:
            self._vhost.set_vsock_running(False)
        except OSError:
            pass  # it never ran
        self.rings.stop()

    def deactivate(self) -> None:
        self._stop()

    def reset(self) -> None:
        super().reset()
        self._stop()

    def pause(self) -> None:
        with self.lock:
            self._paused = True
            self._stop()

    def resume(self) -> None:
        with self.lock:
            if self._paused:
                self._paused = False
                if self.active:
                    self.loop.call_soon(self._start)

    def close(self) -> None:
        super().close()
        self._stop()
        self.rings.close()

    def queue_kicked(self, index: int) -> None:
        if index == EVENT and self._tell_reset:
            self._announce_reset()

    def interrupt_changed(self, index: int) -> None:
        if index != EVENT:
            self.rings.interrupt_changed(index)

    def _announce_reset(self) -> None:
        """5.10.6.7: streams do not outlive a snapshot."""
        queue = self.queues[EVENT]
        chain = queue.pop() if queue.ready else None
        if chain is not None:
            self._tell_reset = False
            queue.push(chain, chain.write(bytes(4)))
            queue.flush()

    def restore(self, state: State) -> None:
        super().restore(state)
        self.config["guest_cid"] = self.cid
        self._tell_reset = self.active
