"""kvik img: the commands that look at images and print what qemu-img 7.2 prints."""

from __future__ import annotations

from kvik.cli.options import UsageError
from kvik.image.opening import Opener

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from kvik.cli.context import Context
    from kvik.cli.img import Arguments
    from kvik.image.base import Extent, Image
    from kvik.image.info import Info
    from kvik.image.qcow2.check import CheckResult
    from kvik.image.qcow2.snapshots import Snapshot

NOT_SUPPORTED = 63  # qemu-img check: the format has no checks


def put_json(ctx: Context, data: Any) -> None:
    """As QEMU indents it: four blanks."""
    import json

    for line in json.dumps(data, indent=4, ensure_ascii=False).split("\n"):
        if line.rstrip(",").endswith("[]"):  # which QEMU writes in two lines
            start, blank, end = line.rpartition("]")
            line = f"{start}\n{' ' * (len(line) - len(line.lstrip()))}{blank}{end}"
        ctx.write(f"{line}\n")


# -- info


def info(ctx: Context, arguments: Arguments) -> int:
    from kvik.image.info import info as look

    chain = arguments.flag("backing-chain")
    if (code := _foreign_info(ctx, arguments)) is not None:
        return code
    opener = Opener(share=arguments.flag("U"), alone=arguments.flag("alone"))
    with opener.open(arguments.files[0], _format(arguments), chain=chain) as image:
        found = [look(layer) for layer in image.chain()] if chain else [look(image)]
    if ctx.json:
        put_json(ctx, [one.as_dict() for one in found] if chain else found[0].as_dict())
        return 0
    ctx.document("\n".join(info_text(one) for one in found))
    return 0


def _foreign_info(ctx: Context, arguments: Arguments) -> int | None:
    """Of an image in a format that a confined qemu-img reads; None if it is none."""
    import os

    from kvik.image.opening import FOREIGN, open_file, probe_format

    path = arguments.files[0]
    format = arguments.text("f")
    if format is not None and format not in FOREIGN:
        return None
    fd = open_file(path, writable=False)
    try:
        format = format or probe_format(fd)
        if format not in FOREIGN:
            return None
        from kvik.cli.img_foreign import info as look

        found = look(fd, path, format, as_json=ctx.json, member=arguments.text("l"))
    finally:
        os.close(fd)
    if isinstance(found, str):
        ctx.document(found)
    else:
        put_json(ctx, [found] if arguments.flag("backing-chain") else found)
    return 0


def _format(arguments: Arguments, key: str = "f") -> str | None:
    return arguments.text(key)


def info_text(found: Info) -> str:
    """The lines of qemu-img 7.2."""
    from kvik.image.info import size_text

    lines = [
        f"image: {found.filename}",
        f"file format: {found.format}",
        f"virtual size: {size_text(found.virtual_size)} ({found.virtual_size} bytes)",
        f"disk size: {size_text(found.disk_size)}",
    ]
    if found.encrypted:
        lines.append("encrypted: yes")
    if found.cluster_size is not None:
        lines.append(f"cluster_size: {found.cluster_size}")
    if found.dirty:
        lines.append("cleanly shut down: no")
    if found.backing_file is not None:
        full = found.full_backing_file()
        actual = f" (actual path: {full})" if full != found.backing_file else ""
        lines.append(f"backing file: {found.backing_file}{actual}")
        if found.backing_format:
            lines.append(f"backing file format: {found.backing_format}")
    if found.snapshots:
        lines += ["Snapshot list:", *snapshot_lines(found.snapshots)]
    specific = found.as_dict().get("format-specific", {}).get("data", {})
    if specific:
        lines += ["Format specific information:", *_tree(specific, 1)]
    return "\n".join(lines) + "\n"


def _tree(data: Any, depth: int) -> Iterable[str]:
    """QEMU's dump_qobject: nested names with their values."""
    items = data.items() if isinstance(data, dict) else ((f"[{i}]", value) for i, value in enumerate(data))
    for key, value in items:
        name = key if isinstance(data, list) else key.replace("-", " ")
        if isinstance(value, dict | list):
            yield f"{'    ' * depth}{name}:"
            yield from _tree(value, depth + 1)
        else:
            text = ("true" if value else "false") if isinstance(value, bool) else value
            yield f"{'    ' * depth}{name}: {text}"


