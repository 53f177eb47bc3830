"""Run a command in the guest, through its agent (guest-exec of QEMU's qga/qapi-schema.json).

The agent gives output only when the command has ended, and cuts each stream at 16 MiB. On a timeout the command is
killed: the agent has no call for that, so its pid is sent to the guest's own `kill`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kvik.errors import AgentError, InvalidArgument, OperationTimeout

_NOT_RUN = re.compile(r"Failed to execute child process .*\(([^()]+)\)")

Agent = Callable[[str, Mapping[str, Any], float], Awaitable[Any]]  # command, arguments, seconds

FIRST_POLL = 0.01  # seconds; doubled up to
LAST_POLL = 0.5
CALL_TIMEOUT = 10.0  # seconds for one answer of the agent
STDIN_LIMIT = 1 << 20  # bytes; more does not fit into one request of the agent


class ExecResult(NamedTuple):
    code: int
    stdout: bytes
    stderr: bytes
    signal: int = 0  # the signal that ended it, 0 if none
    truncated: bool = False  # the agent cut the output


async def run(
    agent: Agent,
    argv: Sequence[str],
    stdin: bytes = b"",
    timeout: float | None = 30.0,
    env: Sequence[str] = (),
) -> ExecResult:
    """The command's end. `AgentError` if it cannot be run; `OperationTimeout` when it takes longer than `timeout`
    seconds (it is killed; None: as long as it wants)."""
    if not argv or not argv[0]:
        raise InvalidArgument("a command is needed")
    if any("\0" in part for part in argv):
        raise InvalidArgument("a command cannot contain NUL")
    if len(stdin) > STDIN_LIMIT:
        raise InvalidArgument(f"{len(stdin)} bytes of input are too many: at most {STDIN_LIMIT}")
    arguments: dict[str, Any] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
    if stdin:
        arguments["input-data"] = base64.b64encode(stdin).decode()
    if env:
        arguments["env"] = list(env)
    try:
        answer = await agent("guest-exec", arguments, CALL_TIMEOUT)
    except AgentError as error:
        # GLib's sentence: Failed to execute child process “x” (No such file or directory)
        refused = _NOT_RUN.search(error.message)
        if refused:
            raise AgentError(f"{argv[0]!r} cannot be run in the guest: {refused[1]}") from error
        raise
    pid = answer.get("pid") if isinstance(answer, dict) else None
    if not isinstance(pid, int):
        raise AgentError(f"the agent answered {str(answer)[:80]!r} to guest-exec")
    try:
        async with asyncio.timeout(timeout):
            return await _wait(agent, pid)
    except TimeoutError:
        await _kill(agent, pid)
        raise OperationTimeout(f"{argv[0]} in the guest did not end within {timeout:g} s and was killed") from None
    except asyncio.CancelledError:
        await _kill(agent, pid)
        raise


async def _wait(agent: Agent, pid: int) -> ExecResult:
    pause = FIRST_POLL
    while True:
        status = await agent("guest-exec-status", {"pid": pid}, CALL_TIMEOUT)
        if not isinstance(status, dict):
            raise AgentError(f"the agent answered {str(status)[:80]!r} to guest-exec-status")
        if status.get("exited"):
            signal = _number(status, "signal")
            return ExecResult(
                code=128 + signal if signal else _number(status, "exitcode"),
                stdout=_data(status, "out-data"),
                stderr=_data(status, "err-data"),
                signal=signal,
                truncated=bool(status.get("out-truncated") or status.get("err-truncated")),
            )
        await asyncio.sleep(pause)
        pause = min(pause * 2, LAST_POLL)


async def _kill(agent: Agent, pid: int) -> None:
    with contextlib.suppress(AgentError, OperationTimeout, TimeoutError):
        async with asyncio.timeout(CALL_TIMEOUT):
            await agent("guest-exec", {"path": "kill", "arg": ["-KILL", str(pid)]}, CALL_TIMEOUT)


def _number(status: Mapping[str, Any], key: str) -> int:
    value = status.get(key, 0)
    return value if isinstance(value, int) else 0


def _data(status: Mapping[str, Any], key: str) -> bytes:
    try:
        return base64.b64decode(status.get(key) or "", validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise AgentError(f"the agent sent {key} that is not base64") from error
