"""vol-create(-as, -from), -clone, -delete, -resize, -wipe: making volumes and changing them."""

from __future__ import annotations

from contextlib import suppress

from kvik.cli.common import scaled
from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError, Verb
from kvik.cli.pool_as import escape
from kvik.cli.pool_common import OF_POOL, POOL_ACTIVE, VOLUME, pool_of, volume_of
from kvik.errors import InvalidArgument, KvikError, NoStorageVolume

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client.storage import StoragePool, StorageVolume

# virStorageVolCreateFlags, virStorageVolDeleteFlags, virStorageVolResizeFlags
PREALLOCATE, REFLINK, VALIDATE = 1 << 0, 1 << 1, 1 << 2
WITH_SNAPSHOTS = 1 << 1
ALLOCATE, DELTA, SHRINK = 1 << 0, 1 << 1, 1 << 2
ALGORITHMS = (
    "zero", "nnsa", "dod", "bsi", "gutmann", "schneier", "pfitzner7", "pfitzner33", "random", "trim",
)  # fmt: skip
PREALLOCATES = Option("prealloc-metadata", FLAG, "preallocate metadata (for qcow2 instead of full allocation)")
REFLINKS = Option("reflink", FLAG, "use btrfs COW lightweight copy")
VALIDATES = Option("validate", FLAG, "validate the XML against the schema")
INTO = Option("pool", DATA, "pool name", complete="pool-active")
FILE = Option("file", DATA, "file containing an XML vol description", complete="file")


def _bits(options: Options, **table: int) -> int:
    return sum(bit for name, bit in table.items() if options.flag(name.replace("_", "-")))


def _size(ctx: Context, text: str) -> int:
    try:
        return scaled(text, "capacity", 1)
    except UsageError as error:
        ctx.doing = f"Malformed size {text}"
        suffix = text.lstrip("0123456789")
        why = f"unknown suffix '{suffix}'" if suffix != text else f"'{text}' is not a size"
        raise InvalidArgument(f"invalid argument: {why}", remedy="write a size such as 512M or 2GiB") from error


def vol_create(ctx: Context, options: Options) -> int:
    path = options.data("file")
    bits = _bits(options, prealloc_metadata=PREALLOCATE, validate=VALIDATE)
    pool = pool_of(ctx, options.data("pool"))
    text = ctx.read_file(path)
    ctx.doing = f"Failed to create vol from {path}"
    volume = pool.create_volume(text, bits)
    ctx.say(f"Vol {volume.name} created from {path}")
    _warn(ctx, text)
    return 0


def _warn(ctx: Context, text: str) -> None:
    """What the document says and nobody understands: it is kept nowhere."""
    from kvik.conf.storage_volume import parse_volume
    from kvik.conf.tree import warnings

    with suppress(KvikError):  # the daemon took it
        for message in warnings(parse_volume(text), "/volume"):
            ctx.warn(f"warning: {message.replace(', kept but', ',')}")


def vol_create_as(ctx: Context, options: Options) -> int:
    bits = _bits(options, prealloc_metadata=PREALLOCATE)
    pool = pool_of(ctx, options.data("pool"))
    name = options.data("name")
    allocation, form, backing = options.text("allocation"), options.text("format"), options.text("backing-vol")
    text = f"<volume>\n  <name>{escape(name)}</name>\n  <capacity>{_size(ctx, options.data('capacity'))}</capacity>\n"
    if allocation is not None:
        text += f"  <allocation>{_size(ctx, allocation)}</allocation>\n"
    if form:
        text += f"  <target>\n    <format type='{escape(form)}'/>\n  </target>\n"
    if backing:
        path, kind = _backing(ctx, pool, backing).path(), options.text("backing-vol-format")
        text += f"  <backingStore>\n    <path>{escape(path)}</path>\n"
        text += f"    <format type='{escape(kind)}'/>\n" if kind else ""
        text += "  </backingStore>\n"
    text += "</volume>\n"
    if options.flag("print-xml"):
        if not ctx.put({"xml": text}):
            ctx.document(text)
        return 0
    ctx.doing = f"Failed to create vol {name}"
    pool.create_volume(text, bits)
    ctx.say(f"Vol {name} created")
    return 0


def _backing(ctx: Context, pool: StoragePool, key: str) -> StorageVolume:
    from kvik.client import storage

    try:
        return storage.volume(ctx.connection, key, pool)
    except NoStorageVolume:
        ctx.doing = f"failed to get vol '{key}'"
        raise


def vol_create_from(ctx: Context, options: Options) -> int:
    path = options.data("file")
    bits = _bits(options, prealloc_metadata=PREALLOCATE, reflink=REFLINK, validate=VALIDATE)
    pool = pool_of(ctx, options.data("pool"))
    text = ctx.read_file(path)
    source = volume_of(ctx, options, pool="inputpool")
    ctx.doing = f"Failed to create vol from {path}"
    volume = pool.copy_volume(text, source, bits)
    ctx.say(f"Vol {volume.name} created from input vol {source.name}")
    _warn(ctx, text)
    return 0


