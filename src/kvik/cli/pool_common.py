"""What the verbs of storage pools and volumes share."""

from __future__ import annotations

from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.storage import StoragePool, StorageVolume

POOL = Option("pool", DATA, "pool name or uuid", complete="pool")
POOL_ACTIVE = Option("pool", DATA, "pool name or uuid", complete="pool-active")
POOL_INACTIVE = Option("pool", DATA, "pool name or uuid", complete="pool-inactive")
VOLUME = Option("vol", DATA, "vol name, key or path", complete="volume")
OF_POOL = Option("pool", TEXT, "pool name or uuid", complete="pool-active")
BUILD = (
    Option("build", FLAG, "build the pool as normal"),
    Option("no-overwrite", FLAG, "do not overwrite any existing data"),
    Option("overwrite", FLAG, "overwrite any existing data"),
)


def pool_of(ctx: Context, key: str) -> StoragePool:
    """The pool that `key` (UUID or name) means; the error suggests a name that looks like it."""
    from kvik.client import storage
    from kvik.errors import NoStoragePool

    try:
        return storage.pool(ctx.connection, key)
    except NoStoragePool as error:
        from kvik.cli.suggest import nearest

        near = nearest(key, [pool.name for pool in storage.pools(ctx.connection)])
        remedy = f"did you mean '{near}'?" if near else "'kvik pool-list --all' shows every pool"
        ctx.doing = f"failed to get pool '{key}'"
        raise NoStoragePool(error.message, remedy=remedy) from error


def volume_of(ctx: Context, options: Options, *, option: str = "vol", pool: str | None = "pool") -> StorageVolume:
    """The volume that an option means: a name in the pool of option `pool`, or a key or path anywhere."""
    from kvik.client import storage
    from kvik.errors import NoStorageVolume

    key = options.data(option)
    within = None
    if pool is not None and (name := options.text(pool)) is not None:
        within = pool_of(ctx, name)
        if not within.is_active():
            raise UsageError(f"pool '{name}' is not active", remedy=f"start it: kvik pool-start {name}")
    try:
        found = storage.volume(ctx.connection, key, within)
    except NoStorageVolume:
        hint = f", specifying --{pool} might help" if within is None and pool is not None else ""
        ctx.doing = f"failed to get vol '{key}'{hint}"
        raise
    if within is not None and found.pool_name != within.name:
        raise UsageError(f"Requested volume '{key}' is not in pool '{name}'")
    return found


def building(options: Options) -> int:
    """virStoragePoolCreateFlags of --build, --overwrite and --no-overwrite."""
    overwrite, no_overwrite = options.flag("overwrite"), options.flag("no-overwrite")
    if overwrite and no_overwrite:
        raise UsageError("Options --overwrite and --no-overwrite are mutually exclusive")
    return (1 if options.flag("build") else 0) | (2 if overwrite else 0) | (4 if no_overwrite else 0)


def pretty(size: int) -> str:
    """`1.50 GiB`, as virsh prints what pools and volumes hold."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1024 or unit == "EiB":
            return f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError


def yes(value: bool) -> str:
    return "yes" if value else "no"
