"""pool-event: what happens to storage pools, as it happens."""

from __future__ import annotations

from kvik.cli.events import stamp, wait_for
from kvik.cli.options import FLAG, NUMBER, TEXT, Option, UsageError, Verb
from kvik.cli.pool_common import pool_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.events import AnyEvent


def pool_event(ctx: Context, options: Options) -> int:
    from kvik.client.events import POOL_EVENT_IDS, PoolEvent

    if options.flag("list"):
        if not ctx.put(list(POOL_EVENT_IDS)):
            for known in POOL_EVENT_IDS:
                ctx.line(known)
        return 0
    kind = options.text("event")
    if kind is None:
        raise UsageError("either --list or --event <type> is required")
    if kind not in POOL_EVENT_IDS:
        raise UsageError(f"unknown event type {kind}", remedy=f"one of: {', '.join(POOL_EVENT_IDS)}")
    seconds = options.number("timeout")
    if seconds is not None and seconds < 1:
        raise UsageError(f"invalid timeout '{seconds}'")
    name, timestamp = options.text("pool"), options.flag("timestamp")
    ctx.connection.register_pool(kind, pool_of(ctx, name) if name else None)

    def show(event: AnyEvent) -> None:
        if not isinstance(event, PoolEvent):
            return
        text, when = str(event), stamp() if timestamp else ""
        if ctx.json:  # one object a line: a stream has no end to close a list at
            import json

            facts = {"event": event.kind, "pool": event.name, "uuid": event.uuid.hex(), "detail": text}
            ctx.write(json.dumps(facts | ({"time": when.rstrip(": ")} if when else {})) + "\n")
        else:
            ctx.line(f"{when}event '{event.kind}' for storage pool {event.name}" + (f": {text}" if text else ""))
        ctx.stdout.flush()

    return wait_for(ctx, show, loop=options.flag("loop"), seconds=seconds)


COMMANDS = {
    "pool-event": Verb(
        pool_event,
        "List event types, or wait for storage pool events to occur",
        Option("pool", TEXT, "filter by storage pool name or uuid", complete="pool"),
        Option("event", TEXT, "which event type to wait for", complete=("lifecycle", "refresh")),
        Option("loop", FLAG, "loop until timeout or interrupt, rather than one-shot"),
        Option("timeout", NUMBER, "timeout seconds"),
        Option("list", FLAG, "list valid event types"),
        Option("timestamp", FLAG, "show timestamp for each printed event"),
    )
}
