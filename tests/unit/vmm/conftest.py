"""What tests of kvik-blk share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .blk_process import BlkProcess


@pytest.fixture
def running() -> Iterator[Callable[..., BlkProcess]]:
    made: list[BlkProcess] = []

    def start(*images: tuple[Path, str], **more: Any) -> BlkProcess:
        made.append(BlkProcess(*images, **more))
        return made[-1]

    yield start
    for process in made:
        process.close()
