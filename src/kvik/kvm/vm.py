"""One machine: memory slots, interrupt controllers, event descriptors, clock, dirty log (api.rst 2, "VM ioctls")."""

from __future__ import annotations

import errno
import struct

from kvik.kvm import constants as c
from kvik.kvm import routing
from kvik.kvm.constants import Capability
from kvik.kvm.descriptor import AttributeOwner, KvmError, address_of
from kvik.kvm.structs import ClockData, PitState2, UserspaceMemoryRegion
from kvik.kvm.vcpu import Vcpu

_IRQFD = struct.Struct("<IIII16x")
_IOEVENTFD = struct.Struct("<QQIiI36x")
_IRQ_LEVEL = struct.Struct("<II")
_MSI = struct.Struct("<IIII16x")
_ZONE = struct.Struct("<QII")
_FILTER_RANGE = struct.Struct("<IIIxxxxQ")

_DEASSIGN, _RESAMPLE = 1, 2  # KVM_IRQFD_FLAG_*
_IO_DATAMATCH, _IO_PIO, _IO_DEASSIGN = 1, 2, 4  # KVM_IOEVENTFD_FLAG_*
_IRQCHIP_SIZE = 520
FILTER_RANGES = 16  # KVM_MSR_FILTER_MAX_RANGES
FILTER_BITMAP = 0x600  # bytes, KVM_MSR_FILTER_MAX_BITMAP_SIZE


class DeviceDescriptor(AttributeOwner):
    """A device inside the kernel, from `Vm.create_device`."""


