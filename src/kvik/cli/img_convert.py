"""kvik img convert: images into other formats, with qemu-img's options."""

from __future__ import annotations

import os

from kvik.cli.img_foreign import Foreign
from kvik.cli.options import UsageError
from kvik.image.opening import Opener

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments
    from kvik.image.base import Image
    from kvik.image.qcow2.snapshots import Snapshot

CACHES = ("none", "writeback", "unsafe", "directsync", "writethrough")
LARGEST_SPARSE = 16 << 20
MOST_COROUTINES = 16


def convert(ctx: Context, arguments: Arguments) -> int:
    if "help" in arguments.texts("o"):
        from kvik.cli.img_help import list_options
        from kvik.cli.img_make import known_format

        return list_options(ctx, known_format(arguments.text("O") or "raw", "luks"))
    *names, target = arguments.files
    options = _options(arguments)
    _check(arguments, names, options)
    foreign = Foreign(os.path.dirname(os.path.abspath(target)), arguments.text("l"))  # noqa: PTH100, PTH120
    opener = Opener(share=arguments.flag("U"), alone=arguments.flag("alone"), foreign=foreign)
    sources: list[Image] = []
    try:
        for number, name in enumerate(names):
            sources.append(opener.open(name, arguments.format(number)))
        if (wanted := arguments.text("l")) is not None and not foreign.used:
            use_snapshot(sources[0], wanted)
        if arguments.flag("n"):
            with Opener().open(target, arguments.text("O") or "raw", writable=True) as image:
                _copy(ctx, arguments, sources, image, zeroed=arguments.flag("target-is-zero"))
        else:
            _into_new(ctx, arguments, sources, options)
        if arguments.text("T") in ("none", "directsync"):
            from kvik.image.windows import drop_cached

            drop_cached(sources)
    finally:
        for image in sources:
            image.release()
    return 0


def _options(arguments: Arguments) -> dict[str, Any]:
    """What the target is to be, as `create` takes it."""
    from kvik.cli.img_make import known_format
    from kvik.image.create import parse_options

    format = known_format(arguments.text("O") or "raw")
    options = parse_options(arguments.texts("o"), format)
    for key, option in (("B", "backing_file"), ("F", "backing_format")):
        if (value := arguments.text(key)) is not None:
            options[option] = value
    return options


def _check(arguments: Arguments, names: Sequence[str], options: dict[str, Any]) -> None:
    """What qemu-img refuses before it opens anything."""
    given = arguments.flag
    for wrong, message in (
        (given("C") and given("S"), "Cannot enable copy offloading when -S is used"),
        (given("C") and given("c"), "Cannot enable copy offloading when -c is used"),
        (given("C") and given("salvage"), "Cannot use copy offloading in salvaging mode"),
        (given("target-is-zero") and not given("n"), "--target-is-zero requires use of -n flag"),
        (len(names) > 1 and given("l"), "No support for concatenating multiple snapshot"),
        (
            len(names) > 1 and "backing_file" in options,
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        ),
        (
            "backing_file" in options and "backing_format" not in options and not given("n"),
            "Use of backing file requires explicit backing format",
        ),
        (
            given("c") and options.get("preallocation", "off") != "off",
            "Compression and preallocation not supported at the same time",
        ),
        (
            given("c") and (arguments.text("O") or "raw") != "qcow2",
            "Compression not supported for this file format",
        ),
        (
            given("bitmaps") and (len(names) > 1 or given("n") or given("l")),
            "--bitmaps copies those of one image, as it is now, into a new one",
        ),
        (given("skip-broken-bitmaps") and not given("bitmaps"), "Use of --skip-broken-bitmaps requires --bitmaps"),
        (given("n") and given("o"), "-o has no effect when skipping image creation"),
    ):
        if wrong:
            raise UsageError(message, remedy="see 'kvik img convert --help'")
    sparse_size(arguments), threads(arguments), rate_limit(arguments)
    for key in ("t", "T"):
        if arguments.text(key) not in (None, *CACHES):
            raise UsageError(f"Invalid cache option: {arguments.text(key)}", remedy=f"one of: {', '.join(CACHES)}")


def sparse_size(arguments: Arguments) -> int:
    from kvik.image.convert import SPARSE
    from kvik.image.create import parse_size

    text = arguments.text("S")
    if text is None:
        return SPARSE
    size = parse_size(text, "buffer size for sparse output")
    if size % 512 or size > LARGEST_SPARSE:
        raise UsageError(
            "Invalid buffer size for sparse output specified.",
            remedy="multiples of 512 up to 16M; 0 turns the detection of zeros off and fully allocates the output",
        )
    return size


def rate_limit(arguments: Arguments) -> int:
    """Bytes a second; 0: none."""
    from kvik.image.create import parse_size

    return parse_size(arguments.text("r") or "0", "rate limit")


