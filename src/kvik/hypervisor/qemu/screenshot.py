"""A picture of a machine's screen, through a descriptor: no file, no name, nothing left behind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvik.errors import HypervisorError, InvalidArgument, MonitorError, OperationUnsupported

if TYPE_CHECKING:
    from kvik.hypervisor.qemu.machine import QemuMachine

__all__ = ["screenshot"]

MAX_IMAGE = 256 * 1024 * 1024


async def screenshot(machine: QemuMachine, screen: int) -> tuple[str, bytes]:
    """MIME type and image: PNG where this QEMU can, else PPM."""
    videos = [video for video in machine.domain.devices.videos if video.model and video.model.type != "none"]
    if not videos:
        raise OperationUnsupported(f"machine {machine.name} has no video device")
    heads = [(video, head) for video in videos for head in range((video.model and video.model.heads) or 1)]
    if not 0 <= screen < len(heads):
        raise InvalidArgument(f"machine {machine.name} has {len(heads)} screens, numbered from 0")
    video, head = heads[screen]
    which: dict[str, object] = {}
    if len(heads) > 1 and video.alias is not None:
        which = {"device": video.alias.name, "head": head}
    if machine.capabilities.screendump_format:
        try:
            return "image/png", await _dump(machine, which | {"format": "png"})
        except MonitorError:
            pass  # built without libpng
    return "image/x-portable-pixmap", await _dump(machine, which)


async def _dump(machine: QemuMachine, arguments: dict[str, object]) -> bytes:
    image = os.memfd_create("kvik-screenshot", os.MFD_CLOEXEC)
    # QEMU takes from an fdset only a descriptor opened exactly as it means to open it: for writing.
    writer = os.open(f"/proc/self/fd/{image}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        added = await machine.execute("add-fd", fds=[writer])
        number = added.get("fdset-id") if isinstance(added, dict) else None
        if not isinstance(number, int):
            raise HypervisorError(f"{machine.name}: the reply to add-fd is malformed")
        try:
            await machine.execute("screendump", {"filename": f"/dev/fdset/{number}", **arguments}, deadline=20.0)
        finally:
            await machine.execute("remove-fd", {"fdset-id": number})
        size = os.fstat(image).st_size
        if not 0 < size <= MAX_IMAGE:
            raise HypervisorError(f"{machine.name}: QEMU drew a picture of {size} bytes")
        return os.pread(image, size, 0)
    finally:
        os.close(writer)
        os.close(image)
