"""examples/fuzz.py: the reset loop does what its page says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from functional.vmm.guests import needs_kvm

pytestmark = [needs_kvm, pytest.mark.functional]
EXAMPLES = Path(__file__).parents[3] / "examples"


def test_the_fuzzer_finds_what_its_guest_dies_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import fuzz

    try:
        found, runs, _ = fuzz.fuzz(seed=1)
    finally:
        sys.modules.pop("fuzz", None)
    assert found == b"KVM" and runs > 1
