"""define, undefine, autostart, domrename: what is kept on disk about a machine."""

from __future__ import annotations

import contextlib

from kvik.cli import flags
from kvik.cli.common import DOMAIN, INACTIVE, chosen
from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError, Verb
from kvik.errors import KvikError, OperationInvalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain

DOCUMENT_MESSAGES = 1  # of DOMAIN_GET_MESSAGES: what the document warns of

UNDEFINE_FLAGS = {
    "managed-save": flags.UNDEFINE_MANAGED_SAVE,
    "snapshots-metadata": flags.UNDEFINE_SNAPSHOTS_METADATA,
    "checkpoints-metadata": flags.UNDEFINE_CHECKPOINTS_METADATA,
    "nvram": flags.UNDEFINE_NVRAM,
    "keep-nvram": flags.UNDEFINE_KEEP_NVRAM,
    "tpm": flags.UNDEFINE_TPM,
    "keep-tpm": flags.UNDEFINE_KEEP_TPM,
}


def define(ctx: Context, options: Options) -> int:
    path = options.data("file")
    ctx.doing = f"Failed to define domain from {path}"
    domain = ctx.connection.define(ctx.read_file(path), flags=flags.DEFINE_VALIDATE if options.flag("validate") else 0)
    ctx.say(f"Domain '{domain.name}' defined from {path}")
    warn_of_document(ctx, domain)
    return 0


def warn_of_document(ctx: Context, domain: Domain) -> None:
    """What the document says that kvik does not understand: kept, but without effect."""
    with contextlib.suppress(KvikError):  # another daemon may not know the call
        for message in domain.messages(DOCUMENT_MESSAGES):
            ctx.warn(f"warning: {message}")


def undefine(ctx: Context, options: Options) -> int:
    bits = chosen(options, UNDEFINE_FLAGS)
    for keep, remove in (("keep-nvram", "nvram"), ("keep-tpm", "tpm")):
        if options.flag(keep) and options.flag(remove):
            raise UsageError(f"Options --{remove} and --{keep} are mutually exclusive")
    wanted, everything = options.text("storage"), options.flag("remove-all-storage")
    if wanted is not None and everything:
        raise UsageError("Options --storage and --remove-all-storage are mutually exclusive")
    for name in ("wipe-storage", "delete-storage-volume-snapshots"):
        if options.flag(name) and wanted is None and not everything:
            raise UsageError(f"--{name} requires --storage or --remove-all-storage")
    domain = ctx.domain(options.data("domain"))
    volumes = []
    if wanted is not None or everything:
        from kvik.cli import domain_storage

        volumes = domain_storage.volumes_of(ctx, domain, wanted)
    ctx.doing = f"Failed to undefine domain '{domain.name}'"
    try:
        domain.undefine(bits)
    except OperationInvalid as error:
        if "managed save" in error.message:
            ctx.doing = ""  # virsh looks for one itself before it begins
        raise
    ctx.say(f"Domain '{domain.name}' has been undefined")
    if not volumes:
        return 0
    return domain_storage.remove(
        ctx,
        volumes,
        wipe=options.flag("wipe-storage"),
        with_snapshots=options.flag("delete-storage-volume-snapshots"),
    )


def autostart(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    word = "unmark" if options.flag("disable") else "mark"
    ctx.doing = f"failed to {word} domain '{domain.name}' as autostarted"
    domain.set_autostart(word == "mark")
    ctx.say(f"Domain '{domain.name}' {word}ed as autostarted")
    return 0


def domrename(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    domain.rename(options.data("new-name"))
    ctx.say("Domain successfully renamed")
    return 0


COMMANDS = {
    "define": Verb(
        define,
        "Define a domain.",
        Option("file", DATA, "file containing an XML domain description", complete="file"),
        Option("validate", FLAG, "validate the XML against the schema"),
    ),
    "undefine": Verb(
        undefine,
        "Undefine an inactive domain, or convert persistent to transient.",
        DOMAIN,
        Option("managed-save", FLAG, "remove domain managed state file"),
        Option("storage", TEXT, "remove associated storage volumes (comma separated list of targets or source paths)"),
        Option("remove-all-storage", FLAG, "remove all associated storage volumes, but no media and shared ones"),
        Option("delete-storage-volume-snapshots", FLAG, "delete snapshots associated with volume(s)"),
        Option("wipe-storage", FLAG, "wipe data on the removed volumes"),
        Option("snapshots-metadata", FLAG, "remove all domain snapshot metadata (vm must be inactive)"),
        Option("checkpoints-metadata", FLAG, "remove all domain checkpoint metadata (vm must be inactive)"),
        Option("nvram", FLAG, "remove nvram file"),
        Option("keep-nvram", FLAG, "keep nvram file"),
        Option("tpm", FLAG, "remove TPM state"),
        Option("keep-tpm", FLAG, "keep TPM state"),
    ),
    "autostart": Verb(
        autostart,
        "Configure a domain to be automatically started at boot.",
        DOMAIN,
        Option("disable", FLAG, "disable autostarting"),
    ),
    "domrename": Verb(
        domrename,
        "Rename an inactive domain.",
        INACTIVE,
        Option("new-name", DATA, "new domain name"),
    ),
}
