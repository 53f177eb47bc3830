"""kvik img: the commands that make and change images."""

from __future__ import annotations

from kvik.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments


def known_format(name: str, *others: str) -> str:
    from kvik.image.opening import FORMATS

    if name not in (*FORMATS, *others):
        raise UsageError(f"images of format '{name}' are not made here", remedy=f"one of: {', '.join(FORMATS)}")
    return name


def create(ctx: Context, arguments: Arguments) -> int:
    from kvik.image.create import parse_options, parse_size
    from kvik.image.fresh import FreshImage

    format = known_format(arguments.text("f") or "raw", *(["luks"] if "help" in arguments.texts("o") else []))
    if "help" in arguments.texts("o"):
        from kvik.cli.img_help import list_options

        return list_options(ctx, format)
    options = parse_options(arguments.texts("o"), format)
    path = arguments.files[0]
    size = options.pop("size", None)
    if len(arguments.files) > 1:
        size = parse_size(arguments.files[1])
    if (backing := arguments.text("b")) is not None:
        options["backing_file"] = backing
    if (backing_format := arguments.text("F")) is not None:
        options["backing_format"] = backing_format
    if "backing_file" in options:
        size = _backing(path, options, size, look=not arguments.flag("u"))
    if size is None:
        raise UsageError("Image creation needs a size parameter", remedy="kvik img create -f qcow2 disk.qcow2 10G")
    if not arguments.flag("q") and not ctx.quiet:
        ctx.line(formatting(path, format, size, options))
    with FreshImage(path, format, size, options) as fresh:
        fresh.keep()
    return 0


def _backing(path: str, options: dict[str, Any], size: int | None, *, look: bool) -> int | None:
    """The disk's size: as given, or the backing image's, which must be there unless told otherwise."""
    from kvik.errors import ImageError
    from kvik.image.opening import Opener, beside, plain_file

    name = options["backing_file"]
    if options.get("backing_format") is None:
        raise UsageError(
            f"backing file specified without backing format: {name}", remedy="state it with -F, such as -F qcow2"
        )
    if not look:
        return size
    there = beside(path, plain_file(name, "backing file", path))
    try:
        with Opener(share=True).open(there, options["backing_format"]) as below:
            return below.size if size is None else size
    except OSError as error:
        raise ImageError(
            f"its backing file {there} cannot be opened: {error.strerror}",
            file=path,
            remedy="name one that is there, as seen from the image's directory; -u and a SIZE do without",
        ) from error


def formatting(path: str, format: str, size: int, options: dict[str, Any]) -> str:
    """The line that qemu-img prints, option by option."""
    from kvik.image.create import CreateOptions

    chosen = CreateOptions(**options)
    parts = [f"Formatting '{path}', fmt={format}"]
    size = (size + 511) & -512
    if format == "raw":
        parts.append(f"size={size}")
        if "preallocation" in options:
            parts.append(f"preallocation={chosen.preallocation}")
        return " ".join(parts)
    on = ("off", "on")
    parts += [f"cluster_size={chosen.cluster_size}", f"extended_l2={on[chosen.extended_l2]}"]
    if "preallocation" in options:
        parts.append(f"preallocation={chosen.preallocation}")
    parts += [f"compression_type={chosen.compression_type}", f"size={size}"]
    if "compat" in options:
        parts.append(f"compat={chosen.compat}")
    for name, value in (
        ("backing_file", chosen.backing_file),
        ("backing_fmt", chosen.backing_format),
        ("data_file", chosen.data_file),
    ):
        if value is not None:
            parts.append(f"{name}={value}")
    if "data_file_raw" in options:
        parts.append(f"data_file_raw={on[chosen.data_file_raw]}")
    parts += [f"lazy_refcounts={on[chosen.lazy_refcounts]}", f"refcount_bits={chosen.refcount_bits}"]
    return " ".join(parts)


HANDLERS: dict[str, Callable[[Context, Arguments], int]] = {"create": create}
