"""LUKS headers, recognised and told; what they guard cannot be read here.

Reference: LUKS On-Disk Format Specification 1.2.3, "PHDR"; the names are QEMU's (qapi's QCryptoBlockInfoLUKS).
"""

from __future__ import annotations

import os
import struct

from kvik.errors import ImageError
from kvik.image.base import KEY_WANTED, LOCKED, Image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from kvik.image.base import Run
    from kvik.image.qcow2.header import Header

__all__ = ["LuksImage", "is_encrypted", "luks_facts"]

MAGIC = b"LUKS\xba\xbe"
_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")  # 208 bytes
_SLOT = struct.Struct(">II32sII")  # 48 bytes
SLOTS = 8
ACTIVE = 0x00AC71F3
SECTOR = 512


def luks_facts(data: bytes, path: str, offset: int = 0) -> dict[str, Any]:
    """What a header says, in the order in which QEMU tells it; `data` begins at `offset` of the file.

    Raises `ImageError` for what is no header of version 1.
    """
    if len(data) < _HEADER.size + SLOTS * _SLOT.size or data[:6] != MAGIC:
        raise ImageError("the LUKS header is cut off or none", file=path, offset=offset)
    fields = _HEADER.unpack_from(data)
    version, payload, key_bytes, iterations = fields[1], fields[5], fields[6], fields[9]
    if version != 1:
        raise ImageError(f"LUKS version {version} is not supported", file=path, offset=offset + 6)
    cipher, mode, digest, uuid = (_text(fields[i]) for i in (2, 3, 4, 10))
    mode, _, generator = mode.partition("-")
    generator, _, generator_hash = generator.partition(":")
    bits = key_bytes * 8 // (2 if mode == "xts" else 1)  # XTS has two keys
    facts: dict[str, Any] = {
        "ivgen-alg": generator,
        "hash-alg": digest,
        "cipher-alg": f"{cipher}-{bits}",
        "uuid": uuid,
    }
    if generator_hash:
        facts["ivgen-hash-alg"] = generator_hash
    slots = []
    for number in range(SLOTS):
        active, iters, _, key_offset, stripes = _SLOT.unpack_from(data, _HEADER.size + number * _SLOT.size)
        slot: dict[str, Any] = {"active": active == ACTIVE}
        if active == ACTIVE:
            slot["iters"] = iters
        slot["key-offset"] = key_offset * SECTOR
        if active == ACTIVE:
            slot["stripes"] = stripes
        slots.append(slot)
    return facts | {
        "cipher-mode": mode,
        "slots": slots,
        "payload-offset": payload * SECTOR,
        "master-key-iters": iterations,
    }


def is_encrypted(image: Image) -> bool:
    """Whether a secret is needed for what is on it, not counting what is below it."""
    header: Header | None = getattr(image, "header", None)
    return image.format == "luks" or (header is not None and header.crypt_method != 0)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii", "replace")


class LuksImage(Image):
    """A file that is encrypted as a whole: its size and its header can be told."""

    format = "luks"

    def __init__(self, fd: int, path: str = "") -> None:
        super().__init__(fd, path, writable=False)
        self.facts = luks_facts(os.pread(fd, 4096, 0), path)
        self.size = max(0, os.lseek(fd, 0, os.SEEK_END) - self.facts["payload-offset"])

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        raise self.fault(LOCKED, 0, KEY_WANTED)
