"""virtio-net (virtio 1.2, 5.1): queue pairs, a control queue, and a backend or the kernel's vhost-net at the other end.

A backend that ends takes the link down; the machine goes on.
"""

from __future__ import annotations

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.backends.net import BackendGone, NetBackend, NoBackend
from kvik.vmm.faults import GuestFault
from kvik.vmm.ratelimit import RateLimiter
from kvik.vmm.virtio.config import Field
from kvik.vmm.virtio.device import VirtioDevice
from kvik.vmm.virtio.netqueue import Receiver, Transmitter
from kvik.vmm.virtio.rxfilter import ReceiveFilter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvik.vmm.device import State
    from kvik.vmm.machine import Machine
    from kvik.vmm.vhost import VhostNet
    from kvik.vmm.virtio.queue import Chain, Queue

F_CSUM, F_GUEST_CSUM, F_CTRL_GUEST_OFFLOADS, F_MTU, F_MAC = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5
F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_CTRL_RX, F_CTRL_VLAN = 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19
F_CTRL_RX_EXTRA, F_GUEST_ANNOUNCE, F_MQ, F_CTRL_MAC_ADDR = 1 << 20, 1 << 21, 1 << 22, 1 << 23
# GUEST_CSUM, TSO4, TSO6, ECN, UFO, USO4, USO6: what the driver takes, and CTRL_GUEST_OFFLOADS changes
GUEST_OFFLOADS = F_GUEST_CSUM | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 54 | 1 << 55

S_LINK_UP, S_ANNOUNCE = 1, 2
_OK, _ERR = b"\0", b"\1"
CTRL_RX, CTRL_MAC, CTRL_VLAN, CTRL_ANNOUNCE, CTRL_MQ, CTRL_GUEST_OFFLOADS = range(6)
_MAX_COMMAND = 1 << 16  # bytes
MAX_QUEUE = 512


def parse_mac(text: str) -> bytes:
    """Six bytes of "52:54:00:12:34:56". InvalidArgument if it is no unicast address."""
    try:
        mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise InvalidArgument(f"{text!r} is no MAC address of a network card")
    return mac


