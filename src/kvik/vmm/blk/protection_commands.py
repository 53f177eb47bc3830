"""While its VMM's memory is saved as it was at one instant, kvik-blk writes only to what the saver has copied."""

from __future__ import annotations

from collections.abc import Sequence

from kvik.errors import OperationInvalid
from kvik.vmm.monitor.fds import take_named
from kvik.vmm.monitor.schema import ID, NOTHING, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context
from kvik.vmm.state.protection import Protection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.blk.host import BlkHost

__all__ = ["COMMANDS"]


def _begin(context: Context, arguments: Arguments) -> None:
    host: BlkHost = context.machine  # type: ignore[assignment]  # quacks like a machine
    channel, device = take_named(context.server.named_fds, arguments["fdname"], arguments["userfaultfd"])

    def ended(why: str) -> None:
        host.protection = None

    host.protection = Protection(host.memory, host.loop, channel, device, ended)


def _protect(context: Context, arguments: Arguments) -> None:
    host: BlkHost = context.machine  # type: ignore[assignment]  # quacks like a machine
    if host.protection is None:
        raise OperationInvalid("the memory is not being watched", remedy="x-kvik-protect-begin comes first")
    host.protection.protect({}, ())


def _cancel(context: Context, arguments: Arguments) -> None:
    host: BlkHost = context.machine  # type: ignore[assignment]  # quacks like a machine
    if host.protection is not None:
        host.protection.cancel()


COMMANDS: Sequence[Command] = (
    Command("x-kvik-protect-begin", _begin, Struct({"fdname": ID, "userfaultfd": ID}), NOTHING),
    Command("x-kvik-protect", _protect, NOTHING, NOTHING),
    Command("x-kvik-protect-cancel", _cancel, NOTHING, NOTHING),
)
