"""kvik img bench: requests to an image one after the other, and how long they take altogether."""

from __future__ import annotations

from kvik.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments
    from kvik.image.base import Image

LARGEST = (1 << 31) - 1  # of counts, and of bytes at once
AIO = ("threads", "native", "io_uring")
MOST_READERS = 16  # threads: more of them wait for each other only


class Requests:
    """What is to be done, as the options say. `UsageError`, `InvalidArgument`."""

    def __init__(self, arguments: Arguments) -> None:
        from kvik.image.create import parse_size

        text = arguments.text
        self.count = _number(text("c"), 75000, "request count")
        self.depth = _number(text("d"), 64, "queue depth")
        self.size = parse_size(text("s") or "4096", "buffer size")
        self.step = parse_size(text("S") or "0", "step size") or self.size
        self.offset = parse_size(text("o") or "0", "offset")
        self.write = arguments.flag("w")
        self.pattern = _number(text("pattern"), 0, "pattern byte", most=255)
        self.flush_interval = _number(text("flush-interval"), 0, "flush interval")
        if not self.depth:
            raise UsageError("Invalid queue depth specified", remedy="1 at least")
        if max(self.size, self.step) > LARGEST:
            raise UsageError("Invalid buffer size specified", remedy=f"0 to {LARGEST} bytes")
        if self.flush_interval and not self.write:
            raise UsageError("--flush-interval is only available in write tests")
        if 0 < self.flush_interval < self.depth:
            raise UsageError("Flush interval can't be smaller than depth")
        aio, cache = "native" if arguments.flag("n") else text("i") or "threads", text("t") or "writeback"
        if aio not in AIO:
            raise UsageError(f"Invalid aio option: {aio}", remedy=f"one of: {', '.join(AIO)}")
        if aio == "native" and cache not in ("none", "directsync"):
            raise UsageError("aio=native was specified, but it requires cache.direct=on", remedy="use -t none")

    def offsets(self, size: int) -> Iterator[int]:
        """Of all requests to a disk of `size` bytes: from about its end on at its beginning again, as QEMU wraps."""
        at = self.offset
        for _ in range(self.count):
            yield at
            at = (at + self.step) % (size - self.size) if size > self.size else 0

    def describe(self) -> Iterator[str]:
        yield (
            f"Sending {self.count} {'write' if self.write else 'read'} requests, {self.size} bytes each, "
            f"{self.depth} in parallel (starting at offset {self.offset}, step size {self.step})"
        )
        if self.flush_interval:
            yield f"Sending flush every {self.flush_interval} requests"


def _number(text: str | None, default: int, what: str, most: int = LARGEST) -> int:
    if text is None:
        return default
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= most:
        raise UsageError(f"Invalid {what} specified", remedy=f"0 to {most}")
    return value


def bench(ctx: Context, arguments: Arguments) -> int:
    from time import monotonic

    from kvik.cli.img_layers import check_caches
    from kvik.image.opening import Opener

    check_caches(arguments)
    requests = Requests(arguments)
    opener = Opener(share=arguments.flag("U"))
    with opener.open(arguments.files[0], arguments.text("f"), writable=requests.write) as image:
        for line in requests.describe():
            ctx.line(line)
        ctx.stdout.flush()
        began = monotonic()
        if requests.write:
            _write(image, requests, arguments.text("t") or "writeback")
        else:
            _read(image, requests)
        ctx.line(f"Run completed in {monotonic() - began:.3f} seconds.")
    return 0


def _read(image: Image, requests: Requests) -> None:
    from kvik.image.pipeline import in_order

    workers = min(requests.depth, MOST_READERS)
    ahead = min(requests.depth, 2 * workers)
    buffers = [bytearray(requests.size) for _ in range(ahead)]

    def load(offset: int, slot: int) -> None:
        image.read_into(offset, buffers[slot])

    for _ in in_order(requests.offsets(image.size), load, workers, ahead):
        pass


def _write(image: Image, requests: Requests, cache: str) -> None:
    """One at a time: an image is written by one thread, which QEMU has, too."""
    data = bytes([requests.pattern]) * requests.size
    synchronous = cache in ("writethrough", "directsync")
    for number, offset in enumerate(requests.offsets(image.size), 1):
        image.write(offset, data)
        if synchronous or (requests.flush_interval and number % requests.flush_interval == 0 and cache != "unsafe"):
            image.flush()


HANDLERS: dict[str, Callable[[Context, Arguments], int]] = {"bench": bench}
