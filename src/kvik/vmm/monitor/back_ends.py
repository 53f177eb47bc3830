"""Back ends of devices that other processes serve (vhost-user): one that has died is replaced by another."""

from __future__ import annotations

import os

from kvik.errors import KvikError
from kvik.vmm.monitor.errors import QmpError, device_not_found
from kvik.vmm.monitor.net import named_fd
from kvik.vmm.monitor.schema import ID, NOTHING, TEXT, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

KIND = "vhost-user-blk"


def _device(context: Context, arguments: Arguments) -> Any:
    for device in context.devices(KIND):
        if device.name == arguments["id"]:
            return device
    raise device_not_found(arguments["id"])


def _connect(context: Context, arguments: Arguments) -> None:
    device = _device(context, arguments)
    fd = named_fd(context, arguments["fd"])
    try:
        life = named_fd(context, arguments["lifefd"])
    except QmpError:
        os.close(fd)
        raise
    try:
        device.connect_anew(fd, life)
        device.served_by = arguments.get("process", "")
    except KvikError as error:
        raise QmpError(str(error)) from error


def _give_up(context: Context, arguments: Arguments) -> None:
    try:
        _device(context, arguments).give_up(arguments["reason"])
    except KvikError as error:
        raise QmpError(str(error)) from error


def _query(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    return [
        {
            "id": device.name,
            "connected": device.back_end is not None,
            "waiting": bool(device.waiting),
            "process": device.served_by,
        }
        for device in context.devices(KIND)
    ]


COMMANDS: Sequence[Command] = (
    Command("x-kvik-query-back-ends", _query, summary="who serves disks, and which wait to be served again"),
    Command(
        "x-kvik-back-end-connect",
        _connect,
        Struct({"id": ID, "fd": ID, "lifefd": ID, "*process": TEXT}),
        NOTHING,
        summary="a disk that waits has a new back end; both descriptors came by getfd",
    ),
    Command(
        "x-kvik-back-end-give-up",
        _give_up,
        Struct({"id": ID, "reason": TEXT}),
        NOTHING,
        summary="a disk that waits fails: no other back end comes",
    ),
)
