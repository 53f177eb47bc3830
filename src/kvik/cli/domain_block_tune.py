"""blkdeviotune: limits of a disk's requests, in virsh's words."""

from __future__ import annotations

from kvik.cli.common import CONFIG, CURRENT, DOMAIN, LIVE, impact, scaled
from kvik.cli.options import DATA, TEXT, Option, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options

_PER = {
    "bytes-sec": "throughput limit, as scaled integer (default bytes)",
    "iops-sec": "I/O operations limit per second",
}
_WAYS = ("total", "read", "write")


def _limits() -> list[Option]:
    def each(make: str) -> list[Option]:
        return [
            Option(f"{way}-{unit}{make}", TEXT, _words(way, unit, make), named_only=True)
            for unit in ("bytes-sec", "iops-sec")
            for way in _WAYS
        ]

    return [
        *each(""),
        *each("-max"),
        Option("size-iops-sec", TEXT, "I/O size in bytes", named_only=True),
        Option("group-name", TEXT, "group name to share I/O quota between multiple drives", named_only=True),
        *each("-max-length"),
    ]


def _words(way: str, unit: str, make: str) -> str:
    what = "bytes" if unit == "bytes-sec" else "I/O operations"
    if make == "-max-length":
        return f"duration in seconds to allow {way} max {what}"
    if make == "-max":
        return f"{way} max, as scaled integer (default bytes)" if what == "bytes" else f"{way} I/O operations max"
    return f"{way} {_PER[unit]}"


def blkdeviotune(ctx: Context, options: Options) -> int:
    device, bits = options.data("device"), impact(options)
    values: dict[str, int | str] = {}
    for option in _limits():
        text = options.text(option.name)
        if text is not None:
            field = option.name.replace("-", "_")
            values[field] = text if field == "group_name" else scaled(text, option.name, 1)
    domain = ctx.domain(options.data("domain"))
    if values:
        ctx.doing = "Unable to change block I/O throttle"
        domain.set_block_io_tune(device, values, bits)
        return 0
    ctx.doing = "Unable to get block I/O throttle parameters"
    found = domain.block_io_tune(device, bits)
    if not ctx.put({"device": device, **found}):
        for name, value in found.items():
            ctx.line(f"{name:<15}: {value}")
    return 0


COMMANDS = {
    "blkdeviotune": Verb(
        blkdeviotune,
        "Set or query disk I/O parameters such as block throttling.",
        DOMAIN,
        Option("device", DATA, "block device", complete="disk"),
        *_limits(),
        CONFIG,
        LIVE,
        CURRENT,
    )
}
