"""What can never change in a device of a running machine, whichever VMM runs it."""

from __future__ import annotations

from kvik.conf.devices.disk import Disk
from kvik.conf.devices.interface import Interface
from kvik.errors import OperationUnsupported
from kvik.hypervisor.names import TAP_TYPES, alias_of

__all__ = ["check_disk", "check_interface"]

_BRIDGED = {"network", "bridge"}  # a tap on a bridge either way
# What the guest was told, or the VMM, and nobody can tell it anew.
_FIXED = (
    ("model", "model"), ("driver", "<driver>"), ("mtu", "MTU"), ("target", "<target>"), ("backend", "<backend>"),
    ("boot", "boot order"), ("rom", "ROM"), ("tune", "<tune>"), ("teaming", "<teaming>"), ("script", "script"),
    ("coalesce", "<coalesce>"), ("address", "address"),
)  # fmt: skip
# What the host does for a tap; of user networking and the like the VMM would have to.
_HOSTED = (("source", "<source>"), ("bandwidth", "bandwidth"), ("vlan", "VLAN"), ("port", "isolation"))


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
