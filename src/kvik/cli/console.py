"""console: this terminal becomes the machine's."""

from __future__ import annotations

from kvik.cli import flags, term
from kvik.cli.common import ACTIVE, chosen
from kvik.cli.options import FLAG, TEXT, Option, UsageError, Verb
from kvik.errors import OperationInvalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain


def escape_byte(text: str) -> bytes:
    """The byte of `^]`, `^A` or a plain character."""
    if len(text) == 2 and text[0] == "^" and "?" <= text[1].upper() <= "_":
        return bytes([ord(text[1].upper()) ^ 0x40])
    if len(text.encode()) == 1:
        return text.encode()
    raise UsageError(f"Invalid string '{text}' for escape sequence", remedy="write it like ^] or ^A")


def attach(ctx: Context, domain: Domain, device: str | None = None, bits: int = 0, *, backlog: bytes = b"") -> int:
    """Carry bytes until the escape character, the machine's end, or the end of input.

    `backlog` is what the guest printed before, to be shown first.
    """
    from kvik.client.stream import raw_terminal, write_all

    escape = escape_byte(ctx.escape)
    ctx.doing = ""
    if not term.is_terminal(ctx.stdin):
        raise OperationInvalid(
            "Cannot run interactive console without a controlling TTY",
            remedy=f"'kvik exec {domain.name} -- COMMAND' needs none",
        )
    ctx.extra(f"Connected to domain '{domain.name}'")
    shown = ctx.escape if len(ctx.escape) > 1 else f"'{ctx.escape}'"
    ctx.extra(f"Escape character is {shown}" + (f" (Ctrl + {ctx.escape[1]})" if len(ctx.escape) == 2 else ""))
    ctx.stdout.flush()
    with domain.console(device, bits) as stream, raw_terminal(ctx.stdin.fileno()):
        write_all(ctx.stdout.fileno(), backlog)
        how = stream.pump(ctx.stdin.fileno(), ctx.stdout.fileno(), escape)
    ctx.extra()
    if how == "escape":
        ctx.extra(f"'{domain.name}' goes on; 'kvik console {domain.name}' comes back")
    return 0


def console(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    if domain.id <= 0:
        raise OperationInvalid("The domain is not running", remedy=f"'kvik start --console {domain.name}' starts it")
    return attach(
        ctx,
        domain,
        options.text("devname"),
        chosen(options, {"force": flags.CONSOLE_FORCE, "safe": flags.CONSOLE_SAFE}),
    )


COMMANDS = {
    "console": Verb(
        console,
        "Connect the virtual serial console for the guest",
        ACTIVE,
        Option("devname", TEXT, "character device name"),
        Option("force", FLAG, "force console connection (disconnect already connected sessions)"),
        Option("safe", FLAG, "only connect if safe console handling is supported"),
    )
}
