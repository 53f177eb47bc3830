"""What carries guest mode beneath KVM: the hardware's extension (Intel's VMX, AMD's SVM) or something else, and whether
the hardware walks the guest's page tables itself (nested paging: Intel's EPT, AMD's NPT, also called RVI).

Found without opening /dev/kvm, from the CPU's flags and the parameters of KVM's modules: the one answer to this
question, for the VMM, the probe and `kvik doctor` alike.
"""

from __future__ import annotations

import os

from kvik.named import NamedTuple

MODULES = {"kvm_intel": ("VMX", "ept", "EPT"), "kvm_amd": ("SVM", "npt", "NPT")}
PVM = "kvm_pvm"


class Extension(NamedTuple):
    """`hardware`: VMX, SVM or "" (no such flag: none, or none handed on to us). `paging`: EPT, NPT or "" (shadow page
    tables, made by KVM). `module`: the kernel module that drives it, or "". `nested`: whether guests may run KVM
    themselves; None if nobody says."""

    hardware: str
    paging: str
    module: str
    nested: bool | None

    @property
    def paravirtual(self) -> bool:
        """KVM-PVM: guest mode without a hardware extension, for guests that are made for it."""
        return self.module == PVM

    def __str__(self) -> str:
        """As `SVM with NPT`."""
        name = self.hardware or ("KVM-PVM" if self.paravirtual else "none")
        return f"{name} with {self.paging}" if self.paging else name


def extension(root: str = "/") -> Extension:
    """Of the host whose /proc and /sys lie below `root`."""
    flags = _cpu_flags(f"{root}/proc/cpuinfo")
    hardware = "VMX" if "vmx" in flags else "SVM" if "svm" in flags else ""
    loaded = [name for name in (*MODULES, PVM) if os.access(f"{root}/sys/module/{name}", os.F_OK)]
    module = loaded[0] if loaded else ""
    if PVM in loaded and not hardware:
        module = PVM  # kvm_amd and kvm_intel built in stay visible without the hardware they drive
    if module not in MODULES:
        return Extension(hardware, "", module, None)
    parameters = f"{root}/sys/module/{module}/parameters"
    _, parameter, paging = MODULES[module]
    return Extension(
        hardware,
        paging if _on(f"{parameters}/{parameter}") else "",
        module,
        _on(f"{parameters}/nested"),
    )


def _cpu_flags(path: str) -> set[str]:
    """Of the first CPU in /proc/cpuinfo."""
    for line in _read(path, 1 << 16).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()


def _on(path: str) -> bool:
    return _read(path, 16).strip() in ("Y", "1")


def _read(path: str, limit: int) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, limit).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(fd)
