"""What an operation on snapshots is about to do, on disk before it is done, so that the next daemon can end it.

    prepare   the files in `made` did not exist and are being created. Undone: they are removed.
    ready     they are whole, and the VMM is being told to write to them. Which of the two it is is the VMM's to say.
    commit    everything in `redo` is to be true. Done again from the start, however far it came. What is in
              `unfinished` then goes: of a snapshot whose memory was still being written.

Every step of `redo` can be done twice: a document written, a document or file removed that may be gone already.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from kvik.errors import InvalidArgument

__all__ = ["Journal", "Redo"]


class Redo(msgspec.Struct, kw_only=True):
    """`write`: snapshot -> document; `definition`: the machine's persistent one (None: as it is)."""

    write: dict[str, str] = {}
    remove: list[str] = []
    current: str | None = None
    made: list[str] = []
    originals: list[str] = []
    definition: str | None = None
    live: dict[str, tuple[str, int]] = {}  # target -> the image that a running machine's disk now writes to, its number
    unlink: list[str] = []
    inside: list[tuple[str, str]] = []  # (image, name) of snapshots inside that are to be taken out
    apply: list[tuple[str, str]] = []  # ... that the images go back to
    restore: dict[str, str] = {}  # copy of the firmware's variables -> where they belong


class Journal(msgspec.Struct, kw_only=True):
    """`operation` is for messages: "create s1"."""

    operation: str
    phase: str
    made: list[str] = []
    unfinished: list[str] = []  # those of `made` that are worth nothing if the disks have changed over and no more
    inside: list[tuple[str, str]] = []  # (image, name) of snapshots that are being put inside
    redo: Redo = msgspec.field(default_factory=Redo)

    def to_bytes(self) -> bytes:
        return json.dumps(msgspec.to_builtins(self), indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Journal:
        """`InvalidArgument` for anything that `to_bytes` would not write."""
        try:
            found: Any = json.loads(data)
            journal = msgspec.convert(found, cls)
        except (ValueError, RecursionError, msgspec.ValidationError) as error:
            raise InvalidArgument(f"not a journal of snapshots: {error}") from error
        if journal.phase not in ("prepare", "ready", "commit"):
            raise InvalidArgument(f"not a journal of snapshots: phase {journal.phase!r}")
        return journal
