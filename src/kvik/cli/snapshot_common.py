"""What the verbs of snapshots share."""

from __future__ import annotations

from kvik.cli.options import FLAG, TEXT, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain
    from kvik.client.snapshot import Snapshot

NAME = Option("snapshotname", TEXT, "snapshot name", complete="snapshot")
CREATE_REDEFINE, CREATE_CURRENT = 1 << 0, 1 << 1
XML_SECURE = 1


def current(help: str) -> Option:
    return Option("current", FLAG, help)


def snapshot_of(ctx: Context, options: Options, domain: Domain, *, both: bool = False) -> Snapshot:
    """The one that --snapshotname or --current means; `both`: --current says something else beside the name."""
    from kvik.client import snapshot

    name = options.text("snapshotname")
    if name is not None and options.flag("current") and not both:
        raise UsageError("--snapshotname and --current are mutually exclusive")
    if name is not None:
        return snapshot.lookup(domain, name)
    if options.flag("current"):
        return snapshot.current(domain)
    raise UsageError("--snapshotname or --current is required")
