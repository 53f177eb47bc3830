"""virtio-mem (virtio 1.2, 5.15): memory that grows and shrinks by blocks while the guest runs.

The device has a window of guest addresses; `requested_size` says how much of it the guest shall use, and the driver
plugs and unplugs blocks to get there. A plugged block is RAM; an unplugged one is given back to the host. The window
is one region of guest memory without any page behind it until it is touched.

As with QEMU before 8.2, a guest that touches unplugged blocks within the usable part gets pages: what a machine may
use at most is the window, which is therefore the figure to account.
"""

from __future__ import annotations

import struct

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.layout import MIB
from kvik.vmm.memory import HostMemory
from kvik.vmm.virtio.config import Field
from kvik.vmm.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.machine import Machine
    from kvik.vmm.memory import Region
    from kvik.vmm.virtio.queue import Queue

__all__ = ["Mem"]

PLUG, UNPLUG, UNPLUG_ALL, STATE = 0, 1, 2, 3  # VIRTIO_MEM_REQ_*, 5.15.6
ACK, NACK, BUSY, ERROR = 0, 1, 2, 3  # VIRTIO_MEM_RESP_*
PLUGGED, UNPLUGGED, MIXED = 0, 1, 2
_REQUEST = struct.Struct("<HxxxxxxQHxxxxxx")  # type, address, blocks
_RESPONSE = struct.Struct("<HxxxxxxH")  # type, state
ROUND = 64


