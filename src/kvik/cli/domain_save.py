"""save, restore, save-image-*, managedsave*: machines put aside with their memory."""

from __future__ import annotations

from kvik.cli import xml_verbs
from kvik.cli.common import ACTIVE, DOMAIN, chosen, exclusive
from kvik.cli.options import DATA, FLAG, TEXT, Option, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain

# virDomainSaveRestoreFlags
FLAGS = {"bypass-cache": 1 << 0, "running": 1 << 1, "paused": 1 << 2, "reset-nvram": 1 << 3}
SECURE = 1  # virDomainSaveImageXMLFlags
LOOK = 0.1  # seconds between two looks at how far it is


def _bits(options: Options, *names: str) -> int:
    exclusive(options, ("running", "paused"))
    return chosen(options, {name: FLAGS[name] for name in names})


def _place(path: str) -> str:
    """As the daemon, which has another working directory, must be told."""
    import os

    return os.path.abspath(path)  # noqa: PTH100


def _document(ctx: Context, options: Options) -> str | None:
    path = options.text("xml")
    return ctx.read_file(path) if path is not None else None


def save(ctx: Context, options: Options) -> int:
    from kvik.client import saved

    domain, path = ctx.domain(options.data("domain")), options.data("file")
    bits, xml = _bits(options, "bypass-cache", "running", "paused"), _document(ctx, options)
    ctx.doing = f"Failed to save domain '{domain.name}' to {path}"
    _watched(ctx, options, domain, "Save", lambda: saved.save(domain, _place(path), xml, bits))
    ctx.extra()
    ctx.say(f"Domain '{domain.name}' saved to {path}")
    return 0


def _watched(ctx: Context, options: Options, domain: Domain, label: str, work: Callable[[], None]) -> None:
    """With --verbose how far it is, asked for by a connection of its own: this one waits for the answer."""
    if not options.flag("verbose"):
        work()
        return
    import threading

    from kvik.cli.progress import Progress
    from kvik.errors import KvikError

    over = threading.Event()
    with Progress(ctx.stderr, quiet=ctx.quiet) as progress:

        def watch() -> None:
            try:
                with ctx.another_connection() as connection:
                    looked = connection.lookup_name(domain.name)
                    while not over.wait(LOOK):
                        figures = looked.job_stats()[1]
                        total = int(figures.get("data_total", 0))
                        if total:
                            progress.bar(label, int(figures["data_processed"]), total, is_bytes=True)
            except KvikError:
                pass  # it goes on unseen

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            work()
        finally:
            over.set()
            watcher.join()
    ctx.line(f"{label}: [100 %]")


def restore(ctx: Context, options: Options) -> int:
    from kvik.client import saved

    path = options.data("file")
    bits = _bits(options, "bypass-cache", "running", "paused", "reset-nvram")
    xml = _document(ctx, options)
    ctx.doing = f"Failed to restore domain from {path}"
    saved.restore(ctx.connection, _place(path), xml, bits)
    ctx.say(f"Domain restored from {path}")
    return 0


def save_image_dumpxml(ctx: Context, options: Options) -> int:
    from kvik.client import saved

    bits = SECURE if options.flag("security-info") else 0
    return xml_verbs.show(ctx, options, saved.image_xml(ctx.connection, _place(options.data("file")), bits))


def save_image_define(ctx: Context, options: Options) -> int:
    from kvik.client import saved

    path, bits = options.data("file"), _bits(options, "running", "paused")
    text = ctx.read_file(options.data("xml"))
    ctx.doing = f"Failed to update {path}"
    saved.define_image(ctx.connection, _place(path), text, bits)
    ctx.say(f"State file {path} updated.")
    return 0


def save_image_edit(ctx: Context, options: Options) -> int:
    from kvik.client import saved

    path, bits = options.data("file"), _bits(options, "running", "paused")

    def define(text: str, validate: bool) -> str:
        saved.define_image(ctx.connection, _place(path), text, bits)
        return f"state file {path}"

    return xml_verbs.edit(
        ctx,
        f"saved image {path}",
        lambda: saved.image_xml(ctx.connection, _place(path), SECURE),
        define,
        validate=False,
        edited="edited.",
    )


def managedsave(ctx: Context, options: Options) -> int:
    from kvik.client import saved

    domain = ctx.domain(options.data("domain"))
    bits = _bits(options, "bypass-cache", "running", "paused")
    ctx.doing = f"Failed to save domain '{domain.name}' state"
    _watched(ctx, options, domain, "Managedsave", lambda: saved.managed_save(domain, bits))
    ctx.extra()
    ctx.say(f"Domain '{domain.name}' state saved by libvirt")
    return 0


