"""A new image on top of a disk that is written to here: kvik-blk's one disk, or one of kvik-vmm's own (`device`).

What it does: `vmm/blk/overlay.py`, which only a machine with a disk of its own imports.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from kvik.vmm.monitor import block
from kvik.vmm.monitor.errors import QmpError, refused
from kvik.vmm.monitor.schema import ID, NOTHING, TEXT, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.blk.overlay import Overlays
    from kvik.vmm.virtio.blk import Blk

__all__ = ["COMMANDS", "disk_of", "overlays_of"]


def disk_of(context: Context, arguments: Arguments) -> Blk:
    """The disk that is meant. Raises `QmpError`."""
    if "device" not in arguments:
        if not hasattr(context.machine, "overlays"):  # no kvik-blk, which has one disk
            raise QmpError("Parameter 'device' is missing")
        alone: Blk = next(context.devices())
        return alone
    found = block.drive(context, {"device": arguments["device"]})
    if found.kind != "virtio-blk":
        raise refused(f"cannot change the images of disk {found.name}", "its storage is another process's")
    device: Blk = found
    return device


def _overlays(context: Context, arguments: Arguments) -> Overlays | None:
    """None as long as that disk had no new image."""
    return disk_of(context, arguments).overlays


def overlays_of(context: Context, arguments: Arguments) -> Overlays:
    """Of that disk, whether it had a new image before or not. Raises `QmpError`."""
    device = disk_of(context, arguments)
    if device.overlays is None:
        try:
            from kvik.vmm.blk.overlay import Overlays
        except ImportError as error:  # confined
            raise refused(
                f"cannot put an image on top of disk {device.name}",
                "the machine was started without a disk of this kind: start it again with this one",
            ) from error
        device.overlays = Overlays(device, locking=device.image.locking, log=context.machine.log)
    return device.overlays


def _overlay_add(context: Context, arguments: Arguments) -> None:
    taken: dict[str, int] = {}
    named = context.server.named_fds
    try:
        for role in ("image", "below", "data"):
            if role in arguments:
                if arguments[role] not in named:
                    raise QmpError(f"File descriptor named '{arguments[role]}' not found")
                taken[role] = named.pop(arguments[role])
        overlays = overlays_of(context, arguments)
    except BaseException:
        for fd in taken.values():
            os.close(fd)
        raise
    overlays.add(
        taken["image"],
        taken["below"],
        taken.get("data", -1),
        node=arguments["node-name"],
        group=arguments["group"],
        name=arguments["filename"],
    )


def _overlay_put(context: Context, arguments: Arguments) -> None:
    overlays_of(context, arguments).put()


def _overlay_drop(context: Context, arguments: Arguments) -> None:
    overlays = _overlays(context, arguments)
    if overlays is not None:
        overlays.drop()


def _overlay_keep(context: Context, arguments: Arguments) -> None:
    overlays = _overlays(context, arguments)
    if overlays is not None:
        overlays.keep()


def _query_overlay(context: Context, arguments: Arguments) -> dict[str, str]:
    overlays = _overlays(context, arguments)
    return overlays.report() if overlays is not None else {"state": "none", "top": ""}


_DEVICE = {"*device": ID}
COMMANDS: Sequence[Command] = (
    Command(
        "x-kvik-overlay-add",
        _overlay_add,
        Struct(_DEVICE | {"image": ID, "below": ID, "*data": ID, "node-name": ID, "group": ID, "filename": TEXT}),
        NOTHING,
        summary="make a new image, sent by getfd, ready to be put on top",
    ),
    Command("x-kvik-overlay-put", _overlay_put, Struct(_DEVICE), NOTHING, summary="put it on top"),
    Command(
        "x-kvik-overlay-drop", _overlay_drop, Struct(_DEVICE), NOTHING, summary="let go of it, if nothing was written"
    ),
    Command(
        "x-kvik-overlay-keep", _overlay_keep, Struct(_DEVICE), NOTHING, summary="it stays; the one below is only read"
    ),
    Command("x-kvik-query-overlay", _query_overlay, Struct(_DEVICE), summary="what is on top, and what is under way"),
)
