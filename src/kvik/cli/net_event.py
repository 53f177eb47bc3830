"""net-event: what happens to networks, as it happens."""

from __future__ import annotations

from kvik.cli.events import named, stamp, wait_for
from kvik.cli.options import FLAG, NUMBER, TEXT, Option, UsageError, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.events import AnyEvent, NetworkEvent


def detail(event: NetworkEvent) -> str:
    if event.kind == "metadata-change":
        kind = named(event.fields["type"], "description", "title", "element")
        return f"type {kind}, uri {event.fields['nsuri'] or ''}"
    return str(event)


def net_event(ctx: Context, options: Options) -> int:
    from kvik.client.events import NETWORK_EVENT_IDS, NetworkEvent

    if options.flag("list"):
        if not ctx.put(list(NETWORK_EVENT_IDS)):
            for known in NETWORK_EVENT_IDS:
                ctx.line(known)
        return 0
    kind = options.text("event")
    if kind is None:
        raise UsageError("either --list or --event <type> is required")
    if kind not in NETWORK_EVENT_IDS:
        raise UsageError(f"unknown event type {kind}", remedy=f"one of: {', '.join(NETWORK_EVENT_IDS)}")
    seconds = options.number("timeout")
    if seconds is not None and seconds < 1:
        raise UsageError(f"invalid timeout '{seconds}'")
    name, timestamp = options.text("network"), options.flag("timestamp")
    ctx.connection.register_network(kind, ctx.network(name) if name else None)

    def show(event: AnyEvent) -> None:
        if not isinstance(event, NetworkEvent):
            return
        text, when = detail(event), stamp() if timestamp else ""
        if ctx.json:  # one object a line: a stream has no end to close a list at
            import json

            facts = {"event": event.kind, "network": event.name, "uuid": event.uuid.hex(), "detail": text}
            ctx.write(json.dumps(facts | ({"time": when.rstrip(": ")} if when else {})) + "\n")
        else:
            ctx.line(f"{when}event '{event.kind}' for network {event.name}: {text}")
        ctx.stdout.flush()

    return wait_for(ctx, show, loop=options.flag("loop"), seconds=seconds)


COMMANDS = {
    "net-event": Verb(
        net_event,
        "List event types, or wait for network events to occur",
        Option("network", TEXT, "filter by network name or uuid", complete="network"),
        Option("event", TEXT, "which event type to wait for", complete="network-event"),
        Option("loop", FLAG, "loop until timeout or interrupt, rather than one-shot"),
        Option("timeout", NUMBER, "timeout seconds"),
        Option("list", FLAG, "list valid event types"),
        Option("timestamp", FLAG, "show timestamp for each printed event"),
    )
}
