"""kvik-blk's monitor: block jobs of its disk that kvik-vmm's own disks do not have. An image of its chain is named by
its place, 0 being on top."""

from __future__ import annotations

from kvik.vmm.monitor.block_jobs import MAX_CHAIN, SPEED, jobs, take_fds
from kvik.vmm.monitor.schema import ID, NOTHING, Int, List, Str, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

__all__ = ["COMMANDS"]


def _pull(context: Context, arguments: Arguments) -> None:
    jobs(context, arguments).pull(
        arguments["job"], arguments.get("base", 0), arguments.get("backing-file"), arguments.get("speed", 0)
    )


def _commit(context: Context, arguments: Arguments) -> None:
    given = take_fds(context, [arguments[key] for key in ("image", "above", "data") if key in arguments])
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


def _carry(context: Context, arguments: Arguments) -> None:
    jobs(context, arguments).carry(arguments["layers"])


_JOB = {"job": ID}
COMMANDS = (
    Command(
        "x-kvik-pull",
        _pull,
        Struct(_JOB | {"*base": Int(1, MAX_CHAIN), "*backing-file": Str(1023), "*speed": SPEED}),
        NOTHING,
        summary="the image on top gets what those below it have, down to a base",
    ),
    Command(
        "x-kvik-commit",
        _commit,
        Struct(
            _JOB
            | {"top": Int(0, MAX_CHAIN), "base": Int(1, MAX_CHAIN), "*backing-file": Str(1023), "*speed": SPEED}
            | {"image": ID, "*above": ID, "*data": ID, "*node-name": ID}
        ),
        NOTHING,
        summary="images go into a base below them; that and the one above, if not on top, are sent by getfd",
    ),
    Command(
        "x-kvik-copy-carry",
        _carry,
        Struct({"layers": List(Int(0, MAX_CHAIN), MAX_CHAIN)}),
        NOTHING,
        summary="what the bitmaps of these images mark is marked in the copy when the guest changes over to it",
    ),
)
