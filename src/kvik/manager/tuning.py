"""What can be changed without attaching anything: metadata, vCPUs, memory. Live, in the definition, or both.

Both means: the new definition is worked out and checked first, then the VMM is asked, then the definition is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.conf.devices.memory import BalloonStats
from kvik.conf.domain import Domain
from kvik.conf.enums import DomainMemoryModFlags, DomainMetadataType, DomainVcpuFlags
from kvik.errors import InvalidArgument, OperationInvalid, OperationUnsupported
from kvik.hypervisor.driver import Feature
from kvik.manager import metadata, prepare

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

LIVE, CONFIG = 1, 2
VCPU_LIMIT = 1 << 16

# Metadata -------------------------------------------------------------------------------------------------------


async def set_metadata(  # noqa: PLR0917
    domain: DomainObject, type_: int, text: str | None, key: str | None, uri: str | None, flags: int
) -> None:
    impact = domain.impact(flags)
    change = metadata.Change(type_, text, key, uri)
    if impact & CONFIG:
        async with domain.manager.editing(domain) as document:
            change(document)
    if impact & LIVE:
        assert domain.run is not None
        change(domain.run.live)
        domain.live_changed()
        await domain.save_status()
    domain.emit("metadata-change", type=type_, uri=uri if type_ == DomainMetadataType.ELEMENT else None)


# vCPUs ----------------------------------------------------------------------------------------------------------


async def set_vcpus(domain: DomainObject, count: int, flags: int) -> None:
    """virDomainVcpuFlags. MAXIMUM is of the definition only."""
    if not 0 < count <= VCPU_LIMIT:
        raise InvalidArgument(f"{count} vCPUs are not possible")
    if flags & (DomainVcpuFlags.GUEST | DomainVcpuFlags.HOTPLUGGABLE):
        raise OperationUnsupported("vCPUs cannot be changed through the guest, or made hot-pluggable one by one, yet")
    impact = domain.impact(flags)
    maximum = bool(flags & DomainVcpuFlags.MAXIMUM)
    if maximum and impact & LIVE:
        raise InvalidArgument(
            f"the most vCPUs of machine {domain.name!r} cannot change while it runs", remedy="change the definition"
        )

    def check(most: int) -> None:
        if count > most and not maximum:
            raise InvalidArgument(
                f"{count} vCPUs are more than the {most} that machine {domain.name!r} can have",
                remedy="raise the maximum while it is off: setvcpus --maximum --config",
            )

    async def live() -> None:
        machine = domain.require_machine()
        assert domain.run is not None
        vcpu = domain.run.live.vcpu
        check(vcpu.value if vcpu else 1)
        if Feature.VCPU_HOTPLUG not in domain.driver.features():
            raise OperationUnsupported(f"the VMM of machine {domain.name!r} cannot plug vCPUs while it runs")
        await machine.set_vcpus(count)
        if vcpu is not None:
            vcpu.current = count if count != vcpu.value else None
        domain.live_changed()
        domain.emit("tunable", params={"cputune.vcpus": count})
        await domain.save_status()

    if not impact & CONFIG:
        await live()
        return
    async with domain.manager.editing(domain) as document:
        vcpu = document.vcpu
        if vcpu is None:
            vcpu = document.vcpu = prepare.default_vcpu()
        check(vcpu.value)
        if maximum:
            vcpu.value = count
            if vcpu.current is not None and vcpu.current >= count:
                vcpu.current = None
        else:
            vcpu.current = count if count != vcpu.value else None
        document.vcpus = None  # which of them are there is no longer said one by one
        if impact & LIVE:
            await live()


# Memory ---------------------------------------------------------------------------------------------------------


async def set_memory(domain: DomainObject, kib: int, flags: int) -> None:
    """virDomainMemoryModFlags. MAXIMUM is of the definition only."""
    if not 0 < kib < 1 << 54:
        raise InvalidArgument(f"{kib} KiB of memory are not possible")
    impact = domain.impact(flags)
    maximum = bool(flags & DomainMemoryModFlags.MAXIMUM)
    if maximum and impact & LIVE:
        raise InvalidArgument(
            f"the most memory of machine {domain.name!r} cannot change while it runs", remedy="change the definition"
        )

    def check(most: int) -> None:
        if kib > most and not maximum:
            raise InvalidArgument(
                f"{kib} KiB are more than the {most} KiB that machine {domain.name!r} can have",
                remedy="raise the maximum while it is off: setmaxmem --config",
            )

    async def live() -> None:
        machine = domain.require_machine()
        run = domain.run
        assert run is not None
        check(run.live.memory)
        if Feature.BALLOON not in domain.driver.features():
            raise OperationUnsupported(f"the VMM of machine {domain.name!r} cannot change its memory while it runs")
        await machine.set_balloon(kib * 1024)

    if not impact & CONFIG:
        await live()
        return
    async with domain.manager.editing(domain) as document:
        check(document.memory)
        if maximum:
            document.memory = kib
            if document.current_memory is not None:
                document.current_memory = min(document.current_memory, kib)
        else:
            document.current_memory = kib
        if impact & LIVE:
            await live()


async def set_memory_stats_period(domain: DomainObject, seconds: int, flags: int) -> None:
    if not 0 <= seconds < 1 << 31:
        raise InvalidArgument(f"a period of {seconds} s is not possible")
    impact = domain.impact(flags)

    def change(document: Domain) -> None:
        balloon = document.devices.memballoon
        if balloon is None or balloon.model == "none":
            raise OperationInvalid(
                f"machine {domain.name!r} has no balloon device", remedy="add <memballoon model='virtio'/>"
            )
        balloon.stats = BalloonStats(period=seconds) if seconds else None

    async def live() -> None:
        machine = domain.require_machine()
        assert domain.run is not None
        change(domain.run.live.copy())
        await machine.set_balloon_period(seconds)
        change(domain.run.live)
        domain.live_changed()
        await domain.save_status()

    if not impact & CONFIG:
        await live()
        return
    async with domain.manager.editing(domain) as document:
        change(document)
        if impact & LIVE:
            await live()
