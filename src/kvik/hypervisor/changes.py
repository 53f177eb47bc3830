"""What can never change in a device of a running machine, whichever VMM runs it."""

from __future__ import annotations

from kvik.conf.devices.disk import Disk
from kvik.conf.devices.interface import Interface
from kvik.errors import OperationUnsupported

__all__ = ["check_disk", "check_interface"]


def check_disk(old: Disk, new: Disk) -> None:
    """For a disk that is no drive with a medium. Raises `OperationUnsupported`."""
    before = old.source.location if old.source is not None else None
    after = new.source.location if new.source is not None else None
    if after is not None and after != before:
        raise OperationUnsupported(
            f"the image of disk {old.target.dev} cannot change while the machine runs, from {before} to {after}",
            remedy="detach the disk and attach the other one",
        )


def check_interface(old: Interface, new: Interface) -> None:
    """Raises `OperationUnsupported`."""
    if (old.type, old.mac and old.mac.address, old.model and old.model.type) != (
        new.type,
        new.mac and new.mac.address,
        new.model and new.model.type,
    ):
        raise OperationUnsupported("type, MAC address and model of an interface cannot change while the machine runs")
    if new.source is not None and old.source is not None and new.source.bridge != old.source.bridge:
        raise OperationUnsupported(
            "an interface cannot move to another bridge while the machine runs", remedy="detach and attach it"
        )
