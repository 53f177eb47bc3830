"""qemu-monitor-command and qemu-agent-command: words straight to the VMM, or to the guest's agent."""

from __future__ import annotations

from kvik.cli.common import ACTIVE, exclusive
from kvik.cli.options import FLAG, NUMBER, SOME, Option, UsageError, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

# virDomainQemuAgentCommandTimeoutValues
AGENT_BLOCK = -2
AGENT_NOWAIT = 0


def command_text(options: Options, *, json: bool) -> str:
    """The command: words joined; a bare QMP or agent command's name becomes its JSON."""
    text = " ".join(options.words("cmd")).strip()
    if json and text and not text.startswith("{"):
        import json as codec

        name, _, arguments = text.partition(" ")
        return codec.dumps({"execute": name, **({"arguments": codec.loads(arguments)} if arguments else {})})
    return text


def qemu_monitor_command(ctx: Context, options: Options) -> int:
    hmp, pretty, bare = options.flag("hmp"), options.flag("pretty"), options.flag("return-value")
    exclusive(options, ("hmp", "pretty"), ("hmp", "return-value"))
    try:
        text = command_text(options, json=not hmp)
    except ValueError as error:
        raise UsageError(f"the command's arguments are not JSON: {error}") from error
    result = ctx.domain(options.data("domain")).monitor_command(text, hmp=hmp)
    if hmp:
        if not ctx.put({"output": result}):
            ctx.document(result.rstrip("\r\n").replace("\r", ""))
        return 0
    if not (ctx.json or pretty or bare):
        ctx.document(result)
        return 0
    import json

    value = json.loads(result)
    if bare:
        if not isinstance(value, dict) or "return" not in value:
            raise UsageError("'return' member missing")
        value = value["return"]
    if not ctx.put(value):
        ctx.document(json.dumps(value, indent=2 if pretty else None))
    return 0


def qemu_agent_command(ctx: Context, options: Options) -> int:
    timeout, wait, block = options.number("timeout"), not options.flag("async"), options.flag("block")
    if sum((timeout is not None, not wait, block)) > 1:
        raise UsageError("timeout, async and block options are exclusive")
    if timeout is not None and timeout < 1:
        raise UsageError("timeout must be positive")
    how = AGENT_BLOCK if timeout is None else timeout
    if not wait:
        how = AGENT_NOWAIT
    try:
        text = command_text(options, json=True)
    except ValueError as error:
        raise UsageError(f"the command's arguments are not JSON: {error}") from error
    result = ctx.domain(options.data("domain")).agent_command(text, how)
    if result is None:
        return 0
    if not (ctx.json or options.flag("pretty")):
        ctx.document(result)
        return 0
    import json

    value = json.loads(result)
    if not ctx.put(value):
        ctx.document(json.dumps(value, indent=2))
    return 0


COMMANDS = {
    "qemu-monitor-command": Verb(
        qemu_monitor_command,
        "QEMU Monitor Command",
        ACTIVE,
        Option("hmp", FLAG, "command is in human monitor protocol"),
        Option("pretty", FLAG, "pretty-print any qemu monitor protocol output"),
        Option("return-value", FLAG, "extract the value of the 'return' key from the returned string"),
        Option("cmd", SOME, "command"),
    ),
    "qemu-agent-command": Verb(
        qemu_agent_command,
        "Run an arbitrary qemu guest agent command; use at your own risk",
        ACTIVE,
        Option("timeout", NUMBER, "timeout seconds. must be positive.", named_only=True),
        Option("async", FLAG, "execute command without waiting for timeout"),
        Option("block", FLAG, "execute command without timeout"),
        Option("pretty", FLAG, "pretty-print the output"),
        Option("cmd", SOME, "command"),
    ),
}