class Vm(AttributeOwner):
    """One machine. Its descriptor keeps it alive, and each vCPU's does too."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_size = vcpu_mmap_size
        self._ring_size = 0

    def enable_cap(self, capability: int, *arguments: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP on the machine (4.37, chapter 7 lists them): up to four arguments."""
        self._enable_cap(capability, arguments, flags)

    # Memory

    def set_tss_addr(self, address: int) -> None:
        """KVM_SET_TSS_ADDR (4.36): three guest-physical pages below 4 GiB that Intel's CPUs without unrestricted guest
        mode need; must come before the first vCPU."""
        self._long("SET_TSS_ADDR", address)

    def set_identity_map_addr(self, address: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR (4.40): one page, for the same CPUs."""
        self._bytes("SET_IDENTITY_MAP_ADDR", address.to_bytes(8, "little"))

    def set_user_memory_region(self, slot: int, guest_address: int, size: int, address: int, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION (4.35): bytes; page aligned. `address` is in this process and must stay mapped;
        size 0 deletes the slot. Flags: MEM_LOG_DIRTY_PAGES, MEM_READONLY."""
        region = UserspaceMemoryRegion(slot, flags, guest_address, size, address)
        where = f"slot {slot}, {size:#x} bytes at {guest_address:#x}"
        self._struct("SET_USER_MEMORY_REGION", region, where)

    # vCPUs

    def create_vcpu(self, number: int) -> Vcpu:
        """KVM_CREATE_VCPU (4.7); `number` is the APIC id."""
        xsave_size = max(self.check_extension(Capability.XSAVE2), 4096)
        return Vcpu(self._int("CREATE_VCPU", number), self._vcpu_mmap_size, xsave_size, self._ring_size)

    def set_boot_cpu_id(self, number: int) -> None:
        """KVM_SET_BOOT_CPU_ID (4.41): the bootstrap processor, 0 unless said; before the first vCPU."""
        self._int("SET_BOOT_CPU_ID", number)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ on the machine (4.55): of the vCPUs made from now on."""
        self._int("SET_TSC_KHZ", khz)

    # Interrupts

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP (4.24): two PICs, an IOAPIC, and a local APIC in every vCPU made from now on."""
        self._int("CREATE_IRQCHIP")

    def enable_split_irqchip(self, routes: int) -> None:
        """KVM_CAP_SPLIT_IRQCHIP (7.5) instead of `create_irqchip`: local APICs in the kernel, the IOAPIC (with `routes`
        pins, which reserves as many GSIs) and PICs in user space. Before the first vCPU."""
        self.enable_cap(Capability.SPLIT_IRQCHIP, routes)

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2 (4.71): the 8254 timer; needs the full irqchip."""
        self._bytes("CREATE_PIT2", flags.to_bytes(64, "little"))

    def set_gsi_routing(self, routes: list[routing.Route]) -> None:
        """KVM_SET_GSI_ROUTING (4.52): replaces the whole table, so begin with `routing.default_routes()` unless the
        irqchip is split. Waits for all users of the old table."""
        self._struct("SET_GSI_ROUTING", routing.encode(routes), f"{len(routes)} routes")

    def irqfd(self, fd: int, gsi: int, resample_fd: int | None = None, deassign: bool = False) -> None:
        """KVM_IRQFD (4.75): a write to the eventfd `fd` raises `gsi` as an edge. With `resample_fd` it is a level line:
        it stays up until the guest's EOI, which writes to `resample_fd`. `deassign` undoes it."""
        flags = (_DEASSIGN if deassign else 0) | (_RESAMPLE if resample_fd is not None else 0)
        self._struct("IRQFD", bytearray(_IRQFD.pack(fd, gsi, flags, resample_fd or 0)), f"GSI {gsi}")

    def ioeventfd(
        self,
        fd: int,
        address: int,
        size: int,
        datamatch: int | None = None,
        pio: bool = False,
        *,
        deassign: bool = False,
    ) -> None:
        """KVM_IOEVENTFD (4.59): a guest's write of `size` bytes (0: of any size) to `address`, a port with `pio`, adds
        1 to the eventfd `fd` and never leaves the kernel; with `datamatch` only a write of that value. `deassign`
        undoes it, with the same arguments."""
        flags = (_IO_PIO if pio else 0) | (_IO_DEASSIGN if deassign else 0)
        if datamatch is not None:
            flags |= _IO_DATAMATCH
        data = _IOEVENTFD.pack(datamatch or 0, address, size, fd, flags)
        self._struct("IOEVENTFD", bytearray(data), f"{'port' if pio else 'address'} {address:#x}")

    def irq_line(self, gsi: int, level: bool) -> None:
        """KVM_IRQ_LINE (4.25): set the level of a line of the irqchip."""
        self._bytes("IRQ_LINE", _IRQ_LEVEL.pack(gsi, level))

    def signal_msi(self, address: int, data: int) -> bool:
        """KVM_SIGNAL_MSI (4.71): send a message at once. False if no local APIC took it, as when the guest programmed
        an address where none is."""
        low, high = routing.msi_address(address)
        try:
            return self._struct("SIGNAL_MSI", bytearray(_MSI.pack(low, high, data, 0))) > 0
        except KvmError as error:
            if error.errno == errno.EPERM:  # the kernel's "-1": no destination
                return False
            raise

    def irqchip(self, chip: int) -> bytes:
        """KVM_GET_IRQCHIP (4.26): the state of one chip (`constants.Irqchip`), 512 bytes in the kernel's layout."""
        state = bytearray(_IRQCHIP_SIZE)
        state[:4] = chip.to_bytes(4, "little")
        self._struct("GET_IRQCHIP", state)
        return bytes(state[8:])

    def set_irqchip(self, chip: int, state: bytes) -> None:
        """KVM_SET_IRQCHIP (4.27), of what `irqchip` gave."""
        if len(state) != _IRQCHIP_SIZE - 8:
            raise ValueError(f"the state of an irqchip has {_IRQCHIP_SIZE - 8} bytes, not {len(state)}")
        self._struct("SET_IRQCHIP", bytearray(chip.to_bytes(8, "little") + state))

    def pit2(self) -> PitState2:
        """KVM_GET_PIT2 (4.72)."""
        state = PitState2()
        self._struct("GET_PIT2", state)
        return state

    def set_pit2(self, state: PitState2) -> None:
        """KVM_SET_PIT2 (4.73)."""
        self._struct("SET_PIT2", state)

    # Clock

    def clock(self) -> ClockData:
        """KVM_GET_CLOCK (4.29): kvmclock, nanoseconds."""
        data = ClockData()
        self._struct("GET_CLOCK", data)
        return data

    def set_clock(self, nanoseconds: int, realtime: int | None = None) -> None:
        """KVM_SET_CLOCK (4.30). With `realtime`, nanoseconds since the epoch at which the clock read `nanoseconds`: the
        kernel adds what has passed since (CLOCK_REALTIME)."""
        flags = c.CLOCK_REALTIME if realtime is not None else 0
        self._struct("SET_CLOCK", ClockData(clock=nanoseconds, flags=flags, realtime=realtime or 0))

    # Dirty log

    def get_dirty_log(self, slot: int, buffer: bytearray | memoryview) -> None:
        """KVM_GET_DIRTY_LOG (4.8): a bit a page since the last call into `buffer`, which must hold the slot's pages
        rounded up to 64. Clears the log, unless MANUAL_DIRTY_LOG_PROTECT2 (7.18) is enabled."""
        address = address_of(buffer)
        self._struct("GET_DIRTY_LOG", bytearray(struct.pack("<IIQ", slot, 0, address)), f"slot {slot}")

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, buffer: bytearray | memoryview) -> None:
        """KVM_CLEAR_DIRTY_LOG (4.117): log writes anew to those of the `pages` from `first_page` whose bit is set in
        `buffer`. `first_page` is a multiple of 64, `pages` too unless they reach the slot's end."""
        data = bytearray(struct.pack("<IIQQ", slot, pages, first_page, address_of(buffer)))
        self._struct("CLEAR_DIRTY_LOG", data, f"slot {slot}")

    def enable_dirty_ring(self, entries: int) -> None:
        """KVM_CAP_DIRTY_LOG_RING (8.29) instead of bitmaps: each vCPU made from now on has a ring of `entries`, a power
        of two (`Vcpu.dirty_ring`). Before the first vCPU."""
        ordered = self.check_extension(Capability.DIRTY_LOG_RING_ACQ_REL)
        capability = Capability.DIRTY_LOG_RING_ACQ_REL if ordered else Capability.DIRTY_LOG_RING
        self.enable_cap(capability, entries * 16)
        self._ring_size = entries * 16

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS (8.29): protect what was taken from all rings; the number of entries."""
        return self._int("RESET_DIRTY_RINGS")

    # The rest

    def register_coalesced(self, address: int, size: int, pio: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO (4.116): writes there are kept in the ring of `Vcpu.coalesced` until the next
        exit for another reason."""
        self._bytes("REGISTER_COALESCED_MMIO", _ZONE.pack(address, size, pio))

    def unregister_coalesced(self, address: int, size: int, pio: bool = False) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO (4.116)."""
        self._struct("UNREGISTER_COALESCED_MMIO", bytearray(_ZONE.pack(address, size, pio)))

    def set_user_space_msr(self, reasons: int) -> None:
        """KVM_CAP_X86_USER_SPACE_MSR (7.21): accesses to MSRs that fail for these reasons (MSR_EXIT_REASON_*) become
        `MsrExit` instead of an exception in the guest."""
        self.enable_cap(Capability.X86_USER_SPACE_MSR, reasons)

    def set_msr_filter(self, ranges: list[tuple[int, int, bytes]], deny: bool = False) -> None:
        """KVM_X86_SET_MSR_FILTER (4.97). Each range: MSR_FILTER_READ | MSR_FILTER_WRITE, the first MSR, and a bitmap
        from there on: a clear bit denies. `deny`: what is in no range. A denied access is #GP or
        `MsrExit`."""
        if len(ranges) > FILTER_RANGES or any(not 0 < len(bits) <= FILTER_BITMAP for _, _, bits in ranges):
            raise ValueError(f"an MSR filter has up to {FILTER_RANGES} ranges of 1 to {FILTER_BITMAP} bytes")
        data = bytearray(8 + _FILTER_RANGE.size * FILTER_RANGES)
        data[:4] = int(deny).to_bytes(4, "little")
        held = [bytearray(bits.ljust(-len(bits) // 8 * -8, b"\0")) for _, _, bits in ranges]  # the kernel reads words
        for number, ((flags, base, bits), words) in enumerate(zip(ranges, held, strict=True)):
            place = 8 + _FILTER_RANGE.size * number
            _FILTER_RANGE.pack_into(data, place, flags, len(bits) * 8, base, address_of(words))
        self._struct("X86_SET_MSR_FILTER", data)

    def create_device(self, kind: int, test: bool = False) -> DeviceDescriptor | None:
        """KVM_CREATE_DEVICE (4.79); with `test` only asks whether it could, and gives None."""
        data = bytearray(struct.pack("<III", kind, 0, int(test)))
        self._struct("CREATE_DEVICE", data, f"device type {kind}")
        return None if test else DeviceDescriptor(int.from_bytes(data[4:8], "little"))
