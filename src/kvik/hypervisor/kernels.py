"""The kernel of a document, unpacked once and kept: a VMM enters it by PVH without unpacking it at each start."""

from __future__ import annotations

from pathlib import Path

from kvik.conf.domain import Domain
from kvik.errors import KvikError
from kvik.host.threads import in_thread

__all__ = ["unpacked_kernel"]


async def unpacked_kernel(domain: Domain, cache: Path) -> str | None:
    """The unpacked kernel with a PVH entry, if the document boots a kernel without firmware and it has one."""
    described = domain.os
    if not described.kernel or described.firmware is not None or described.loader is not None:
        return None
    from kvik.image.kernel import uncompressed_kernel

    try:
        found = await in_thread(uncompressed_kernel, described.kernel, cache / "kernels")
    except (KvikError, OSError):
        return None  # the VMM says better what is wrong with the kernel itself
    return str(found) if found is not None else None
