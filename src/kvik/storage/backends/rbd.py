"""Pools of type rbd: images of a Ceph pool, by Ceph's own tools, which answer in JSON.

As in libvirt the host's ceph.conf is not read: what leads to the cluster is in the pool's document, its config_opts
included. The key of the secret is a file in memory to the tools. Volumes are of type network: a machine's VMM opens
them itself, and so does what reads or writes them here (`served.py`).
"""

from __future__ import annotations

import errno
import re
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kvik.conf.storage_pool import bytes_of
from kvik.conf.storage_volume import StorageVolume, VolumeFormat, VolumeTarget
from kvik.errors import (
    ConfigUnsupported,
    HostError,
    InvalidArgument,
    KvikError,
    NoStorageVolume,
    OperationInvalid,
    OperationTimeout,
    ResourceBusy,
    StorageVolumeExists,
)
from kvik.host.secret_file import lent
from kvik.host.tools import Completed
from kvik.storage.backend import VOLUMES_MAX, Contents
from kvik.storage.directory import leave_out
from kvik.storage.served import Node, ServedBackend
from kvik.storage.tool import call, missing, number, read_json

__all__ = ["Backend"]

DEADLINE = 90.0  # seconds: more than the tools' own, which say what did not answer
SLOWEST = 64 << 20  # bytes a second of an image that goes, at the least
# How long Ceph's client tries, in seconds: libvirt's figures. <rbd:config_opts> may name others.
PATIENCE = {"client_mount_timeout": "30", "rados_mon_op_timeout": "30", "rados_osd_op_timeout": "30"}
_LOGGED = re.compile(r"\d{4}-\d\d-\d\dT\S+ [0-9a-f]+ ")  # a line of the client's log, not of the tool
_NUMBERED = re.compile(r"\[errno (\d+)\]|: \((\d+)\) ")  # where ceph and rbd write an error's number


