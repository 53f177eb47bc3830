"""Pools whose directory is mounted when they start: what the types fs and netfs share."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kvik.errors import HostError, OperationInvalid, ResourceBusy
from kvik.storage import mounts
from kvik.storage.directory import DirectoryBackend

__all__ = ["MountedBackend"]


class MountedBackend(DirectoryBackend):
    """A type says what is mounted (`attach`), and whether what is seen is that (`is_ours`)."""

    unmounting: ClassVar[float] = 600.0  # seconds

    def attach(self) -> None:
        """Mount it on the pool's directory."""
        raise NotImplementedError  # each type's own

    def is_ours(self, found: mounts.Mount) -> bool:
        raise NotImplementedError  # each type's own

    def check(self) -> bool:
        found = mounts.mounted_at(self.document.path)
        return found is not None and self.is_ours(found)

    def start(self) -> None:
        path = self.document.path
        found = mounted = mounts.mounted_at(path)
        if found is None:
            self.attach()
        elif not self.is_ours(found):
            raise ResourceBusy(f"{found.source} is mounted on {path} already", remedy=f"unmount it: umount {path}")
        try:
            super().start()
        except BaseException:
            if mounted is None:
                mounts.unmount(path)
            raise

    def stop(self) -> None:
        """What was written is on disk then, which may take long."""
        mounts.unmount(self.document.path, timeout=self.unmounting, lazy=self.given_up)

    def clean(self) -> None:
        mounts.wait_for_mount(self.document.path)
        super().clean()

    def delete(self) -> None:
        """The directory only; what is mounted on it stays as it is."""
        path = self.document.path
        if mounts.mounted_at(path) is not None:
            raise OperationInvalid(f"something is mounted on {path}", remedy=f"unmount it: umount {path}")
        try:
            Path(path).rmdir()
        except OSError as error:
            raise HostError(f"failed to remove pool '{path}': {error.strerror}", errno=error.errno or 0) from error

    @property
    def options(self) -> list[str]:
        """For mount(8), as the document has them."""
        wanted = self.document.mount_options
        return [option.name for option in wanted.options] if wanted is not None else []
