"""DSDT: the devices that nothing else announces, and the methods that carry events to the guest's drivers.

The generic event device (ACPI 6.5, 5.6.9) owns one level interrupt, ACPI_GSI. Its method _EVT reads the pending events,
which takes them and lowers the line, and notifies the device that each is about. `devices.acpi_events` is the other
side of every register named here.
"""

from __future__ import annotations

from kvik.vmm.acpi import aml
from kvik.vmm.acpi import resources as res
from kvik.vmm.acpi.fadt import S5_SLEEP_TYPE
from kvik.vmm.acpi.madt import cpu_entry
from kvik.vmm.acpi.table import table
from kvik.vmm.layout import (
    ACPI_GSI,
    ACPI_PORT,
    COM_GSIS,
    COM_PORTS,
    CPU_HOTPLUG_PORT,
    ECAM,
    ECAM_BUSES,
    ECAM_SIZE,
    PCI_CONFIG_ADDRESS,
    PCI_HOTPLUG_PORT,
    PM_PORT,
    PVPANIC_PORT,
    RTC_GSI,
    RTC_PORT,
    pci_gsi,
)
from kvik.vmm.layout import VMGENID as VMGENID_ADDRESS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.acpi.description import Description

# Pending events: bits of the register at ACPI_PORT + 4.
POWER_BUTTON, PCI_HOTPLUG, CPU_HOTPLUG, SLEEP_BUTTON, VMGENID = (1 << bit for bit in range(5))
# Notification values (5.6.6)
DEVICE_CHECK, EJECT_REQUEST, BUTTON_PRESSED, GENERATION_CHANGED = 1, 3, 0x80, 0x80
PCI_SLOTS = 32


def build(description: Description) -> bytes:
    parts = [
        aml.name("\\_S5_", aml.package(S5_SLEEP_TYPE, 0, 0, 0)),
        aml.scope("\\_SB_", *_platform(description), _pci_root(description), *_events(description)),
    ]
    return table(b"DSDT", 2, b"".join(parts))


def _identity(hid: str, uid: int = 0) -> bytes:
    return aml.name("_HID", aml.eisa_id(hid)) + aml.name("_UID", uid)


def _present() -> bytes:
    return aml.name("_STA", 0x0F)


def _platform(description: Description) -> list[bytes]:
    devices = []
    for index in description.com_ports:
        crs = res.template(res.io(COM_PORTS[index], 8), res.interrupt(COM_GSIS[index]))
        devices.append(aml.device(f"COM{index + 1}", _identity("PNP0501", index), _present(), aml.name("_CRS", crs)))
    if description.rtc:
        crs = res.template(res.io(RTC_PORT, 2), res.interrupt(RTC_GSI))
        devices.append(aml.device("RTC_", _identity("PNP0B00"), _present(), aml.name("_CRS", crs)))
    # Registers that no device claims, so that nothing else is put there; MMCONFIG is refused unless ECAM is among them.
    reserved = [res.io(ACPI_PORT, 0x40)]
    reserved.append(res.io(PM_PORT, 0x40) if description.layout.firmware else res.memory32(ECAM, ECAM_SIZE))
    devices.append(aml.device("MRES", _identity("PNP0C02"), _present(), aml.name("_CRS", res.template(*reserved))))
    if description.pvpanic:
        crs = res.template(res.io(PVPANIC_PORT, 1))
        devices.append(aml.device("PEVT", aml.name("_HID", aml.string("QEMU0001")), _present(), aml.name("_CRS", crs)))
    if description.vmgenid:
        address = aml.package(VMGENID_ADDRESS, 0)
        devices.append(
            aml.device(
                "VGEN",
                aml.name("_HID", aml.string("QEMUVGID")),
                aml.name("_CID", aml.string("VM_Gen_Counter")),
                aml.name("_DDN", aml.string("VM_Gen_Counter")),
                _present(),
                aml.name("ADDR", address),
            )
        )
    devices.append(aml.device("PWRB", _identity("PNP0C0C"), _present()))
    devices.append(aml.device("SLPB", _identity("PNP0C0E"), _present()))
    return devices


