"""The monitor's commands for migration and snapshots: what QEMU's do (qapi/migration.json), and ours."""

from __future__ import annotations

import os
from collections.abc import Generator

from kvik.errors import HostError, InvalidArgument, OperationInvalid
from kvik.vmm.monitor.fds import take_named
from kvik.vmm.state.background import Background
from kvik.vmm.state.migration import migration_of
from kvik.vmm.state.saved_stream import save_stream_steps
from kvik.vmm.state.saving import save_steps
from kvik.vmm.state.snapshot import load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvik.vmm.monitor.table import Arguments, Context, Handler

__all__ = ["HANDLERS"]


def _uri(context: Context, text: str) -> str:
    """fd:NAME is a descriptor that came by `getfd`, as with QEMU; the number stays valid until the stream is made."""
    if text.startswith("fd:") and (fd := context.server.named_fds.get(text[3:])) is not None:
        return f"fd:{fd}"
    return text


def migrate(context: Context, arguments: Arguments) -> None:
    uri = arguments["uri"]
    migration = migration_of(context.machine)
    (migration.resume if arguments.get("resume") else migration.start)(_uri(context, uri))
    _close_named(context, uri)


def migrate_incoming(context: Context, arguments: Arguments) -> None:
    uri = arguments["uri"]
    migration_of(context.machine).listen(_uri(context, uri))
    _close_named(context, uri)


def _close_named(context: Context, uri: str) -> None:
    """The stream has a copy of its own."""
    if uri.startswith("fd:") and (fd := context.server.named_fds.pop(uri[3:], None)) is not None:
        os.close(fd)


def migrate_cancel(context: Context, arguments: Arguments) -> None:
    migration_of(context.machine).cancel()


def start_postcopy(context: Context, arguments: Arguments) -> None:
    migration_of(context.machine).start_postcopy()


def migrate_pause(context: Context, arguments: Arguments) -> None:
    migration_of(context.machine).pause_postcopy()


def migrate_recover(context: Context, arguments: Arguments) -> None:
    migration_of(context.machine).recover(arguments["uri"])


def set_parameters(context: Context, arguments: Arguments) -> None:
    migration_of(context.machine).set_parameters(arguments)


def set_capabilities(context: Context, arguments: Arguments) -> None:
    for item in arguments["capabilities"]:
        migration_of(context.machine).set_capability(item["capability"], item["state"])


def query_migrate(context: Context, arguments: Arguments) -> dict[str, Any]:
    return migration_of(context.machine).report()


def query_parameters(context: Context, arguments: Arguments) -> dict[str, Any]:
    return dict(migration_of(context.machine).parameters)


def query_capabilities(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    found = migration_of(context.machine).capabilities
    return [{"capability": name, "state": state} for name, state in found.items()]


def snapshot_save(context: Context, arguments: Arguments) -> Generator[None, None, None]:
    """The guest stands still, the monitor goes on answering."""
    for _ in save_steps(context.machine, arguments["directory"], arguments.get("compression", "none")):
        yield


def save_stream(context: Context, arguments: Arguments) -> Generator[None, None, None]:
    """Into a descriptor that came by `getfd`, which is closed afterwards."""
    fd = context.server.named_fds.pop(arguments["fdname"], None)
    if fd is None:
        raise InvalidArgument(f"no descriptor named {arguments['fdname'][:40]!r} was passed", remedy="send it by getfd")
    try:
        for _ in save_stream_steps(context.machine, fd):
            yield
    except OSError as error:
        if isinstance(error, HostError):
            raise
        raise HostError(f"the machine was not saved: {error.strerror}", errno=error.errno or 0) from error
    finally:
        os.close(fd)


def background_begin(context: Context, arguments: Arguments) -> None:
    """`fdname` and `userfaultfd` came by getfd, and are taken."""
    channel, device = take_named(context.server.named_fds, arguments["fdname"], arguments["userfaultfd"])
    Background(context.machine, channel, device, arguments["served"])


def background_freeze(context: Context, arguments: Arguments) -> None:
    if context.machine.background is None:
        raise OperationInvalid(
            "the machine's memory is not being watched", remedy="x-kvik-background-begin comes first"
        )
    context.machine.background.freeze()


def background_cancel(context: Context, arguments: Arguments) -> None:
    if context.machine.background is not None:
        context.machine.background.cancel()


def snapshot_load(context: Context, arguments: Arguments) -> None:
    load(context.machine, arguments["directory"])


def checkpoint(context: Context, arguments: Arguments) -> None:
    context.machine.checkpoint()


def reset_to_snapshot(context: Context, arguments: Arguments) -> None:
    context.machine.rewind()


HANDLERS: dict[str, Handler] = {
    "migrate": migrate,
    "migrate-incoming": migrate_incoming,
    "migrate_cancel": migrate_cancel,
    "migrate-start-postcopy": start_postcopy,
    "migrate-pause": migrate_pause,
    "migrate-recover": migrate_recover,
    "migrate-set-parameters": set_parameters,
    "migrate-set-capabilities": set_capabilities,
    "query-migrate": query_migrate,
    "query-migrate-parameters": query_parameters,
    "query-migrate-capabilities": query_capabilities,
    "x-kvik-snapshot-save": snapshot_save,
    "x-kvik-snapshot-load": snapshot_load,
    "x-kvik-save-stream": save_stream,
    "x-kvik-background-begin": background_begin,
    "x-kvik-background-freeze": background_freeze,
    "x-kvik-background-cancel": background_cancel,
    "x-kvik-checkpoint": checkpoint,
    "x-kvik-reset-to-snapshot": reset_to_snapshot,
}
