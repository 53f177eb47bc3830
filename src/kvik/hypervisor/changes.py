"""What can never change in a device of a running machine, whichever VMM runs it."""

from __future__ import annotations

from kvik.conf.devices.disk import Disk
from kvik.conf.devices.interface import Interface
from kvik.errors import OperationUnsupported
from kvik.hypervisor.names import TAP_TYPES, alias_of

__all__ = ["check_disk", "check_drive", "check_interface", "keep_chain"]

_BRIDGED = {"network", "bridge"}  # a tap on a bridge either way
# What the guest was told, or the VMM, and nobody can tell it anew.
_FIXED = (
    ("model", "model"), ("driver", "<driver>"), ("mtu", "MTU"), ("target", "<target>"), ("backend", "<backend>"),
    ("boot", "boot order"), ("rom", "ROM"), ("tune", "<tune>"), ("teaming", "<teaming>"), ("script", "script"),
    ("coalesce", "<coalesce>"), ("address", "address"),
)  # fmt: skip
# What the host does for a tap; of user networking and the like the VMM would have to.
_HOSTED = (("source", "<source>"), ("bandwidth", "bandwidth"), ("vlan", "VLAN"), ("port", "isolation"))


# What the guest was told of a drive, and of how it is served; of the image, unless it is a medium that is changed.
_DRIVE = ("model", "rawio", "sgio", "geometry", "blockio", "serial", "wwn", "vendor", "product", "boot", "address")
_TARGET = ("bus", "removable", "rotation_rate", "dpofua")
_SERVED = (
    "error_policy", "rerror_policy", "ioeventfd", "event_idx", "iothread", "iothreads", "queues", "queue_size",
    "iommu", "ats", "packed", "page_per_vq",
)  # fmt: skip
_IMAGE = ("type", "cache", "io", "copy_on_read", "discard", "discard_no_unref", "detect_zeroes", "metadata_cache")


def check_disk(old: Disk, new: Disk) -> None:
    """For a disk that is no drive with a medium. Raises `OperationUnsupported`."""
    check_drive(old, new)
    before = old.source.location if old.source is not None else None
    after = new.source.location if new.source is not None else None
    if after is not None and after != before:
        raise OperationUnsupported(
            f"the image of disk {old.target.dev} cannot change while the machine runs, from {before} to {after}",
            remedy="detach the disk and attach the other one",
        )


def check_drive(old: Disk, new: Disk) -> None:
    """Raises `OperationUnsupported` for what is changed in a drive and cannot be, in libvirt's words. What the new
    document leaves out is not asked to change, and is put into it."""
    medium = old.device in ("cdrom", "floppy")
    parts: list[tuple[object | None, object | None, tuple[str, ...]]] = [
        (old, new, _DRIVE),
        (old.target, new.target, _TARGET),
        (old.driver, new.driver, _SERVED if medium else _SERVED + _IMAGE),
    ]
    changed = ["device"] if new.device != old.device else []
    for before, after, fields in parts:
        if before is None or after is None:
            continue
        for field in fields:
            wanted = getattr(after, field)
            if wanted is None:
                setattr(after, field, getattr(before, field))
            elif wanted != getattr(before, field):
                changed.append(field)
    if new.driver is None and not medium:
        new.driver = old.driver
    for field in ("readonly", "shareable", "transient"):
        if getattr(new, field) and not getattr(old, field) and not (medium and field == "readonly"):
            changed.append(field)
        setattr(new, field, getattr(old, field))
    if changed:
        raise OperationUnsupported(
            f"cannot modify field '{changed[0]}' (or its parts) of the disk {old.target.dev} while the machine runs",
            remedy="detach it and attach it anew, or change the definition (--config)",
        )


def keep_chain(old: Disk, new: Disk) -> None:
    """The images of `old`, a disk whose images do not change, in the document that takes its place."""
    new.source, new.backing_store, new.mirror = old.source, old.backing_store, old.mirror


def check_interface(old: Interface, new: Interface) -> None:
    """Raises `OperationUnsupported` that names the first thing that cannot change. What the new document leaves out
    is not asked to change (`complete_change`)."""
    changed = [words for field, words in _FIXED if getattr(new, field) != getattr(old, field)]
    if old.mac is not None and new.mac is not None and old.mac.address.lower() != new.mac.address.lower():
        changed.insert(0, "MAC address")
    if old.type != new.type and not {old.type, new.type} <= _BRIDGED:
        changed.insert(0, "type")
    if old.type not in TAP_TYPES:
        changed += [words for field, words in _HOSTED if getattr(new, field) != getattr(old, field)]
    if changed:
        raise OperationUnsupported(
            f"the {changed[0]} of interface {alias_of(old)} cannot change while the machine runs",
            remedy="detach it and attach it anew, or change the definition (--config)",
        )


def complete_change(old: Interface, new: Interface) -> None:
    """What `new` leaves out of the things that cannot change is as it was."""
    for field in ("alias", "mac", *(field for field, _ in _FIXED)):
        if getattr(new, field) is None:
            setattr(new, field, getattr(old, field))
    if old.type not in TAP_TYPES:
        new.source = new.source or old.source
    if new.target is not old.target and new.target is not None and not new.target.dev:
        new.target = old.target
