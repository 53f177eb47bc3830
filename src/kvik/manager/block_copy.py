"""Copies of a running machine's disk: where one goes, how it is made, and what may not become of it.

A copy is a block job like others: its course is in `block_jobs.py` and `block_following.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.conf.codec import Element
from kvik.conf.devices.disk import BackingStore, Disk, DiskDriver, DiskSource, Format, Mirror, SourceType
from kvik.conf.enums import DomainBlockCopyFlags, DomainBlockJobType, DomainBlockRebaseFlags
from kvik.conf.reader import read_xml
from kvik.conf.tree import clone
from kvik.conf.xmlparse import parse_element
from kvik.errors import AlreadyExists, ConfigError, ConfigUnsupported, InvalidArgument, KvikError
from kvik.host.reach import reach
from kvik.host.threads import in_thread
from kvik.hypervisor import new_image
from kvik.hypervisor.layers import as_disk
from kvik.manager import disks
from kvik.manager.block_following import BlockJob, unknown
from kvik.manager.block_jobs import MIB, begun, disk_for_job, pull, speed_of
from kvik.manager.encrypted_images import maker
from kvik.manager.secrets import open_secrets
from kvik.manager.storage import resolve

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.run import Run

__all__ = ["Destination", "check_secrecy", "copy", "rebase"]


class Destination(Element):
    """The document that says where a copy goes: a `<disk>` that needs no target."""

    type: SourceType = "file"
    driver: DiskDriver | None = None
    source: DiskSource | None = None
    backing_store: BackingStore | None = None


async def rebase(domain: DomainObject, name: str, base: str | None, bandwidth: int, flags: int) -> None:
    """virDomainBlockRebase: a pull as far as `base`, or a copy to it."""
    known = DomainBlockRebaseFlags
    speed = speed_of(bandwidth, bool(flags & known.BANDWIDTH_BYTES))
    if not flags & known.COPY:
        if flags & ~(known.BANDWIDTH_BYTES | known.RELATIVE):
            raise InvalidArgument(f"flags 0x{flags:x} are for a copy only")
        await pull(domain, name, base, speed, relative=bool(flags & known.RELATIVE))
        return
    if not base:
        raise InvalidArgument("a copy needs a destination")
    block = bool(flags & known.COPY_DEV)
    destination = Destination(
        type="block" if block else "file",
        source=DiskSource(dev=base) if block else DiskSource(file=base),
        driver=DiskDriver(type="raw") if flags & known.COPY_RAW else None,
    )
    options = flags & (known.SHALLOW | known.REUSE_EXT)
    await _copy(domain, name, destination, {"bandwidth": speed}, options)


async def copy(domain: DomainObject, name: str, xml: str, params: Mapping[str, int], flags: int) -> None:
    """virDomainBlockCopy; `params`: "bandwidth" in bytes a second, "granularity" and "buf-size" in bytes."""
    root = read_xml(xml, "disk document")
    if root.tag != "disk":
        raise ConfigError(f"the destination of a copy is a <disk>, not a <{root.tag}>", path=f"/{root.tag}")
    await _copy(domain, name, parse_element(root, Destination), params, flags)


async def _copy(
    domain: DomainObject, name: str, destination: Destination, params: Mapping[str, int], flags: int
) -> None:
    known = DomainBlockCopyFlags
    shallow, reuse = bool(flags & known.SHALLOW), bool(flags & known.REUSE_EXT)
    granularity = params.get("granularity", 0)
    if granularity and (granularity & (granularity - 1) or not 512 <= granularity <= 64 * MIB):
        raise InvalidArgument("granularity must be power of 2 between 512 and 67108864")
    disk, jobs = await disk_for_job(domain, name)
    run = domain.run
    assert run is not None
    check_secrecy(disk, destination)
    if destination.type == "volume":
        found = resolve(domain.manager.pools, destination.source or DiskSource())
        named, destination.type, destination.source = destination.source, found.type, found.source
        assert named is not None
        destination.source.pool, destination.source.volume, destination.source.mode = (
            named.pool,
            named.volume,
            named.mode,
        )
    mirror = _mirror(disk, destination, reuse)
    below = disk.backing_store if shallow else None
    size = 0 if reuse else await domain.require_machine().disk_size(disk)
    made = "" if reuse else await reach(new_image.check, mirror, size, below)
    await jobs.number(disk, mirror, fresh=not reuse)
    assert mirror.source is not None
    if below is not None and not reuse:
        mirror.backing_store = clone(below)
    target = disk.target.dev or ""
    job = BlockJob(f"copy-{target}-{mirror.source.index}", DomainBlockJobType.COPY, target, created=made)
    disk.mirror = mirror
    async with begun(domain, run, job, disk):
        try:
            if made:
                encrypted = maker(domain.manager, mirror.source.encryption)
                await in_thread(new_image.make, mirror, size, below, encrypted)
            if mirror.type != "network":
                await _claim(domain, run, mirror)
            with ExitStack() as held:
                secrets = open_secrets(domain.manager.secrets, [as_disk(disk, mirror)], held)
                await jobs.copy(
                    job.id,
                    disk,
                    mirror,
                    shallow=shallow,
                    fresh=not reuse,
                    speed=params.get("bandwidth", 0),
                    granularity=granularity,
                    buffer=params.get("buf-size", 0),
                    synchronous=bool(flags & known.SYNCHRONOUS_WRITES),
                    secrets=secrets,
                )
        except KvikError as error:
            if made and not isinstance(error, AlreadyExists) and not unknown(error):
                await in_thread(new_image.remove, made)
            raise


def check_secrecy(disk: Disk, destination: Destination) -> None:
    """What is encrypted is not copied to where it would lie open for all who can read the file."""
    source = disk.encryption or (disk.source.encryption if disk.source is not None else None)
    if source is not None and (destination.source is None or destination.source.encryption is None):
        raise ConfigUnsupported(
            f"disk '{disk.target.dev}' is encrypted, and its copy would not be",
            path="/disk/source",
            remedy="put <encryption> into the <source> of the copy's document: --xml",
        )


def _mirror(disk: Disk, destination: Destination, reuse: bool) -> Mirror:
    """The element that libvirt shows while a copy is made."""
    source = destination.source
    if source is None or not (source.protocol if destination.type == "network" else source.location):
        raise ConfigUnsupported("the document does not say where the copy goes", path="/disk/source")
    if destination.type not in ("file", "block", "network"):
        raise ConfigUnsupported(
            f"a copy goes to a file, a block device, a volume or a place on the network, not to type "
            f"{destination.type!r}",
            path="/disk/@type",
        )
    place = source.location or f"{source.protocol}:{source.name or ''}"
    if source.location and not Path(source.location).is_absolute():
        raise ConfigError(f"the path of a copy is absolute, not {source.location!r}", path="/disk/source")
    given = destination.driver.type if destination.driver is not None else None
    if given is None and reuse:
        raise ConfigError(
            f"the format of {place} is not said, and never guessed",
            remedy="say it: --format raw, --format qcow2, or <driver type=...> in the document",
        )
    kind = given or (disk.driver.type if disk.driver is not None else None) or "raw"
    return Mirror(
        type=destination.type,
        job="copy",
        file=source.location if destination.type == "file" else None,
        format_attribute=kind if destination.type == "file" else None,
        format=Format(type=kind),
        source=source,
        backing_store=destination.backing_store if reuse else BackingStore(),
    )


async def _claim(domain: DomainObject, run: Run, mirror: Mirror) -> None:
    """No other machine has what the copy goes to, and no disk of this one. Raises `ResourceBusy`, `HostError`."""
    use = await reach(disks.image_use, mirror.source)
    if use is None:
        raise ConfigError(f"{mirror.source.location if mirror.source else ''} does not exist")
    disks.check_unused([use], [*domain.manager.disk_uses(domain), (domain.name, run.uses)])
    run.uses.append(use)