def threads(arguments: Arguments) -> int | None:
    text = arguments.text("m")
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MOST_COROUTINES:
        raise UsageError(f"Invalid number of coroutines '{text}'", remedy=f"a number between 1 and {MOST_COROUTINES}")
    return int(text)


def use_snapshot(source: Image, wanted: str) -> None:
    """Read the source as it was in the snapshot that `-l` names: `snapshot.id=`, `snapshot.name=`, or either."""
    from kvik.errors import NoSnapshot
    from kvik.image.qcow2.reader import Qcow2Reader

    found: list[Snapshot] = source.snapshots if isinstance(source, Qcow2Reader) else []
    by: dict[str, str] = {}
    if wanted.startswith(("snapshot.id=", "snapshot.name=")):
        for part in wanted.split(","):
            name, _, value = part.partition("=")
            by[name] = value
        unknown = by.keys() - {"snapshot.id", "snapshot.name"}
        if unknown:
            raise UsageError(f"Invalid parameter '{unknown.pop()}' of a snapshot", remedy="snapshot.id, snapshot.name")
        found = [
            one
            for one in found
            if one.id == by.get("snapshot.id", one.id) and one.name == by.get("snapshot.name", one.name)
        ]
    else:
        found = [one for one in found if one.id == wanted] or [one for one in found if one.name == wanted]
    if not found or not isinstance(source, Qcow2Reader):
        raise NoSnapshot(
            f"image {source.path} has no snapshot '{wanted}'", remedy=f"kvik img info {source.path} lists what it has"
        )
    source.use_snapshot(found[0])


def _into_new(ctx: Context, arguments: Arguments, sources: list[Image], options: dict[str, Any]) -> None:
    from kvik.image.fresh import FreshImage

    path, format = arguments.files[-1], arguments.text("O") or "raw"
    size = options.pop("size", None) or sum(source.size for source in sources)
    with FreshImage(path, format, size, options) as fresh:
        with Opener().adopt(os.dup(fresh.fd), path, format) as image:
            _copy(ctx, arguments, sources, image, zeroed=fresh.zeroed)
        if arguments.flag("bitmaps"):
            with Opener().adopt(os.dup(fresh.fd), path, format) as image:
                _copy_bitmaps(ctx, sources[0], image, skip=arguments.flag("skip-broken-bitmaps"))
        fresh.keep()


def _copy(ctx: Context, arguments: Arguments, sources: list[Image], target: Image, *, zeroed: bool) -> None:
    from kvik.cli.img_progress import ImageProgress
    from kvik.image.convert import convert as copy

    quiet = arguments.flag("q")

    def unreadable(offset: int, error: OSError) -> None:
        if not quiet:
            ctx.warn(f"warning: error while reading offset {offset}: {error.strerror}")

    with ImageProgress(ctx, arguments, "converting") as progress:
        copy(
            sources,
            target,
            zeroed=zeroed,
            compressed=arguments.flag("c"),
            sparse=sparse_size(arguments),
            own=arguments.flag("B"),
            salvage=unreadable if arguments.flag("salvage") else None,
            offload=arguments.flag("C"),
            rate=rate_limit(arguments),
            workers=threads(arguments),
            progress=progress,
        )
    if arguments.text("t") not in (None, "unsafe"):
        target.flush()
        if arguments.text("t") in ("none", "directsync"):
            from kvik.image.windows import drop_cached

            drop_cached([target])


def _copy_bitmaps(ctx: Context, source: Image, target: Image, *, skip: bool) -> None:
    """The source's persistent bitmaps, as they are, for a target that has its data."""
    from kvik.image.qcow2.bitmap_changes import BitmapChanges
    from kvik.image.qcow2.bitmaps import AUTO, IN_USE
    from kvik.image.qcow2.reader import Qcow2Reader
    from kvik.image.qcow2.writer import Qcow2Writer

    if not isinstance(source, Qcow2Reader) or not isinstance(target, Qcow2Writer):
        raise UsageError("only images of format qcow2 have bitmaps", remedy="leave --bitmaps away")
    changes = BitmapChanges(target)
    for bitmap in source.bitmaps:
        if bitmap.flags & IN_USE:
            if not skip:
                raise source.fault(
                    f"Cannot copy inconsistent bitmap '{bitmap.name}'",
                    remedy="use --skip-broken-bitmaps, or remove it: kvik img bitmap --remove",
                )
            ctx.warn(f"warning: Skipping inconsistent bitmap '{bitmap.name}'")
            continue
        changes.add(bitmap.name, bitmap.granularity)
        changes.merge(bitmap.name, bitmap.name, source)
        changes.enable(bitmap.name, on=bool(bitmap.flags & AUTO))
    changes.store()


HANDLERS: dict[str, Callable[[Context, Arguments], int]] = {"convert": convert}
