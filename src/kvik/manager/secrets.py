"""Secrets: what they are for, where they are kept, and who gets their values.

    <config>/secrets/UUID.xml     the document, mode 0600; fsynced
    <config>/secrets/UUID.base64  its value, mode 0600; fsynced; never of an ephemeral secret

An ephemeral secret lies in memory only and ends with the daemon. A private one's value goes to VMMs and to storage,
never to a client. A value is in no message, no log and no command line. File operations block and run in the store's
threads; the caller's loop is the only one that changes what is in memory.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID, uuid4

from kvik.conf.devices.disk import Disk
from kvik.conf.secret import Secret, format_secret, parse_secret
from kvik.errors import AlreadyExists, HostError, InvalidArgument, InvalidSecret, KvikError, NoSecret
from kvik.host import documents, files
from kvik.host.documents import DOCUMENT_LIMIT, SUFFIX, set_aside
from kvik.host.secret_file import memory_file
from kvik.hypervisor.secrets import needs
from kvik.manager.certificates import lend_client, remove_lent
from kvik.manager.store import Store
from kvik.paths import Paths

__all__ = ["DEFINED", "UNDEFINED", "VALUE_CHANGED", "VALUE_LIMIT", "Secrets", "open_secrets"]

logger = logging.getLogger(__name__)

VALUE_LIMIT = 65536  # bytes; the wire's limit
VALUE_SUFFIX = ".base64"
DEFINED, UNDEFINED, VALUE_CHANGED = 0, 1, -1  # the first two are virSecretEventLifecycleType

Callback = Callable[[Secret, int], None]


class Secrets:
    """`open` it once, in the loop that it is used from."""

    def __init__(self, paths: Paths, store: Store) -> None:
        self.directory = paths.secrets
        self.certificates, self.run = paths.certificates, paths.run
        self.warnings: list[str] = []  # what `open` had to set aside
        self._store = store
        self._secrets: dict[str, Secret] = {}
        self._values: dict[str, bytes] = {}
        self._changing = asyncio.Lock()
        self._callbacks: list[Callback] = []

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def _emit(self, secret: Secret, event: int) -> None:
        for callback in list(self._callbacks):
            callback(secret, event)

    # loading

    async def open(self) -> None:
        """`HostError` if the directory cannot be had; what cannot be read is set aside with a warning."""
        await self._store.run(self._load)

    def _load(self) -> None:
        files.ensure_directory(self.directory, durable=True)
        remove_lent(self.run)
        with contextlib.suppress(HostError):
            files.remove_temporaries(self.directory, older_than=0)
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            try:
                secret = parse_secret(files.read_file(path, limit=DOCUMENT_LIMIT))
                if secret.uuid is None or f"{secret.uuid}{SUFFIX}" != path.name:
                    raise InvalidArgument("its UUID is not the one in its name")
                self._check_usage(secret)
            except KvikError as error:
                self.warnings.append(set_aside(path, str(error)))
                continue
            secret.ephemeral = False  # it lies on disk
            self._secrets[secret.uuid] = secret
            place = path.with_suffix(VALUE_SUFFIX)
            try:
                data = files.try_read_file(place, limit=2 * VALUE_LIMIT)
                if data is not None:
                    self._values[secret.uuid] = base64.b64decode(data.strip(), validate=True)
            except (HostError, binascii.Error) as error:
                self.warnings.append(set_aside(place, str(error)))

    # looking up

    def list(self) -> list[Secret]:
        return [*self._secrets.values()]

    def lookup_uuid(self, uuid: bytes | str) -> Secret:
        try:
            text = str(UUID(uuid) if isinstance(uuid, str) else UUID(bytes=uuid))
        except ValueError:
            text = str(uuid)
        try:
            return self._secrets[text]
        except KeyError:
            raise NoSecret(f"no secret with matching uuid '{text}'", remedy="'kvik secret-list' shows all") from None

    def lookup_usage(self, kind: str, usage: str) -> Secret:
        """`kind` as in `conf.secret.USAGE_TYPES`."""
        for secret in self._secrets.values():
            if secret.usage_type == kind and secret.usage_id == usage:
                return secret
        raise NoSecret(f"no secret with matching usage '{usage}' of type {kind}", remedy="'kvik secret-list' shows all")

    def for_volume(self, path: str) -> str | None:
        """UUID of the secret that is for the volume at `path`, if there is one."""
        with contextlib.suppress(NoSecret):
            return self.lookup_usage("volume", path).uuid
        return None

    # changing

    async def define(self, xml: str) -> Secret:
        """New, or in place of one with the same UUID. Raises ConfigError, AlreadyExists, InvalidArgument, HostError."""
        secret = parse_secret(xml)
        async with self._changing:
            if secret.uuid is None:
                self._check_usage(secret)
                secret.uuid = str(uuid4())
            before = self._secrets.get(secret.uuid)
            if before is not None and (before.usage_type, before.usage_id) != (secret.usage_type, secret.usage_id):
                raise AlreadyExists(
                    f"a secret with UUID {secret.uuid} is already defined for use with {before.usage_id or 'nothing'}",
                    remedy="undefine it first, or leave out <uuid>",
                )
            self._check_usage(secret)
            if before is not None and before.private and not secret.private:
                raise InvalidArgument(
                    "cannot change private flag on existing secret", remedy="undefine it and define it anew"
                )
            value = self._values.get(secret.uuid)
            await self._store.run(self._write, secret, value)
            self._secrets[secret.uuid] = secret
        self._emit(secret, DEFINED)
        return secret

    def _check_usage(self, secret: Secret) -> None:
        for other in self._secrets.values() if secret.usage_id else ():
            if other.uuid != secret.uuid and (other.usage_type, other.usage_id) == (
                secret.usage_type,
                secret.usage_id,
            ):
                raise AlreadyExists(
                    f"a secret with UUID {other.uuid} already defined for use with {secret.usage_id}",
                    remedy="give the document its <uuid> to change it",
                )

    def _paths(self, secret: Secret) -> tuple[Path, Path]:
        return self.directory / f"{secret.uuid}{SUFFIX}", self.directory / f"{secret.uuid}{VALUE_SUFFIX}"

    def _write(self, secret: Secret, value: bytes | None) -> None:
        document, place = self._paths(secret)
        if secret.ephemeral:  # perhaps it was none before: the value goes first
            documents.remove(place)
            documents.remove(document)
            return
        documents.replace(document, format_secret(secret).encode())
        if value is not None:
            documents.replace(place, base64.b64encode(value))

    async def set_value(self, secret: Secret, value: bytes) -> None:
        """Durable when this returns, unless the secret is ephemeral. Raises HostError: then the old value stands."""
        if len(value) > VALUE_LIMIT:
            raise InvalidArgument(f"a secret's value has at most {VALUE_LIMIT} bytes, not {len(value)}")
        async with self._changing:
            secret = self.lookup_uuid(secret.uuid or "")  # it may have gone meanwhile
            if not secret.ephemeral:
                await self._store.run(documents.replace, self._paths(secret)[1], base64.b64encode(value))
            self._values[secret.uuid or ""] = value
        self._emit(secret, VALUE_CHANGED)

    async def undefine(self, secret: Secret) -> None:
        """The value goes first: a kill in between leaves a secret without one."""
        async with self._changing:
            uuid = self.lookup_uuid(secret.uuid or "").uuid or ""
            document, place = self._paths(secret)
            if not secret.ephemeral:
                await self._store.run(documents.remove, place)
                self._values.pop(uuid, None)
                await self._store.run(documents.remove, document)
            self._values.pop(uuid, None)
            del self._secrets[uuid]
        self._emit(secret, UNDEFINED)

    # values

    def shown_value(self, secret: Secret) -> bytes:
        """For a client. `InvalidSecret` for a private one, `NoSecret` if there is none."""
        if secret.private:
            raise InvalidSecret("secret is private")
        return self._value(secret)

    def _value(self, secret: Secret) -> bytes:
        try:
            return self._values[secret.uuid or ""]
        except KeyError:
            raise NoSecret(
                f"secret '{secret.uuid}' does not have a value",
                remedy=f"kvik secret-set-value {secret.uuid} --interactive",
            ) from None

    def value(self, kind: str, *, uuid: str | None = None, usage: str | None = None) -> bytes:
        """For a VMM or storage, private or not: the value of the secret that a document names by `uuid` or `usage`.

        `kind` is the usage it must have ("volume", "ceph", ...); a secret for nothing in particular serves all.
        Raises `NoSecret`, `InvalidSecret`.
        """
        if uuid is not None:
            secret = self.lookup_uuid(uuid)
            if secret.usage_type not in ("none", kind):
                raise InvalidSecret(f"secret '{uuid}' is of type '{secret.usage_type}', expected '{kind}'")
        else:
            secret = self.lookup_usage(kind, usage or "")
        return self._value(secret)


def open_secrets(secrets: Secrets, disks: Iterable[Disk], held: ExitStack) -> dict[str, int]:
    """The values that disks need, as descriptors by the names that a driver looks for.

    When `held` is closed they are, and the files are empty for whoever still holds them: a VMM has read its own then.
    Raises `NoSecret`, `InvalidSecret`, `ConfigUnsupported`, `HostError`.
    """
    opened = {}
    for disk in disks:
        for need in needs(disk):
            if need.certificates:
                opened[need.file] = lend_client(secrets.certificates, secrets.run, need.where, held)
                continue
            try:
                value = need.text.encode() or secrets.value(need.usage, uuid=need.secret.uuid, usage=need.secret.usage)
            except (NoSecret, InvalidSecret) as error:
                raise type(error)(f"{need.where}: {error.message}", remedy=error.remedy) from error
            fd = memory_file(value)
            held.callback(os.close, fd)
            held.callback(os.ftruncate, fd, 0)
            opened[need.file] = fd
    return opened
