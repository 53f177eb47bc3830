"""kvik img amend: options of an existing image."""

from __future__ import annotations

from kvik.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments


def amend(ctx: Context, arguments: Arguments) -> int:
    from kvik.cli.img_layers import check_caches
    from kvik.cli.img_progress import ImageProgress
    from kvik.image.create import parse_options
    from kvik.image.opening import Opener
    from kvik.image.qcow2.amend import amend as change
    from kvik.image.qcow2.writer import Qcow2Writer

    check_caches(arguments)
    if "help" in arguments.texts("o"):
        from kvik.cli.img_help import list_amendments

        return list_amendments(ctx, arguments.text("f") or "qcow2")
    if not arguments.texts("o"):
        raise UsageError("Must specify options (-o)", remedy="'kvik img amend -o help' lists them")
    path = arguments.files[0]
    with (
        ImageProgress(ctx, arguments, "amending") as progress,
        Opener().open(path, arguments.text("f"), writable=True) as image,
    ):
        if not isinstance(image, Qcow2Writer):
            raise image.fault(f"Format driver '{image.format}' does not support option amendment")
        options = parse_options(arguments.texts("o"), "qcow2")
        size = options.pop("size", None)
        change(image, **options)
        if size is not None and size != image.size:
            from kvik.image.resize import resize

            resize(image, size, shrink=True)
        progress(1, 1)
    return 0


HANDLERS: dict[str, Callable[[Context, Arguments], int]] = {"amend": amend}
