"""Which secrets a disk needs, by the documents; and whether its images are encrypted as those say.

A value reaches a VMM as a descriptor of a file in memory, under `secret:ALIAS:N:luks` or `secret:ALIAS:N:auth`; the
certificates of a client over TLS as one of their directory, under `secret:ALIAS:N:tls`.
Documents: https://libvirt.org/formatstorageencryption.html; LUKS: the LUKS1 on-disk format, section 1.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from kvik.conf.devices.disk import Auth, Disk, DiskSource, Encryption
from kvik.conf.devices.disk import Secret as SecretReference
from kvik.errors import ConfigError, ConfigUnsupported
from kvik.hypervisor.layers import Layer, layers
from kvik.hypervisor.names import alias_of

__all__ = [
    "SECRET_PREFIX",
    "Need",
    "auth_of",
    "auth_secret",
    "check_image",
    "cookie_secret",
    "cookies_of",
    "encryption_of",
    "luks_secret",
    "needs",
    "own_secrets",
    "tls_credentials",
]

SECRET_PREFIX = "secret:"
_LUKS = b"LUKS\xba\xbe"
_QCOW2 = struct.Struct(">IIQIIQI")  # up to crypt_method
_CRYPT_LUKS = 2
# The usage that a secret must have: a network disk's by its protocol (libvirt's table), a passphrase's "volume".
_AUTH_USAGE = {"rbd": "ceph"}


class Need(NamedTuple):
    """`id`: of the VMM's object, the same for as long as the machine runs; `file`: the name of the value's descriptor,
    which is asked for before images are numbered; `usage`: what the secret must be for; `where`: for messages."""

    id: str
    file: str
    usage: str
    secret: SecretReference
    where: str
    text: str = ""  # the value itself, where the document has it: cookies
    certificates: bool = False  # no value, but the directory with those of a client over TLS


def luks_secret(disk: Disk, layer: Layer) -> str:
    return f"{alias_of(disk)}-{layer.key}-luks"


def auth_secret(disk: Disk, layer: Layer) -> str:
    return f"{alias_of(disk)}-{layer.key}-auth"


def cookie_secret(disk: Disk, layer: Layer) -> str:
    return f"{alias_of(disk)}-{layer.key}-cookie"


def tls_credentials(disk: Disk, layer: Layer) -> str:
    return f"{alias_of(disk)}-{layer.key}-tls"


def cookies_of(source: DiskSource) -> str:
    """As in an HTTP header, or "" (RFC 6265, section 4.2.1)."""
    listed = source.cookies.cookies if source.cookies is not None else []
    return "; ".join(f"{cookie.name}={cookie.value or ''}" for cookie in listed)


def own_secrets(disk: Disk) -> None:
    """What is said of the disk is said of its top image from here on: another image may come above that one."""
    if disk.source is not None:
        disk.source.encryption, disk.encryption = disk.source.encryption or disk.encryption, None
        disk.source.auth, disk.auth = disk.source.auth or disk.auth, None


def encryption_of(disk: Disk, layer: Layer) -> Encryption | None:
    """A layer's own, or for the top one the disk's (an older place for the same)."""
    return layer.source.encryption or (disk.encryption if layer.number == 0 else None)


def auth_of(disk: Disk, source: DiskSource, number: int) -> Auth | None:
    return source.auth or (disk.auth if number == 0 else None)


def needs(disk: Disk) -> Iterator[Need]:
    """All of one disk, its chain's included. Raises `ConfigUnsupported` for encryption that QEMU does not do."""
    for layer in layers(disk):
        where = f"disk {disk.target.dev}" + (f", layer {layer.number} of its chain" if layer.number else "")
        encryption = encryption_of(disk, layer)
        if encryption is not None:
            file = f"{SECRET_PREFIX}{alias_of(disk)}:{layer.number}:luks"
            yield Need(luks_secret(disk, layer), file, "volume", _passphrase(encryption, layer, where), where)
        auth = auth_of(disk, layer.source, layer.number)
        if auth is not None and layer.type == "network":
            if auth.secret is None or not auth.username:
                raise ConfigUnsupported(f"{where}: <auth> needs a username and a <secret>")
            protocol = layer.source.protocol or ""
            usage = _AUTH_USAGE.get(protocol, "iscsi")
            file = f"{SECRET_PREFIX}{alias_of(disk)}:{layer.number}:auth"
            yield Need(auth_secret(disk, layer), file, usage, auth.secret, where)
        cookies = cookies_of(layer.source)
        if cookies and layer.type == "network":
            file = f"{SECRET_PREFIX}{alias_of(disk)}:{layer.number}:cookie"
            yield Need(cookie_secret(disk, layer), file, "", SecretReference(), where, text=cookies)
        if layer.source.tls and layer.type == "network":
            file = f"{SECRET_PREFIX}{alias_of(disk)}:{layer.number}:tls"
            yield Need(tls_credentials(disk, layer), file, "", SecretReference(), where, certificates=True)


def _passphrase(encryption: Encryption, layer: Layer, where: str) -> SecretReference:
    if encryption.format != "luks":
        raise ConfigUnsupported(f"{where}: encryption {encryption.format!r} is not supported", remedy="use 'luks'")
    if encryption.engine not in (None, "qemu"):
        raise ConfigUnsupported(f"{where}: encryption by {encryption.engine} is not supported", remedy="leave it out")
    if layer.format not in ("raw", "qcow2"):
        raise ConfigUnsupported(f"{where}: an image of format {layer.format!r} cannot be encrypted with LUKS")
    if len(encryption.secrets) != 1 or encryption.secrets[0].type not in (None, "passphrase"):
        raise ConfigUnsupported(f"{where}: LUKS needs one <secret type='passphrase'>")
    return encryption.secrets[0]


def check_image(fd: int, layer: Layer, encryption: Encryption | None, where: str) -> None:
    """Before anything starts: an image that its document calls encrypted is, and a qcow2 one that is, is called so.

    A raw image with a LUKS header that nobody calls encrypted is the guest's own business. Raises `ConfigError`.
    """
    name = layer.source.location or where
    if encryption is not None and layer.format == "raw":
        if os.pread(fd, len(_LUKS), 0) != _LUKS:
            raise ConfigError(
                f"{where}: {name} has no LUKS header, but its document says that it is encrypted",
                remedy="leave <encryption> out, or make it anew: qemu-img create -f luks",
            )
    elif layer.format == "qcow2":
        head = os.pread(fd, _QCOW2.size, 0)
        method = _QCOW2.unpack(head)[6] if len(head) == _QCOW2.size else 0
        if encryption is not None and method != _CRYPT_LUKS:
            raise ConfigError(
                f"{where}: {name} is not encrypted with LUKS, but its document says so", remedy="leave <encryption> out"
            )
        if encryption is None and method:
            raise ConfigError(
                f"{where}: {name} is encrypted, and its document names no secret for it",
                remedy="say <encryption format='luks'><secret type='passphrase' .../></encryption> in its <source>",
            )
