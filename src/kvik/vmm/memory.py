"""The guest's RAM: mapped into this process, given to KVM as slots, read and written with bounds.

Every access goes through `view` (or what is built on it), which refuses an address that is not wholly RAM with a
`GuestFault`: there is no other way from a number that the guest chose to this process's memory.

RAM is a private anonymous mapping, aligned to 2 MiB and open to transparent huge pages. With `shared` it is a memfd,
so that another process (vhost-user, a fork) can map it too. Nothing is touched before the guest touches it, unless
`prealloc` says so. Sources: Documentation/virt/kvm/api.rst 4.35, mmap(2), memfd_create(2), mbind(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.faults import GuestFault
from kvik.vmm.layout import MIB, PAGE, Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GuestMemory", "HostMemory", "Region", "map_memory", "unmap_memory"]

_HUGE = 2 * MIB
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (*(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64),)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long

MAP_FIXED, MAP_NORESERVE, MAP_HUGETLB = 0x10, 0x4000, 0x40000
MADV_DONTNEED, MADV_HUGEPAGE, MADV_DONTDUMP, MADV_POPULATE_WRITE = 4, 14, 16, 23
MFD_HUGE_SHIFT = 26
_SYS_MBIND = 237  # x86_64
MPOL_BIND, MPOL_INTERLEAVE, MPOL_PREFERRED = 2, 3, 1
_FAILED = ctypes.c_void_p(-1).value
_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")


def map_memory(size: int, flags: int, fd: int = -1, offset: int = 0, *, at: int = 0, align: int = PAGE) -> int:
    """mmap readable and writable memory; its address, a multiple of `align`. `at` replaces what is mapped there."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if at:
        flags |= MAP_FIXED
    elif align > PAGE:
        # Reserve more than needed, keep the aligned part: mmap itself promises pages only.
        reserved = _mmap(0, size + align, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        at = (reserved + align - 1) // align * align
        if at > reserved:
            _libc.munmap(reserved, at - reserved)
        _libc.munmap(at + size, reserved + align - at)
        flags |= MAP_FIXED
    return _mmap(at, size, protection, flags, fd, offset)


def _mmap(at: int, size: int, protection: int, flags: int, *file: int) -> int:
    address = _libc.mmap(at or None, size, protection, flags, *file)
    if address is None or address == _FAILED:
        number = ctypes.get_errno()
        raise HostError(
            f"cannot map {size >> 20} MiB of memory: {os.strerror(number)}",
            errno=number,
            remedy="give the machine less memory, or free some (huge pages: see /proc/sys/vm/nr_hugepages)",
        )
    return int(address)


def unmap_memory(address: int, size: int) -> None:
    _libc.munmap(address, size)


class Region:
    """One piece of RAM, one KVM slot. `view` is all of it, writable; `address` where it lies in this process.

    `fd` is the memfd behind it and `fd_offset` where in that it begins; -1 for private memory. `node` is the guest's
    NUMA node that it belongs to.
    """

    __slots__ = ("address", "fd", "fd_offset", "node", "size", "slot", "start", "view")

    def __init__(
        self, start: int, size: int, address: int, *, slot: int = -1, fd: int = -1, fd_offset: int = 0, node: int = 0
    ) -> None:
        self.start, self.size, self.address, self.slot = start, size, address, slot
        self.fd, self.fd_offset, self.node = fd, fd_offset, node
        self.view = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")

    @property
    def end(self) -> int:
        return self.start + self.size


class HostMemory:
    """How this host is to back a machine's RAM.

    `hugepages`: size of explicit huge pages in bytes, 0 for none (transparent ones are always welcome). `policy` and
    `host_nodes`: mbind(2)'s mode and the host's nodes. `huge_later`: transparent huge pages only from
    `GuestMemory.allow_huge_pages` on.
    """

    __slots__ = ("host_nodes", "huge_later", "hugepages", "policy", "prealloc", "shared")

    def __init__(
        self,
        *,
        shared: bool = False,
        hugepages: int = 0,
        prealloc: bool = False,
        policy: int = 0,
        host_nodes: tuple[int, ...] = (),
        huge_later: bool = False,
    ) -> None:
        self.huge_later = huge_later and not prealloc
        self.shared, self.hugepages, self.prealloc = shared, hugepages, prealloc
        self.policy, self.host_nodes = policy, host_nodes

    def allocate(self, size: int) -> tuple[int, int]:
        """(address, memfd or -1) of `size` bytes of zeroes, bound and, if asked for, present."""
        if self.hugepages and (self.hugepages & self.hugepages - 1 or size % self.hugepages):
            raise InvalidArgument(
                f"{size} bytes of memory are no multiple of huge pages of {self.hugepages} bytes",
                remedy="round the memory size, or choose 2M or 1G pages",
            )
        align = max(self.hugepages, _HUGE)
        fd = -1
        if self.shared:
            flags = os.MFD_CLOEXEC
            if self.hugepages:
                flags |= os.MFD_HUGETLB | (self.hugepages.bit_length() - 1) << MFD_HUGE_SHIFT
            fd = os.memfd_create("kvik-ram", flags)
        try:
            if fd >= 0:
                os.ftruncate(fd, size)
                address = map_memory(size, mmap.MAP_SHARED | MAP_NORESERVE, fd, align=align)
            else:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
                if self.hugepages:
                    flags |= MAP_HUGETLB | (self.hugepages.bit_length() - 1) << MFD_HUGE_SHIFT
                address = map_memory(size, flags, align=align)
            try:
                self._settle(address, size)
            except BaseException:
                unmap_memory(address, size)
                raise
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise HostError(f"cannot set aside {size >> 20} MiB: {error.strerror}", errno=error.errno or 0) from error
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        return address, fd

    def _settle(self, address: int, size: int) -> None:
        if not self.hugepages and not self.shared and not self.huge_later:
            _libc.madvise(address, size, MADV_HUGEPAGE)  # refused where the kernel has none: no loss
        _libc.madvise(address, size, MADV_DONTDUMP)  # a core of the VMM is not to hold the guest's secrets
        if self.host_nodes:
            words = max(self.host_nodes) // 64 + 1
            mask = (ctypes.c_uint64 * words)()
            for node in self.host_nodes:
                mask[node // 64] |= 1 << node % 64
            arguments = (ctypes.c_ulong(address), ctypes.c_ulong(size), self.policy or MPOL_BIND)
            if _libc.syscall(_SYS_MBIND, *arguments, mask, ctypes.c_ulong(words * 64 + 1), 0) < 0:
                number = ctypes.get_errno()
                nodes = ", ".join(map(str, self.host_nodes))
                raise HostError(
                    f"cannot bind memory to the host's NUMA nodes {nodes}: {os.strerror(number)}", errno=number
                )
        if self.prealloc and _libc.madvise(address, size, MADV_POPULATE_WRITE) < 0:
            number = ctypes.get_errno()
            raise HostError(
                f"cannot fill {size >> 20} MiB of memory in advance: {os.strerror(number)}",
                errno=number,
                remedy="free memory or huge pages on the host, or start without prealloc",
            )


class GuestMemory:
    """All RAM of one machine. Addresses are guest-physical.

    `set_slot(region)`, if given, makes a region known to KVM (or, with `region.size` given as 0 there, unknown);
    without it the memory is only this process's: unit tests.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.regions: list[Region] = []
        self.on_change: list[Callable[[], None]] = []
        self.dirty_log: Callable[[int, int], None] | None = None  # told (address, size) of what the VMM wrote
        self.arrival: Callable[[int, int], None] | None = None  # post-copy: waits until (address, size) is there
        # While RAM is saved as it was at one instant, and the guest runs: pages have to stay. Called, that ends.
        self.keeper: Callable[[], None] | None = None
        self.mapped: list[tuple[int, int]] = []  # (address, size) of parts that are a file's pages, copied on write
        self._starts: list[tuple[int, int, Region]] = []
        self._low: Region | None = None
        self._left: list[tuple[int, int]] = []  # (address, size) here of regions that were removed

    @classmethod
    def allocate(
        cls, size: int, host: HostMemory | None = None, hotplug: int = 0, *, firmware: bool = False
    ) -> GuestMemory:
        """RAM of `size` bytes in one or two regions, as the layout has it."""
        memory = cls(Layout(size, hotplug, firmware=firmware))
        try:
            for start, length in memory.layout.ram:
                memory.add_ram(start, length, host or HostMemory())
        except BaseException:
            memory.close()
            raise
        return memory

    @property
    def size(self) -> int:
        """Bytes of RAM, with all that devices bring (virtio-mem's whole window)."""
        return sum(region.size for region in self.regions)

    @property
    def boot_size(self) -> int:
        """Bytes of RAM that the machine begins with."""
        return sum(size for _, size in self.layout.ram)

    def add_ram(self, start: int, size: int, host: HostMemory, node: int = 0) -> Region:
        address, fd = host.allocate(size)
        region = Region(start, size, address, fd=fd, node=node)
        self.add(region)
        return region

    def require_whole(self, what: str, number: int = 0) -> None:
        """HostError while pages are still on their way here, so that not all of it can `what`."""
        if self.arrival is not None:
            raise HostError(
                f"the guest's memory is still arriving (post-copy) and cannot {what}",
                errno=number,
                remedy="wait until query-migrate says completed",
            )

    def require_free(self, what: str) -> None:
        """HostError while RAM is being saved, so that its pages cannot `what`."""
        if self.keeper is not None:
            raise HostError(
                f"the guest's memory is being saved and cannot {what}",
                errno=errno.EBUSY,
                remedy="wait until its snapshot is taken",
            )

    def add(self, region: Region) -> None:
        """Take a mapped region in; it must not overlap another."""
        for other in self.regions:
            if region.start < other.end and other.start < region.end:
                raise InvalidArgument(f"memory at {region.start:#x} overlaps memory at {other.start:#x}")
        self.regions.append(region)
        self._index()

    def remove(self, region: Region) -> None:
        """Forget a region and give its pages back. Rings, requests in flight and stashed buffers may still have views
        of it, wherever the guest chose to put them: its addresses stay mapped, to pages of nobody, until `close`."""
        if self.keeper is not None:
            self.keeper()  # what was saved so far is not the whole any more
        self.regions.remove(region)
        self.mapped = [(start, size) for start, size in self.mapped if not region.start <= start < region.end]
        self._index()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        map_memory(region.size, flags, at=region.address)
        _libc.madvise(region.address, region.size, MADV_DONTDUMP)
        if region.fd >= 0:
            os.close(region.fd)
        self._left.append((region.address, region.size))

    def _index(self) -> None:
        self.regions.sort(key=lambda region: region.start)
        self._starts = [(region.start, region.end, region) for region in self.regions]
        self._low = self.regions[0] if self.regions and self.regions[0].start == 0 else None
        for callback in self.on_change:
            callback()

    def allow_huge_pages(self) -> None:
        """For memory that was allocated with `huge_later`: what is touched from now on may come as huge pages. What
        the loader wrote before, a few pages here and there, did not cost the zeroing of 2 MiB each time."""
        for region in self.regions:
            if region.fd < 0:
                _libc.madvise(region.address, region.size, MADV_HUGEPAGE)  # refused for explicit huge pages: no loss

    # Access ------------------------------------------------------------------------------------------------------

    def find(self, address: int, size: int = 1) -> Region:
        """The region that holds all of [address, address + size); else a `GuestFault`."""
        low = self._low
        if low is not None and address >= 0 and address + size <= low.size:
            return low
        for start, end, region in self._starts:
            if start <= address and address + size <= end:
                return region
        raise GuestFault(f"{size} bytes at {address:#x} are not all RAM")

    def view(self, address: int, size: int) -> memoryview:
        """The guest's own bytes, writable, no copy. After writing through it, say so with `touched`."""
        if self.arrival is not None:
            self.find(address, size)
            self.arrival(address, size)
        low = self._low
        if low is not None and address >= 0 and address + size <= low.size:  # most of what is asked for
            return low.view[address : address + size]
        region = self.find(address, size)
        offset = address - region.start
        return region.view[offset : offset + size]

    def read(self, address: int, size: int) -> bytes:
        return bytes(self.view(address, size))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        size = len(data)
        self.view(address, size)[:] = data
        if self.dirty_log is not None:
            self.dirty_log(address, size)

    def touched(self, address: int, size: int) -> None:
        """The VMM wrote here through a view. KVM's own dirty log sees only what the guest writes."""
        if self.dirty_log is not None and size:
            self.dirty_log(address, size)

    def host_address(self, address: int, size: int) -> int:
        """Where [address, address + size) lies in this process, for ioctls that want pointers."""
        region = self.find(address, size)
        return region.address + address - region.start

    def u16(self, address: int) -> int:
        return int(_U16.unpack_from(self.view(address, 2))[0])

    def u32(self, address: int) -> int:
        return int(_U32.unpack_from(self.view(address, 4))[0])

    def u64(self, address: int) -> int:
        return int(_U64.unpack_from(self.view(address, 8))[0])

    def put_u16(self, address: int, value: int) -> None:
        self.write(address, _U16.pack(value))

    def put_u32(self, address: int, value: int) -> None:
        self.write(address, _U32.pack(value))

    def put_u64(self, address: int, value: int) -> None:
        self.write(address, _U64.pack(value))

    def map_file(self, address: int, fd: int, offset: int, size: int) -> None:
        """Put `size` bytes of a file at `address`: mapped copy-on-write where pages allow it, else read.

        A mapped part costs nothing until it is touched, and what nobody writes stays one copy for all machines.
        """
        region = self.find(address, size)
        self.touched(address, size)
        whole = size - size % PAGE
        free = self.arrival is None and self.keeper is None
        if region.fd < 0 and address % PAGE == 0 and offset % PAGE == 0 and whole and free:
            at = region.address + address - region.start
            map_memory(whole, mmap.MAP_PRIVATE, fd, offset, at=at)
            _libc.madvise(at, whole, MADV_DONTDUMP)
            self.mapped = [item for item in self.mapped if item != (address, whole)] + [(address, whole)]
            address, offset, size = address + whole, offset + whole, size - whole
        while size:
            count = os.preadv(fd, [self.view(address, size)], offset)
            if count == 0:
                raise HostError(f"the file ended {size} bytes too early while it was loaded at {address:#x}")
            address, offset, size = address + count, offset + count, size - count

    def discard(self, address: int, size: int) -> None:
        """Give pages back to the host; the guest reads zeroes there afterwards. Page aligned."""
        self.require_whole("be given back to the host", errno.EBUSY)
        self.require_free("be given back to the host")
        region = self.find(address, size)
        at = region.address + address - region.start
        if region.fd >= 0:
            os_fallocate_punch(region.fd, region.fd_offset + address - region.start, size)
        elif _libc.madvise(at, size, MADV_DONTNEED) < 0:
            number = ctypes.get_errno()
            raise HostError(f"cannot discard memory at {address:#x}: {os.strerror(number)}", errno=number)
        self.touched(address, size)

    def close(self) -> None:
        """Unmap everything. Views of it must be gone: a use of one afterwards is a crash."""
        while self.regions:
            self._unmap(self.regions.pop())
        while self._left:
            unmap_memory(*self._left.pop())
        self._starts, self._low = [], None

    @staticmethod
    def _unmap(region: Region) -> None:
        region.view.release()
        unmap_memory(region.address, region.size)
        if region.fd >= 0:
            os.close(region.fd)


_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def os_fallocate_punch(fd: int, offset: int, size: int) -> None:
    """fallocate(2) with FALLOC_FL_PUNCH_HOLE: Python's own wrapper can only reserve."""
    if _libc.fallocate(fd, 3, offset, size) < 0:
        number = ctypes.get_errno()
        raise HostError(f"cannot punch a hole: {os.strerror(number)}", errno=number)
