"""What the verbs of snapshots and of checkpoints share: lists and trees of what comes from each other."""

from __future__ import annotations

import time

from kvik.cli.document import parse
from kvik.cli.options import UsageError
from kvik.cli.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.recorded import Recorded

__all__ = ["DESCENDANTS", "EXCLUSIVE", "ROOTS", "check", "comma_parts", "draw", "settings", "show", "show_parent"]

ROOTS = DESCENDANTS = 1 << 0  # of virDomainSnapshotListFlags and virDomainCheckpointListFlags
EXCLUSIVE = (("tree", "name"), ("parent", "roots"), ("parent", "tree"), ("roots", "tree"), ("roots", "from"))


class Row:
    """What is shown of one of them, from its document."""

    __slots__ = ("created", "item", "name", "parent", "root")

    def __init__(self, item: Recorded, xml: str) -> None:
        self.item = item
        self.name = item.name
        self.root = parse(xml)
        self.parent = self.root.findtext("parent/name")
        seconds = self.root.findtext("creationTime") or ""
        self.created = int(seconds) if seconds.isdigit() and len(seconds) < 12 else 0

    @property
    def when(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.created))


def check(options: Options, *exclusive: tuple[str, str]) -> None:
    """Options of a list that contradict each other, in virsh's words."""

    def given(name: str) -> bool:
        return options.text("from") is not None if name == "from" else options.flag(name)

    for left, right in (*EXCLUSIVE, *exclusive):
        if given(left) and given(right):
            raise UsageError(f"Options --{left} and --{right} are mutually exclusive")
    for name in ("leaves", "no-leaves"):
        if options.flag(name) and options.flag("tree"):
            raise UsageError(f"--{name} and --tree are mutually exclusive")


def show(
    ctx: Context, options: Options, found: Sequence[Recorded], start: Recorded | None, bits: int, *columns: str
) -> int:
    """The list, as names, a tree or a table. `start`: what all of them come from. `bits`: of their documents.
    `columns`: more of the table, each of the element of that name."""
    if not options.flag("topological"):
        found = sorted(found, key=lambda item: item.name.lower())
    if options.flag("name") and not ctx.json:
        for item in found:
            ctx.line(item.name)
        return 0
    if options.flag("tree"):
        rows = [Row(item, item.xml(bits)) for item in (*([start] if start is not None else []), *found)]
        names = {row.name for row in rows}
        parents = {row.name: row.parent if row.parent in names and row.item is not start else None for row in rows}
        if not ctx.put([{"name": name, "parent": parent} for name, parent in parents.items()]):
            for name, parent in parents.items():
                if parent is None:
                    ctx.document("".join(f"{line}\n" for line in draw(name, parents)))
        return 0
    with_parent = options.flag("parent")
    table = Table("Name", "Creation Time", *columns, *(["Parent"] if with_parent else []))
    for item in found:
        row = Row(item, item.xml(bits))
        more = [row.root.findtext(column.lower()) or "" for column in columns]
        table.add(row.name, row.when, *more, *([row.parent or ""] if with_parent else []))
    ctx.table(table)
    return 0


def draw(root: str, parents: dict[str, str | None]) -> list[str]:
    """The lines of a tree as virsh draws them; an empty one ends it."""
    children: dict[str | None, list[str]] = {}
    for name, parent in parents.items():
        children.setdefault(parent, []).append(name)
    lines: list[str] = []
    # A stack, not recursion: a tree may be 16384 deep. (name, indent before it, is the last of its parent's children)
    waiting = [(root, "", True)]
    while waiting:
        name, indent, last = waiting.pop()
        top = name == root
        lines.append(f"{indent}{'' if top else '+- '}{name}")
        if not top:
            indent += "  " if last else "| "
        below = children.get(name, [])
        if below:
            lines.append(f"{indent}  |")
            waiting += [(child, indent + "  ", child == below[-1]) for child in reversed(below)]
        elif last:
            lines.append(indent)
    return lines


def show_parent(ctx: Context, found: Recorded) -> int:
    parent = found.parent()
    if parent is None:
        raise found.MISSING(f"{found.KIND.lower()} '{found.name}' has no parent")
    if not ctx.put({"name": parent.name}):
        ctx.last(parent.name)
    return 0


def comma_parts(text: str) -> list[str]:
    """The parts between commas; a doubled comma is one of the text."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def settings(option: str, text: str, parts: list[str], names: tuple[str, ...], form: str) -> dict[str, str]:
    """`name=value` of each part. `form`: how it is to be written."""
    found: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name not in names or name in found:
            raise UsageError(f"unable to parse {option}: {text}", remedy=f"write {form}")
        found[name] = value
    return found
