"""Encrypted volumes: LUKS as a whole, or LUKS inside qcow2, made and filled by a confined qemu-img.

    <target><encryption format='luks'><secret type='passphrase' uuid='...'/></encryption></target>

Nothing here encrypts or decrypts. qemu-img gets the volume, what it copies from and the passphrase as open files, and
can open nothing else (host/jail.py); the passphrase lies in memory, in a file without a name, and on no command line.
Which documents are possible is as in libvirt: https://libvirt.org/formatstorageencryption.html
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from kvik.conf.storage_pool import AuthSecret
from kvik.conf.storage_volume import Encryption, StorageVolume
from kvik.errors import ConfigError, ConfigUnsupported, HostError, ImageError, OperationUnsupported
from kvik.host.jail import run_qemu_img
from kvik.host.secret_file import lent
from kvik.host.tools import Completed
from kvik.image.base import Image
from kvik.image.luks import luks_facts
from kvik.image.qcow2.reader import Qcow2Reader
from kvik.storage.backend import SecretReader

__all__ = [
    "check_encryption",
    "create",
    "encryption_of",
    "fill",
    "image_node",
    "payload_offset",
    "resize",
    "secret_object",
]

PATH = "/volume/target/encryption"
SLOWEST = 16 << 20  # bytes a second that qemu-img encrypts at the least
KEY, SOURCE_KEY = "key", "source-key"
# How long opening such a volume takes anybody who has the passphrase, or guesses it: QEMU's own 2 s where None.
iteration_ms: int | None = None


def encryption_of(document: StorageVolume) -> Encryption | None:
    return document.target.encryption if document.target is not None else None


def check_encryption(document: StorageVolume) -> None:
    """ConfigError, ConfigUnsupported for what cannot be made. Plain volumes pass."""
    encryption = encryption_of(document)
    if encryption is None:
        return
    if document.format not in ("raw", "qcow2"):
        raise ConfigUnsupported(f"volume encryption unsupported with format {document.format}", path=PATH)
    if encryption.format != "luks":
        raise ConfigUnsupported(
            f"unsupported volume encryption format {encryption.format}", path=f"{PATH}/@format", remedy="luks"
        )
    if encryption.engine not in (None, "qemu"):
        raise ConfigUnsupported(f"encryption by {encryption.engine} is not supported", path=f"{PATH}/@engine")
    if len(encryption.secrets) != 1:
        words = "too many secrets" if encryption.secrets else "no secret provided"
        raise ConfigError(
            f"{words} for luks encryption", path=f"{PATH}/secret", remedy="one <secret type='passphrase' uuid='...'/>"
        )
    secret = encryption.secrets[0]
    if (secret.uuid is None) == (secret.usage is None):
        raise ConfigError("a secret is named by its uuid or by its usage", path=f"{PATH}/secret")
    cipher = encryption.cipher
    if cipher is not None and (cipher.size is None or cipher.size not in (128, 192, 256)):
        raise ConfigError("a cipher's size is 128, 192 or 256 bits", path=f"{PATH}/cipher/@size")
    names = [cipher.name, cipher.mode, cipher.hash] if cipher is not None else []
    names += [encryption.ivgen.name, encryption.ivgen.hash] if encryption.ivgen is not None else []
    for word in names:
        if word is not None and not (word.isascii() and word.replace("-", "").isalnum()):
            raise ConfigError(f"{word!r} is no name of a cipher, mode or hash", path=PATH)


def _passphrase(encryption: Encryption, secret: SecretReader) -> AbstractContextManager[int]:
    """A descriptor of a file in memory with the value. Raises NoSecret, InvalidSecret."""
    named = encryption.secrets[0]
    return lent(secret("volume", AuthSecret(uuid=named.uuid, usage=named.usage)))


def create(fd: int, document: StorageVolume, secret: SecretReader, *, metadata: bool = False) -> None:
    """An empty volume in the open, empty file (or on the device). ImageError, HostError, NoSecret."""
    encryption = encryption_of(document)
    assert encryption is not None
    options = ["preallocation=metadata"] if metadata else []
    below: list[str] = []
    if document.format == "qcow2":
        options += ["encrypt.format=luks", *(f"encrypt.{option}" for option in _luks_options(encryption))]
        options += _qcow2_options(document)
        if document.backing_store is not None:  # named, not opened
            store = document.backing_store
            below = ["-u", "-b", store.path, "-F", store.format.type if store.format is not None else "raw"]
    else:
        options += _luks_options(encryption)
    kind = "qcow2" if document.format == "qcow2" else "luks"
    with _passphrase(encryption, secret) as key:
        words = ["create", "-q", "-f", kind, *secret_object(KEY, key), *below, "-o", ",".join(options)]
        _qemu_img([*words, f"/proc/self/fd/{fd}", str(document.size)], document, writable=[fd], keys=[key])
    if kind == "luks" and document.allocated:
        offset = payload_offset(fd)
        if os.fstat(fd).st_size > offset:  # of a file; a device has its room
            os.posix_fallocate(fd, 0, offset + min(document.allocated, document.size))
    os.fsync(fd)


def fill(
    fd: int, document: StorageVolume, secret: SecretReader, source: Image, locked: Encryption | None = None
) -> None:
    """Everything that `source` and what lies below it hold, into a volume that `create` made of `fd`. `locked`: what
    the top image of the source is encrypted with."""
    encryption = encryption_of(document)
    assert encryption is not None
    chain = [*_chain(source)]
    with ExitStack() as stack:
        keys = [stack.enter_context(_passphrase(encryption, secret))]
        objects = secret_object(KEY, keys[0])
        if locked is not None and locked.secrets:
            keys.append(stack.enter_context(_passphrase(locked, secret)))
            objects += secret_object(SOURCE_KEY, keys[1])
        target = ",".join(_options(image_node(document.format, fd, KEY)))
        given = "json:" + json.dumps(_source(chain, SOURCE_KEY if len(keys) > 1 else ""))
        words = ["convert", "-q", "-n", *objects, "--target-image-opts", given, target]
        _qemu_img(words, document, readable=[image.fd for image in chain], writable=[fd], keys=keys)
    os.fsync(fd)


def resize(fd: int, volume: StorageVolume, secret: SecretReader, capacity: int, *, allocate: bool = False) -> None:
    """A qcow2 volume with LUKS inside, to `capacity` bytes; new ones read as zero. Needs its secret."""
    encryption = encryption_of(volume)
    if encryption is None or not encryption.secrets:
        raise ConfigUnsupported(
            f"encrypted volume '{volume.name}' cannot be resized without its secret",
            remedy=f"define one for it: <usage type='volume'><volume>{volume.path}</volume></usage>",
        )
    if volume.backing_store is not None:
        raise ConfigUnsupported(f"encrypted volume '{volume.name}' is based on another, and cannot be resized")
    with _passphrase(encryption, secret) as key:
        words = [
            "resize",
            "-q",
            *(["--preallocation=falloc"] if allocate else []),
            "--shrink",
            *secret_object(KEY, key),
        ]
        given = ",".join(_options(image_node("qcow2", fd, KEY)))
        _qemu_img(
            [*words, "--image-opts", given, str(capacity)], volume, "resized", size=capacity, writable=[fd], keys=[key]
        )
    os.fsync(fd)


def _chain(image: Image) -> Iterator[Image]:
    """The images from the top down, each of which can be handed over. ConfigUnsupported."""
    here: Image | None = image
    while here is not None:
        if here.data_fd != here.fd:
            raise ConfigUnsupported(f"{here.path} has its data in another file, and cannot be copied encrypted")
        if isinstance(here, Qcow2Reader) and here.header.backing_file is not None and here.backing is None:
            raise ImageError("what it is based on is not open", file=here.path)
        yield here
        here = here.backing


def _source(chain: list[Image], key: str) -> dict[str, Any]:
    """All of the chain by descriptors: what the headers name is not asked."""
    above: dict[str, Any] = {}
    for image in reversed(chain):
        its_key = key if image is chain[0] else ""
        if isinstance(image, Qcow2Reader) and image.header.crypt_method and not its_key:
            raise ConfigUnsupported(f"{image.path} is encrypted, and no secret opens it here")
        node = image_node(image.format, image.fd, its_key)
        if image.format == "qcow2":
            node["backing"] = above or None
        above = node
    return above


def image_node(format_: str, fd: int, key: str) -> dict[str, Any]:
    """How QEMU is told of an image; `key` names the object with its passphrase. Who works on a volume holds its lock
    already."""
    kind = "host_device" if stat.S_ISBLK(os.fstat(fd).st_mode) else "file"
    file = {"driver": kind, "filename": f"/proc/self/fd/{fd}", "locking": "off"}
    node: dict[str, Any] = {"driver": format_, "file": file}
    if key and format_ == "raw":
        node |= {"driver": "luks", "key-secret": key}
    elif key:
        node["encrypt"] = {"format": "luks", "key-secret": key}
    return node


def _options(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The same in qemu-img's other way of writing."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={value}"


def secret_object(name: str, fd: int) -> list[str]:
    return ["--object", f"secret,id={name},file=/proc/self/fd/{fd}"]


def _luks_options(encryption: Encryption) -> list[str]:
    """QEMU's names (qapi/crypto.json, QCryptoBlockCreateOptionsLUKS) for those of the document."""
    options, cipher, ivgen = [f"key-secret={KEY}"], encryption.cipher, encryption.ivgen
    if cipher is not None:
        options.append(f"cipher-alg={cipher.name}-{cipher.size}")
        options += [f"cipher-mode={cipher.mode}"] if cipher.mode else []
        options += [f"hash-alg={cipher.hash}"] if cipher.hash else []
    if ivgen is not None:
        options.append(f"ivgen-alg={ivgen.name}")
        options += [f"ivgen-hash-alg={ivgen.hash}"] if ivgen.hash else []
    if iteration_ms is not None:
        options.append(f"iter-time={iteration_ms}")
    return options


