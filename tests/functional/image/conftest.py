"""qemu-img and qemu-io as the oracle of every format: what they make we read, what we make they check."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvik.cli.context import Context
from kvik.cli.main import run_verb

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None, reason="needs qemu-utils"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.functional)
            item.add_marker(needs_qemu)


class Done:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def qemu_img(*words: str | Path) -> Done:
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False, timeout=60)
    return Done(done.returncode, done.stdout, done.stderr)


def qemu_io(path: Path, *commands: str, format: str = "qcow2") -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-t", "unsafe", "-f", format, *words, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0 and "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


def kvik_img(*words: str | Path) -> Done:
    out, err = io.StringIO(), io.StringIO()
    context = Context(stdout=out, stderr=err, colour=False)
    code = run_verb(context, ["img", *map(str, words)])
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture
def same(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Both programs, told the same: they must print the same and end the same way."""

    def run(*words: str | Path) -> Done:
        theirs, ours = qemu_img(*words), kvik_img(*words)
        assert ours.out == theirs.out, (words, ours.err)
        assert ours.code == theirs.code, (words, ours.err, theirs.err)
        return ours

    return run


def assert_clean(path: Path) -> None:
    """Without a leak or an error, as both see it."""
    done = qemu_img("check", path)
    assert done.code == 0, done.out + done.err
    ours = kvik_img("check", path)
    assert (ours.code, ours.out) == (0, done.out), ours.err
