"""What the verbs of checkpoints share."""

from __future__ import annotations

from kvik.cli.options import TEXT, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.options import Options
    from kvik.client import Domain
    from kvik.client.checkpoint import Checkpoint

NAME = Option("checkpointname", TEXT, "checkpoint name", complete="checkpoint")
XML_SECURE, XML_NO_DOMAIN, XML_SIZE = 1 << 0, 1 << 1, 1 << 2  # virDomainCheckpointXMLFlags


def checkpoint_of(options: Options, domain: Domain) -> Checkpoint:
    """The one that --checkpointname means."""
    from kvik.client import checkpoint

    name = options.text("checkpointname")
    if name is None:
        raise UsageError("--checkpointname is required")
    return checkpoint.lookup(domain, name)
