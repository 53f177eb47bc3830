"""create, start, shutdown, reboot, reset, destroy, suspend, resume."""

from __future__ import annotations

from kvik.cli import flags
from kvik.cli.common import ACTIVE, INACTIVE, chosen
from kvik.cli.needs import with_qemu
from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError, Verb
from kvik.errors import OperationInvalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

START_FLAGS = {
    "paused": flags.START_PAUSED,
    "autodestroy": flags.START_AUTODESTROY,
    "reset-nvram": flags.START_RESET_NVRAM,
}


def create(ctx: Context, options: Options) -> int:
    path = options.data("file")
    ctx.doing = f"Failed to create domain from {path}"
    bits = chosen(options, {**START_FLAGS, "validate": flags.START_VALIDATE})
    text = ctx.read_file(path)
    domain = with_qemu(ctx, lambda: ctx.connection.create(text, bits))
    ctx.say(f"Domain '{domain.name}' created from {path}")
    if options.flag("console"):
        from kvik.cli.console import attach

        return attach(ctx, domain)
    return 0


def start(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    if domain.id > 0:
        raise OperationInvalid("Domain is already active", remedy=f"'kvik console {domain.name}' connects to it")
    ctx.doing = f"Failed to start domain '{domain.name}'"
    table = {**START_FLAGS, "bypass-cache": flags.START_BYPASS_CACHE, "force-boot": flags.START_FORCE_BOOT}
    bits = chosen(options, table)
    with_qemu(ctx, lambda: domain.start(bits))
    ctx.say(f"Domain '{domain.name}' started")
    if options.flag("console"):
        from kvik.cli.console import attach

        return attach(ctx, domain)
    return 0


def power_mode(options: Options) -> int:
    """The bits of `--mode acpi,agent`."""
    text = options.text("mode")
    bits = 0
    for mode in text.split(",") if text else ():
        if mode not in flags.POWER_MODES:
            raise UsageError(
                f"Unknown mode {mode} value, expecting 'acpi', 'agent', 'initctl', 'signal', or 'paravirt'"
            )
        bits |= flags.POWER_MODES[mode]
    return bits


def shutdown(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    mode = power_mode(options)
    ctx.doing = f"Failed to shutdown domain '{domain.name}'"
    domain.shutdown(mode)
    ctx.say(f"Domain '{domain.name}' is being shutdown")
    return 0


def reboot(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    mode = power_mode(options)
    ctx.doing = f"Failed to reboot domain '{domain.name}'"
    domain.reboot(mode)
    ctx.say(f"Domain '{domain.name}' is being rebooted")
    return 0


def reset(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Failed to reset domain '{domain.name}'"
    domain.reset()
    ctx.say(f"Domain '{domain.name}' was reset")
    return 0


def destroy(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Failed to destroy domain '{domain.name}'"
    domain.destroy(
        chosen(options, {"graceful": flags.DESTROY_GRACEFUL, "remove-logs": flags.DESTROY_REMOVE_LOGS}),
    )
    ctx.say(f"Domain '{domain.name}' destroyed")
    return 0


def suspend(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Failed to suspend domain '{domain.name}'"
    domain.suspend()
    ctx.say(f"Domain '{domain.name}' suspended")
    return 0


def resume(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Failed to resume domain '{domain.name}'"
    domain.resume()
    ctx.say(f"Domain '{domain.name}' resumed")
    return 0


CONSOLE = Option("console", FLAG, "attach to console after creation")
PAUSED = Option("paused", FLAG, "leave the guest paused after creation")
AUTODESTROY = Option("autodestroy", FLAG, "automatically destroy the guest when kvik disconnects")
RESET_NVRAM = Option("reset-nvram", FLAG, "re-initialize NVRAM from its pristine template")
MODE = Option("mode", TEXT, "shutdown mode: acpi|agent|initctl|signal|paravirt", complete=tuple(flags.POWER_MODES))

COMMANDS = {
    "create": Verb(
        create,
        "Create a domain.",
        Option("file", DATA, "file containing an XML domain description", complete="file"),
        CONSOLE,
        PAUSED,
        AUTODESTROY,
        Option("validate", FLAG, "validate the XML against the schema"),
        RESET_NVRAM,
    ),
    "start": Verb(
        start,
        "Start a domain, either from the last managedsave state,\nor via a fresh boot if there is none.",
        INACTIVE,
        CONSOLE,
        PAUSED,
        AUTODESTROY,
        Option("bypass-cache", FLAG, "avoid file system cache when loading"),
        Option("force-boot", FLAG, "force fresh boot by discarding any managed save"),
        RESET_NVRAM,
    ),
    "shutdown": Verb(shutdown, "Run shutdown in the target domain.", ACTIVE, MODE),
    "reboot": Verb(reboot, "Run a reboot command in the target domain.", ACTIVE, MODE),
    "reset": Verb(reset, "Reset the target domain as if by power button", ACTIVE),
    "destroy": Verb(
        destroy,
        "Forcefully stop a given domain, but leave its resources intact.",
        ACTIVE,
        Option("graceful", FLAG, "terminate gracefully"),
        Option("remove-logs", FLAG, "remove domain logs"),
    ),
    "suspend": Verb(suspend, "Suspend a running domain.", ACTIVE),
    "resume": Verb(resume, "Resume a previously suspended domain.", ACTIVE),
}
