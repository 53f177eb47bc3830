"""A definition is forgotten: what else there is of the machine must be given up or kept by name first."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.conf.enums import DomainEventType, DomainEventUndefinedDetailType, DomainUndefineFlags
from kvik.errors import KvikError, OperationInvalid, OperationUnsupported
from kvik.host.reach import about, reach
from kvik.host.threads import in_thread
from kvik.manager.checkpoints.store import store_of as checkpoints_of
from kvik.manager.checkpoints.tree import Checkpoints
from kvik.manager.saved import machine as saved_machine
from kvik.manager.snapshots import apply as snapshots
from kvik.manager.snapshots.tree import Tree

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager

logger = logging.getLogger(__name__)

__all__ = ["undefine"]

_KEEPS_NOTHING = (
    DomainUndefineFlags.MANAGED_SAVE
    | DomainUndefineFlags.SNAPSHOTS_METADATA
    | DomainUndefineFlags.CHECKPOINTS_METADATA
    | DomainUndefineFlags.TPM
    | DomainUndefineFlags.KEEP_TPM
)
_NVRAM = DomainUndefineFlags.NVRAM | DomainUndefineFlags.KEEP_NVRAM
_TPM = DomainUndefineFlags.TPM | DomainUndefineFlags.KEEP_TPM


def _exists(path: Path) -> bool:
    about(path)
    return path.exists()


async def undefine(manager: Manager, domain: DomainObject, flags: int) -> None:
    """The machine's name and UUID are the caller's. Raises `OperationInvalid`, `OperationUnsupported`, `HostError`;
    then nothing has changed. A machine that runs goes on as a transient one."""
    if flags & ~(_KEEPS_NOTHING | _NVRAM):
        raise OperationUnsupported(f"undefine flags 0x{flags:x} are not supported")
    if flags & _NVRAM == _NVRAM:
        raise OperationInvalid("NVRAM cannot be both kept and removed")
    if flags & _TPM == _TPM:
        raise OperationInvalid("TPM state cannot be both kept and removed")
    if not domain.persistent:
        raise OperationInvalid(f"machine {domain.name!r} is transient: there is nothing to undefine")
    if len(domain.snapshots) and not flags & DomainUndefineFlags.SNAPSHOTS_METADATA:
        raise OperationInvalid(
            f"cannot delete inactive domain with {len(domain.snapshots)} snapshots",
            remedy="delete them first, or undefine with --snapshots-metadata, which leaves their images behind",
        )
    if len(domain.checkpoints) and not flags & DomainUndefineFlags.CHECKPOINTS_METADATA:
        raise OperationInvalid(
            f"cannot delete inactive domain with {len(domain.checkpoints)} checkpoints",
            remedy="delete them first, or undefine with --checkpoints-metadata, which leaves their bitmaps",
        )
    if domain.has_managed_save and not flags & DomainUndefineFlags.MANAGED_SAVE:
        raise OperationInvalid(
            "Refusing to undefine while domain managed save image exists",
            remedy="undefine with --managed-save to give its saved memory up",
        )
    nvram = domain.definition.os.nvram
    path = Path(nvram.value) if nvram and nvram.value else None
    if path is not None and not flags & _NVRAM and await reach(_exists, path):
        raise OperationInvalid(
            f"machine {domain.name!r} has firmware variables in {path}",
            remedy="undefine with --nvram to remove or --keep-nvram to keep them",
        )
    await manager.store.remove_definition(domain.name)
    if domain.run is None:
        await manager.pivots.forget_all(domain)
    if path is not None and flags & DomainUndefineFlags.NVRAM:
        with contextlib.suppress(OSError):
            await in_thread(path.unlink, missing_ok=True)
    keep_tpm = None if not flags & _TPM else bool(flags & DomainUndefineFlags.KEEP_TPM)
    await _forget_state(domain, keep_tpm)
    if domain.has_managed_save:
        await saved_machine.forget_managed(domain)
    await manager.store.run(snapshots.store_of(domain).forget)
    domain.snapshots = Tree()
    if domain.run is None:  # a backup that runs has its facts there
        await manager.store.run(checkpoints_of(domain).forget)
        domain.checkpoints = Checkpoints()
    domain.autostart = False
    domain.persistent = False
    domain.updated = False
    if domain.run is None:
        manager.forget(domain)
    else:
        with contextlib.suppress(KvikError):
            await domain.save_status()
    domain.emit("lifecycle", event=DomainEventType.UNDEFINED, detail=DomainEventUndefinedDetailType.REMOVED)


async def _forget_state(domain: DomainObject, keep_tpm: bool | None) -> None:
    """Once a machine is off and nothing defines it; while it runs, its end does this."""
    if domain.run is not None:
        domain.keep_tpm = keep_tpm
        return
    try:
        await domain.driver.forget(domain.definition, keep_tpm=keep_tpm)
    except KvikError as error:
        logger.warning("machine %s: %s", domain.name, error)
