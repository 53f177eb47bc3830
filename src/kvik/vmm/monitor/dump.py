"""dump-guest-memory: an ELF core, in steps, so that the monitor goes on answering.

Reference: QEMU's qapi/dump.json.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence

from kvik.vmm.monitor.errors import QmpError, refused
from kvik.vmm.monitor.schema import ID, NOTHING, TEXT, Bool, Enum, Int, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _state(context: Context) -> dict[str, Any]:
    state: dict[str, Any] = context.server.values.setdefault("dump", {"status": "none", "completed": 0, "total": 0})
    return state


def query_dump(context: Context, arguments: Arguments) -> dict[str, Any]:
    return dict(_state(context))


def dump_guest_memory(context: Context, arguments: Arguments) -> Any:
    protocol = arguments["protocol"]
    if arguments["paging"]:
        raise refused("dumps by physical address only", "paging must be false")
    if "begin" in arguments or "length" in arguments:
        raise refused("dumps all of the memory", "begin and length must be left out")
    if _state(context)["status"] == "active":
        raise QmpError("There is a dump in process, please wait.")
    if protocol.startswith("file:") and len(protocol) > 5:
        fd, path = -1, protocol[5:]
    elif protocol.startswith("fd:"):
        named = context.server.named_fds.pop(protocol[3:], None)
        if named is None:
            raise QmpError(f"File descriptor named '{protocol[3:][:80]}' has not been found")
        fd, path = named, ""
    else:
        raise QmpError("Invalid parameter 'protocol'")
    steps = _steps(context, fd, path)
    if arguments.get("detach"):
        _drive(context, steps)
        return None
    return _answer(steps)


def _answer(steps: Generator[None, None, str]) -> Generator[None, None, None]:
    """For a client that waits: an error of the dump is the command's."""
    error = yield from steps
    if error:
        raise QmpError(error)


def _drive(context: Context, steps: Generator[None, None, str]) -> None:
    """Detached: to the end, a step each round of the loop."""
    try:
        next(steps)
    except StopIteration:
        return
    context.server.later(lambda: _drive(context, steps))


def _steps(context: Context, fd: int, path: str) -> Generator[None, None, str]:
    """The dump; the error's text, "" if all went well. Never raises."""
    from kvik.vmm.dump import core, core_file
    from kvik.vmm.monitor.server import describe

    machine, state = context.machine, _state(context)
    state.update(status="active", completed=0, total=machine.memory.size)
    text = ""
    try:
        with machine.paused():
            for done in core_file(machine, path) if path else core(machine, fd):
                state["completed"] = done
                yield
        state["status"] = "completed"
    except Exception as error:
        text = describe(error)[1]
        state["status"] = "failed"
    finally:
        if fd >= 0:
            os.close(fd)
        if state["status"] == "active":  # nobody drives it any more: the machine ends
            state["status"] = "failed"
    event: dict[str, Any] = {"result": dict(state)}
    context.server.emit("DUMP_COMPLETED", event | ({"error": text} if text else {}))
    return text


def capability(context: Context, arguments: Arguments) -> dict[str, list[str]]:
    return {"formats": ["elf"]}


COMMANDS: Sequence[Command] = (
    Command(
        "dump-guest-memory",
        dump_guest_memory,
        Struct(
            {
                "paging": Bool(),
                "protocol": TEXT,
                "*detach": Bool(),
                "*begin": Int(),
                "*length": Int(),
                "*format": Enum("elf"),
            }
        ),
        NOTHING,
        summary="an ELF core to file:PATH or fd:NAME",
    ),
    Command(
        "query-dump", query_dump, returns=Struct({"status": ID, "completed": Int(), "total": Int()}), summary="how far"
    ),
    Command("query-dump-guest-memory-capability", capability, summary="elf"),
)
