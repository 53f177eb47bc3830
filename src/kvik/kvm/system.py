"""/dev/kvm itself: what this kernel's KVM can do, and the making of machines (api.rst 2, "system ioctls")."""

from __future__ import annotations

import errno
import os

from kvik.kvm.constants import Capability
from kvik.kvm.descriptor import AttributeOwner, KvmError
from kvik.kvm.msrs import read_msrs
from kvik.kvm.structs import CpuidTable
from kvik.kvm.vm import Vm

_ROOM = 1024  # MSR numbers in a list; a kernel has about 200
_MORE = 1 << 20  # an answer that asks for more room than this is nonsense


class System(AttributeOwner):
    """/dev/kvm. Raises OSError if it cannot be opened."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def api_version(self) -> int:
        """KVM_GET_API_VERSION (api.rst 4.1): 12 for every kernel since 2.6.22."""
        return self._int("GET_API_VERSION")

    def capabilities(self) -> dict[str, int]:
        """Each capability by name with KVM_CHECK_EXTENSION's answer (4.4), absent ones as 0."""
        return {name: self.check_extension(number) for name, number in Capability}

    def vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE (4.5): bytes to map of each vCPU."""
        return self._int("GET_VCPU_MMAP_SIZE")

    def supported_cpuid(self) -> CpuidTable:
        """KVM_GET_SUPPORTED_CPUID (4.46): what the hardware and KVM can give a guest."""
        return self._cpuid("GET_SUPPORTED_CPUID")

    def emulated_cpuid(self) -> CpuidTable:
        """KVM_GET_EMULATED_CPUID (4.88): what KVM can give by emulation, slowly."""
        return self._cpuid("GET_EMULATED_CPUID")

    def _cpuid(self, name: str) -> CpuidTable:
        table = CpuidTable()
        table.nent = CpuidTable.MAX
        self._struct(name, table)
        return table

    def msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST (4.3): the MSRs that a snapshot of a vCPU has to hold."""
        return self._index_list("GET_MSR_INDEX_LIST")

    def msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST (4.3): the MSRs that describe the CPU's features."""
        return self._index_list("GET_MSR_FEATURE_INDEX_LIST")

    def _index_list(self, name: str) -> list[int]:
        room = _ROOM
        while True:
            table = bytearray(4 + 4 * room)
            table[:4] = room.to_bytes(4, "little")
            try:
                self._struct(name, table)
            except KvmError as error:
                wanted = int.from_bytes(table[:4], "little")
                if error.errno != errno.E2BIG or not room < wanted <= _MORE:
                    raise
                room = wanted
                continue
            count = min(int.from_bytes(table[:4], "little"), room)
            return memoryview(table)[4 : 4 + 4 * count].cast("I").tolist()

    def msrs(self, indices: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
        """KVM_GET_MSRS on the system (4.18), for feature MSRs: (index, value) pairs, and the indices it refused."""
        return read_msrs(self, indices)

    def create_vm(self, machine_type: int = 0) -> Vm:
        """KVM_CREATE_VM (4.2)."""
        while True:
            try:
                return Vm(self._int("CREATE_VM", machine_type), self.vcpu_mmap_size())
            except KvmError as error:
                if error.errno != errno.EINTR:  # a signal while it allocates: the kernel's documented answer
                    raise
