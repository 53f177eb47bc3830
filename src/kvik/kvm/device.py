"""The three kinds of descriptor, and what their ioctls raise, by the name of the module that they used to share."""

from __future__ import annotations

from kvik.kvm.descriptor import KvmError
from kvik.kvm.system import System
from kvik.kvm.vcpu import Vcpu
from kvik.kvm.vm import Vm

__all__ = ["KvmError", "System", "Vcpu", "Vm"]
