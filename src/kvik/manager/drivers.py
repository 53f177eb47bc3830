"""Which hypervisor drivers a daemon has: domain types -> driver."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kvik.errors import OperationUnsupported
from kvik.hypervisor.driver import Driver
from kvik.paths import Paths

__all__ = ["make_drivers"]


def make_drivers(paths: Paths, which: str = "qemu") -> dict[str, Driver]:
    """The drivers by domain type. `which` "test": every type runs in memory."""
    if which == "test":
        from kvik.hypervisor.test.driver import TestDriver

        test: Any = TestDriver()
        return {"test": test, "qemu": test, "kvm": test}
    try:
        module = import_module("kvik.hypervisor.qemu.driver")
    except ModuleNotFoundError as error:
        raise OperationUnsupported(f"this kvik has no QEMU driver: {error}", remedy="use --driver test") from error
    qemu: Driver = module.QemuDriver(paths)
    return {"qemu": qemu, "kvm": qemu}
