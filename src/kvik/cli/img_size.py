"""kvik img: the commands about sizes, measure and resize, and compare."""

from __future__ import annotations

from kvik.cli.img_foreign import Foreign
from kvik.cli.options import UsageError
from kvik.image.opening import Opener

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments
    from kvik.image.base import Image
    from kvik.image.compare import Difference

# qemu-img compare: what went wrong
OPENING_FAILED, READING_FAILED = 2, 4


def compare(ctx: Context, arguments: Arguments) -> int:
    from kvik.cli.img import failed
    from kvik.cli.img_layers import check_caches
    from kvik.cli.img_progress import ImageProgress
    from kvik.errors import KvikError
    from kvik.image.base import KEY_WANTED, LOCKED
    from kvik.image.compare import compare as look
    from kvik.image.luks import is_encrypted

    check_caches(arguments)
    images: list[Image] = []
    code = OPENING_FAILED
    progress = ImageProgress(ctx, arguments, "comparing")

    def tell(text: str) -> None:
        if not arguments.flag("q"):
            progress.clear()
            ctx.line(text)

    try:
        opener = Opener(share=arguments.flag("U"), alone=arguments.flag("alone"), foreign=Foreign())
        for path, key in zip(arguments.files, ("f", "F"), strict=True):
            images.append(opener.open(path, arguments.text(key)))
        for image in images:
            if is_encrypted(image):
                raise image.fault(LOCKED, remedy=KEY_WANTED)
        code = READING_FAILED
        with progress:
            found = look(
                images[0],
                images[1],
                strict=arguments.flag("s"),
                progress=progress,
                sizes_differ=lambda: tell("Warning: Image size mismatch!"),
            )
            tell(_told(found))
    except (KvikError, OSError) as error:
        ctx.error(failed("compare", error) if isinstance(error, OSError) else error)
        return code
    finally:
        for image in images:
            image.release()
    return 0 if found is None else 1


def _told(found: Difference | None) -> str:
    from kvik.image.compare import CONTENT, SIZE

    if found is None:
        return "Images are identical."
    if found.kind == SIZE:
        return "Strict mode: Image size mismatch!"
    if found.kind == CONTENT:
        return f"Content mismatch at offset {found.offset}!"
    return f"Strict mode: Offset {found.offset} block status mismatch!"


def measure(ctx: Context, arguments: Arguments) -> int:
    from kvik.cli.img_look import put_json
    from kvik.cli.img_make import known_format
    from kvik.image.create import parse_options, parse_size
    from kvik.image.measure import measure as reckon

    format = known_format(arguments.text("O") or "raw")
    options = parse_options(arguments.texts("o"), format)
    options.pop("size", None)  # which QEMU does not ask here
    size = None
    if (text := arguments.text("size")) is not None:
        size = parse_size(text)
        if arguments.files:
            raise UsageError("--size N cannot be used together with a filename.")
    if not arguments.files and size is None:
        raise UsageError("Either --size N or one filename must be specified.")
    if arguments.files:
        opener = Opener(share=arguments.flag("U"), alone=arguments.flag("alone"), foreign=Foreign())
        with opener.open(arguments.files[0], arguments.text("f")) as source:
            if (wanted := arguments.text("l")) is not None:
                from kvik.cli.img_convert import use_snapshot

                use_snapshot(source, wanted)
            found = reckon(format, source=source, **options)
    else:
        if arguments.flag("f") or arguments.flag("l"):
            raise UsageError("--object, --image-opts, -l, and -f require a filename argument.")
        found = reckon(format, size=size, **options)
    if ctx.json:
        facts = {"bitmaps": found.bitmaps, "required": found.required, "fully-allocated": found.fully_allocated}
        put_json(ctx, {name: value for name, value in facts.items() if value is not None})
        return 0
    ctx.line(f"required size: {found.required}")
    ctx.line(f"fully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        ctx.line(f"bitmaps size: {found.bitmaps}")
    return 0


def resize(ctx: Context, arguments: Arguments) -> int:
    from kvik.image.create import parse_size
    from kvik.image.resize import resize as change

    path, text = arguments.files
    number = parse_size(text[1:] if text.startswith(("+", "-")) else text)
    with Opener().open(path, arguments.text("f"), writable=True) as image:
        size = image.size + number if text[0] == "+" else image.size - number if text[0] == "-" else number
        change(image, size, shrink=arguments.flag("shrink"), preallocation=arguments.text("preallocation") or "off")
    if not arguments.flag("q"):
        ctx.line("Image resized.")
    return 0


HANDLERS: dict[str, Callable[[Context, Arguments], int]] = {"compare": compare, "measure": measure, "resize": resize}