class Mem(VirtioDevice):
    """`size`: how far it can grow, `block`: in what steps, both in bytes; `node`: the guest's NUMA node."""

    kind = "virtio-mem"
    device_id = 24
    queue_sizes = (128,)
    config_fields = (
        Field("block_size", 0, 8),
        Field("node_id", 8, 2),
        Field("addr", 16, 8),
        Field("region_size", 24, 8),
        Field("usable_region_size", 32, 8),
        Field("plugged_size", 40, 8),
        Field("requested_size", 48, 8),
    )

    def __init__(
        self, name: str, size: int, *, requested: int = 0, block: int = 2 * MIB, node: int = 0, shared: bool = False
    ) -> None:
        if block < 2 * MIB or block & (block - 1):
            raise InvalidArgument(f"{name}: blocks of {block} bytes: give a power of 2 from 2 MiB on")
        if size <= 0 or size % block:
            raise InvalidArgument(f"{name}: {size} bytes are no multiple of blocks of {block}")
        self.size, self.block, self.node, self.shared = size, block, node, shared
        self.paused = False
        self.region: Region | None = None
        self._plugged = bytearray(size // block)
        self._first_request = self._check(requested)
        super().__init__(name)

    def _check(self, requested: int) -> int:
        if not 0 <= requested <= self.size or requested % self.block:
            raise InvalidArgument(
                f"memory device of {self.size} bytes in blocks of {self.block} cannot have {requested} bytes",
                remedy=f"give a multiple of {self.block} up to {self.size}",
            )
        return requested

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        config = self.config
        start = self._place(*machine.memory.layout.hotplug)
        self.region = machine.memory.add_ram(start, self.size, HostMemory(shared=self.shared), self.node)
        machine.back(self.region)
        config["block_size"], config["node_id"] = self.block, self.node
        config["addr"], config["region_size"] = start, self.size
        config["requested_size"] = self._first_request
        config["usable_region_size"] = self._usable(self._first_request)

    def _place(self, start: int, end: int) -> int:
        """The first gap of the hot-plug window that is large enough, aligned to 128 MiB as Linux's sections are."""
        align = max(self.block, 128 * MIB)
        start = -(-start // align) * align
        for region in self.memory.regions:
            if region.start < start + self.size and start < region.end:
                start = -(-region.end // align) * align
        if start + self.size > end:
            raise InvalidArgument(
                f"{self.name}: no room for {self.size >> 20} MiB of memory that comes later",
                remedy="give the machine's memory a larger hotplug=SIZE",
            )
        return start

    def _usable(self, requested: int) -> int:
        """What the driver may plug from: some room above what is asked for, so that it can choose (5.15.5)."""
        return min(self.size, requested + 2 * 128 * MIB)

    def queue_kicked(self, index: int) -> None:
        if self.paused:
            return
        queue = self.queues[0]
        for _ in range(ROUND):
            chain = queue.pop()
            if chain is None:
                self._rearm(queue)
                break
            kind, address, blocks = _REQUEST.unpack(chain.take_front(_REQUEST.size))
            answer, state = self._do(kind, address, blocks)
            queue.push(chain, chain.write(_RESPONSE.pack(answer, state)))
        else:
            self.loop.call_soon(lambda: self.kick(0))
        queue.flush()

    def _rearm(self, queue: Queue) -> None:
        """All is taken: let the driver kick again, and look once more if it put something meanwhile."""
        if queue.enable_notifications():
            self.loop.call_soon(lambda: self.kick(queue.index))

    def _do(self, kind: int, address: int, blocks: int) -> tuple[int, int]:
        config = self.config
        if kind == UNPLUG_ALL:
            return self._unplug_all(), 0
        offset = address - config["addr"]
        size = blocks * self.block
        if (
            kind > STATE
            or not blocks
            or offset % self.block
            or offset < 0
            or offset + size > config["usable_region_size"]
        ):
            return ERROR, 0
        first = offset // self.block
        part = self._plugged[first : first + blocks]
        count = sum(part)
        if kind == STATE:
            return ACK, PLUGGED if count == blocks else UNPLUGGED if not count else MIXED
        if kind == PLUG:
            if count:
                return ERROR, 0
            if config["plugged_size"] + size > config["requested_size"]:
                return NACK, 0
            self._set(first, blocks, 1)
        else:
            if count < blocks:
                return ERROR, 0
            if not self._give_back(address, size):
                return BUSY, 0
            self._set(first, blocks, 0)
        return ACK, 0

    def _set(self, first: int, blocks: int, value: int) -> None:
        self._plugged[first : first + blocks] = bytes([value]) * blocks
        self.config["plugged_size"] = sum(self._plugged) * self.block
        self._tell()

    def _give_back(self, address: int, size: int) -> bool:
        try:
            self.memory.discard(address, size)
        except HostError as error:
            if self.machine is not None:
                self.machine.log(f"{self.name}: {error}")
            return False
        return True

    def _unplug_all(self) -> int:
        if self.region is not None and not self._give_back(self.config["addr"], self.size):
            return BUSY
        self._set(0, len(self._plugged), 0)
        self.config["usable_region_size"] = self._usable(self.config["requested_size"])
        return ACK

    def _tell(self) -> None:
        if self.machine is not None:
            data = {"id": self.name, "size": self.config["plugged_size"], "qom-path": f"/machine/{self.name}"}
            self.machine.emit("MEMORY_DEVICE_SIZE_CHANGE", data)

    @property
    def requested(self) -> int:
        """Bytes that the guest is asked to use."""
        return self.config["requested_size"]

    @property
    def plugged(self) -> int:
        """Bytes that it uses."""
        return self.config["plugged_size"]

    @property
    def address(self) -> int:
        """Guest-physical, where the window begins."""
        return self.config["addr"]

    def request(self, size: int) -> None:
        """Ask the guest to use `size` bytes of the window (QMP: qom-set requested-size)."""
        self._check(size)

        def change() -> None:
            self.config["requested_size"] = size
            # Never less than before: blocks that are plugged above stay usable until they are gone (5.15.5)
            self.config["usable_region_size"] = max(self._usable(size), self.config["usable_region_size"])

        self.config_changed(change)

    def reset(self) -> None:
        """Power-on: the guest starts without the memory, and is asked for it again."""
        super().reset()
        if self.region is not None and any(self._plugged):
            self._unplug_all()

    def pause(self) -> None:
        with self.lock:
            self.paused = True

    def resume(self) -> None:
        with self.lock:
            self.paused = False
        self.loop.call_soon(lambda: self.kick(0))

    def state(self) -> State:
        return {**super().state(), "plugged": bytes(self._plugged)}

    def restore(self, state: State) -> None:
        own = self.config["addr"], self.config["region_size"], self.config["block_size"]
        super().restore(state)
        if (self.config["addr"], self.config["region_size"], self.config["block_size"]) != own:
            raise ValueError(f"{self.name}: the state is of a window elsewhere or of another size")
        if len(state["plugged"]) != len(self._plugged) or any(value > 1 for value in state["plugged"]):
            raise ValueError(f"{self.name}: the state has another number of blocks")
        self._plugged[:] = state["plugged"]

    def close(self) -> None:
        super().close()
        region, self.region = self.region, None
        if region is not None and self.machine is not None and region in self.memory.regions:
            self.machine.unback(region)
            self.memory.remove(region)

    def stats(self) -> dict[str, int]:
        return {**super().stats(), "plugged_bytes": self.config["plugged_size"]}
