"""kvik img bitmap: persistent bitmaps, changed as qemu-img changes them."""

from __future__ import annotations

from kvik.cli.options import UsageError
from kvik.errors import KvikError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments
    from kvik.image.qcow2.reader import Qcow2Reader

ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")


def bitmap(ctx: Context, arguments: Arguments) -> int:
    from contextlib import ExitStack

    from kvik.image.create import parse_size
    from kvik.image.opening import Opener
    from kvik.image.qcow2.bitmap_changes import BitmapChanges
    from kvik.image.qcow2.reader import Qcow2Reader
    from kvik.image.qcow2.writer import Qcow2Writer

    actions = [(key, value) for key, value in arguments.order if key in ACTIONS]
    if not actions:
        raise UsageError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
    if arguments.flag("g") and not arguments.flag("add"):
        raise UsageError("granularity only supported with --add")
    if arguments.flag("F") and not arguments.flag("b"):
        raise UsageError("-F only supported with -b")
    if arguments.flag("b") and not arguments.flag("merge"):
        raise UsageError("Merge bitmap source file only supported with --merge")
    granularity = None
    if (text := arguments.text("g")) is not None:
        granularity = parse_size(text, "granularity")
    path, name = arguments.files
    with ExitStack() as stack:
        image = stack.enter_context(Opener().open(path, arguments.text("f"), writable=True, chain=False))
        if not isinstance(image, Qcow2Writer):
            raise image.fault(f"images of format {image.format} cannot have bitmaps")
        source: Qcow2Reader | None = None
        if (other := arguments.text("b")) is not None:
            opened = stack.enter_context(Opener().open(other, arguments.text("F"), chain=False))
            if not isinstance(opened, Qcow2Reader):
                raise opened.fault(f"images of format {opened.format} have no bitmaps")
            source = opened
        changes = BitmapChanges(image)
        for action, value in actions:
            try:
                if action == "add":
                    changes.add(name, granularity)
                elif action == "merge":
                    changes.merge(name, value, source)
                elif action in ("enable", "disable"):
                    changes.enable(name, on=action == "enable")
                else:
                    (changes.clear if action == "clear" else changes.remove)(name)
            except KvikError as error:
                error.message = f"Operation {action} on bitmap {name} failed: {error.message}"
                raise
        changes.store()
    return 0


HANDLERS: dict[str, Callable[[Context, Arguments], int]] = {"bitmap": bitmap}
