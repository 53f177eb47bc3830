"""The hostile guest of fuzz/vmm_devices.py, bounded: each device survives a few thousand operations."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("vmm_devices", Path(__file__).parents[3] / "fuzz" / "vmm_devices.py")
assert SPEC is not None and SPEC.loader is not None
fuzzer = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzzer)


@pytest.mark.parametrize("name", sorted(fuzzer.TARGETS))
@pytest.mark.parametrize("seed", [1, 2])
def test_a_hostile_guest_breaks_its_device_and_nothing_else(name, seed):
    faults = fuzzer.fuzz(name, 3000, seed)
    assert name in ("pci", "watchdog") or faults > 0  # it got as far as the rings


def test_an_exception_of_a_device_is_found(monkeypatch):
    from kvik.vmm.virtio.rng import Rng

    def broken(self, index):
        raise ZeroDivisionError

    monkeypatch.setattr(Rng, "queue_kicked", broken)
    with pytest.raises(ZeroDivisionError):
        fuzzer.fuzz("rng", 3000, 1)
