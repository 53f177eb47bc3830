"""Tiny guests for this host's KVM: a few instructions at a known address, in 16-bit or 64-bit mode.

Tests put them into a `Machine` that has no kernel. Where KVM emulates every instruction (nested, KVM-PVM) they still
take only milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from restored import either

from kvik.vmm.config import CpuConfig, MachineConfig, MemoryConfig
from kvik.vmm.layout import MIB
from kvik.vmm.machine import Machine
from kvik.vmm.program import Program, bare_machine

CODE = 0x1000

needs_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is not there, or may not be opened"
)


def machine_with(
    code: bytes,
    *,
    cpus: int = 1,
    memory: int = 2 * MIB,
    mode: str = "real",
    change: Callable[[MachineConfig], None] | None = None,
) -> Machine:
    """A machine whose first vCPU runs `code` at power-on and after each reset."""

    def make() -> Machine:
        config = MachineConfig(memory=MemoryConfig(size=memory), cpus=CpuConfig(count=cpus))
        if change is not None:
            change(config)
        return bare_machine(Program(code, CODE, mode), config)

    return either(make, mode)
