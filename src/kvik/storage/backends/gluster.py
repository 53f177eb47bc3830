"""Pools of type gluster: images on a Gluster volume, which a machine's VMM opens itself.

To look at them and to make them the volume is mounted, by its own FUSE client, in a directory that only root can enter.
What is shown is gluster://HOST/VOLUME/NAME, of type network.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kvik.conf.reader import read_xml
from kvik.conf.storage_pool import PoolSource, PoolTarget, SourceDirectory, StoragePool
from kvik.conf.storage_volume import Encryption, StorageVolume
from kvik.errors import InvalidArgument
from kvik.host.files import ensure_directory
from kvik.image.base import Image
from kvik.storage import mounts
from kvik.storage.backend import Backend as Base
from kvik.storage.backend import Contents, SecretReader, no_secrets
from kvik.storage.backends.iscsi import check_host
from kvik.storage.mounted import MountedBackend
from kvik.storage.tool import call, missing

__all__ = ["Backend"]

DEADLINE = 30.0  # seconds
VOLUMES_MAX = 1024


class _Files(MountedBackend):
    """The mounted volume as a directory of files."""

    type = "gluster"

    @property
    def source(self) -> str:
        origin = self.document.origin
        directory = origin.dir.path.strip("/") if origin.dir is not None else ""
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        return f"{host}:/{'/'.join(part for part in (origin.name, directory) if part)}"

    def is_ours(self, found: mounts.Mount) -> bool:
        return found.type == "fuse.glusterfs"

    def attach(self) -> None:
        ensure_directory(self.document.path)
        mounts.mount(self.source, self.document.path, "glusterfs", self.options)


class Backend(Base):
    type = "gluster"
    takes_room = True
    below: ClassVar[Path] = Path("/run/kvik/gluster")  # where volumes are mounted

    def __init__(self, document: StoragePool, secret: SecretReader = no_secrets) -> None:
        super().__init__(document, secret)
        mounted = document.copy()
        mounted.target = PoolTarget(path=str(self.below / (document.uuid or document.name)))
        self.files = _Files(mounted, secret)

    def check(self) -> bool:
        return self.files.check()

    def start(self) -> None:
        self.files.start()

    def stop(self) -> None:
        self.files.stop()

    def clean(self) -> None:
        self.files.clean()

    def refresh(self) -> Contents:
        contents = self.files.refresh()
        contents.permissions = None
        contents.volumes = {name: self._shown(volume) for name, volume in contents.volumes.items()}
        return contents

    def measure(self) -> tuple[int, int, int]:
        return self.files.measure()

    def _shown(self, volume: StorageVolume) -> StorageVolume:
        origin = self.document.origin
        directory = origin.dir.path.strip("/") if origin.dir is not None else ""
        port = f":{origin.hosts[0].port}" if origin.hosts[0].port else ""
        path = "/".join(
            part for part in (f"gluster://{origin.host}{port}", origin.name, directory, volume.name) if part
        )
        volume.type = "netdir" if volume.type == "dir" else "network"
        volume.key = path
        if volume.target is not None:
            volume.target.path = path
        return volume

    # volumes: those methods of `_Files` go by the name alone

    def look_at(self, volume: StorageVolume) -> StorageVolume:
        return self._shown(self.files.look_at(volume))

    def create_volume(self, document: StorageVolume, *, preallocate_metadata: bool = False) -> StorageVolume:
        return self._shown(self.files.create_volume(document, preallocate_metadata=preallocate_metadata))

    def copy_volume(self, document: StorageVolume, source: int, *, reflink: bool = False) -> StorageVolume:
        return self._shown(self.files.copy_volume(document, source, reflink=reflink))

    def convert_volume(
        self,
        document: StorageVolume,
        source: Image,
        locked: Encryption | None = None,
        *,
        preallocate_metadata: bool = False,
    ) -> StorageVolume:
        return self._shown(
            self.files.convert_volume(document, source, locked, preallocate_metadata=preallocate_metadata)
        )

    def delete_volume(self, volume: StorageVolume) -> None:
        self.files.delete_volume(volume)

    def resize_volume(self, volume: StorageVolume, capacity: int, *, allocate: bool = False) -> None:
        self.files.resize_volume(volume, capacity, allocate=allocate)

    def open_volume(self, volume: StorageVolume, *, writable: bool = False) -> int:
        return self.files.open_volume(volume, writable=writable)

    @classmethod
    def find_sources(cls, source: PoolSource | None) -> list[PoolSource]:
        """The volumes of a server's cluster."""
        if source is None or not source.hosts:
            raise InvalidArgument("hostname must be specified for gluster sources")
        host = source.hosts[0]
        check_host(host.name)
        argv = ["gluster", "--mode=script", "--xml", f"--remote-host={host.name}", "volume", "list"]
        root = read_xml(call(argv, timeout=DEADLINE).out, "answer of gluster")
        names = [str(each.text) for each in root.iterfind("volList/volume") if each.text][:VOLUMES_MAX]
        return [PoolSource(hosts=[host], dir=SourceDirectory(path="/"), name=name) for name in names]

    @classmethod
    def missing(cls) -> str:
        return missing("mount.glusterfs")
