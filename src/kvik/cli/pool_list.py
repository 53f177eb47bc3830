"""pool-list, -info, -name, -uuid, -dumpxml, -edit: what pools there are, and what each is."""

from __future__ import annotations

from kvik.cli import xml_verbs
from kvik.cli.options import FLAG, TEXT, Option, UsageError, Verb
from kvik.cli.pool_common import POOL, pool_of, pretty, yes
from kvik.cli.table import Table
from kvik.errors import KvikError, NoStoragePool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.storage import PoolFacts

# virConnectListAllStoragePoolsFlags
INACTIVE, ACTIVE = 1 << 0, 1 << 1
FILTERS = {"persistent": 1 << 2, "transient": 1 << 3, "autostart": 1 << 4, "no-autostart": 1 << 5}
TYPES = {
    "dir": 1 << 6, "fs": 1 << 7, "netfs": 1 << 8, "logical": 1 << 9, "disk": 1 << 10, "iscsi": 1 << 11,
    "scsi": 1 << 12, "mpath": 1 << 13, "rbd": 1 << 14, "sheepdog": 1 << 15, "gluster": 1 << 16, "zfs": 1 << 17,
    "vstorage": 1 << 18, "iscsi-direct": 1 << 19,
}  # fmt: skip
XML_INACTIVE = 1  # virStorageXMLFlags


def pool_list(ctx: Context, options: Options) -> int:
    from kvik.client import storage

    bits = ACTIVE
    if options.flag("inactive"):
        bits = INACTIVE
    if options.flag("all"):
        bits = ACTIVE | INACTIVE
    for option, bit in FILTERS.items():
        bits |= bit if options.flag(option) else 0
    for kind in (options.text("type") or "").split(",") if options.text("type") is not None else ():
        if kind not in TYPES:
            raise UsageError(f"Invalid pool type '{kind}'", remedy=f"there are {', '.join(TYPES)}")
        bits |= TYPES[kind]
    ctx.doing = "Failed to list pools"
    uuid, name = options.flag("uuid"), options.flag("name")
    if (uuid or name) and not ctx.json:
        for pool in sorted(storage.pools(ctx.connection, bits), key=lambda pool: pool.name.lower()):
            cells = ([pool.uuid] if uuid else []) + ([f"{pool.name:<20}"] if name else [])
            ctx.line(" ".join(cells))
        return 0
    rows = sorted(storage.pool_facts(ctx.connection, bits), key=lambda row: row.name.lower())
    if ctx.json:
        ctx.put([{**row._asdict(), "info": row.info._asdict()} for row in rows])
        return 0
    shades = {"active": "green", "running": "green", "inactive": "dim"}
    table = _details(rows) if options.flag("details") else _plain(rows)
    ctx.table(table, colour=lambda column, text: shades.get(text) if column == 1 else None)
    return 0


def _plain(rows: list[PoolFacts]) -> Table:
    table = Table("Name", "State", "Autostart")
    for row in rows:
        table.add(row.name, "active" if row.active else "inactive", yes(row.autostart))
    return table


def _details(rows: list[PoolFacts]) -> Table:
    table = Table("Name", "State", "Autostart", "Persistent", "Capacity", "Allocation", "Available")
    for row in rows:
        figures = [pretty(size) if row.active else "-" for size in row.info[1:]]
        table.add(row.name, state(row.info.state), yes(row.autostart), yes(row.persistent), *figures)
    return table


def state(number: int) -> str:
    from kvik.client.storage import STATES

    return STATES[number] if 0 <= number < len(STATES) else "unknown"


def pool_info(ctx: Context, options: Options) -> int:
    from kvik.client.storage import STATES

    pool = pool_of(ctx, options.data("pool"))
    info = pool.info()
    pairs: list[tuple[str, object]] = [
        ("Name", pool.name),
        ("UUID", pool.uuid),
        ("State", state(info.state)),
        ("Persistent", yes(pool.is_persistent())),
    ]
    try:
        pairs.append(("Autostart", yes(pool.autostart())))
    except KvikError:
        pairs.append(("Autostart", "no autostart"))
    if state(info.state) in STATES[2:4]:
        as_is = options.flag("bytes") or ctx.json
        sizes = zip(("Capacity", "Allocation", "Available"), info[1:], strict=True)
        pairs += [(what, size if as_is else pretty(size)) for what, size in sizes]
    ctx.pairs(pairs)
    return 0


def pool_name(ctx: Context, options: Options) -> int:
    from kvik.client.storage import lookup_pool_uuid

    key = options.data("pool")
    try:
        name = lookup_pool_uuid(ctx.connection, key).name
    except NoStoragePool as error:
        raise NoStoragePool(f"failed to get pool '{key}'", remedy="pool-name takes a UUID") from error
    if not ctx.put({"name": name}):
        ctx.line(name)
    return 0


def pool_uuid(ctx: Context, options: Options) -> int:
    from kvik.client.storage import lookup_pool_name

    key = options.data("pool")
    ctx.doing = f"failed to get pool '{key}'"
    uuid = lookup_pool_name(ctx.connection, key).uuid
    if not ctx.put({"uuid": uuid}):
        ctx.line(uuid)
    return 0


def pool_dumpxml(ctx: Context, options: Options) -> int:
    pool = pool_of(ctx, options.data("pool"))
    return xml_verbs.show(ctx, options, pool.xml(XML_INACTIVE if options.flag("inactive") else 0))


def pool_edit(ctx: Context, options: Options) -> int:
    from kvik.client.storage import define_pool

    pool = pool_of(ctx, options.data("pool"))

    def define(text: str, validate: bool) -> str:
        return f"pool {define_pool(ctx.connection, text, int(validate)).name}"

    return xml_verbs.edit(ctx, f"pool {pool.name}", lambda: pool.xml(XML_INACTIVE), define)


COMMANDS = {
    "pool-list": Verb(
        pool_list,
        "Returns list of pools.",
        Option("inactive", FLAG, "list inactive pools"),
        Option("all", FLAG, "list inactive & active pools"),
        Option("transient", FLAG, "list transient pools"),
        Option("persistent", FLAG, "list persistent pools"),
        Option("autostart", FLAG, "list pools with autostart enabled"),
        Option("no-autostart", FLAG, "list pools with autostart disabled"),
        Option("type", TEXT, "only list pool of specified type(s) (if supported)", complete=tuple(TYPES)),
        Option("details", FLAG, "display extended details for pools"),
        Option("uuid", FLAG, "list UUID of active pools only"),
        Option("name", FLAG, "list name of active pools only"),
    ),
    "pool-info": Verb(
        pool_info,
        "Returns basic information about the storage pool.",
        POOL,
        Option("bytes", FLAG, "Return pool info in bytes"),
    ),
    "pool-name": Verb(pool_name, "Convert a pool UUID to pool name.", POOL),
    "pool-uuid": Verb(pool_uuid, "Convert a pool name to pool UUID.", POOL),
    "pool-dumpxml": Verb(
        pool_dumpxml,
        "Output the pool information as an XML dump to stdout.",
        POOL,
        Option("inactive", FLAG, "show inactive defined XML"),
        *xml_verbs.XPATH,
    ),
    "pool-edit": Verb(pool_edit, "Edit the XML configuration for a storage pool.", POOL),
}