class Backend(ServedBackend):
    type = "rbd"
    takes_room = True
    formats = ("raw",)

    @property
    def pool(self) -> str:
        return self.document.origin.name or ""

    def check(self) -> bool:
        """There is nothing on this host that could be gone."""
        return True

    @contextmanager
    def _access(self) -> Iterator[tuple[list[str], list[int]]]:
        """Arguments that lead to the cluster, and the descriptor that the key is read from."""
        source, keys = self.document.origin, []
        hosts = [f"[{each.name}]" if ":" in each.name else each.name for each in source.hosts]
        ports = [f":{each.port}" if each.port is not None else "" for each in source.hosts]
        monitors = ",".join(host + port for host, port in zip(hosts, ports, strict=True))
        # The ceph tool does not start without a file of settings.
        arguments = ["--conf", "/dev/null", "-m", monitors]
        settings, options = dict(PATIENCE), self.document.config_options
        for option in options.options if options is not None else []:
            if not option.name.replace("_", "").isalnum():
                raise InvalidArgument(f"{option.name!r} is not the name of a setting of Ceph")
            settings[option.name] = option.value
        with ExitStack() as stack:
            if (key := self._key()) is not None:
                assert source.auth is not None
                # Ceph reads as many bytes as fstat(2) says: of a pipe none.
                keys.append(stack.enter_context(lent(b64encode(key))))
                arguments += ["--id", source.auth.username, "--keyfile", f"/proc/self/fd/{keys[0]}"]
            else:
                settings.setdefault("auth_client_required", "none")
            arguments += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
            yield arguments, keys

    def _key(self) -> bytes | None:
        """The user's, as its secret holds it, which Ceph writes in Base64; None where everybody may."""
        auth = self.document.origin.auth
        if auth is None:
            return None
        if auth.type != "ceph":
            raise ConfigUnsupported("rbd pool only supports 'ceph' auth type", path="/pool/source/auth/@type")
        return self.secret("ceph", auth.secret)

    def _json(self, tool: str, *words: str) -> Any:
        with self._access() as (arguments, descriptors):
            argv = [tool, *arguments, "--format", "json", *words]
            done = call(argv, timeout=DEADLINE, pass_fds=descriptors, check=False)
        if done.code != 0:
            raise self._error(f"{tool} {words[0]}", done)
        return read_json(done)

    def _rbd(self, *argv: str, size: int = 0) -> None:
        """`size`: bytes of an image that the cluster has to go through."""
        with self._access() as (arguments, descriptors):
            deadline = DEADLINE + size // SLOWEST
            done = call(["rbd", *arguments, *argv], timeout=deadline, pass_fds=descriptors, check=False)
        if done.code != 0:
            raise self._error(f"rbd {argv[0]}", done)

    def _error(self, what: str, done: Completed) -> KvikError:
        """rbd's exit code is the error's number; ceph writes it."""
        lines = [line for line in done.message.splitlines() if line.strip() and not _LOGGED.match(line)]
        words = "; ".join(line.strip().removeprefix("rbd: ") for line in lines) or done.message
        found = _NUMBERED.search(words) if what.startswith("ceph ") else None
        code = int(found[1] or found[2]) if found is not None else (0 if what.startswith("ceph ") else done.code)
        source = self.document.origin
        monitors = ", ".join(host.name for host in source.hosts)
        if code == errno.ETIMEDOUT:
            return OperationTimeout(
                f"the Ceph cluster of storage pool '{self.name}' does not answer (monitors {monitors}): {words}",
                remedy="see that a monitor runs there and can be reached from here",
            )
        if code in (errno.EACCES, errno.EPERM):
            user = f"user '{source.auth.username}'" if source.auth is not None else "anybody"
            return HostError(
                f"the Ceph cluster of storage pool '{self.name}' does not let {user} do that: {words}",
                errno=code,
                remedy="compare the secret with `ceph auth get-key`, and the user's caps: profile rbd on this pool",
            )
        if code == errno.EBUSY:
            return ResourceBusy(f"the image is in use: {words}")
        if code == errno.EEXIST:
            return StorageVolumeExists(f"the image exists already: {words}")
        if code == errno.ENOTEMPTY:
            return OperationInvalid(f"the image has snapshots: {words}", remedy="remove them first: rbd snap")
        return HostError(f"{what} failed: {words}", errno=code)

    def refresh(self) -> Contents:
        contents = Contents()
        for each in self._json("rbd", "ls", "--long", "--pool", self.pool) or []:
            name = str(each.get("image")) if isinstance(each, dict) else ""
            if not name or "snapshot" in each:
                continue
            if len(contents.volumes) >= VOLUMES_MAX:
                leave_out(contents, name, f"a pool shows {VOLUMES_MAX} volumes at most")
                continue
            contents.volumes[name] = self._volume(name, number(each.get("size")))
        contents.capacity, contents.allocation, contents.available = self.measure()
        return contents

    def measure(self) -> tuple[int, int, int]:
        """Of the whole cluster, of this pool without its copies, and what it still takes."""
        answer = self._json("ceph", "df")
        if not isinstance(answer, dict):
            raise HostError("ceph df did not answer with figures")
        cluster = answer.get("stats", {})
        for each in answer.get("pools", []):
            if isinstance(each, dict) and each.get("name") == self.pool:
                figures = each.get("stats", {})
                used = number(figures.get("stored", figures.get("bytes_used")))
                return number(cluster.get("total_bytes")), used, number(figures.get("max_avail"))
        # A pool that was made some seconds ago, or a cluster without a manager: nobody has counted yet.
        return number(cluster.get("total_bytes")), 0, number(cluster.get("total_avail_bytes"))

    def _volume(self, name: str, size: int, taken: int | None = None) -> StorageVolume:
        """`taken`: bytes of the cluster's storage, if that is known; else all of it at most."""
        path = f"{self.pool}/{name}"
        volume = StorageVolume(type="network", name=name, key=path)
        volume.capacity, volume.allocation = bytes_of(size), bytes_of(size if taken is None else min(taken, size))
        volume.target = VolumeTarget(path=path, format=VolumeFormat(type="raw"))
        return volume

    def look_at(self, volume: StorageVolume) -> StorageVolume:
        try:
            answer = self._json("rbd", "info", "--", f"{self.pool}/{volume.name}")
        except HostError as error:
            if error.errno != errno.ENOENT:
                raise
            answer = None
        if not isinstance(answer, dict) or "size" not in answer:
            raise NoStorageVolume(f"image '{volume.name}' of pool '{self.name}' is gone")
        return self._volume(volume.name, number(answer["size"]), self._taken(volume.name, answer))

    def _taken(self, name: str, facts: dict[str, Any]) -> int | None:
        """What an image takes, if the cluster has counted it (its feature fast-diff): else each of its objects would
        have to be asked for."""
        features, flags = facts.get("features"), facts.get("flags")
        if not isinstance(features, list) or "fast-diff" not in features or (isinstance(flags, list) and flags):
            return None  # a flag says that what was counted is not valid
        try:
            answer = self._json("rbd", "du", "--", f"{self.pool}/{name}")
        except KvikError:
            return None
        images = answer.get("images") if isinstance(answer, dict) else None
        # Its snapshots are listed, too, each with what is in it alone.
        found = [number(each.get("used_size")) for each in images or [] if isinstance(each, dict)]
        return sum(found) if found else None

    def create_volume(self, document: StorageVolume, *, preallocate_metadata: bool = False) -> StorageVolume:
        name = document.name
        if any(sign in name for sign in "@/") or document.backing_store is not None:
            raise ConfigUnsupported(f"an image {name!r} of its own is all that can be made here", path="/volume")
        if document.target is not None and document.target.encryption is not None:
            raise ConfigUnsupported(
                f"images of pool '{self.name}', of type rbd, cannot be made encrypted",
                path="/volume/target/encryption",
                remedy="a file, a logical volume, a partition or a ZFS volume can",
            )
        self._rbd("create", "--size", f"{document.size}B", "--", f"{self.pool}/{name}")
        return self.look_at(document)

    def delete_volume(self, volume: StorageVolume) -> None:
        """One that a machine has open stays: Ceph knows its watchers."""
        self._rbd("rm", "--no-progress", "--", f"{self.pool}/{volume.name}", size=volume.size)

    def resize_volume(self, volume: StorageVolume, capacity: int, *, allocate: bool = False) -> None:
        if allocate:
            self.refuse("allocating the new bytes of a volume")
        shrink = ["--allow-shrink"] if capacity < volume.size else []
        words = ["resize", "--no-progress", *shrink, "--size", f"{capacity}B", "--", f"{self.pool}/{volume.name}"]
        self._rbd(*words, size=volume.size)

    def node(self, volume: StorageVolume) -> Node:
        source, key = self.document.origin, self._key()
        servers = [{"host": host.name, "port": str(host.port or 6789)} for host in source.hosts]
        options = {"driver": "rbd", "pool": self.pool, "image": volume.name, "server": servers}
        if source.auth is None or key is None:
            return Node({**options, "auth-client-required": ["none"]})
        return Node({**options, "user": source.auth.username, "auth-client-required": ["cephx"]}, "key-secret", key)

    @classmethod
    def missing(cls) -> str:
        return missing("rbd", "ceph")
