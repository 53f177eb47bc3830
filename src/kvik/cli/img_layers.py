"""kvik img: the commands that move data between the layers of a chain."""

from __future__ import annotations

from kvik.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments
    from kvik.image.layers import Progress

CACHES = ("none", "writeback", "writethrough", "directsync", "unsafe")


def check_caches(arguments: Arguments) -> None:
    """The cache modes are qemu-img's; all of them leave what was written on disk here."""
    for key in ("t", "T"):
        for mode in arguments.texts(key):
            if mode not in CACHES:
                raise UsageError(f"Invalid cache option: {mode}", remedy=f"one of: {', '.join(CACHES)}")


def commit(ctx: Context, arguments: Arguments) -> int:
    from kvik.cli.img_progress import ImageProgress
    from kvik.image.commit import commit as write_down
    from kvik.image.commit import empty
    from kvik.image.opening import Opener

    check_caches(arguments)
    path, format = arguments.files[0], arguments.text("f")
    base = arguments.text("b")
    # qemu-img: several layers are never emptied
    keep = arguments.flag("d") or base is not None
    depth = depth_of(path, format, base)
    with (
        ImageProgress(ctx, arguments, "committing") as progress,
        Opener().open(path, format, writable=not keep, write_layer=depth) as top,
    ):
        write_down(top, top.chain()[depth], layers=depth, progress=_limited(progress, arguments.text("r")))
        if not keep:
            empty(top)
    if not arguments.flag("q") and not ctx.quiet:
        ctx.line("Image committed.")
    return 0


def depth_of(path: str, format: str | None, base: str | None) -> int:
    """How deep below the image at `path` the one is that is written to."""
    from kvik.errors import ImageError
    from kvik.image.layers import identity
    from kvik.image.opening import Opener, beside, open_file

    with Opener(lock=False).open(path, format) as top:
        chain = top.chain()
        if len(chain) < 2:
            raise ImageError("Image does not have a backing file", file=path)
        if base is None:
            return 1
        for depth, layer in enumerate(chain[1:], 1):
            above = getattr(getattr(chain[depth - 1], "header", None), "backing_file", None)
            if base in (above, layer.path):
                return depth
        import os

        for name in (base, beside(path, base)):
            try:
                fd = open_file(name, writable=False)
            except OSError:
                continue
            status = os.fstat(fd)
            os.close(fd)
            for depth, layer in enumerate(chain[1:], 1):
                if identity(layer) == (status.st_dev, status.st_ino):
                    return depth
    raise ImageError(
        f"Did not find '{base}' in the backing chain of '{path}'",
        remedy=f"kvik img info --backing-chain {path} lists it",
    )


def _limited(progress: Progress, rate: str | None) -> Progress:
    """No faster than `rate` bytes a second."""
    if rate is None:
        return progress
    import time

    from kvik.image.create import parse_size

    speed = parse_size(rate, "rate limit")
    if not speed:
        return progress
    began = time.monotonic()

    def slowed(done: int, whole: int) -> None:
        progress(done, whole)
        if done < whole:
            time.sleep(max(0.0, done / speed - (time.monotonic() - began)))

    return slowed


def rebase(ctx: Context, arguments: Arguments) -> int:
    from kvik.cli.img_progress import ImageProgress
    from kvik.image.opening import Opener
    from kvik.image.rebase import rebase as change

    check_caches(arguments)
    unsafe = arguments.flag("u")
    if arguments.text("b") is None and not unsafe:
        raise UsageError(
            "Must specify backing file (-b) or use unsafe mode (-u)", remedy="see 'kvik img rebase --help'"
        )
    with ImageProgress(ctx, arguments, "rebasing") as progress:
        change(
            arguments.files[0],
            arguments.text("b"),
            arguments.text("F"),
            format=arguments.text("f"),
            safe=not unsafe,
            opener=Opener(share=arguments.flag("U")),
            progress=progress,
        )
    return 0


HANDLERS: dict[str, Callable[[Context, Arguments], int]] = {"commit": commit, "rebase": rebase}
