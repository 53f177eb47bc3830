"""kvik-blk's monitor: what of block jobs is about bitmaps, which kvik-vmm's own disks do not have."""

from __future__ import annotations

from kvik.vmm.monitor.block_jobs import MAX_CHAIN, jobs
from kvik.vmm.monitor.schema import NOTHING, Int, List, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

__all__ = ["COMMANDS"]


def _carry(context: Context, arguments: Arguments) -> None:
    jobs(context, arguments).carry(arguments["layers"])


COMMANDS = (
    Command(
        "x-kvik-copy-carry",
        _carry,
        Struct({"layers": List(Int(0, MAX_CHAIN), MAX_CHAIN)}),
        NOTHING,
        summary="what the bitmaps of these images mark is marked in the copy when the guest changes over to it",
    ),
)
