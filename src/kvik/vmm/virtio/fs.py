"""virtio-fs (virtio 1.2, 5.11): a directory of the host, served by virtiofsd over vhost-user.

In the guest: `mount -t virtiofs TAG /mnt`. The files that the guest has open are virtiofsd's state: it is not part of
a snapshot, and a guest that is restored finds its mounts broken.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument
from kvik.vmm.virtio.config import Field
from kvik.vmm.virtio.vhost_user import VhostUserDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.vhost_user import VhostUser

__all__ = ["Fs"]

TAG_BYTES = 36


class Fs(VhostUserDevice):
    """A directory of the host (virtio 1.2, 5.11), mounted by the guest with `mount -t virtiofs TAG`."""

    kind = "virtio-fs"
    device_id = 26
    pci_class = 0x018000
    writes_unseen = True  # its pages are logged, but what the guest has open is virtiofsd's: it cannot move along
    extra_queues = 1  # the first is for requests of high priority
    config_fields = (Field("tag", 0, TAG_BYTES, raw=True), Field("num_request_queues", 36, 4))

    def __init__(self, name: str, source: str | int, tag: str, queues: int = 1) -> None:
        if not 0 < len(tag.encode()) <= TAG_BYTES:
            raise InvalidArgument(f"{name}: a tag has 1 to {TAG_BYTES} bytes, not {tag!r}")
        self.tag = tag
        super().__init__(name, source, queues)

    def load_config(self, back_end: VhostUser) -> None:
        self.config["tag"] = self.tag.encode()
        self.config["num_request_queues"] = len(self.queue_sizes) - self.extra_queues