def snapshot_lines(snapshots: list[Snapshot]) -> Iterable[str]:
    from time import localtime, strftime

    from kvik.image.info import size_text

    yield f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"
    for one in snapshots:
        seconds, millis = divmod(one.vm_clock_nsec // 1_000_000, 1000)
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{millis:03d}"
        date = strftime("%Y-%m-%d %H:%M:%S", localtime(one.date_sec))
        count = "" if one.icount is None else one.icount
        yield f"{one.id:<9} {one.name:<16} {size_text(one.vm_state_size):>8}{date:>20}{clock:>13}{count:>11}"


# -- check


def check(ctx: Context, arguments: Arguments) -> int:
    from kvik.cli.img_layers import check_caches, check_shared

    check_caches(arguments)
    repair = arguments.text("r")
    if repair not in (None, "leaks", "all"):
        raise UsageError("-r expects 'leaks' or 'all'")
    path = arguments.files[0]
    check_shared(arguments, writes=repair is not None)
    opener = Opener(share=arguments.flag("U"))
    quiet = arguments.flag("q")
    with opener.open(path, _format(arguments), writable=repair is not None, chain=False, repairing=True) as image:
        from kvik.image.qcow2.reader import Qcow2Reader

        if not isinstance(image, Qcow2Reader):
            ctx.warn(f"error: {path}: images of format {image.format} cannot be checked")
            return NOT_SUPPORTED
        from kvik.image.qcow2.check import check as look

        result = look(image)
        if repair is not None:
            result = _repaired(ctx, image, result, repair, quiet)
    if ctx.json:
        if not quiet:
            put_json(ctx, check_dict(result, path))
    else:
        for line in result.messages:
            ctx.warn(line)
        if not quiet:
            ctx.document(check_text(result))
    return 1 if result.check_errors else 2 if result.corruptions else 3 if result.leaks else 0


def _repaired(ctx: Context, image: Image, result: CheckResult, what: str, quiet: bool) -> CheckResult:
    from kvik.image.qcow2.check import check as look
    from kvik.image.qcow2.repair import repair
    from kvik.image.qcow2.writer import Qcow2Writer

    assert isinstance(image, Qcow2Writer)
    leaks, corruptions = repair(image, everything=what == "all")
    after = look(image)
    after.leaks_fixed, after.corruptions_fixed = leaks, corruptions
    if not ctx.json and (leaks or corruptions):
        for line in result.messages:
            ctx.warn(line)
        if not quiet:
            ctx.document(
                "The following inconsistencies were found and repaired:\n\n"
                f"    {leaks} leaked clusters\n    {corruptions} corruptions\n\n"
                "Double checking the fixed image now...\n"
            )
    return after


def check_text(result: CheckResult) -> str:
    lines = []
    if result.clean:
        lines.append("No errors were found on the image.")
    if result.corruptions:
        lines.append(
            f"\n{result.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if result.leaks:
        lines.append(
            f"\n{result.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if result.check_errors:
        lines.append(f"\n{result.check_errors} internal errors have occurred during the check.")
    allocated = result.allocated_clusters
    if result.total_clusters and allocated:
        lines.append(
            f"{allocated}/{result.total_clusters} = {allocated * 100 / result.total_clusters:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        lines.append(f"Image end offset: {result.image_end_offset}")
    return "\n".join(lines) + "\n"


def check_dict(result: CheckResult, path: str) -> dict[str, Any]:
    """As `qemu-img check --output=json`: figures that are zero are left out."""
    figures = {
        "image-end-offset": result.image_end_offset,
        "compressed-clusters": result.compressed_clusters,
        "total-clusters": result.total_clusters,
        "corruptions": result.corruptions,
        "corruptions-fixed": result.corruptions_fixed,
        "check-errors": result.check_errors,
        "leaks": result.leaks,
        "leaks-fixed": result.leaks_fixed,
        "allocated-clusters": result.allocated_clusters,
        "filename": path,
        "format": "qcow2",
        "fragmented-clusters": result.fragmented_clusters,
    }
    return {name: value for name, value in figures.items() if value or name == "check-errors"}


# -- map


def map_image(ctx: Context, arguments: Arguments) -> int:
    from kvik.image.create import parse_size

    start = parse_size(arguments.text("s") or "0", "start-offset")
    opener = Opener(share=arguments.flag("U"), alone=arguments.flag("alone"))
    with opener.open(arguments.files[0], _format(arguments)) as image:
        length = max(0, image.size - start)
        if (limit := arguments.text("l")) is not None:
            length = min(length, parse_size(limit, "max-length"))
        extents = image.map(min(start, image.size), length)
        if ctx.json:
            _map_json(ctx, extents, start)
        else:
            _map_text(ctx, extents, [data_path(layer) for layer in image.chain()])
    return 0


def data_path(image: Image) -> str:
    """The file in which an image's data is, as the image names it."""
    from kvik.image.qcow2.reader import Qcow2Reader

    if isinstance(image, Qcow2Reader) and image.has_data_file and image.header.data_file is not None:
        return image.header.data_file
    return image.path


def _map_json(ctx: Context, extents: Iterable[Extent], start: int) -> None:
    text = ("false", "true")
    ctx.write("[")
    comma = ""
    for one in extents:
        place = "" if one.offset is None else f', "offset": {one.offset}'
        ctx.write(
            f'{comma}{{ "start": {one.start}, "length": {one.length}, "depth": {one.depth}, '
            f'"present": {text[one.present]}, "zero": {text[one.zero]}, "data": {text[one.data]}{place}}}'
        )
        comma = ",\n"
    if not comma:  # of nothing QEMU tells, too
        ctx.write(f'{{ "start": {start}, "length": 0, "depth": 0, "present": false, "zero": false, "data": false}}')
    ctx.write("]\n")


def _map_text(ctx: Context, extents: Iterable[Extent], names: list[str]) -> None:
    from kvik.errors import OperationUnsupported

    ctx.line(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for one in extents:
        if not one.data or one.zero:
            continue
        if one.offset is None:
            raise OperationUnsupported(
                "File contains external, encrypted or compressed clusters.", remedy="use --output=json"
            )
        ctx.line(f"{_hex(one.start):<16}{_hex(one.length):<16}{_hex(one.offset):<16}{names[one.depth]}")


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


HANDLERS: dict[str, Callable[[Context, Arguments], int]] = {"info": info, "check": check, "map": map_image}
