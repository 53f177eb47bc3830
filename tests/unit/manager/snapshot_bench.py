"""A machine with a real image and its snapshots, for the tests of both."""

from __future__ import annotations

from pathlib import Path

from manager_bench import Bench, document

from kvik.conf.enums import DomainSnapshotCreateFlags as Create
from kvik.image.create import create as create_image
from kvik.image.opening import Opener
from kvik.manager.domain import DomainObject
from kvik.manager.snapshots import create
from kvik.storage import overlays

SIZE = 1 << 20


def disk_xml(path: Path, target: str = "vda", format: str = "qcow2", extra: str = "") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/>{extra}</disk>"
    )


def top(domain: DomainObject, target: str = "vda") -> tuple[str, str]:
    """The image that a disk of the definition is in, and its format."""
    for disk in domain.definition.devices.disks:
        if disk.target.dev == target:
            assert disk.source is not None and disk.source.file and disk.driver is not None
            return disk.source.file, disk.driver.type or "raw"
    raise AssertionError(target)


def write(domain: DomainObject, at: int, data: bytes, target: str = "vda") -> None:
    """What a guest would write, between two boots."""
    path, format = top(domain, target)
    with Opener().open(path, format, writable=True) as image:
        image.write(at, data)


def shows(domain: DomainObject, target: str = "vda") -> str:
    return overlays.digest(*top(domain, target))


async def machine(bench: Bench, tmp_path: Path, format: str = "qcow2") -> DomainObject:
    path = tmp_path / f"disk.{format}"
    create_image(str(path), format, SIZE)
    return await bench.manager.define(document(devices=disk_xml(path, format=format)))


async def take(domain: DomainObject, name: str, flags: int = 0) -> None:
    assert await create.create(domain, f"<domainsnapshot><name>{name}</name></domainsnapshot>", flags) == name


def images(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir() if path.is_file()}


async def started(bench: Bench, tmp_path: Path) -> DomainObject:
    domain = await machine(bench, tmp_path)
    await domain.start()
    return domain


DISKS = Create.DISK_ONLY