def _pci_root(description: Description) -> bytes:
    places = description.layout
    crs = res.template(
        res.bus_numbers(0, ECAM_BUSES - 1),
        res.io(PCI_CONFIG_ADDRESS, 8),
        res.io_window(*places.pci_io),
        res.memory_window(*places.pci32),
        res.memory_window(*places.pci64, prefetchable=True),
    )
    terms = [
        aml.name("_HID", aml.eisa_id("PNP0A03" if places.firmware else "PNP0A08")),  # without ECAM no PCI Express
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", 0),
        aml.name("_SEG", 0),
        aml.name("_BBN", 0),
        aml.name("_CCA", 1),
        aml.name("_CRS", crs),
        aml.name("_PRT", _routes()),
    ]
    if description.slots:
        terms.append(_pci_hotplug(description.slots))
    return aml.device("PCI0", *terms)


# What does not depend on the machine and is long: made once for all resets, and for all forks of a zygote.
_made: dict[object, bytes] = {}


def _routes() -> bytes:
    """Which interrupt a pin of a slot raises."""
    if "_PRT" not in _made:
        wires = [(slot, pin) for slot in range(PCI_SLOTS) for pin in range(4)]
        routes = [aml.package(slot << 16 | 0xFFFF, pin, 0, pci_gsi(slot)) for slot, pin in wires]
        _made["_PRT"] = aml.package(*routes)
    return _made["_PRT"]


def _pci_hotplug(slots: tuple[int, ...]) -> bytes:
    """A device a slot, ejected by a bit in a register; PSCN tells which of them came and which shall go. The names
    and the shape are those of ACPI PCI hot-plug as every guest knows it from QEMU."""
    if slots in _made:
        return _made[slots]
    terms = [
        aml.region("PCIH", aml.SYSTEM_IO, PCI_HOTPLUG_PORT, 12),
        aml.field("PCIH", aml.DWORD_ACCESS, ("PCIU", 32), ("PCID", 32), ("B0EJ", 32)),
    ]
    checks = []
    for slot in slots:
        device = f"S{slot:02X}_"
        terms.append(
            aml.device(
                device,
                aml.name("_ADR", slot << 16),
                aml.name("_SUN", slot),
                aml.method("_EJ0", 1, aml.store(1 << slot, aml.path("B0EJ"))),
            )
        )
        checks.append(aml.if_(aml.and_(aml.ARG0, 1 << slot), aml.notify(device, aml.ARG1)))
    terms.append(aml.method("DVNT", 2, *checks))
    scan = [
        aml.store(aml.path("PCIU"), aml.LOCAL0),
        aml.store(aml.path("PCID"), aml.LOCAL1),
        aml.call("DVNT", aml.LOCAL0, DEVICE_CHECK),
        aml.call("DVNT", aml.LOCAL1, EJECT_REQUEST),
    ]
    terms.append(aml.method("PSCN", 0, *scan, serialized=True))
    return _made.setdefault(slots, b"".join(terms))


def _events(description: Description) -> list[bytes]:
    handlers = [
        (POWER_BUTTON, aml.notify("\\_SB_.PWRB", BUTTON_PRESSED)),
        (SLEEP_BUTTON, aml.notify("\\_SB_.SLPB", BUTTON_PRESSED)),
    ]
    if description.slots:
        handlers.append((PCI_HOTPLUG, aml.call("\\_SB_.PCI0.PSCN")))
    if description.cpu_hotplug:
        handlers.append((CPU_HOTPLUG, aml.call("\\_SB_.CPUS.CSCN")))
    if description.vmgenid:
        handlers.append((VMGENID, aml.notify("\\_SB_.VGEN", GENERATION_CHANGED)))
    event = aml.method(
        "_EVT",
        1,
        aml.store(aml.path("PEND"), aml.LOCAL0),
        *(aml.if_(aml.and_(aml.LOCAL0, bit), action) for bit, action in handlers),
        serialized=True,
    )
    crs = res.template(res.interrupt(ACPI_GSI, level=True))
    devices = [_cpus(description)] if description.cpu_hotplug else []
    devices.append(
        aml.device(
            "GED_",
            aml.name("_HID", aml.string("ACPI0013")),
            aml.name("_UID", 0),
            aml.name("_CRS", crs),
            aml.region("EVTR", aml.SYSTEM_IO, ACPI_PORT + 4, 4),
            aml.field("EVTR", aml.DWORD_ACCESS, ("PEND", 32)),
            event,
        )
    )
    return devices


