"""Images that are encrypted with the secret that a disk's document names: new ones, for copies and for what comes on
top; and merges of those that are there, while the machine is off.

An image that goes on with an encrypted one has the same secret: nothing of such a disk ever lies in plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from os.path import normpath
from typing import TYPE_CHECKING

from kvik.conf import storage_volume as volume
from kvik.conf.devices.disk import Disk, Encryption
from kvik.conf.storage_pool import AuthSecret, Size
from kvik.conf.tree import clone
from kvik.hypervisor.layers import layers
from kvik.storage import encrypted_merge, overlays
from kvik.storage.encryption import check_encryption, create

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager
    from kvik.manager.snapshots.plan import Layer

__all__ = ["Make", "can_merge", "encryption_of", "maker", "merge_back"]

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


def _known(domain: DomainObject) -> dict[str, AuthSecret]:
    """Which secret opens which image, by all that says so: the definition and the documents of the snapshots."""
    documents = [domain.config.parse()]
    for snapshot in domain.snapshots.snapshots.values():
        documents += [one for one in (snapshot.domain, snapshot.inactive) if one is not None]
    found: dict[str, AuthSecret] = {}
    for disk in (disk for document in documents for disk in document.devices.disks):
        for layer in layers(disk):
            encryption = layer.source.encryption or (disk.encryption if not layer.number else None)
            if encryption is not None and encryption.secrets and layer.source.location:
                named = encryption.secrets[0]
                found[normpath(layer.source.location)] = AuthSecret(uuid=named.uuid, usage=named.usage)
    return found


def can_merge(domain: DomainObject, top: str, images: Mapping[str, Layer], locked: Collection[str]) -> bool:
    """Whether an encrypted image can be merged into the one below it, which is encrypted, too."""
    known, path = _known(domain), images[top].backing
    if top not in known or path is None or path not in locked:
        return False
    while path is not None:
        if path in locked and path not in known:
            return False
        path = images[path].backing if path in images else None
    return True


def merge_back(domain: DomainObject, top: str) -> Callable[[], None]:
    """What does it (blocking). Raises as `encrypted_merge.merge_back`."""
    known, secret = _known(domain), domain.manager.pools.secret

    def merge() -> None:
        chain: list[encrypted_merge.Locked] = []
        facts = overlays.look(top, "qcow2")
        while True:
            format = "raw" if facts.format == "luks" else facts.format
            key = known.get(facts.path) if facts.locked else None
            chain.append(encrypted_merge.Locked(facts.path, format, facts.size, facts.allocated, key))
            if facts.backing is None:
                break
            facts = overlays.look(normpath(facts.backing), facts.backing_format or "raw")
        encrypted_merge.merge_back(chain, secret)

    return merge
