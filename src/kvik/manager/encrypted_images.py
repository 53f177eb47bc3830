"""New images that are encrypted with the secret that a disk's document names: for copies, and for what comes on top.

An image that goes on with an encrypted one has the same secret: nothing of such a disk ever lies in plain text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvik.conf import storage_volume as volume
from kvik.conf.devices.disk import Disk, Encryption
from kvik.conf.storage_pool import Size
from kvik.conf.tree import clone
from kvik.storage.encryption import check_encryption, create

if TYPE_CHECKING:
    from kvik.manager.manager import Manager

__all__ = ["Make", "encryption_of", "maker"]

# (descriptor of an empty file, format, size in bytes, backing file and its format: "" for none)
Make = Callable[[int, str, int, str, str], None]


def encryption_of(disk: Disk) -> Encryption | None:
    """That of its top image, a copy."""
    found = (disk.source.encryption if disk.source is not None else None) or disk.encryption
    return clone(found) if found is not None else None


def maker(manager: Manager, wanted: Encryption | None) -> Make | None:
    """Makes (blocking) images that are encrypted so; None for plain ones. What cannot be is said when it is called."""
    if wanted is None:
        return None

    def make(fd: int, kind: str, size: int, backing_file: str, backing_format: str) -> None:
        document = volume.StorageVolume(
            name=backing_file.rpartition("/")[2] or "image",
            capacity=Size(unit="bytes", value=size),
            target=volume.VolumeTarget(format=volume.VolumeFormat(type=kind), encryption=_as_volume(wanted)),
        )
        if backing_file:
            document.backing_store = volume.BackingStore(
                path=backing_file, format=volume.VolumeFormat(type=backing_format)
            )
        check_encryption(document)
        create(fd, document, manager.pools.secret)

    return make


def _as_volume(wanted: Encryption) -> volume.Encryption:
    cipher, ivgen = wanted.cipher, wanted.ivgen
    return volume.Encryption(
        format="luks" if wanted.format == "luks" else "default",
        engine=wanted.engine,
        secrets=[volume.EncryptionSecret(type="passphrase", uuid=one.uuid, usage=one.usage) for one in wanted.secrets],
        cipher=volume.EncryptionCipher(name=cipher.name, size=cipher.size, mode=cipher.mode, hash=cipher.hash)
        if cipher is not None and cipher.name is not None
        else None,
        ivgen=volume.EncryptionIvgen(name=ivgen.name, hash=ivgen.hash)
        if ivgen is not None and ivgen.name is not None
        else None,
    )
