"""The fuzzers of fuzz/, bounded: each target survives a few thousand operations, and each can find something."""

import os
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[3] / "fuzz"
if str(FUZZ) not in sys.path:
    sys.path.insert(0, str(FUZZ))

import vmm_devices  # noqa: E402  # behind the path
import vmm_images  # noqa: E402
import vmm_migration  # noqa: E402
import vmm_peers  # noqa: E402
import vmm_ports  # noqa: E402

OTHERS = [(module, name) for module in (vmm_ports, vmm_images, vmm_peers, vmm_migration) for name in module.TARGETS]


@pytest.mark.parametrize("name", sorted(vmm_devices.TARGETS))
@pytest.mark.parametrize("seed", [1, 2])
def test_a_hostile_guest_breaks_its_device_and_nothing_else(name, seed):
    faults = vmm_devices.fuzz(name, 3000, seed)
    assert name in vmm_devices.NO_RINGS or faults > 0  # it got as far as the rings


@pytest.mark.parametrize(("module", "name"), OTHERS, ids=[name for _, name in OTHERS])
def test_whoever_else_is_hostile_gets_an_answer_and_no_more(module, name):
    if name == "gdb" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is not there, or may not be opened")
    refused = module.fuzz(name, 2000, 1)
    assert module is vmm_ports or refused > 0


def test_an_exception_of_a_device_is_found(monkeypatch):
    from kvik.vmm.virtio.rng import Rng

    def broken(self, index):
        raise ZeroDivisionError

    monkeypatch.setattr(Rng, "queue_kicked", broken)
    with pytest.raises(ZeroDivisionError):
        vmm_devices.fuzz("rng", 3000, 1)


def test_a_device_that_finds_no_rest_is_found(monkeypatch):
    from kvik.vmm.virtio.rng import Rng

    monkeypatch.setattr(Rng, "queue_kicked", lambda self, index: self.loop.call_soon(lambda: self.kick(index)))
    with pytest.raises(AssertionError, match="no rest"):
        vmm_devices.fuzz("rng", 3000, 1)
