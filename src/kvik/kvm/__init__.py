"""The kernel's KVM interface (Documentation/virt/kvm/api.rst).

`System` (/dev/kvm), `Vm` and `Vcpu` mirror the three kinds of descriptor, each made by its parent, each a context
manager; a failing ioctl raises `KvmError`, an OSError that names it. Only x86_64.

    with System() as system, system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        ...

Numbers are in `constants`, layouts in `structs`, reasons for leaving guest mode in `exits`.
"""

from __future__ import annotations

from kvik.kvm.constants import Capability, ExitReason
from kvik.kvm.descriptor import KvmError
from kvik.kvm.system import System
from kvik.kvm.vcpu import Vcpu
from kvik.kvm.vm import Vm

__all__ = ["Capability", "ExitReason", "KvmError", "System", "Vcpu", "Vm"]
