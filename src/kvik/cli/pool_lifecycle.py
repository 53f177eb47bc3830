"""pool-define, -create, -build, -start, -destroy, -delete, -undefine, -refresh, -autostart: what there is to be."""

from __future__ import annotations

import contextlib

from kvik.cli.options import DATA, FLAG, Option, UsageError, Verb
from kvik.cli.pool_common import BUILD, POOL, POOL_ACTIVE, POOL_INACTIVE, building, pool_of
from kvik.errors import KvikError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.storage import StoragePool

VALIDATE = 1  # virStoragePoolDefineFlags
FILE = Option("file", DATA, "file containing an XML pool description", complete="file")
BUILD_NO_OVERWRITE, BUILD_OVERWRITE = 4, 8  # virStoragePoolBuildFlags


def warn(ctx: Context, pool: StoragePool) -> None:
    """What the daemon has to say of it: parts of the document without effect, what in it is no volume."""
    with contextlib.suppress(KvikError):  # the verb itself went well
        for message in pool.messages():
            ctx.warn(f"warning: {message}")


def pool_define(ctx: Context, options: Options) -> int:
    from kvik.client.storage import define_pool

    path = options.data("file")
    text = ctx.read_file(path)
    ctx.doing = f"Failed to define pool from {path}"
    pool = define_pool(ctx.connection, text, VALIDATE if options.flag("validate") else 0)
    ctx.say(f"Pool {pool.name} defined from {path}")
    warn(ctx, pool)
    return 0


def pool_create(ctx: Context, options: Options) -> int:
    from kvik.client.storage import create_pool

    path = options.data("file")
    bits = building(options)
    text = ctx.read_file(path)
    ctx.doing = f"Failed to create pool from {path}"
    pool = create_pool(ctx.connection, text, bits)
    ctx.say(f"Pool {pool.name} created from {path}")
    warn(ctx, pool)
    return 0


def pool_build(ctx: Context, options: Options) -> int:
    if options.flag("overwrite") and options.flag("no-overwrite"):
        raise UsageError("Options --overwrite and --no-overwrite are mutually exclusive")
    bits = BUILD_NO_OVERWRITE if options.flag("no-overwrite") else 0
    bits |= BUILD_OVERWRITE if options.flag("overwrite") else 0
    pool = pool_of(ctx, options.data("pool"))
    ctx.doing = f"Failed to build pool {pool.name}"
    pool.build(bits)
    ctx.say(f"Pool {pool.name} built")
    return 0


def pool_start(ctx: Context, options: Options) -> int:
    pool = pool_of(ctx, options.data("pool"))
    bits = building(options)
    ctx.doing = f"Failed to start pool {pool.name}"
    pool.start(bits)
    ctx.say(f"Pool {pool.name} started")
    warn(ctx, pool)
    return 0


def pool_destroy(ctx: Context, options: Options) -> int:
    pool = pool_of(ctx, options.data("pool"))
    ctx.doing = f"Failed to destroy pool {pool.name}"
    pool.destroy()
    ctx.say(f"Pool {pool.name} destroyed")
    return 0


def pool_delete(ctx: Context, options: Options) -> int:
    pool = pool_of(ctx, options.data("pool"))
    ctx.doing = f"Failed to delete pool {pool.name}"
    pool.delete()
    ctx.say(f"Pool {pool.name} deleted")
    return 0


def pool_undefine(ctx: Context, options: Options) -> int:
    pool = pool_of(ctx, options.data("pool"))
    ctx.doing = f"Failed to undefine pool {pool.name}"
    pool.undefine()
    ctx.say(f"Pool {pool.name} has been undefined")
    return 0


def pool_refresh(ctx: Context, options: Options) -> int:
    pool = pool_of(ctx, options.data("pool"))
    ctx.doing = f"Failed to refresh pool {pool.name}"
    pool.refresh()
    ctx.say(f"Pool {pool.name} refreshed")
    warn(ctx, pool)
    return 0


def pool_autostart(ctx: Context, options: Options) -> int:
    pool = pool_of(ctx, options.data("pool"))
    word = "unmark" if options.flag("disable") else "mark"
    ctx.doing = f"failed to {word} pool {pool.name} as autostarted"
    pool.set_autostart(word == "mark")
    ctx.say(f"Pool {pool.name} {word}ed as autostarted")
    return 0


COMMANDS = {
    "pool-define": Verb(
        pool_define,
        "Define or modify a persistent storage pool.",
        FILE,
        Option("validate", FLAG, "validate the XML against the schema"),
    ),
    "pool-create": Verb(pool_create, "Create a pool.", FILE, *BUILD),
    "pool-build": Verb(pool_build, "Build a given pool.", POOL_INACTIVE, *BUILD[1:]),
    "pool-start": Verb(pool_start, "Start a pool.", POOL_INACTIVE, *BUILD),
    "pool-destroy": Verb(pool_destroy, "Forcefully stop a given pool. Raw data in the pool is untouched", POOL_ACTIVE),
    "pool-delete": Verb(pool_delete, "Delete a given pool.", POOL_INACTIVE),
    "pool-undefine": Verb(pool_undefine, "Undefine the configuration for an inactive pool.", POOL_INACTIVE),
    "pool-refresh": Verb(pool_refresh, "Refresh a given pool.", POOL_ACTIVE),
    "pool-autostart": Verb(
        pool_autostart,
        "Configure a pool to be automatically started at boot.",
        POOL,
        Option("disable", FLAG, "disable autostarting"),
    ),
}
