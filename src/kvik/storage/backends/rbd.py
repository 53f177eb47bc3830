"""Pools of type rbd: images of a Ceph pool, by Ceph's own tools, which answer in JSON.

The key of the secret is read by the tools from a descriptor. Volumes are of type network: a machine's VMM opens them
itself; what is read or written here goes through `rbd export` and `import`, which is left to those tools.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvik.conf.storage_pool import bytes_of
from kvik.conf.storage_volume import StorageVolume, VolumeFormat, VolumeTarget
from kvik.errors import (
    ConfigUnsupported,
    HostError,
    InvalidArgument,
    NoStorageVolume,
    ResourceBusy,
    StorageVolumeExists,
)
from kvik.storage.backend import VOLUMES_MAX, Contents
from kvik.storage.backend import Backend as Base
from kvik.storage.directory import leave_out
from kvik.storage.tool import call, missing, number, read_json

__all__ = ["Backend"]

DEADLINE = 60.0  # seconds: monitors that do not answer
MIB = 1 << 20
BUSY, EXISTS = 16, 17  # errno, which rbd makes its exit code


class Backend(Base):
    type = "rbd"
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
        source, arguments, reading = self.document.origin, [], -1
        if source.hosts:
            hosts = [f"[{each.name}]" if ":" in each.name else each.name for each in source.hosts]
            ports = [f":{each.port}" if each.port is not None else "" for each in source.hosts]
            arguments += ["-m", ",".join(host + port for host, port in zip(hosts, ports, strict=True))]
        options = self.document.config_options
        for option in options.options if options is not None else []:
            if not option.name.replace("_", "").isalnum():
                raise InvalidArgument(f"{option.name!r} is not the name of a setting of Ceph")
            arguments.append(f"--{option.name.replace('_', '-')}={option.value}")
        if source.auth is not None:
            if source.auth.type != "ceph":
                raise ConfigUnsupported("rbd pool only supports 'ceph' auth type", path="/pool/source/auth/@type")
            reading, writing = os.pipe()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(b64encode(self.secret("ceph", source.auth.secret)))
            arguments += ["--id", source.auth.username, "--keyfile", f"/dev/fd/{reading}"]
        try:
            yield arguments, [reading] if reading >= 0 else []
        finally:
            if reading >= 0:
                os.close(reading)

    def _json(self, *argv: str) -> Any:
        with self._access() as (arguments, descriptors):
            done = call([argv[0], *arguments, "--format", "json", *argv[1:]], timeout=DEADLINE, pass_fds=descriptors)
            return read_json(done)

    def _rbd(self, *argv: str) -> None:
        with self._access() as (arguments, descriptors):
            done = call(["rbd", *arguments, *argv], timeout=DEADLINE, pass_fds=descriptors, check=False)
        if done.code == BUSY:
            raise ResourceBusy(f"the image is in use: {done.message}")
        if done.code == EXISTS:
            raise StorageVolumeExists(f"the image exists already: {done.message}")
        if done.code != 0:
            raise HostError(f"rbd {argv[0]} failed: {done.message}")

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
        answer = self._json("ceph", "df")
        for each in answer.get("pools", []) if isinstance(answer, dict) else []:
            if isinstance(each, dict) and each.get("name") == self.pool:
                figures = each.get("stats", {})
                used, free = number(figures.get("bytes_used")), number(figures.get("max_avail"))
                return number(answer.get("stats", {}).get("total_bytes")), used, free
        raise HostError(f"the Ceph cluster has no pool '{self.pool}'", errno=2)

    def _volume(self, name: str, size: int) -> StorageVolume:
        path = f"{self.pool}/{name}"
        volume = StorageVolume(type="network", name=name, key=path)
        # What an image takes is not known without reading its whole map (rbd du): all of it at most.
        volume.capacity, volume.allocation = bytes_of(size), bytes_of(size)
        volume.target = VolumeTarget(path=path, format=VolumeFormat(type="raw"))
        return volume

    def look_at(self, volume: StorageVolume) -> StorageVolume:
        answer = self._json("rbd", "info", "--", f"{self.pool}/{volume.name}")
        if not isinstance(answer, dict) or "size" not in answer:
            raise NoStorageVolume(f"image '{volume.name}' of pool '{self.name}' is gone")
        return self._volume(volume.name, number(answer["size"]))

    def create_volume(self, document: StorageVolume, *, preallocate_metadata: bool = False) -> StorageVolume:
        name = document.name
        if any(sign in name for sign in "@/") or document.backing_store is not None:
            raise ConfigUnsupported(f"an image {name!r} of its own is all that can be made here", path="/volume")
        if document.target is not None and document.target.encryption is not None:
            raise ConfigUnsupported("encrypted volumes cannot be created", path="/volume/target/encryption")
        self._rbd("create", "--size", _size(document.size), "--", f"{self.pool}/{name}")
        return self.look_at(document)

    def delete_volume(self, volume: StorageVolume) -> None:
        """One that a machine has open stays: Ceph knows its watchers."""
        self._rbd("rm", "--no-progress", "--", f"{self.pool}/{volume.name}")

    def resize_volume(self, volume: StorageVolume, capacity: int, *, allocate: bool = False) -> None:
        if allocate:
            self.refuse("allocating the new bytes of a volume")
        shrink = ["--allow-shrink"] if capacity < volume.size else []
        self._rbd("resize", "--no-progress", *shrink, "--size", _size(capacity), "--", f"{self.pool}/{volume.name}")

    @classmethod
    def missing(cls) -> str:
        return missing("rbd", "ceph")


def _size(size: int) -> str:
    """In MiB, rounded up, as rbd counts."""
    return str(-(-size // MIB))
