"""kvik-blk's monitor: block jobs of its disk. An image of its chain is named by its place, 0 being on top."""

from __future__ import annotations

from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.schema import ID, NOTHING, Bool, Enum, Int, List, Str, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.blk.block_jobs import BlockJobs

__all__ = ["COMMANDS"]

MAX_CHAIN = 200
_SPEED = Int(0, (1 << 63) - 1)


def _jobs(context: Context) -> BlockJobs:
    found: BlockJobs = context.machine.block_jobs  # type: ignore[attr-defined]  # it is a `BlkHost`
    return found


def _query_chain(context: Context, arguments: Arguments) -> list[dict[str, int]]:
    return _jobs(context).chain()


def _query_jobs(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    return _jobs(context).report()


def _pull(context: Context, arguments: Arguments) -> None:
    _jobs(context).pull(
        arguments["job"], arguments.get("base", 0), arguments.get("backing-file"), arguments.get("speed", 0)
    )


def _taken(context: Context, names: list[str]) -> list[int]:
    """The descriptors of these names, sent by getfd: all or none."""
    named = context.server.named_fds
    for name in names:
        if name not in named or names.count(name) > 1:
            raise QmpError(f"File descriptor named '{name}' not found")
    return [named.pop(name) for name in names]


def _commit(context: Context, arguments: Arguments) -> None:
    given = _taken(context, [arguments[key] for key in ("image", "above", "data") if key in arguments])
    fds = given[0], given[1] if len(given) > 1 else -1
    if not arguments["top"]:
        node, speed = arguments.get("node-name", ""), arguments.get("speed", 0)
        _jobs(context).commit_top(arguments["job"], arguments["base"], fds=fds, node=node, speed=speed)
        return
    _jobs(context).commit(
        arguments["job"],
        arguments["top"],
        arguments["base"],
        fds=fds,
        backing=arguments.get("backing-file", ""),
        speed=arguments.get("speed", 0),
    )


def _copy(context: Context, arguments: Arguments) -> None:
    images = arguments["images"]
    if not images:
        raise QmpError("Parameter 'images' is empty")
    data = [arguments["data"]] if "data" in arguments else []
    fds = _taken(context, [*(item["image"] for item in images), *data])
    _jobs(context).copy(
        arguments["job"],
        [(fd, item["format"]) for fd, item in zip(fds, images, strict=False)],
        data=fds[-1] if data else -1,
        shallow=arguments.get("shallow", False),
        shared=arguments.get("shared", False),
        blank=arguments.get("blank", False),
        node=arguments["node-name"],
        speed=arguments.get("speed", 0),
        granularity=arguments.get("granularity", 0),
        room=arguments.get("buf-size", 0),
    )


def _carry(context: Context, arguments: Arguments) -> None:
    _jobs(context).carry(arguments["layers"])


def _set_speed(context: Context, arguments: Arguments) -> None:
    _jobs(context).set_speed(arguments["job"], arguments["speed"])


def _cancel(context: Context, arguments: Arguments) -> None:
    _jobs(context).cancel(arguments["job"], force=arguments.get("force", True))


def _complete(context: Context, arguments: Arguments) -> None:
    _jobs(context).complete(arguments["job"])


def _dismiss(context: Context, arguments: Arguments) -> None:
    _jobs(context).dismiss(arguments["job"])


_JOB = {"job": ID}
COMMANDS = (
    Command("x-kvik-query-chain", _query_chain, summary="the files of its images, from the top down"),
    Command("x-kvik-query-block-jobs", _query_jobs, summary="what is under way, or has ended"),
    Command(
        "x-kvik-pull",
        _pull,
        Struct(_JOB | {"*base": Int(1, MAX_CHAIN), "*backing-file": Str(1023), "*speed": _SPEED}),
        NOTHING,
        summary="the image on top gets what those below it have, down to a base",
    ),
    Command(
        "x-kvik-commit",
        _commit,
        Struct(
            _JOB
            | {"top": Int(0, MAX_CHAIN), "base": Int(1, MAX_CHAIN), "*backing-file": Str(1023), "*speed": _SPEED}
            | {"image": ID, "*above": ID, "*data": ID, "*node-name": ID}
        ),
        NOTHING,
        summary="images go into a base below them; that and the one above, if not on top, are sent by getfd",
    ),
    Command(
        "x-kvik-copy",
        _copy,
        Struct(
            _JOB
            | {"images": List(Struct({"image": ID, "format": Enum("raw", "qcow2")}), MAX_CHAIN), "*data": ID}
            | {"node-name": ID, "*shallow": Bool(), "*shared": Bool(), "*blank": Bool(), "*speed": _SPEED}
            | {"*granularity": Int(0, 1 << 31), "*buf-size": Int(0, (1 << 31) - 1)}
        ),
        NOTHING,
        summary="what the disk has goes into an image, sent by getfd as all that it rests on",
    ),
    Command(
        "x-kvik-copy-carry",
        _carry,
        Struct({"layers": List(Int(0, MAX_CHAIN), MAX_CHAIN)}),
        NOTHING,
        summary="what the bitmaps of these images mark is marked in the copy when the guest changes over to it",
    ),
    Command(
        "x-kvik-block-job-speed",
        _set_speed,
        Struct(_JOB | {"speed": _SPEED}),
        NOTHING,
        summary="bytes a second, 0: no limit",
    ),
    Command(
        "x-kvik-block-job-cancel",
        _cancel,
        Struct(_JOB | {"*force": Bool()}),
        NOTHING,
        summary="it ends as it is; by force=false a copy that is ready ends as one that is whole",
    ),
    Command("x-kvik-block-job-complete", _complete, Struct(_JOB), NOTHING, summary="one that is ready changes over"),
    Command("x-kvik-block-job-dismiss", _dismiss, Struct(_JOB), NOTHING, summary="it is forgotten"),
)
