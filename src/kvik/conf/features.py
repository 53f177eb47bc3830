"""<features>, <clock>, <pm>, <perf>: https://libvirt.org/formatdomain.html#hypervisor-features"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, KIB, SIGNED, Element, OnOff, Present, YesNo
from kvik.conf.devices.common import Enabled, State


class Apic(Element):
    eoi: OnOff = None


class Spinlocks(Element):
    state: OnOff = None
    retries: int | None = None


class Stimer(Element):
    state: OnOff = None
    direct: State | None = None


class VendorId(Element):
    state: OnOff = None
    value: str | None = None


class TlbFlush(Element):
    state: OnOff = None
    direct: State | None = None
    extended: State | None = None


class Hyperv(Element):
    """Enlightenments for Windows guests."""

    mode: Literal["custom", "passthrough", "host-model"] | None = None
    relaxed: State | None = None
    vapic: State | None = None
    spinlocks: Spinlocks | None = None
    vpindex: State | None = None
    runtime: State | None = None
    synic: State | None = None
    stimer: Stimer | None = None
    reset: State | None = None
    vendor_id: VendorId | None = None
    frequencies: State | None = None
    reenlightenment: State | None = None
    tlbflush: TlbFlush | None = None
    ipi: State | None = None
    evmcs: State | None = None
    avic: State | None = None
    emsr_bitmap: State | None = None
    xmm_input: State | None = None


class DirtyRing(Element):
    state: OnOff = None
    size: int | None = None


class KvmFeatures(Element):
    hidden: State | None = None
    hint_dedicated: Annotated[State | None, "hint-dedicated"] = None
    poll_control: Annotated[State | None, "poll-control"] = None
    pv_ipi: Annotated[State | None, "pv-ipi"] = None
    dirty_ring: Annotated[DirtyRing | None, "dirty-ring"] = None


class Smm(Element):
    """`tseg` in KiB."""

    state: OnOff = None
    tseg: Annotated[int | None, CHILD, KIB] = None


class Ioapic(Element):
    driver: Literal["kvm", "qemu"] | None = None


class Gic(Element):
    version: str | None = None


class Hpt(Element):
    resizing: Literal["enabled", "disabled", "required"] | None = None
    maxpagesize: Annotated[int | None, CHILD, KIB] = None


class TcgFeatures(Element):
    """`tb_cache` in KiB."""

    tb_cache: Annotated[int | None, CHILD, KIB, "tb-cache"] = None


class Msrs(Element):
    unknown_msrs: Annotated[Literal["ignore", "fault"] | None, "unknown"] = None


class Level(Element):
    """`value` of <cfpc>, <sbbc>, <ibs>: how far a side channel is closed."""

    value: str | None = None


class Features(Element):
    acpi: Present = False
    apic: Apic | None = None
    pae: Present = False
    hap: State | None = None
    viridian: Present = False
    privnet: Present = False
    hyperv: Hyperv | None = None
    kvm: KvmFeatures | None = None
    pvspinlock: State | None = None
    pmu: State | None = None
    vmport: State | None = None
    gic: Gic | None = None
    smm: Smm | None = None
    ioapic: Ioapic | None = None
    hpt: Hpt | None = None
    vmcoreinfo: State | None = None
    htm: State | None = None
    msrs: Msrs | None = None
    ccf_assist: Annotated[State | None, "ccf-assist"] = None
    cfpc: Level | None = None
    sbbc: Level | None = None
    ibs: Level | None = None
    tcg: TcgFeatures | None = None
    async_teardown: Annotated[Enabled | None, "async-teardown"] = None
    ras: State | None = None
    ps2: State | None = None


class Catchup(Element):
    threshold: int | None = None
    slew: int | None = None
    limit: int | None = None


class Timer(Element):
    name: Literal["platform", "hpet", "kvmclock", "pit", "rtc", "tsc", "hypervclock", "armvtimer"]
    present: YesNo = None
    tickpolicy: Literal["delay", "catchup", "merge", "discard"] | None = None
    track: Literal["boot", "guest", "wall", "realtime"] | None = None
    frequency: int | None = None
    mode: str | None = None
    catchup: Catchup | None = None


class Clock(Element):
    offset: Literal["utc", "localtime", "timezone", "variable", "absolute"] = "utc"
    adjustment: str | None = None
    basis: Literal["utc", "localtime"] | None = None
    timezone: str | None = None
    start: Annotated[int | None, SIGNED] = None
    timers: Annotated[list[Timer], "timer"] = []


class Pm(Element):
    suspend_to_mem: Annotated[Enabled | None, "suspend-to-mem"] = None
    suspend_to_disk: Annotated[Enabled | None, "suspend-to-disk"] = None


class PerfEvent(Element):
    name: str
    enabled: YesNo = None


class Perf(Element):
    events: Annotated[list[PerfEvent], "event"] = []
