"""kvik-blk's commands for bitmaps and backups of its disk. An image is named by its place, 0 being on top."""

from __future__ import annotations

from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.schema import ID, NOTHING, TEXT, Bool, Enum, Int, List, Str, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.blk.backups import Backups

__all__ = ["COMMANDS"]

MAX_CHAIN = 200
_BITMAP = Str(1023)  # characters, as QEMU's; `bitmap_changes` bounds its bytes
_SOURCES = List(Struct({"layer": Int(0, MAX_CHAIN), "name": _BITMAP}), MAX_CHAIN)


def _backups(context: Context) -> Backups:
    found: Backups = context.machine.backups  # type: ignore[attr-defined]  # it is a `BlkHost`
    return found


def _named_fd(context: Context, name: str) -> int:
    fd: int | None = context.server.named_fds.pop(name, None)
    if fd is None:
        raise QmpError(f"File descriptor named '{name}' not found")
    return fd


def _sources(arguments: Arguments) -> list[tuple[int, str]]:
    return [(item["layer"], item["name"]) for item in arguments.get("since", ())]


def _hold(context: Context, arguments: Arguments) -> None:
    session = context.session
    _backups(context).hold(lambda: session.closed)


def _release(context: Context, arguments: Arguments) -> None:
    _backups(context).release()


def _query_bitmaps(context: Context, arguments: Arguments) -> dict[str, Any]:
    return {"layers": _backups(context).bitmaps()}


def _bitmap_add(context: Context, arguments: Arguments) -> None:
    _backups(context).track(arguments["names"], arguments.get("granularity"), held=arguments.get("held", False))


def _bitmap_remove(context: Context, arguments: Arguments) -> None:
    layer = arguments.get("layer", 0)
    fd = _named_fd(context, arguments.get("image", "")) if layer else -1
    _backups(context).forget(arguments["name"], layer, fd)


def _bitmap_count(context: Context, arguments: Arguments) -> dict[str, int]:
    return {"count": _backups(context).changed(_sources(arguments), arguments["granularity"].bit_length() - 1)}


def _bitmap_merge(context: Context, arguments: Arguments) -> None:
    into = arguments.get("into", 0)
    fd = _named_fd(context, arguments["image"]) if "image" in arguments else -1
    _backups(context).merge(arguments["layers"], into, fd)


def _backup_add(context: Context, arguments: Arguments) -> None:
    _backups(context).add(
        arguments["job"],
        _named_fd(context, arguments["image"]),
        arguments["format"],
        name=arguments["filename"],
        pull=arguments["pull"],
        since=_sources(arguments),
        incremental="since" in arguments,
    )


def _backup_begin(context: Context, arguments: Arguments) -> None:
    _backups(context).begin(arguments["job"], arguments["track"], held=arguments.get("held", False))


def _backup_serve(context: Context, arguments: Arguments) -> None:
    named = context.server.named_fds
    fds = {link["export"]: link["socket"] for link in arguments["links"]}
    wanted = {*fds.values(), *([arguments["socket"]] if "socket" in arguments else [])}
    for name in wanted:
        if name not in named:
            raise QmpError(f"File descriptor named '{name}' not found")
    taken = {name: named.pop(name) for name in wanted}
    _backups(context).serve(
        arguments["job"],
        export=arguments["export"],
        bitmap=arguments.get("bitmap", ""),
        names=arguments["exports"],
        listening=taken[arguments["socket"]] if "socket" in arguments else -1,
        links={export: taken[name] for export, name in fds.items()},
    )


def _backup_silence(context: Context, arguments: Arguments) -> None:
    _backups(context).silence(arguments["job"])


def _backup_cancel(context: Context, arguments: Arguments) -> None:
    _backups(context).cancel(arguments["job"])


def _backup_clear(context: Context, arguments: Arguments) -> None:
    _backups(context).clear(arguments["job"])


def _query_backups(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    return _backups(context).report()


_JOB = Struct({"job": ID})
COMMANDS = (
    Command("x-kvik-hold", _hold, NOTHING, NOTHING, summary="answer no request, until told or the session ends"),
    Command("x-kvik-release", _release, NOTHING, NOTHING, summary="answer them again"),
    Command("x-kvik-query-bitmaps", _query_bitmaps, summary="the dirty bitmaps of its images, from the top down"),
    Command(
        "x-kvik-bitmap-add",
        _bitmap_add,
        Struct({"names": List(_BITMAP, 64), "*granularity": Int(512, 1 << 31), "*held": Bool()}),
        NOTHING,
        summary="bitmaps of the image on top that record from now on",
    ),
    Command(
        "x-kvik-bitmap-remove",
        _bitmap_remove,
        Struct({"name": _BITMAP, "*layer": Int(0, MAX_CHAIN), "*image": ID}),
        NOTHING,
        summary="one goes; of an image below by a descriptor for writing, sent by getfd",
    ),
    Command(
        "x-kvik-bitmap-count",
        _bitmap_count,
        Struct({"since": _SOURCES, "granularity": Int(512, 1 << 31)}),
        Struct({"count": Int()}),
        summary="bytes that any of these bitmaps marks",
    ),
    Command(
        "x-kvik-bitmap-merge",
        _bitmap_merge,
        Struct({"layers": List(Int(0, MAX_CHAIN), MAX_CHAIN), "*into": Int(0, MAX_CHAIN), "*image": ID}),
        NOTHING,
        summary="what bitmaps of images below mark is marked by another's, which is sent by getfd if not on top",
    ),
    Command(
        "x-kvik-backup-add",
        _backup_add,
        Struct(
            {"job": ID, "image": ID, "filename": TEXT, "format": Enum("raw", "qcow2"), "pull": Bool()}
            | {"*since": _SOURCES}
        ),
        NOTHING,
        summary="a backup into an image, sent by getfd, ready to begin",
    ),
    Command(
        "x-kvik-backup-begin",
        _backup_begin,
        Struct({"job": ID, "track": List(_BITMAP, 64), "*held": Bool()}),
        NOTHING,
        summary="it is of this moment, as new bitmaps are",
    ),
    Command(
        "x-kvik-backup-serve",
        _backup_serve,
        Struct(
            {"job": ID, "export": ID, "*bitmap": _BITMAP, "exports": List(ID), "*socket": ID}
            | {"links": List(Struct({"export": ID, "socket": ID}))}
        ),
        NOTHING,
        summary="NBD clients may read it; by a listening socket and links to other disks' processes, sent by getfd",
    ),
    Command("x-kvik-backup-silence", _backup_silence, _JOB, NOTHING, summary="they may no more"),
    Command("x-kvik-backup-cancel", _backup_cancel, _JOB, NOTHING, summary="it ends as it is"),
    Command("x-kvik-backup-clear", _backup_clear, _JOB, NOTHING, summary="it ends, and is forgotten"),
    Command("x-kvik-query-backups", _query_backups, summary="what is under way, or has ended"),
)
