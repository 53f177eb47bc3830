"""vol-list, -info, -dumpxml, -key, -name, -path, -pool: what volumes there are, and what each is."""

from __future__ import annotations

from kvik.cli import xml_verbs
from kvik.cli.options import DATA, FLAG, Option, Verb
from kvik.cli.pool_common import OF_POOL, POOL_ACTIVE, VOLUME, pool_of, pretty, volume_of
from kvik.cli.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options


def kind(number: int) -> str:
    from kvik.client.storage import VOLUME_TYPES

    return VOLUME_TYPES[number] if 0 <= number < len(VOLUME_TYPES) else "unknown"


def vol_list(ctx: Context, options: Options) -> int:
    from kvik.client.storage import VolumeInfo

    pool = pool_of(ctx, options.data("pool"))
    ctx.doing = "Failed to list volumes"
    volumes = sorted(pool.volumes(), key=lambda volume: volume.name.lower())
    refs = [(volume.ref,) for volume in volumes]
    paths = [str(answer[0]) for answer in ctx.connection.call_many("STORAGE_VOL_GET_PATH", refs)]
    if not options.flag("details"):
        table = Table("Name", "Path")
        for volume, path in zip(volumes, paths, strict=True):
            table.add(volume.name, path)
        ctx.table(table)
        return 0
    infos = [VolumeInfo(*answer) for answer in ctx.connection.call_many("STORAGE_VOL_GET_INFO", refs)]
    if ctx.json:
        rows = zip(volumes, paths, infos, strict=True)
        ctx.put([{"name": one.name, "path": path, **i._asdict(), "type": kind(i.type)} for one, path, i in rows])
        return 0
    table = Table("Name", "Path", "Type", "Capacity", "Allocation")
    for volume, path, info in zip(volumes, paths, infos, strict=True):
        table.add(volume.name, path, kind(info.type), pretty(info.capacity), pretty(info.allocation))
    ctx.table(table)
    return 0


def vol_info(ctx: Context, options: Options) -> int:
    volume = volume_of(ctx, options)
    physical = options.flag("physical")
    info = volume.info(physical=physical)
    sizes = (("Capacity", info.capacity), ("Physical" if physical else "Allocation", info.allocation))

    def shown(size: int) -> object:
        if ctx.json:
            return size
        return f"{size} bytes" if options.flag("bytes") else pretty(size)

    ctx.pairs([("Name", volume.name), ("Type", kind(info.type)), *((what, shown(size)) for what, size in sizes)])
    return 0


def vol_dumpxml(ctx: Context, options: Options) -> int:
    return xml_verbs.show(ctx, options, volume_of(ctx, options).xml())


def vol_key(ctx: Context, options: Options) -> int:
    return _say(ctx, "key", volume_of(ctx, options).key)


def vol_path(ctx: Context, options: Options) -> int:
    return _say(ctx, "path", volume_of(ctx, options).path())


def vol_name(ctx: Context, options: Options) -> int:
    return _say(ctx, "name", volume_of(ctx, options, pool=None).name)


def vol_pool(ctx: Context, options: Options) -> int:
    volume = volume_of(ctx, options, pool=None)
    ctx.doing = "failed to get parent pool"
    pool = volume.pool()
    return _say(ctx, "uuid", pool.uuid) if options.flag("uuid") else _say(ctx, "pool", pool.name)


def _say(ctx: Context, what: str, value: str) -> int:
    if not ctx.put({what: value}):
        ctx.line(value)
    return 0


COMMANDS = {
    "vol-list": Verb(
        vol_list,
        "Returns list of vols by pool.",
        POOL_ACTIVE,
        Option("details", FLAG, "display extended details for volumes"),
    ),
    "vol-info": Verb(
        vol_info,
        "Returns basic information about the storage vol.",
        VOLUME,
        OF_POOL,
        Option("bytes", FLAG, "sizes are represented in bytes rather than pretty units"),
        Option("physical", FLAG, "return the physical size of the volume in allocation field"),
    ),
    "vol-dumpxml": Verb(
        vol_dumpxml, "Output the vol information as an XML dump to stdout.", VOLUME, OF_POOL, *xml_verbs.XPATH
    ),
    "vol-key": Verb(
        vol_key,
        "Returns the volume key for a given volume name or path.",
        Option("vol", DATA, "volume name or path", complete="volume"),
        OF_POOL,
    ),
    "vol-path": Verb(
        vol_path,
        "Returns the volume path for a given volume name or key.",
        Option("vol", DATA, "volume name or key", complete="volume"),
        OF_POOL,
    ),
    "vol-name": Verb(
        vol_name,
        "Returns the volume name for a given volume key or path.",
        Option("vol", DATA, "volume key or path", complete="file"),
    ),
    "vol-pool": Verb(
        vol_pool,
        "Returns the storage pool for a given volume key or path.",
        Option("vol", DATA, "volume key or path", complete="file"),
        Option("uuid", FLAG, "return the pool uuid rather than pool name"),
    ),
}