def _cpus(description: Description) -> bytes:
    """Processors that come and go (8.4.1, container device). Registers, at CPU_HOTPLUG_PORT: CSEL selects a processor,
    CEVT is the next one from there on that something happened to, CSTA its state."""
    terms = [
        aml.name("_HID", aml.string("ACPI0010")),
        aml.name("_CID", aml.eisa_id("PNP0A05")),
        aml.mutex("CLCK"),
        aml.region("CREG", aml.SYSTEM_IO, CPU_HOTPLUG_PORT, 12),
        aml.field("CREG", aml.DWORD_ACCESS, ("CSEL", 32), ("CSTA", 32), ("CEVT", 32)),
        # CST(index): is the processor there
        aml.method(
            "CST_",
            1,
            aml.acquire("CLCK"),
            aml.store(aml.ARG0, aml.path("CSEL")),
            aml.store(aml.and_(aml.path("CSTA"), CPU_PRESENT), aml.LOCAL0),
            aml.release("CLCK"),
            aml.if_(aml.LOCAL0, aml.return_(0x0F)),
            aml.return_(0),
            serialized=True,
        ),
        aml.method(
            "CEJ_",
            1,
            aml.acquire("CLCK"),
            aml.store(aml.ARG0, aml.path("CSEL")),
            aml.store(CPU_EJECT, aml.path("CSTA")),
            aml.release("CLCK"),
            serialized=True,
        ),
    ]
    checks = []
    for index, cpu in enumerate(description.cpus):
        device = f"C{index:03X}"
        mat = cpu_entry(index, cpu._replace(enabled=True))
        terms.append(
            aml.device(
                device,
                aml.name("_HID", aml.string("ACPI0007")),
                aml.name("_UID", index),
                aml.method("_STA", 0, aml.return_(aml.call("CST_", index))),
                aml.name("_MAT", aml.buffer(mat)),
                aml.name("_PXM", cpu.node),
                *([aml.method("_EJ0", 1, aml.call("CEJ_", index))] if index else []),  # the boot processor stays
            )
        )
        checks.append(aml.if_(aml.equal(aml.ARG0, index), aml.notify(device, aml.ARG1), aml.return_(0)))
    terms.append(aml.method("CTFY", 2, *checks, aml.return_(0)))
    scan = [
        aml.acquire("CLCK"),
        aml.store(0, aml.path("CSEL")),
        aml.while_(
            b"\x01",
            aml.store(aml.path("CEVT"), aml.LOCAL0),
            aml.if_(aml.equal(aml.LOCAL0, 0xFFFFFFFF), aml.BREAK),
            aml.store(aml.LOCAL0, aml.path("CSEL")),
            aml.store(aml.path("CSTA"), aml.LOCAL1),
            aml.store(CPU_INSERTED | CPU_REMOVING, aml.path("CSTA")),  # seen
            aml.if_(aml.and_(aml.LOCAL1, CPU_INSERTED), aml.call("CTFY", aml.LOCAL0, DEVICE_CHECK)),
            aml.if_(aml.and_(aml.LOCAL1, CPU_REMOVING), aml.call("CTFY", aml.LOCAL0, EJECT_REQUEST)),
        ),
        aml.release("CLCK"),
    ]
    terms.append(aml.method("CSCN", 0, *scan, serialized=True))
    return aml.device("CPUS", *terms)


# Bits of CSTA. Read: state. Written: INSERTED and REMOVING are acknowledged, EJECT takes the processor out.
CPU_PRESENT, CPU_INSERTED, CPU_REMOVING, CPU_EJECT = 1, 2, 4, 8
