"""The tests with tiny guests that need a true KVM beneath: interrupts in service, their end, a TSC that can be set."""

from __future__ import annotations

import sys

import pytest

from lab.harness import REPOSITORY, SHARE, Lab


@pytest.mark.lab(deadline=240)
def test_the_platform_as_tiny_guests_see_it_on_a_true_kvm(lab: Lab) -> None:
    """Booted and restored, as on the host; none is skipped."""
    files = "tests/functional/vmm/test_interrupts.py tests/functional/vmm/test_memory_edges.py"
    tree = f"PYTHONPATH={REPOSITORY}/src:{REPOSITORY}/tests"
    command = f"{tree} {sys.executable} -m pytest -v -ra -m true_kvm {files} >{SHARE}/tiny.log 2>&1"
    try:
        done = lab.run(["sh", "-c", command], timeout=200, cwd=str(REPOSITORY))
    finally:
        said = (lab.share / "tiny.log").read_text()
        print(said[-8000:])
    assert done.code == 0 and " passed" in said and " skipped" not in said, said[-8000:]