def vol_clone(ctx: Context, options: Options) -> int:
    from lxml import etree

    bits = _bits(options, prealloc_metadata=PREALLOCATE, reflink=REFLINK)
    source = volume_of(ctx, options)
    ctx.doing = "failed to get parent pool"
    pool = source.pool()
    root = etree.fromstring(source.xml().encode())
    name = root.find("name")
    if name is None:
        raise KvikError("the daemon's document of the volume has no name")
    name.text = options.data("newname")
    text = etree.tostring(root, encoding="unicode")
    if options.flag("print-xml"):
        if not ctx.put({"xml": text}):
            ctx.last(text)
        return 0
    ctx.doing = f"Failed to clone vol from {source.name}"
    volume = pool.copy_volume(text, source, bits)
    ctx.say(f"Vol {volume.name} cloned from {source.name}")
    return 0


def vol_delete(ctx: Context, options: Options) -> int:
    volume = volume_of(ctx, options)
    ctx.doing = f"Failed to delete vol {options.data('vol')}"
    volume.delete(_bits(options, delete_snapshots=WITH_SNAPSHOTS))
    ctx.say(f"Vol {options.data('vol')} deleted")
    return 0


def vol_resize(ctx: Context, options: Options) -> int:
    bits = _bits(options, allocate=ALLOCATE, delta=DELTA, shrink=SHRINK)
    volume = volume_of(ctx, options)
    text = options.data("capacity")
    if text.startswith("-"):
        if not bits & SHRINK:
            raise UsageError("negative size requires --shrink")
        bits |= DELTA
        text = text[1:]
    size, word = _size(ctx, text), "by" if bits & DELTA else "to"
    ctx.doing = f"Failed to change size of volume '{volume.name}' {word} {text}"
    volume.resize(size, bits)
    ctx.say(f"Size of volume '{volume.name}' successfully changed {word} {text}")
    return 0


def vol_wipe(ctx: Context, options: Options) -> int:
    volume = volume_of(ctx, options)
    algorithm = options.text("algorithm")
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise UsageError(f"Unsupported algorithm '{algorithm}'", remedy=f"there are {', '.join(ALGORITHMS)}")
    ctx.doing = f"Failed to wipe vol {options.data('vol')}"
    volume.wipe(ALGORITHMS.index(algorithm) if algorithm is not None else None)
    ctx.say(f"Vol {options.data('vol')} wiped")
    return 0


COMMANDS = {
    "vol-create": Verb(vol_create, "Create a vol.", INTO, FILE, PREALLOCATES, VALIDATES),
    "vol-create-as": Verb(
        vol_create_as,
        "Create a vol.",
        INTO,
        Option("name", DATA, "name of the volume"),
        Option("capacity", DATA, "size of the vol, as scaled integer (default bytes)"),
        Option("allocation", TEXT, "initial allocation size, as scaled integer (default bytes)"),
        Option("format", TEXT, "file format type raw,bochs,qcow,qcow2,qed,vmdk", complete=("raw", "qcow2")),
        Option("backing-vol", TEXT, "the backing volume if taking a snapshot", complete="volume"),
        Option("backing-vol-format", TEXT, "format of backing volume if taking a snapshot", complete=("raw", "qcow2")),
        PREALLOCATES,
        Option("print-xml", FLAG, "print XML document, but don't define/create"),
    ),
    "vol-create-from": Verb(
        vol_create_from,
        "Create a vol from an existing volume.",
        POOL_ACTIVE,
        FILE,
        VOLUME,
        Option("inputpool", TEXT, "pool name or uuid of the input volume's pool", complete="pool-active"),
        PREALLOCATES,
        REFLINKS,
        VALIDATES,
    ),
    "vol-clone": Verb(
        vol_clone,
        "Clone an existing volume within the parent pool.",
        VOLUME,
        Option("newname", DATA, "clone name"),
        OF_POOL,
        PREALLOCATES,
        REFLINKS,
        Option("print-xml", FLAG, "print XML document rather than clone the volume"),
    ),
    "vol-delete": Verb(
        vol_delete,
        "Delete a given vol.",
        VOLUME,
        OF_POOL,
        Option(
            "delete-snapshots",
            FLAG,
            "delete snapshots associated with volume (must be supported by storage driver)",
        ),
    ),
    "vol-resize": Verb(
        vol_resize,
        "Resizes a storage volume. This is safe only for storage volumes not in use by an active guest.\n"
        "See blockresize for live resizing.",
        VOLUME,
        Option("capacity", DATA, "new capacity for the vol, as scaled integer (default bytes)"),
        OF_POOL,
        Option("allocate", FLAG, "allocate the new capacity, rather than leaving it sparse"),
        Option("delta", FLAG, "use capacity as a delta to current size, rather than the new size"),
        Option("shrink", FLAG, "allow the resize to shrink the volume"),
    ),
    "vol-wipe": Verb(
        vol_wipe,
        "Ensure data previously on a volume is not accessible to future reads",
        VOLUME,
        OF_POOL,
        Option("algorithm", TEXT, "perform selected wiping algorithm", complete=ALGORITHMS),
    ),
}