class NetDevice(VirtioDevice):
    """A network card. `mtu` in bytes, 0: not told. `vhost`: "auto" uses the kernel's datapath where it can, "on" says
    so when it cannot, "off" never does. The device owns the backend."""

    kind = "virtio-net"
    device_id = 1
    pci_class = 0x020000
    config_fields = (
        Field("mac", 0, 6),
        Field("status", 6, 2),
        Field("max_virtqueue_pairs", 8, 2),
        Field("mtu", 10, 2),
    )

    def __init__(
        self,
        name: str,
        backend: NetBackend,
        mac: str,
        *,
        mtu: int = 0,
        queue_size: int = 256,
        vhost: str = "off",
        vhost_fds: Sequence[int] = (),
        receive_limit: RateLimiter | None = None,
        transmit_limit: RateLimiter | None = None,
    ) -> None:
        if queue_size > MAX_QUEUE or queue_size < 16 or queue_size & (queue_size - 1):
            raise InvalidArgument(
                f"{name}: a queue size of {queue_size}: a power of 2 from 16 to {MAX_QUEUE} is possible"
            )
        if mtu and not 68 <= mtu <= 65535:
            raise InvalidArgument(f"{name}: an MTU of {mtu} bytes: 68 to 65535 are possible")
        self.backend = backend
        self.pairs = backend.pairs
        self.mac = parse_mac(mac)
        self.mtu = mtu
        self.receive_limit = receive_limit or RateLimiter()
        self.transmit_limit = transmit_limit or RateLimiter()
        self.queue_sizes = (*(queue_size,) * (2 * self.pairs), 64)
        self.features = (
            F_MAC | F_MRG_RXBUF | F_STATUS | F_CTRL_VQ | F_CTRL_RX | F_CTRL_RX_EXTRA | F_CTRL_VLAN | F_GUEST_ANNOUNCE
        ) | F_CTRL_MAC_ADDR  # fmt: skip
        self.features |= backend.offloads
        self.features |= F_CTRL_GUEST_OFFLOADS if backend.offloads & F_GUEST_CSUM else 0
        self.features |= F_MTU if mtu else 0
        self.features |= F_MQ if self.pairs > 1 else 0
        self.receivers: list[Receiver] = []
        self.transmitters: list[Transmitter] = []
        self.vhost: VhostNet | None = None
        self.vhost_reason = ""  # why the kernel's datapath is not used
        self.plugged = True  # the cable, as the host wants it
        self.link = backend.carrier  # what the driver sees
        self.gone = ""  # why the backend ended
        self.backend_errors = 0
        self._paused = False
        self.rx_filter_told = False  # that it has changed; until somebody asks what it is now
        self._restored = False  # `activate` comes from a restored state, not from the driver
        self._totals = dict.fromkeys(
            ("rx_packets", "rx_bytes", "rx_dropped", "tx_packets", "tx_bytes", "tx_dropped"), 0
        )
        super().__init__(name)
        self.config["max_virtqueue_pairs"] = self.pairs
        self.config["mtu"] = mtu
        if vhost != "off":
            self._prepare_vhost(vhost_fds, required=vhost == "on")

    # --- life

    def reset(self) -> None:
        super().reset()
        if self.vhost is not None:
            self.vhost.stop()
        self._end()
        self.config["mac"] = self.mac
        self.config["status"] = S_LINK_UP if self.link else 0
        self._forget_wishes()

    def _forget_wishes(self) -> None:
        """What the driver told over the control queue, as before it told anything."""
        self.filter = ReceiveFilter()
        self.active_pairs = 1
        self.guest_offloads = 0

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        if self.vhost_reason and self.backend.kind == "tap":
            machine.log(f"{self.name}: vhost-net is not used: {self.vhost_reason}")

    @property
    def control(self) -> int:
        """The control queue's index: behind the pairs that the driver knows of (5.1.2)."""
        return 2 * (self.pairs if self.has(F_MQ) else 1)

    def activate(self) -> None:
        if not self._restored:  # else the driver told long ago, and the state knows it
            self._forget_wishes()
            self.guest_offloads = self.acked & GUEST_OFFLOADS
        self._restored = False
        self._begin()

    def _begin(self) -> None:
        """Make the datapath as the driver negotiated it; it starts on the loop."""
        mergeable = self.has(F_MRG_RXBUF)
        receivers, transmitters = [], []
        for pair in range(self.pairs):
            incoming, outgoing = self.queues[2 * pair], self.queues[2 * pair + 1]
            receivers.append(Receiver(self, pair, incoming, self.receive_limit, mergeable=mergeable))
            transmitters.append(Transmitter(self, pair, outgoing, self.transmit_limit))
        self.receivers, self.transmitters = receivers, transmitters
        self._on_loop(self._start)

    def _start(self) -> None:
        with self.lock:
            if not self.active or self._paused:
                return
            if self.machine is not None and self.machine.still:  # restored, and not to run yet
                self._paused = True
                return
            try:
                self._shape_backend()
                if self.vhost is not None and self.link and not self.gone and self._start_vhost():
                    return
            except BackendGone as error:
                self.backend_ended(str(error))
            except HostError as error:
                self.needs_reset(str(error))
                return
            self._run_all()

    def _shape_backend(self) -> None:
        if not self.gone:
            self.backend.set_offload(self.guest_offloads)
            self.backend.set_pairs(self.active_pairs)

    def _run_all(self) -> None:
        # A guest's fault in one of them ends all: they are then closed, and the lists empty.
        for half in [half for pair in zip(self.receivers, self.transmitters, strict=True) for half in pair]:
            if half.queue.ready and not half.closed:
                half.queue.disable_notifications()
                self.guarded(half.run)
        control = self.queues[self.control]
        if self.active and control.ready:
            self.kick(self.control)

    def deactivate(self) -> None:
        if self.vhost is not None:
            self.vhost.stop()
        self._end()
        self._forget_wishes()

    def _end(self) -> None:
        """Stop the datapath, on any thread, with `lock` held. Whoever comes next (the kernel, another backend, a
        restored machine) finds the buffers that were popped ahead in the ring again."""
        for receiver in self.receivers:
            receiver.give_back()
            self._totals["rx_packets"] += receiver.packets
            self._totals["rx_bytes"] += receiver.bytes
            self._totals["rx_dropped"] += receiver.dropped
        for transmitter in self.transmitters:
            self._totals["tx_packets"] += transmitter.packets
            self._totals["tx_bytes"] += transmitter.bytes
            self._totals["tx_dropped"] += transmitter.dropped
        for half in (*self.receivers, *self.transmitters):
            half.stop()
        self.receivers, self.transmitters = [], []

    def _on_loop(self, work: Callable[[], None]) -> None:
        if self.loop.in_loop():
            work()
        else:
            self.loop.call_soon(work)

    def pause(self) -> None:
        """Take back what is in flight, stop listening. The kernel's datapath tells where it stands."""
        with self.lock:
            if self._paused:
                return
            self._paused = True
            if self.active:
                if self.vhost is not None:
                    self.vhost.stop()
                self._end()

    def resume(self) -> None:
        with self.lock:
            if self._paused:
                self._paused = False
                if self.active:
                    self._begin()

    def close(self) -> None:
        super().close()
        if self.vhost is not None:
            self.vhost.close()
            self.vhost = None
        self.backend.close()

    # --- the datapath

    def guarded(self, work: Callable[[], None]) -> None:
        """Run a part of the datapath on the loop: a guest's fault stops the device, a backend's end the link."""
        with self.lock:
            if not self.active or self._paused:
                return
            try:
                work()
            except GuestFault as fault:
                self.needs_reset(str(fault))
            except BackendGone as error:
                self.backend_ended(str(error))

    def queue_kicked(self, index: int) -> None:
        if index == self.control:
            if self.has(F_CTRL_VQ):
                self._serve_control(self.queues[index])
        elif self.receivers and index < 2 * self.pairs and not (self.vhost is not None and self.vhost.running):
            half = self.transmitters[index // 2] if index & 1 else self.receivers[index // 2]
            try:
                half.kick()
            except BackendGone as error:
                self.backend_ended(str(error))

    def queue_reset(self, index: int) -> None:
        if index < 2 * self.pairs and self.receivers and not index & 1:
            self.receivers[index // 2].forget()

    def queue_enabled(self, index: int) -> None:
        if index < 2 * self.pairs and self.receivers:
            self.loop.call_soon(lambda: self.kick(index))

    def backend_ended(self, reason: str) -> None:
        """The backend is no more: the link goes down, packets of the guest are dropped, the machine lives on. Unless
        another one takes its place."""
        if self.gone:
            return
        successor = self.backend.successor()
        if successor is not None:
            self._end()
            self.backend.close()
            self.backend = successor
            if self.machine is not None:
                self.machine.log(f"{self.name}: {reason}")
            self.set_link(self.plugged)
            if self.active:
                self._begin()
            return
        self.gone = reason
        if self.vhost is not None:
            self.vhost.stop()
        self._end()
        self.backend.close()
        self.backend = NoBackend(self.pairs)
        if self.machine is not None:
            self.machine.log(f"{self.name}: {reason}; the link is down")
            self.machine.emit("NETDEV_GONE", {"device": self.name, "reason": reason})
        self.set_link(self.plugged)
        if self.active:
            self._begin()

    # --- the control queue

    def _serve_control(self, queue: Queue) -> None:
        while True:
            queue.disable_notifications()
            for chain in queue:
                status = chain.take_tail()
                status[:] = _OK if self._command(chain) else _ERR
                queue.push(chain, 1)
            queue.flush()
            if not queue.enable_notifications():
                return

    def _command(self, chain: Chain) -> bool:
        """5.1.6.5. False for what is unknown or malformed."""
        if not 2 <= chain.readable_size <= _MAX_COMMAND:
            return False
        command = chain.read_all(_MAX_COMMAND)
        kind, number, data = command[0], command[1], command[2:]
        if kind == CTRL_RX:
            return self._rx_filter_changed(self.filter.set_mode(number, data))
        if kind == CTRL_MAC and number == 0:
            return self._rx_filter_changed(self.filter.set_macs(data))
        if kind == CTRL_MAC and number == 1 and len(data) == 6:  # MAC_ADDR_SET
            self.config["mac"] = data
            return self._rx_filter_changed(True)
        if kind == CTRL_VLAN:
            return self._rx_filter_changed(self.filter.set_vlan(number, data))
        if kind == CTRL_ANNOUNCE and number == 0:
            self.config["status"] = self.config["status"] & ~S_ANNOUNCE
            return True
        if kind == CTRL_MQ and number == 0 and len(data) == 2 and self.has(F_MQ):
            count = int.from_bytes(data, "little")
            if not 1 <= count <= self.pairs:
                return False
            self.active_pairs = count
            return self._backend_takes(lambda: self.backend.set_pairs(count))
        if kind == CTRL_GUEST_OFFLOADS and number == 0 and len(data) == 8 and self.has(F_CTRL_GUEST_OFFLOADS):
            offloads = int.from_bytes(data, "little")
            if offloads & ~(self.acked & GUEST_OFFLOADS):
                return False
            self.guest_offloads = offloads
            return self._backend_takes(lambda: self.backend.set_offload(offloads))
        return False

    def _backend_takes(self, change: Callable[[], None]) -> bool:
        try:
            change()
        except BackendGone as error:
            self.backend_ended(str(error))
        except HostError:
            return False
        return True

    def _rx_filter_changed(self, changed: bool) -> bool:
        """Told once, and again only after somebody asked (QEMU's qapi/net.json): a guest cannot flood with it."""
        if changed and self.machine is not None and not self.rx_filter_told:
            self.rx_filter_told = True
            self.machine.emit("NIC_RX_FILTER_CHANGED", {"name": self.name, "path": f"/machine/peripheral/{self.name}"})
        return changed

    # --- what the host does to it

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out; the driver is told. There is no link while nobody is at the other end, nor with a
        backend that has ended."""
        with self.lock:
            self.plugged = up
            up = up and not self.gone and self.backend.carrier
            if up == self.link:
                return
            self.link = up
            status = self.config["status"] & ~S_LINK_UP | (S_LINK_UP if up else 0)
            if self.machine is None:
                self.config["status"] = status
                return

            def change() -> None:
                self.config["status"] = status

            self.config_changed(change)
            if self.vhost is not None and self.active and not self._paused:
                if self.vhost.running:
                    self.vhost.stop()
                self._end()
                self._begin()

    def announce(self) -> None:
        """Ask the guest to tell the network where it is now: after a migration or a restore (5.1.6.5.4)."""
        with self.lock:
            if self.active and self.has(F_GUEST_ANNOUNCE | F_CTRL_VQ):

                def change() -> None:
                    self.config["status"] = self.config["status"] | S_ANNOUNCE

                self.config_changed(change)

    def rx_filter(self) -> State:
        """What the driver asked to receive: QMP's RxFilterInfo. From now on a change is told again."""
        self.rx_filter_told = False
        told = self.filter.told(by_vlan=self.has(F_CTRL_VLAN))
        return {"name": self.name, "main-mac": self.config.raw("mac").hex(":"), **told}

    # --- vhost

    def _prepare_vhost(self, fds: Sequence[int], *, required: bool) -> None:
        """Open the kernel's datapath, and offer only what it can."""
        from kvik.vmm.vhost import VhostNet

        try:
            if self.backend.kind != "tap":
                raise HostError(f"a {self.backend.kind} backend has no kernel datapath")
            if self.receive_limit.limited or self.transmit_limit.limited:
                raise HostError("it has no rate limits")
            self.vhost = VhostNet(self, self.pairs, fds)
        except HostError as error:
            if required:
                raise
            self.vhost_reason = str(error)
        else:
            self.features &= self.vhost.features | ~VhostNet.HANDLED
            self.ring_features &= self.vhost.ring_features

    def _start_vhost(self) -> bool:
        vhost = self.vhost
        if vhost is None:
            return False
        try:
            vhost.start()
        except OSError as error:
            vhost.stop()
            self.vhost_reason = str(error)
            if self.machine is not None:
                self.machine.log(f"{self.name}: vhost-net is not used: {error}")
            return False
        return True

    def interrupt_changed(self, index: int) -> None:
        if self.vhost is not None and self.vhost.running and index < 2 * self.pairs:
            self.vhost.interrupt_changed(index)

    # --- state

    def state(self) -> State:
        return {
            **super().state(),
            "link": self.plugged,
            "active_pairs": self.active_pairs,
            "guest_offloads": self.guest_offloads,
            **self.filter.state(),
            "receive_limit": self.receive_limit.state(),
            "transmit_limit": self.transmit_limit.state(),
        }

    def restore(self, state: State) -> None:
        pairs, offloads = int(state["active_pairs"]), int(state["guest_offloads"])
        if not 1 <= pairs <= self.pairs:
            raise ValueError(f"{self.name}: the state has {pairs} queue pairs, the device {self.pairs}")
        if int(state["acked"]) & ~(self.features | self.ring_features):
            raise ValueError(f"{self.name}: the state has features that this backend cannot do")
        super().restore(state)
        self.plugged = bool(state["link"])
        self.link = self.plugged and not self.gone and self.backend.carrier
        self.active_pairs, self.guest_offloads = pairs, offloads & GUEST_OFFLOADS
        self.filter.restore(state)
        self.receive_limit.restore(state["receive_limit"])
        self.transmit_limit.restore(state["transmit_limit"])
        self._restored = self.active

    def stats(self) -> dict[str, int]:
        totals = dict(self._totals)
        for receiver in self.receivers:
            totals["rx_packets"] += receiver.packets
            totals["rx_bytes"] += receiver.bytes
            totals["rx_dropped"] += receiver.dropped
        for transmitter in self.transmitters:
            totals["tx_packets"] += transmitter.packets
            totals["tx_bytes"] += transmitter.bytes
            totals["tx_dropped"] += transmitter.dropped
        return {
            **super().stats(),
            **totals,
            "backend_errors": self.backend_errors,
            "throttled": self.receive_limit.throttled + self.transmit_limit.throttled,
            "vhost": int(self.vhost is not None and self.vhost.running),
        }
