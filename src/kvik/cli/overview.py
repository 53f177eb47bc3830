"""ps and top: machines at a glance, from the one call that knows it all."""

from __future__ import annotations

import time

from kvik.cli import flags, term
from kvik.cli.domain_list import acceleration, facts, order
from kvik.cli.guest_exec import seconds
from kvik.cli.options import FLAG, NUMBER, TEXT, Option, UsageError, Verb
from kvik.cli.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.connection import OverviewRow

SAMPLE = 0.2  # seconds between two readings of CPU time; one reading says only how much there ever was
HEADERS = ("Name", "State", "Accel", "vCPUs", "Memory", "CPU%", "Address", "Uptime")
SORTS: dict[str, Callable[[tuple[OverviewRow, float]], Any]] = {
    "cpu": lambda item: (-item[1], item[0].name),
    "memory": lambda item: (-item[0].mem_kib, item[0].name),
    "name": lambda item: item[0].name,
    "id": lambda item: order(item[0]),
}


def percent(before: list[OverviewRow], after: list[OverviewRow], elapsed: float) -> dict[str, float]:
    """CPU use by UUID between two readings `elapsed` seconds apart; 100 is one whole host CPU."""
    old = {row.uuid: row.cpu_time for row in before}
    return {
        row.uuid: max(0, row.cpu_time - old[row.uuid]) / (elapsed * 1e9) * 100
        for row in after
        if row.uuid in old and elapsed > 0
    }


def memory(kib: int) -> str:
    return f"{kib / (1 << 20):.1f}G" if kib >= 1 << 20 else f"{kib >> 10}M"


def duration(value: float | None) -> str:
    """`45s`, `12m`, `3h 5m`, `2d 4h`; `-` for None."""
    if value is None:
        return "-"
    whole = int(value)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def uptime(row: OverviewRow) -> float | None:
    """Seconds since the machine's start, where the daemon says."""
    return row.uptime if row.id > 0 and row.uptime else None


def table_of(items: list[tuple[OverviewRow, float]]) -> Table:
    table = Table(*HEADERS)
    for row, share in items:
        active = row.id > 0
        state = flags.state_name(row.state)
        table.add(
            row.name,
            "ready" if active and row.ready and state == "running" else state,
            acceleration(row.accelerator) if active else "-",
            row.vcpus,
            memory(row.mem_kib),
            f"{share:.1f}" if active else "-",
            row.address or "-",
            duration(uptime(row)),
        )
    return table


def shade(column: int, text: str) -> str | None:
    if column == 1:
        return term.STATE_COLOURS.get("running" if text == "ready" else text)
    return "yellow" if column == 2 and text == "emulation" else None


def measure(
    ctx: Context, bits: int, before: list[OverviewRow] | None = None, since: float = 0.0
) -> tuple[list[OverviewRow], dict[str, float]]:
    """Rows and their CPU percentages, against `before` read at `since`, or against a first reading made here."""
    if before is None:
        before, since = ctx.connection.overview(bits), time.monotonic()
        if not any(row.id > 0 and row.state == flags.RUNNING for row in before):
            return before, {}
        time.sleep(SAMPLE)
    rows = ctx.connection.overview(bits)
    return rows, percent(before, rows, time.monotonic() - since)


def ps(ctx: Context, options: Options) -> int:
    bits = flags.LIST_ACTIVE | (flags.LIST_INACTIVE if options.flag("all") else 0)
    rows, shares = measure(ctx, bits)
    items = [(row, shares.get(row.uuid, 0.0)) for row in sorted(rows, key=order)]
    if ctx.json:
        ctx.put([{**facts(row), "cpu_percent": round(share, 1), "uptime": uptime(row)} for row, share in items])
        return 0
    ctx.table(table_of(items), colour=shade)
    return 0