def managedsave_remove(ctx: Context, options: Options) -> int:
    from kvik.client import saved

    domain = ctx.domain(options.data("domain"))
    if domain.has_managed_save():
        ctx.doing = f"Failed to remove managed save image for domain '{domain.name}'"
        saved.remove_managed(domain)
        ctx.say(f"Removed managedsave image for domain '{domain.name}'")
    else:
        ctx.say(f"Domain '{domain.name}' has no manage save image; removal skipped")
    ctx.blank = False
    return 0


def managedsave_dumpxml(ctx: Context, options: Options) -> int:
    from kvik.client import saved

    bits = SECURE if options.flag("security-info") else 0
    return xml_verbs.show(ctx, options, saved.managed_xml(ctx.domain(options.data("domain")), bits))


def managedsave_define(ctx: Context, options: Options) -> int:
    from kvik.client import saved

    domain, bits = ctx.domain(options.data("domain")), _bits(options, "running", "paused")
    text = ctx.read_file(options.data("xml"))
    ctx.doing = f"Failed to update {domain.name} XML configuration"
    saved.define_managed(domain, text, bits)
    ctx.say(f"Managed save state file of domain '{domain.name}' updated.")
    return 0


def managedsave_edit(ctx: Context, options: Options) -> int:
    from kvik.client import saved

    domain, bits = ctx.domain(options.data("domain")), _bits(options, "running", "paused")

    def define(text: str, validate: bool) -> str:
        saved.define_managed(domain, text, bits)
        return f"managed save image of Domain '{domain.name}'"

    return xml_verbs.edit(
        ctx,
        f"managed save image of domain '{domain.name}'",
        lambda: saved.managed_xml(domain, SECURE),
        define,
        validate=False,
    )


SECURITY = Option("security-info", FLAG, "include security sensitive information in XML dump")
NEW_XML = Option("xml", TEXT, "filename containing updated XML for the target", complete="file", named_only=True)
XML = Option("xml", DATA, "filename containing updated XML for the target", complete="file")


def _after(when: str) -> tuple[Option, Option]:
    return (
        Option("running", FLAG, f"set domain to be running on {when}"),
        Option("paused", FLAG, f"set domain to be paused on {when}"),
    )


VERBOSE = Option("verbose", FLAG, "display the progress of save")

COMMANDS = {
    "save": Verb(
        save,
        "Save the RAM state of a running domain.",
        ACTIVE,
        Option("file", DATA, "where to save the data", complete="file"),
        Option("bypass-cache", FLAG, "avoid file system cache when saving"),
        NEW_XML,
        *_after("restore"),
        VERBOSE,
    ),
    "restore": Verb(
        restore,
        "Restore a domain.",
        Option("file", DATA, "the state to restore", complete="file"),
        Option("bypass-cache", FLAG, "avoid file system cache when restoring"),
        NEW_XML,
        Option("running", FLAG, "restore domain into running state"),
        Option("paused", FLAG, "restore domain into paused state"),
        Option("reset-nvram", FLAG, "re-initialize NVRAM from its pristine template"),
    ),
    "save-image-dumpxml": Verb(
        save_image_dumpxml,
        "Dump XML of domain information for a saved state file to stdout.",
        Option("file", DATA, "saved state file to read", complete="file"),
        SECURITY,
        *xml_verbs.XPATH,
    ),
    "save-image-define": Verb(
        save_image_define,
        "Replace the domain XML associated with a saved state file",
        Option("file", DATA, "saved state file to modify", complete="file"),
        XML,
        *_after("restore"),
    ),
    "save-image-edit": Verb(
        save_image_edit,
        "Edit the domain XML associated with a saved state file",
        Option("file", DATA, "saved state file to edit", complete="file"),
        *_after("restore"),
    ),
    "managedsave": Verb(
        managedsave,
        "Save and destroy a running domain, so it can be restarted from\nthe same state at a later time.  When 'start' "
        "is next run for the domain, it will automatically\nbe started from this saved state.",
        ACTIVE,
        Option("bypass-cache", FLAG, "avoid file system cache when saving"),
        *_after("next start"),
        VERBOSE,
    ),
    "managedsave-remove": Verb(managedsave_remove, "Remove an existing managed save state file from a domain", DOMAIN),
    "managedsave-dumpxml": Verb(
        managedsave_dumpxml,
        "Dump XML of domain information for a managed save state file to stdout.",
        DOMAIN,
        SECURITY,
        *xml_verbs.XPATH,
    ),
    "managedsave-define": Verb(
        managedsave_define,
        "Replace the domain XML associated with a managed save state file",
        DOMAIN,
        XML,
        *_after("start"),
    ),
    "managedsave-edit": Verb(
        managedsave_edit, "Edit the domain XML associated with the managed save state file", DOMAIN, *_after("start")
    ),
}
