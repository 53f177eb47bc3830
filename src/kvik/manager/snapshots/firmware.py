"""What belongs to a snapshot beside disks and memory: the firmware's variables (NVRAM) and the emulated TPM's state.
Copied when it is taken, put back when it is gone back to."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.conf.domain import Domain
from kvik.conf.snapshot import Snapshot, SnapshotTaken
from kvik.errors import OperationFailed
from kvik.host import files
from kvik.host.files import fsync_directory, host_error
from kvik.hypervisor.firmware import variables_of

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["copies", "copies_of", "keep", "put_back", "restores", "sources"]

LIMIT = 64 << 20  # bytes; OVMF has half a MiB, a TPM a few KiB
MOST_FILES = 100  # of a TPM: swtpm has three


def sources(domain: DomainObject, document: Domain, directory: Path, name: str) -> dict[str, tuple[str, str]]:
    """Which of `SnapshotTaken`'s members is kept -> where it is, where its copy belongs."""
    found: dict[str, tuple[str, str]] = {}
    nvram = variables_of(document)
    if nvram is not None:
        found["nvram"] = nvram, str(directory / f"{name}.nvram")
    tpm = domain.manager.driver_of(document).tpm_state(document)
    if tpm is not None:
        found["tpm"] = str(tpm), str(directory / f"{name}.tpm")
    return found


def keep(found: dict[str, tuple[str, str]]) -> SnapshotTaken:
    """Copy them (blocking), durably; a machine that was never started has none yet."""
    taken = SnapshotTaken()
    for what, (path, copy) in found.items():
        if Path(path).is_dir():
            _copy_directory(Path(path), Path(copy))
        else:
            data = files.try_read_file(path, limit=LIMIT)
            if data is None:
                continue
            files.atomic_write(copy, data)
        setattr(taken, what, copy)
    return taken


def _copy_directory(path: Path, copy: Path) -> None:
    """Regular files only: nothing else belongs there."""
    shutil.rmtree(copy, ignore_errors=True)
    files.ensure_directory(copy, durable=True)
    try:
        found = sorted(path.iterdir())
        if len(found) > MOST_FILES:
            raise OperationFailed(f"{path} has {len(found)} files: no TPM's state has so many")
        for file in found:
            if stat.S_ISREG(file.lstat().st_mode):
                files.atomic_write(copy / file.name, files.read_file(file, limit=LIMIT))
        fsync_directory(copy)
    except OSError as error:
        raise host_error("copy", path, error) from error


def put_back(copy: str, path: str) -> None:
    """Can be done twice, and again where it was broken off."""
    if not Path(copy).is_dir():
        data = files.read_file(copy, limit=LIMIT)
        files.ensure_directory(Path(path).parent, durable=True)
        files.atomic_write(path, data)
        return
    target = Path(path)
    fresh = target.with_name(f".{target.name}.back")
    files.ensure_directory(target.parent, durable=True)
    _copy_directory(Path(copy), fresh)
    try:
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
        fsync_directory(target.parent)
    except OSError as error:
        raise host_error("put back", path, error) from error


def restores(domain: DomainObject, snapshot: Snapshot, document: Domain) -> dict[str, str]:
    """Copy -> where it belongs in the machine of `document`."""
    if snapshot.taken is None:
        return {}
    found: dict[str, str] = {}
    for what, (path, _) in sources(domain, document, Path(), "").items():
        copy = getattr(snapshot.taken, what)
        if copy is not None:
            found[copy] = path
    return found


def copies(taken: SnapshotTaken) -> set[str]:
    return {path for path in (taken.nvram, taken.tpm, taken.memory) if path}


def copies_of(snapshot: Snapshot) -> set[str]:
    """The files and directories that were made for it alone."""
    return copies(snapshot.taken) if snapshot.taken is not None else set()
