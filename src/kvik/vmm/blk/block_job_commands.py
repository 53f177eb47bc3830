"""kvik-blk's monitor: block jobs of its disk. An image of its chain is named by its place, 0 being on top."""

from __future__ import annotations

from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.schema import ID, NOTHING, Int, Str, Struct
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


def _commit(context: Context, arguments: Arguments) -> None:
    named = context.server.named_fds
    names = [arguments[key] for key in ("image", "above", "data") if key in arguments]
    for name in names:
        if name not in named:
            raise QmpError(f"File descriptor named '{name}' not found")
    given = [named.pop(name) for name in names]
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


def _set_speed(context: Context, arguments: Arguments) -> None:
    _jobs(context).set_speed(arguments["job"], arguments["speed"])


def _cancel(context: Context, arguments: Arguments) -> None:
    _jobs(context).cancel(arguments["job"])


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
        "x-kvik-block-job-speed",
        _set_speed,
        Struct(_JOB | {"speed": _SPEED}),
        NOTHING,
        summary="bytes a second, 0: no limit",
    ),
    Command("x-kvik-block-job-cancel", _cancel, Struct(_JOB), NOTHING, summary="it ends as it is"),
    Command("x-kvik-block-job-complete", _complete, Struct(_JOB), NOTHING, summary="one that is ready changes over"),
    Command("x-kvik-block-job-dismiss", _dismiss, Struct(_JOB), NOTHING, summary="it is forgotten"),
)
