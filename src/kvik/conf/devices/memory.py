"""Memory that the guest sees beside its boards: <memory> modules, <shmem>, <memballoon>.
https://libvirt.org/formatdomain.html#memory-devices"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, KIB, LIVE, ON_OFF, UUID, YES_NO, Element, OnOff, Present, Text, YesNo
from kvik.conf.devices.common import Device, VirtioOptions


class MemorySource(Element):
    """Sizes in KiB; `nodemask` is a set of host NUMA nodes; `path` names a DAX or NVDIMM file."""

    path: Text = None
    alignsize: Annotated[int | None, CHILD, KIB] = None
    pmem: Present = False
    pagesize: Annotated[int | None, CHILD, KIB] = None
    nodemask: Text = None


class MemoryLabel(Element):
    size: Annotated[int | None, CHILD, KIB] = None


class MemoryTarget(Element):
    """Sizes in KiB. `requested` and `current` are virtio-mem's."""

    dynamic_memslots: Annotated[bool | None, YES_NO, "dynamicMemslots"] = None
    size: Annotated[int | None, CHILD, KIB] = None
    node: Annotated[int | None, CHILD] = None
    label: MemoryLabel | None = None
    readonly: Present = False
    block: Annotated[int | None, CHILD, KIB] = None
    requested: Annotated[int | None, CHILD, KIB] = None
    current: Annotated[int | None, CHILD, KIB, LIVE] = None


class Memory(Device):
    model: Literal["dimm", "nvdimm", "virtio-pmem", "virtio-mem", "sgx-epc"]
    access: Literal["shared", "private"] | None = None
    discard: YesNo = None
    uuid: Annotated[str | None, CHILD, UUID] = None
    source: MemorySource | None = None
    target: MemoryTarget | None = None


class ShmemModel(Element):
    type: Literal["ivshmem", "ivshmem-plain", "ivshmem-doorbell"]


class ShmemServer(Element):
    path: str | None = None


class ShmemMsi(Element):
    vectors: int | None = None
    ioeventfd: OnOff = None


class Shmem(Device):
    name: str
    role: Literal["master", "peer"] | None = None
    model: ShmemModel | None = None
    size: Annotated[int | None, CHILD, KIB] = None
    server: ShmemServer | None = None
    msi: ShmemMsi | None = None


class BalloonStats(Element):
    """Seconds between two reports of the guest."""

    period: int


class Memballoon(Device):
    model: Literal["virtio", "virtio-transitional", "virtio-non-transitional", "xen", "none"]
    autodeflate: OnOff = None
    free_page_reporting: Annotated[bool | None, ON_OFF, "freePageReporting"] = None
    stats: BalloonStats | None = None
    driver: VirtioOptions | None = None
