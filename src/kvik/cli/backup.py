"""backup-begin, backup-dumpxml: backups of a running machine's disks. Their end is domjobinfo's and domjobabort's."""

from __future__ import annotations

from kvik.cli import xml_verbs
from kvik.cli.common import DOMAIN
from kvik.cli.options import FLAG, TEXT, Option, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

REUSE_EXTERNAL = 1 << 0  # virDomainBackupBeginFlags


def backup_begin(ctx: Context, options: Options) -> int:
    from kvik.client import checkpoint

    path, checkpoint_path = options.text("backupxml"), options.text("checkpointxml")
    domain = ctx.domain(options.data("domain"))
    xml = "<domainbackup/>" if path is None else ctx.read_file(path)
    checkpoint_xml = None if checkpoint_path is None else ctx.read_file(checkpoint_path)
    checkpoint.backup_begin(domain, xml, checkpoint_xml, REUSE_EXTERNAL if options.flag("reuse-external") else 0)
    ctx.say("Backup started")
    return 0


def backup_dumpxml(ctx: Context, options: Options) -> int:
    from kvik.client import checkpoint

    return xml_verbs.show(ctx, options, checkpoint.backup_xml(ctx.domain(options.data("domain"))))


COMMANDS = {
    "backup-begin": Verb(
        backup_begin,
        "Use XML to start a full or incremental disk backup of a live domain, optionally creating a checkpoint",
        DOMAIN,
        Option("backupxml", TEXT, "domain backup XML", complete="file"),
        Option("checkpointxml", TEXT, "domain checkpoint XML", complete="file"),
        Option("reuse-external", FLAG, "reuse files provided by caller"),
    ),
    "backup-dumpxml": Verb(backup_dumpxml, "Backup Dump XML", DOMAIN, *xml_verbs.XPATH),
}
