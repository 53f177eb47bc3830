"""A machine of the in-memory driver saved while its guest goes on: what it holds is copied at the instant, and written
afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from kvik.errors import MonitorError, OperationFailed
from kvik.hypervisor.state import StateTarget
from kvik.hypervisor.test.behaviour import Behaviour

__all__ = ["TestLiveSave"]


class TestLiveSave:
    """`command` is what every command goes through, `memory` tells what the machine holds."""

    __test__ = False

    def __init__(
        self,
        target: StateTarget,
        behaviour: Behaviour,
        command: Callable[[str], Awaitable[None]],
        memory: Callable[[], bytes],
    ) -> None:
        self._target, self._behaviour, self._command, self._memory = target, behaviour, command, memory
        self._copy = b""

    async def freeze(self) -> None:
        await self._command("freeze")
        self._copy = self._memory()

    async def finish(self) -> None:
        await self._command("finish")
        self._target.total = len(self._copy)
        for at in range(0, len(self._copy), 4096):
            if self._target.cancelled:
                raise OperationFailed("it was cancelled")
            if self._behaviour.refuses_save:
                raise MonitorError(self._behaviour.refuses_save)
            await asyncio.to_thread(self._target.write, memoryview(self._copy)[at : at + 4096])
        await asyncio.to_thread(self._target.finish)

    async def close(self) -> None:
        """It holds nothing."""