def _qcow2_options(document: StorageVolume) -> Iterator[str]:
    target = document.target
    assert target is not None
    if target.compat is not None:
        yield f"compat={target.compat}"
    if target.cluster_size is not None:
        yield f"cluster_size={target.cluster_size.value}"
    if target.features is not None:
        yield f"lazy_refcounts={'on' if target.features.lazy_refcounts else 'off'}"
        yield f"extended_l2={'on' if target.features.extended_l2 else 'off'}"


def _qemu_img(
    words: list[str],
    document: StorageVolume,
    what: str = "encrypted",
    *,
    size: int = 0,
    readable: list[int] | None = None,
    writable: list[int],
    keys: list[int],
) -> Completed:
    size = size or document.size
    done = run_qemu_img(
        words,
        readable=readable or [],
        writable=writable,
        private=keys,
        seconds=60 + size // SLOWEST,
        size=size + size // 64 + (64 << 20),  # with tables of either format
    )
    if done.code:
        said = done.message
        for fd in [*(readable or []), *writable]:
            said = said.replace(f"/proc/self/fd/{fd}", document.name)
        said = " ".join(line for line in said.replace("qemu-img: ", "").splitlines() if "deleting file" not in line)
        kind = OperationUnsupported if "Landlock" in said else HostError
        raise kind(f"volume '{document.name}' cannot be {what}: {said or f'qemu-img ended with {done.code}'}")
    return done


def payload_offset(fd: int) -> int:
    """Bytes of a LUKS volume before what a machine sees of it; 0 where there is no header that can be read."""
    try:
        return int(luks_facts(os.pread(fd, 4096, 0), "")["payload-offset"])
    except ImageError:
        return 0
