"""What may not be done while a backup is under way: it would end with it, or with the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.errors import ResourceBusy

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

__all__ = ["check_no_backup"]


def check_no_backup(domain: DomainObject, what: str) -> None:
    """`ResourceBusy`."""
    if domain.run is not None and domain.run.backup is not None:
        raise ResourceBusy(
            f"machine {domain.name!r} has a backup under way, which {what} would break off",
            remedy=f"wait for it, or end it: kvik domjobinfo {domain.name}, kvik domjobabort {domain.name}",
        )
