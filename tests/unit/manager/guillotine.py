"""The daemon dies after so many changes to files: what it would do next does not happen any more."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from manager_bench import Bench


class Killed(BaseException):
    """The daemon died here."""


class Guillotine:
    """Lets `steps` changes to the file system happen, then none ever again."""

    PRIMITIVES = (
        "open", "write", "pwrite", "pwritev", "fsync", "fdatasync", "rename", "unlink", "mkdir", "rmdir", "truncate",
        "ftruncate", "fchmod", "fchown",
    )  # fmt: skip

    def __init__(self, patch: pytest.MonkeyPatch, steps: int) -> None:
        self.left = steps
        self.fell = False
        for name in self.PRIMITIVES:
            patch.setattr(os, name, self._guard(getattr(os, name), name))

    def _guard(self, primitive: Callable[..., Any], name: str) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            flags = args[1] if name == "open" and len(args) > 1 else 0
            if name == "open" and not flags & (os.O_CREAT | os.O_TRUNC):
                return primitive(*args, **kwargs)
            if self.left <= 0:
                self.fell = True
                raise Killed
            self.left -= 1
            return primitive(*args, **kwargs)

        return guarded


async def cut(bench: Bench, steps: int, work: Awaitable[Any]) -> bool:
    """A daemon is killed after so many changes to the file system by `work`; whether that was before its end."""
    with pytest.MonkeyPatch.context() as patch:
        guillotine = Guillotine(patch, steps)
        try:
            await work
        except BaseException as error:
            assert guillotine.fell, error
        await bench.kill()
    return guillotine.fell
