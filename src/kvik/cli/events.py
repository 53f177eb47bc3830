"""event: what happens to machines, as it happens."""

from __future__ import annotations

import time

from kvik.cli.options import FLAG, NUMBER, TEXT, Option, UsageError, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.events import AnyEvent, DomainEvent

    Fields = Mapping[str, Any]


def named(number: object, *names: str) -> str:
    return names[number] if isinstance(number, int) and 0 <= number < len(names) else str(number)


IO_ACTIONS = ("none", "pause", "report")
JOB_TYPES = ("unknown", "Block Pull", "Block Copy", "Block Commit", "Active Block Commit", "Backup")
JOB_STATES = ("completed", "failed", "canceled", "ready")

# kind: its fields in virsh's words
DETAILS: dict[str, Callable[[Fields], str]] = {
    "rtc-change": lambda f: f"{f['offset']}",
    "watchdog": lambda f: named(f["action"], "none", "pause", "reset", "poweroff", "shutdown", "debug", "inject-nmi"),
    "io-error": lambda f: f"{f['srcPath']} ({f['devAlias']}) {named(f['action'], *IO_ACTIONS)}",
    "io-error-reason": lambda f: (
        f"{f['srcPath']} ({f['devAlias']}) {named(f['action'], *IO_ACTIONS)} due to {f['reason']}"
    ),
    "graphics": lambda f: f"{named(f['phase'], 'connect', 'initialize', 'disconnect')} {f['authScheme']}",
    "block-job": lambda f: f"{named(f['type'], *JOB_TYPES)} for {f['path']} {named(f['status'], *JOB_STATES)}",
    "block-job-2": lambda f: f"{named(f['type'], *JOB_TYPES)} for {f['dst']} {named(f['status'], *JOB_STATES)}",
    "disk-change": lambda f: (
        f"disk {f['devAlias']} {f['oldSrcPath'] or ''} -> {f['newSrcPath'] or ''}: "
        f"{named(f['reason'], 'changed', 'dropped')}"
    ),
    "tray-change": lambda f: f"disk {f['devAlias']}: {named(f['reason'], 'opened', 'closed')}",
    "balloon-change": lambda f: f"{f['actual']}KiB",
    "device-removed": lambda f: str(f["devAlias"]),
    "device-added": lambda f: str(f["devAlias"]),
    "device-removal-failed": lambda f: str(f["devAlias"]),
    "agent-lifecycle": lambda f: (
        f"state: '{named(f['state'], 'unknown', 'connected', 'disconnected')}' "
        f"reason: '{named(f['reason'], 'unknown', 'domain started', 'channel event')}'"
    ),
    "migration-iteration": lambda f: f"iteration: '{f['iteration']}'",
    "metadata-change": lambda f: f"type {named(f['type'], 'description', 'title', 'element')}, uri {f['nsuri'] or ''}",
    "block-threshold": lambda f: f"dev: {f['dev']}({f['path'] or '-'}) {f['threshold']} {f['excess']}",
    "memory-device-size-change": lambda f: f"alias: '{f['alias']}' size: {f['size']}",
}


def details(event: DomainEvent) -> str:
    if event.kind == "lifecycle":
        return str(event)
    formatter = DETAILS.get(event.kind)
    try:
        return formatter(event.fields) if formatter else str(event)
    except (KeyError, TypeError):  # a daemon that sends other fields
        return str(event)


def stamp() -> str:
    """The time of now, as libvirt writes it in logs: UTC with milliseconds."""
    now = time.time()
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03}+0000: "


def event_line(event: DomainEvent, *, timestamp: bool) -> str:
    text = details(event)
    return f"{stamp() if timestamp else ''}event '{event.kind}' for domain '{event.domain.name}'" + (
        f": {text}" if text else ""
    )


def event(ctx: Context, options: Options) -> int:
    from kvik.client.events import EVENT_IDS, DomainEvent

    if options.flag("list"):
        if not ctx.put(list(EVENT_IDS)):
            for known in EVENT_IDS:
                ctx.line(known)
        return 0
    kind, every, loop = options.text("event"), options.flag("all"), options.flag("loop")
    if every == (kind is not None):
        if every:
            raise UsageError("Options --all and --event are mutually exclusive")
        raise UsageError("one of --list, --all, or --event <type> is required")
    if kind is not None and kind not in EVENT_IDS:
        from kvik.cli.suggest import nearest

        near = nearest(kind, EVENT_IDS)
        raise UsageError(
            f"unknown event type {kind}", remedy=f"did you mean {near}?" if near else "'kvik event --list' shows them"
        )
    seconds = options.number("timeout")
    if seconds is not None and seconds < 1:
        raise UsageError(f"invalid timeout '{seconds}'")
    name, timestamp = options.text("domain"), options.flag("timestamp")
    domain = ctx.domain(name) if name else None
    connection = ctx.connection
    for wanted in EVENT_IDS if every else (kind or "",):
        connection.register(wanted, domain)

    def print_one(found: AnyEvent) -> None:
        if isinstance(found, DomainEvent):
            show(ctx, found, timestamp=timestamp)

    return wait_for(ctx, print_one, loop=loop, seconds=seconds)


def wait_for(ctx: Context, show: Callable[[AnyEvent], None], *, loop: bool, seconds: float | None) -> int:
    """Show events of what was registered until one came (`loop`: until interrupted), or `seconds` have passed."""
    from kvik.client.events import ConnectionClosed

    deadline = None if seconds is None else time.monotonic() + seconds
    count = 0
    code = 0
    try:
        while loop or not count:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            found = ctx.connection.next_event(left)
            if found is None:
                ctx.extra("event loop timed out")
                code = 0 if loop and count else 1
                break
            if isinstance(found, ConnectionClosed):
                ctx.extra("event loop interrupted: the daemon ended")
                code = 1
                break
            count += 1
            show(found)
    except KeyboardInterrupt:
        ctx.extra("event loop interrupted")
    ctx.extra(f"events received: {count}")
    return code


def show(ctx: Context, event: DomainEvent, *, timestamp: bool) -> None:
    if ctx.json:  # one object a line: a stream has no end to close a list at
        import json

        facts = {"event": event.kind, "domain": event.domain.name, "uuid": event.domain.uuid.hex()}
        facts["detail"] = details(event)
        if timestamp:
            facts["time"] = f"{time.time():.3f}"
        ctx.write(json.dumps(facts) + "\n")
    else:
        ctx.line(event_line(event, timestamp=timestamp))
    ctx.stdout.flush()


COMMANDS = {
    "event": Verb(
        event,
        "List event types, or wait for domain events to occur",
        Option("domain", TEXT, "filter by domain name, id or uuid", complete="domain"),
        Option("event", TEXT, "which event type to wait for", complete="event"),
        Option("all", FLAG, "wait for all events instead of just one type"),
        Option("loop", FLAG, "loop until timeout or interrupt, rather than one-shot"),
        Option("timeout", NUMBER, "timeout seconds"),
        Option("list", FLAG, "list valid event types"),
        Option("timestamp", FLAG, "show timestamp for each printed event"),
    )
}
