"""virtio-blk (virtio 1.2, 5.2) served by another process over vhost-user: every image format that process knows.

    qemu-storage-daemon --blockdev file,node-name=f,filename=disk.qcow2 --blockdev qcow2,node-name=q,file=f \\
        --export vhost-user-blk,id=e,node-name=q,writable=on,addr.type=unix,addr.path=SOCKET
"""

from __future__ import annotations

import os

from kvik.errors import InvalidArgument, KvikError, OperationFailed, OperationInvalid
from kvik.vmm.virtio.blk import CONFIG_WCE, FIELDS
from kvik.vmm.virtio.blkburst import SECTOR
from kvik.vmm.virtio.queue import RING_RESET, VERSION_1
from kvik.vmm.virtio.vhost_user import VhostUserDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.vhost_user import VhostUser

__all__ = ["VhostUserBlk"]


class VhostUserBlk(VhostUserDevice):
    """A disk (virtio 1.2, 5.2) that another process serves, in whatever format."""

    kind = "vhost-user-blk"
    device_id = 2
    pci_class = 0x010000
    config_fields = FIELDS
    _writeback = next(field.offset for field in FIELDS if field.name == "writeback")
    # SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES. Not CONFIG_WCE (11):
    # qemu-storage-daemon 7.2 offers it and says "write-through" while it caches, so a driver would never flush.
    # Without it, FLUSH alone says that there is a cache (5.2.5.2).
    known = sum(1 << bit for bit in (1, 2, 4, 5, 6, 9, 10, 12, 13, 14))

    def __init__(
        self, name: str, source: str | int, queues: int = 1, *, queue_size: int = 256, life_fd: int = -1
    ) -> None:
        """`life_fd`: what the back end ends with, closed when this device is, or cannot be made. Whoever gives one also
        starts another back end when this one has gone."""
        self.queue_size = queue_size
        self.life_fd = life_fd
        self.comes_again = life_fd >= 0
        self.served_by = ""  # what we were told of the back end's process, for who asks
        try:
            super().__init__(name, source, queues)
        except BaseException:
            self._end_of_life()
            raise

    def load_config(self, back_end: VhostUser) -> None:
        self.config.restore(back_end.get_config(self.config.size))
        self.config["num_queues"] = len(self.queue_sizes)

    def restore(self, state: State) -> None:
        """Also of a disk that the VMM served itself, which offers its driver more: what was taken up of that, the back
        end must have. Raises `OperationFailed` where it has not."""
        super().restore(state)
        offered = self.back_end.features if self.back_end is not None else 0
        lacking = self.acked & ~(offered | VERSION_1 | RING_RESET)
        if self.active and lacking:
            bits = ", ".join(str(bit) for bit in range(lacking.bit_length()) if lacking >> bit & 1)
            raise OperationFailed(
                f"the back end of disk {self.name} lacks features that the guest uses (bits {bits})",
                remedy="let it be served by what served it before",
            )

    def activating(self, back_end: VhostUser) -> None:
        if self.has(CONFIG_WCE):  # of a state of the VMM's own disk: the driver chose whether writes are cached
            back_end.set_config(self._writeback, bytes(self.config)[self._writeback : self._writeback + 1])

    def resize(self, size: int) -> None:
        """The back end has made its image `size` bytes long: ask it again, and tell the guest (QMP block_resize)."""
        with self.lock:
            if self.waiting:
                raise OperationInvalid(f"disk {self.name} waits for its back end", remedy="try again")
            if self.back_end is None:
                raise OperationInvalid(f"disk {self.name} has lost its back end", remedy="restart the machine")
            told = self.back_end.get_config(self.config.size)
            capacity = int.from_bytes(told[:8], "little") * SECTOR  # 5.2.4: the first field
            if capacity != size:
                raise InvalidArgument(
                    f"the back end of disk {self.name} serves {capacity} bytes, not {size}",
                    remedy="resize the image there first",
                )

            def change() -> None:
                self.config["capacity"] = capacity // SECTOR

            self.config_changed(change)

    def connect_anew(self, fd: int, life_fd: int = -1) -> None:
        """Both are taken in any case. A disk that has another size by now tells the guest."""
        try:
            super().connect_anew(fd)
        except BaseException:
            if life_fd >= 0:
                os.close(life_fd)
            raise
        self._end_of_life()
        self.life_fd = life_fd
        with self.lock:
            if self.back_end is None:
                return
            try:
                told = int.from_bytes(self.back_end.get_config(self.config.size)[:8], "little")
            except KvikError as error:  # it has died already
                self._lost(str(error))
                return
            if told != self.config["capacity"]:

                def change() -> None:
                    self.config["capacity"] = told

                self.config_changed(change)

    def close(self) -> None:
        super().close()
        self._end_of_life()

    def _end_of_life(self) -> None:
        fd, self.life_fd = self.life_fd, -1
        if fd >= 0:
            os.close(fd)

    def config_written(self, offset: int, size: int) -> None:
        if self.back_end is not None:
            try:
                self.back_end.set_config(offset, bytes(self.config)[offset : offset + size])
            except KvikError as error:
                self._lost(str(error))
