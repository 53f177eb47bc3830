"""What QEMU is asked for by a name of its own, and what another driver's way is not tried with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvik.hypervisor.driver import Feature
from kvik.hypervisor.qemu.driver import QemuDriver
from kvik.paths import Paths


def test_memory_of_a_guest_that_goes_on_is_saved_in_qemus_own_way(tmp_path: Path) -> None:
    verdict: Any = SimpleNamespace(usable=False)
    features = QemuDriver(Paths.system(tmp_path), lambda: verdict).features()
    assert Feature.SNAPSHOTS in features
    assert not features & {Feature.SAVES_AT_AN_INSTANT, Feature.RENAME_RUNNING, Feature.KVM}
