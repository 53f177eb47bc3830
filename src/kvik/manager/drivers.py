"""Which hypervisor drivers a daemon has: emulators and domain types -> driver (see `Manager.driver_for`)."""

from __future__ import annotations

from kvik.hypervisor.driver import Driver, HostVerdict
from kvik.paths import Paths

__all__ = ["make_drivers"]


def make_drivers(paths: Paths, which: str = "qemu", *, zygote: bool = False) -> dict[str, Driver]:
    """The drivers by domain type. `which` "test": every type runs in memory. `zygote`: machines of kvik-vmm are forks
    of a process that is kept for that."""
    if which == "test":
        from kvik.hypervisor.test.driver import TestDriver

        test = TestDriver()
        return {"test": test, "qemu": test, "kvm": test}
    from kvik.host.probe import kvm_verdict
    from kvik.hypervisor.kvik import program
    from kvik.hypervisor.kvik.driver import EMULATOR, KvikDriver
    from kvik.hypervisor.qemu.driver import QemuDriver

    def probe() -> HostVerdict:
        found = kvm_verdict(paths.cache)
        return HostVerdict(found.usable, found.reason, found.remedy)

    qemu = QemuDriver(paths, probe)
    return {"qemu": qemu, "kvm": qemu, EMULATOR: KvikDriver(paths, probe, zygote=program.keeper() if zygote else None)}