def frame(ctx: Context, items: list[tuple[OverviewRow, float]], sort: str) -> str:
    """One picture: a summary line and the table."""
    running = sum(row.id > 0 for row, _ in items)
    total = sum(row.mem_kib for row, _ in items if row.id > 0)
    head = (
        f"kvik top {time.strftime('%H:%M:%S')}  {running} running of {len(items)}, "
        f"{sum(share for _, share in items):.0f}% CPU, {memory(total)} memory, by {sort}"
    )
    limit = term.columns(ctx.stdout)
    body = table_of(items).render(limit=limit, colour=shade if ctx.colour else None)
    return f"{term.clip(head, limit) if limit else head}\n\n{body}"


def top(ctx: Context, options: Options) -> int:
    sort = options.text("sort") or "cpu"
    if sort not in SORTS:
        raise UsageError(f"cannot sort by '{sort}'", remedy="one of: " + ", ".join(SORTS))
    delay = seconds(options.text("delay"), "delay") or 2.0
    frames = options.number("iterations")
    if frames is not None and frames < 1:
        raise UsageError(f"invalid value of --iterations '{frames}'")
    bits = flags.LIST_ACTIVE | (0 if options.flag("active") else flags.LIST_INACTIVE)
    live = term.is_terminal(ctx.stdout) and term.is_terminal(ctx.stdin) and not ctx.json
    if frames is None and not live:
        frames = 1
    before, since = ctx.connection.overview(bits), time.monotonic()
    if live:
        return watch(ctx, bits, before, sort=sort, delay=delay, frames=frames)
    for number in range(frames or 1):
        time.sleep(delay if number else SAMPLE)
        rows, shares = measure(ctx, bits, before, since)
        before, since = rows, time.monotonic()
        items = ranked(rows, shares, sort)
        if not ctx.put([{**facts(row), "cpu_percent": round(share, 1), "uptime": uptime(row)} for row, share in items]):
            ctx.write(("\n" if number else "") + frame(ctx, items, sort))
    return 0


def ranked(rows: list[OverviewRow], shares: dict[str, float], sort: str) -> list[tuple[OverviewRow, float]]:
    items = [(row, shares.get(row.uuid, 0.0)) for row in rows]
    items.sort(key=SORTS[sort])
    return items


KEYS = {"c": "cpu", "m": "memory", "n": "name", "i": "id"}
LEAVE = ("q", "Q", "\x1b", "\x03", "\x04")


def watch(ctx: Context, bits: int, before: list[OverviewRow], *, sort: str, delay: float, frames: int | None) -> int:
    """Draw until a key says to leave or `frames` pictures were drawn."""
    from kvik.cli.screen import Screen

    rows, shares, since = before, dict[str, float](), time.monotonic()
    with Screen(ctx.stdin, ctx.stdout) as screen:
        key = screen.wait(SAMPLE)
        while key not in LEAVE:
            sort = KEYS.get(key, sort)
            if not key:  # the time has passed: read anew; a key only sorts what is there
                rows, shares = measure(ctx, bits, rows, since)
                since = time.monotonic()
                frames = frames - 1 if frames is not None else None
            screen.draw(
                frame(ctx, ranked(rows, shares, sort), sort) + "\nq quits; sort by c CPU, m memory, n name, i id\n"
            )
            if frames == 0:
                break
            key = screen.wait(delay)
    return 0


COMMANDS = {
    "ps": Verb(
        ps,
        "Lists running machines with how they run: acceleration, memory, CPU, address, uptime.",
        Option("all", FLAG, "also machines that are off", short="a"),
    ),
    "top": Verb(
        top,
        "Shows machines by their use of the host, again and again; q quits.\nOff a terminal: one picture.",
        Option("sort", TEXT, "cpu, memory, name or id", complete=tuple(SORTS)),
        Option("delay", TEXT, "seconds between two pictures", short="d", metavar="seconds"),
        Option("iterations", NUMBER, "how many pictures", short="n"),
        Option("active", FLAG, "only machines that run"),
    ),
}
