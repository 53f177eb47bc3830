"""Where a machine's managed save is, and what may not be done while there is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvik.errors import OperationInvalid

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.manager import Manager

__all__ = ["check_no_managed_save", "managed_path"]


def managed_path(manager: Manager, name: str) -> Path:
    return manager.paths.saves / f"{name}.save"


def check_no_managed_save(domain: DomainObject, what: str) -> None:
    """`OperationInvalid`: the memory that is kept knows the disks as they are."""
    if domain.has_managed_save:
        raise OperationInvalid(
            f"machine {domain.name!r} has a managed save, which {what} would make worthless",
            remedy=f"start it (kvik start {domain.name}), or give its memory up: kvik managedsave-remove {domain.name}",
        )
