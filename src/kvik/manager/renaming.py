"""Another name for a machine that is off, with its snapshots, checkpoints and managed save.

    definition's file moved --> what else is named so moved --> definition with the new name in it

From the first step on the file's name rules: whoever finds a document in it that says another one does the rest
(`recover`). What lies in a directory that moves is known by its place there (`snapshots/store`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from kvik.conf.enums import DomainEventDefinedDetailType, DomainEventType, DomainEventUndefinedDetailType
from kvik.errors import AlreadyExists, HostError, OperationInvalid
from kvik.manager.checkpoints.store import store_of as checkpoints_of
from kvik.manager.definition import Definition
from kvik.manager.log import MachineLog
from kvik.manager.saved.managed import managed_path
from kvik.manager.snapshots.apply import settle, store_of
from kvik.manager.store import Moves, move

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager

logger = logging.getLogger(__name__)

__all__ = ["finish", "rename"]


def _moves(manager: Manager, old: str, new: str) -> Moves:
    """The directories and the file that are named as the machine."""
    places = [(place / old, place / new) for place in (manager.paths.snapshots, manager.paths.checkpoints)]
    return [*places, (managed_path(manager, old), managed_path(manager, new))]


async def rename(manager: Manager, domain: DomainObject, new: str) -> None:
    """The machine's job and both names are the caller's. Raises `OperationInvalid`, `AlreadyExists`, `HostError`; then
    nothing has changed."""
    if not domain.persistent:
        raise OperationInvalid(f"machine {domain.name!r} is transient and cannot be renamed")
    if domain.run is not None:
        raise OperationInvalid(f"machine {domain.name!r} is running", remedy="shut it down first")
    if domain.cleaning:
        await asyncio.shield(domain.cleaning)
    if manager.has_name(new):
        mine = new == domain.name
        raise AlreadyExists(f"machine {new!r} has this name already" if mine else f"there is a machine {new!r} already")
    await settle(domain)
    moves = _moves(manager, domain.name, new)
    await manager.store.run(_check_free, moves, new)
    document = domain.definition
    document.name = new
    config, log = Definition(document), domain.log
    await manager.store.rename_definition(domain.name, new, config.text, autostart=domain.autostart, moves=moves)
    domain.emit("lifecycle", event=DomainEventType.UNDEFINED, detail=DomainEventUndefinedDetailType.RENAMED)
    domain.config = config
    manager.renamed(domain, new)
    snapshots, checkpoints = store_of(domain), checkpoints_of(domain)
    for snapshot in domain.snapshots.snapshots.values():
        snapshots.adopt(snapshot)
    for checkpoint in (*domain.checkpoints.all.values(), *domain.checkpoints.pending.values()):
        checkpoints.adopt(checkpoint)
    await manager.store.run(log.rename, new)
    domain.emit("lifecycle", event=DomainEventType.DEFINED, detail=DomainEventDefinedDetailType.RENAMED)


def _check_free(moves: Moves, new: str) -> None:
    for source, target in moves:
        if source.exists() and target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise AlreadyExists(
                f"{target} has what is left of another machine {new!r}",
                remedy="move it away if it is still wanted, remove it if not; or choose another name",
            )


def finish(manager: Manager, was: str, name: str) -> list[str]:
    """The rest of a rename that was broken off (blocking): what goes with the definition. Warnings of what cannot."""
    if manager.has_name(was):  # somebody wrote another machine's document there meanwhile: what is there may be its
        return []
    warnings = []
    for source, target in _moves(manager, was, name):
        try:
            move(source, target)
        except HostError as error:
            warnings.append(f"machine {name!r} was {was!r}: {error}")
    MachineLog(manager.paths.domain_logs, was).rename(name)
    return warnings
