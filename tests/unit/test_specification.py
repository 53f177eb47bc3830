"""docs/specification.md: every promise is numbered once and names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/specification.md").read_text()
PROMISE = re.compile(r"^\| (\d+\.\d+) \| (.+?) \| (.+?) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w./-]+\.py)::(\w+)`")


@cache
def functions(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_promise_names_tests_that_exist() -> None:
    promises = PROMISE.findall(PAGE)
    assert len(promises) > 60
    for number, _, proofs in promises:
        named = TEST.findall(proofs)
        assert named, f"promise {number} names no test"
        for path, function in named:
            assert (ROOT / path).is_file(), f"promise {number}: {path}"
            assert function in functions(path), f"promise {number}: {path}::{function}"


def test_promises_are_numbered_once_and_in_order() -> None:
    numbers = [tuple(int(part) for part in number.split(".")) for number, _, _ in PROMISE.findall(PAGE)]
    assert numbers == sorted(set(numbers))


def test_what_has_no_test_is_listed_as_such() -> None:
    """The list may shrink to nothing, not disappear: a reader must see that there is none."""
    assert "## No test yet" in PAGE
