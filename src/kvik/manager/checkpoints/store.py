"""Checkpoints and backups on disk. All functions block; the daemon may be killed between any two steps.

<data>/qemu/checkpoint/NAME/CHECKPOINT.xml      one document a checkpoint, as libvirt keeps them; secrets included
<data>/qemu/checkpoint/NAME/CHECKPOINT.pending  the document of one that is being made: bitmaps may be there or not
<data>/qemu/checkpoint/NAME/backup.json         the backup that runs, and what was made for it
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.conf.checkpoint import Checkpoint, format_checkpoint, parse_checkpoint
from kvik.errors import HostError
from kvik.host import documents, files
from kvik.host.documents import DOCUMENT_LIMIT, SUFFIX, check_document_name, set_aside
from kvik.manager.checkpoints.tree import Checkpoints

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["CheckpointStore", "check_checkpoint_name", "store_of"]

PENDING = ".pending"
MAX_CHECKPOINTS = 16384  # the wire's limit of a list


def check_checkpoint_name(name: str) -> str:
    """The name if a checkpoint can have it, else `InvalidArgument`."""
    return check_document_name(name, "checkpoint")


def store_of(domain: DomainObject) -> CheckpointStore:
    return CheckpointStore(domain.manager.paths.checkpoints / domain.name)


class CheckpointStore:
    """The directory of one machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._backup = directory / "backup.json"

    def _path(self, name: str, suffix: str) -> Path:
        return self.directory / f"{check_checkpoint_name(name)}{suffix}"

    def load(self) -> tuple[Checkpoints, list[str]]:
        """What is there, and warnings of what was set aside. `HostError` only if the directory cannot be read."""
        found = Checkpoints()
        warnings: list[str] = []
        if not self.directory.is_dir():
            return found, warnings
        files.remove_temporaries(self.directory, older_than=0)
        for suffix, known in ((SUFFIX, found.all), (PENDING, found.pending)):
            loaded, aside = documents.load_all(self.directory, suffix, MAX_CHECKPOINTS, "checkpoint", parse_checkpoint)
            warnings += aside
            for name, checkpoint in loaded.items():
                self.adopt(checkpoint)
                known[name] = checkpoint
        for name in [name for name in found.pending if name in found.all]:  # it was made, and only not tidied up after
            files.remove_file(self._path(name, PENDING))
            del found.pending[name]
        return found, warnings

    def adopt(self, checkpoint: Checkpoint) -> None:
        """The machine may have had another name when the document was written."""
        if checkpoint.domain is not None:
            checkpoint.domain.name = self.directory.name

    def write(self, checkpoint: Checkpoint, *, pending: bool = False) -> None:
        assert checkpoint.name is not None
        files.ensure_directory(self.directory, durable=True)
        text = format_checkpoint(checkpoint, secure=True)
        files.atomic_write(self._path(checkpoint.name, PENDING if pending else SUFFIX), text.encode())
        if not pending:
            files.remove_file(self._path(checkpoint.name, PENDING))

    def remove(self, name: str) -> None:
        for suffix in (SUFFIX, PENDING):
            documents.remove(self._path(name, suffix))
        self._tidy()

    # the backup that runs

    def write_backup(self, facts: dict[str, Any]) -> None:
        files.ensure_directory(self.directory, durable=True)
        files.atomic_write(self._backup, json.dumps(facts, indent=1).encode())

    def read_backup(self) -> dict[str, Any] | None:
        """None if there is none. `HostError`; `ValueError` for what `write_backup` would not have written."""
        data = files.try_read_file(self._backup, limit=DOCUMENT_LIMIT)
        facts = json.loads(data) if data is not None else None
        if facts is not None and not isinstance(facts, dict):
            raise ValueError("not an object")
        return facts

    def set_backup_aside(self, why: str) -> str:
        return set_aside(self._backup, why)

    def remove_backup(self) -> None:
        files.remove_file(self._backup)
        self._tidy()

    def _tidy(self) -> None:
        with contextlib.suppress(OSError):
            self.directory.rmdir()  # if it is empty

    def forget(self) -> None:
        """All documents go; bitmaps stay in their images."""
        with contextlib.suppress(HostError):
            shutil.rmtree(self.directory, ignore_errors=True)
