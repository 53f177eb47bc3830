"""Snapshots on disk. All functions block; the daemon may be killed between any two steps.

<data>/qemu/snapshot/NAME/SNAPSHOT.xml   one document a snapshot, as libvirt keeps them; secrets included
<data>/qemu/snapshot/NAME/tree.json      which one is current, and which image files snapshots made
<data>/qemu/snapshot/NAME/journal        the operation under way (see `journal`); gone when there is none
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kvik.conf.snapshot import Snapshot, parse_snapshot
from kvik.errors import KvikError
from kvik.host import documents, files
from kvik.host.documents import SUFFIX, check_document_name, set_aside
from kvik.manager.snapshots.journal import Journal, Redo
from kvik.manager.snapshots.tree import Tree

__all__ = ["SnapshotStore", "check_snapshot_name"]

JOURNAL_LIMIT = 64 << 20  # bytes: it holds documents of a whole subtree
MAX_SNAPSHOTS = 16384  # the wire's limit of a list


def check_snapshot_name(name: str) -> str:
    """The name if a snapshot can have it, else `InvalidArgument`."""
    return check_document_name(name, "snapshot")


class SnapshotStore:
    """The directory of one machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _document(self, name: str) -> Path:
        return self.directory / f"{check_snapshot_name(name)}{SUFFIX}"

    def load(self) -> tuple[Tree, list[str]]:
        """What is there, and warnings of what was set aside. `HostError` only if the directory cannot be read."""
        tree = Tree()
        if not self.directory.is_dir():
            return tree, []
        files.remove_temporaries(self.directory, older_than=0)
        tree.snapshots, warnings = documents.load_all(self.directory, SUFFIX, MAX_SNAPSHOTS, "snapshot", parse_snapshot)
        for snapshot in tree.snapshots.values():
            self.adopt(snapshot)
        try:
            self._load_facts(tree)
        except (ValueError, KvikError) as error:
            warnings.append(set_aside(self.directory / "tree.json", str(error)))
        try:
            data = files.try_read_file(self.directory / "journal", limit=JOURNAL_LIMIT)
            tree.journal = Journal.from_bytes(data) if data is not None else None
        except KvikError as error:
            warnings.append(set_aside(self.directory / "journal", str(error)))
        return tree, warnings

    def adopt(self, snapshot: Snapshot) -> None:
        """The machine may have had another name when the document was written, and the directory with it."""
        taken = snapshot.taken
        if taken is not None:
            taken.nvram, taken.tpm, taken.memory = map(self._here, (taken.nvram, taken.tpm, taken.memory))
        if snapshot.memory is not None:
            snapshot.memory.file = self._here(snapshot.memory.file)
        for document in (snapshot.domain, snapshot.inactive):
            if document is not None:
                document.name = self.directory.name

    def _here(self, path: str | None) -> str | None:
        """Where a file lies that was made in this directory, whatever it was called then."""
        if path is None or Path(path).parent.parent != self.directory.parent:
            return path
        return str(self.directory / Path(path).name)

    def _load_facts(self, tree: Tree) -> None:
        data = files.try_read_file(self.directory / "tree.json", limit=JOURNAL_LIMIT)
        facts = json.loads(data) if data is not None else {}
        if not isinstance(facts, dict):
            raise ValueError("not an object")
        for name in ("made", "originals"):
            paths = facts.get(name, [])
            if not isinstance(paths, list) or not all(isinstance(path, str) and path[:1] == "/" for path in paths):
                raise ValueError(f"{name} is no list of paths")
            setattr(tree, name, set(paths))
        for place in facts.get("inside", []):
            if not isinstance(place, list) or len(place) != 2 or not all(isinstance(part, str) for part in place):
                raise ValueError("inside is no list of images and names")
            tree.inside.add((place[0], place[1]))
        current = facts.get("current")
        tree.current = current if isinstance(current, str) and current in tree.snapshots else None

    # an operation

    def write_journal(self, journal: Journal) -> None:
        files.ensure_directory(self.directory, durable=True)
        files.atomic_write(self.directory / "journal", journal.to_bytes())

    def carry_out(self, redo: Redo) -> None:
        """Make the documents say what `redo` does; the journal of it is on disk, and stays there."""
        for name, text in redo.write.items():
            files.atomic_write(self._document(name), text.encode())
        for name in redo.remove:
            documents.remove(self._document(name))
        facts = {
            "current": redo.current,
            "made": sorted(redo.made),
            "originals": sorted(redo.originals),
            "inside": sorted(redo.inside),
        }
        files.atomic_write(self.directory / "tree.json", json.dumps(facts, indent=1).encode())

    def end_journal(self, *, last: bool = False) -> None:
        """The operation is over; `last`: no snapshot is left, and nothing is to be remembered."""
        files.remove_file(self.directory / "journal")
        if last:
            self.forget()

    def forget(self) -> None:
        """All documents go; images stay."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def undo(self, journal: Journal) -> None:
        """Take away what an operation made before it was sure of itself."""
        for path in journal.made:
            if Path(path).is_dir() and not Path(path).is_symlink():  # a copy of a TPM's state
                shutil.rmtree(path, ignore_errors=True)
            else:
                files.remove_file(path)
        files.remove_file(self.directory / "journal")
