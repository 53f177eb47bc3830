"""kvik img dd: part of an image into a new one, with the words of dd(1)."""

from __future__ import annotations

import os

from kvik.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments
    from kvik.image.base import Image

WORDS = ("bs", "count", "if", "of", "skip")
LARGEST_BLOCK = (1 << 31) - 1
SECTOR = 512


def dd(ctx: Context, arguments: Arguments) -> int:
    from kvik.cli.img_foreign import Foreign
    from kvik.cli.img_make import known_format
    from kvik.image.fresh import FreshImage
    from kvik.image.opening import Opener

    words = _words(arguments.files)
    for key, what in (("if", "input"), ("of", "output")):
        if key not in words:
            raise UsageError("Must specify both input and output file names", remedy=f"{key}=FILE is the {what}")
    name, format = words["if"], arguments.text("f")
    if arguments.flag("image-opts"):
        from kvik.cli.img_opts import parse_image_opts

        if format is not None:
            raise UsageError("--image-opts and --format are mutually exclusive")
        name, format = parse_image_opts(name)
    out = known_format(arguments.text("O") or "raw")
    block = _number(words, "bs", SECTOR)
    if not 0 < block <= LARGEST_BLOCK:
        raise UsageError(f"Invalid bs '{words['bs']}'", remedy="1 byte to 2 GiB")
    with Opener(share=arguments.flag("U"), alone=arguments.flag("alone"), foreign=Foreign()).open(
        name, format
    ) as source:
        begin = _number(words, "skip", 0) * block
        end = source.size
        if "count" in words:
            end = min(end, begin + _number(words, "count", 0) * block)
        if begin > source.size:
            ctx.warn(f"{name}: cannot skip to specified offset")
        size = max(0, end - begin)
        with FreshImage(words["of"], out, size, {}) as fresh:
            with Opener().adopt(os.dup(fresh.fd), words["of"], out) as target:
                if size:
                    _copy(source, begin, target, size, zeroed=fresh.zeroed)
            fresh.keep()
    return 0


def _words(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not equals or key not in WORDS:
            raise UsageError(f"unrecognized operand '{word}'", remedy="if=FILE of=FILE, bs=SIZE, count=N, skip=N")
        found[key] = value
    return found


def _number(words: dict[str, str], key: str, default: int) -> int:
    from kvik.image.create import parse_size

    return parse_size(words[key], key) if key in words else default


def _copy(source: Image, begin: int, target: Image, size: int, *, zeroed: bool) -> None:
    """Zeros are written only where the target has something else: a device."""
    from kvik.image.windows import WINDOW

    blank = bytes(WINDOW)
    for extent in source.map(begin, size):
        for at in range(extent.start, extent.start + extent.length, WINDOW):
            count = min(WINDOW, extent.start + extent.length - at)
            data = source.read(at, count) if extent.data else blank
            if data[:count] != blank[:count]:
                target.write(at - begin, data)
            elif not zeroed:
                target.write_zeroes(at - begin, count)


HANDLERS: dict[str, Callable[[Context, Arguments], int]] = {"dd": dd}
