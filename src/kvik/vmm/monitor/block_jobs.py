"""Block jobs of a disk that is written to here: kvik-blk's one disk, or one of kvik-vmm's own (`device`). An image of
its chain is named by its place, 0 being on top.

What they do: `vmm/blk/block_jobs.py`, which only a machine with a disk of its own imports.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvik.vmm.monitor import overlays
from kvik.vmm.monitor.errors import QmpError, refused
from kvik.vmm.monitor.schema import ID, NOTHING, Bool, Enum, Int, List, Str, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.blk.block_jobs import BlockJobs

__all__ = ["COMMANDS", "MAX_CHAIN", "jobs"]

MAX_CHAIN = 200
_SPEED = Int(0, (1 << 63) - 1)


def jobs(context: Context, arguments: Arguments) -> BlockJobs:
    """Of that disk, whether it had one before or not. Raises `QmpError`."""
    device = overlays.disk_of(context, arguments)
    if device.block_jobs is None:
        ready = overlays.overlays_of(context, arguments)
        try:
            from kvik.vmm.blk.block_jobs import BlockJobs
        except ImportError as error:  # confined
            raise refused(
                f"cannot work on the images of disk {device.name}",
                "the machine was started without a disk of this kind: start it again with this one",
            ) from error
        machine = context.machine
        device.block_jobs = BlockJobs(device, ready, None, machine.emit, locking=ready.locking, log=machine.log)
    return device.block_jobs


def _take_fds(context: Context, names: list[str]) -> list[int]:
    """The descriptors of these names, sent by getfd: all or none."""
    named = context.server.named_fds
    for name in names:
        if name not in named or names.count(name) > 1:
            raise QmpError(f"File descriptor named '{name}' not found")
    return [named.pop(name) for name in names]


def _note(context: Context, arguments: Arguments) -> None:
    ready = overlays.overlays_of(context, arguments)
    (fd,) = _take_fds(context, [arguments["file"]])
    ready.note_in(fd)


def _query_chain(context: Context, arguments: Arguments) -> list[dict[str, int]]:
    return jobs(context, arguments).chain()


def _query_jobs(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    known = overlays.disk_of(context, arguments).block_jobs
    return known.report() if known is not None else []


def _pull(context: Context, arguments: Arguments) -> None:
    jobs(context, arguments).pull(
        arguments["job"], arguments.get("base", 0), arguments.get("backing-file"), arguments.get("speed", 0)
    )


def _commit(context: Context, arguments: Arguments) -> None:
    given = _take_fds(context, [arguments[key] for key in ("image", "above", "data") if key in arguments])
    fds = given[0], given[1] if len(given) > 1 else -1
    found = jobs(context, arguments)
    if not arguments["top"]:
        node, speed = arguments.get("node-name", ""), arguments.get("speed", 0)
        found.commit_top(arguments["job"], arguments["base"], fds=fds, node=node, speed=speed)
        return
    found.commit(
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
    found = jobs(context, arguments)
    data = [arguments["data"]] if "data" in arguments else []
    fds = _take_fds(context, [*(item["image"] for item in images), *data])
    found.copy(
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


def _set_speed(context: Context, arguments: Arguments) -> None:
    jobs(context, arguments).set_speed(arguments["job"], arguments["speed"])


def _cancel(context: Context, arguments: Arguments) -> None:
    jobs(context, arguments).cancel(arguments["job"], force=arguments.get("force", True))


def _complete(context: Context, arguments: Arguments) -> None:
    jobs(context, arguments).complete(arguments["job"])


def _dismiss(context: Context, arguments: Arguments) -> None:
    jobs(context, arguments).dismiss(arguments["job"])


_DEVICE = {"*device": ID}
_JOB = _DEVICE | {"job": ID}
COMMANDS: Sequence[Command] = (
    Command("x-kvik-query-chain", _query_chain, Struct(_DEVICE), summary="the files of its images, from the top down"),
    Command("x-kvik-query-block-jobs", _query_jobs, Struct(_DEVICE), summary="what is under way, or has ended"),
    Command(
        "x-kvik-note",
        _note,
        Struct(_DEVICE | {"file": ID}),
        NOTHING,
        summary="a file, sent by getfd, that says for those who come later which image the guest writes to",
    ),
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
