"""Which hardware and which nested paging lie beneath KVM, from a made-up /proc and /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvik.kvm.extension import Extension, extension


def host(root: Path, flags: str, **modules: dict[str, str]) -> Extension:
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    for name, parameters in modules.items():
        directory = root / "sys/module" / name / "parameters"
        directory.mkdir(parents=True)
        for parameter, value in parameters.items():
            (directory / parameter).write_text(f"{value}\n")
    return extension(str(root))


@pytest.mark.parametrize(
    ("flags", "modules", "expected", "text"),
    [
        ("vmx", {"kvm_intel": {"ept": "Y", "nested": "Y"}}, Extension("VMX", "EPT", "kvm_intel", True), "VMX with EPT"),
        ("svm", {"kvm_amd": {"npt": "1", "nested": "0"}}, Extension("SVM", "NPT", "kvm_amd", False), "SVM with NPT"),
        ("vmx", {"kvm_intel": {"ept": "N", "nested": "N"}}, Extension("VMX", "", "kvm_intel", False), "VMX"),
        ("", {"kvm_amd": {"npt": "Y"}, "kvm_pvm": {}}, Extension("", "", "kvm_pvm", None), "KVM-PVM"),
        ("svm", {}, Extension("SVM", "", "", None), "SVM"),
        ("", {}, Extension("", "", "", None), "none"),
    ],
)
def test_hardware_and_paging(
    tmp_path: Path, flags: str, modules: dict[str, dict[str, str]], expected: Extension, text: str
) -> None:
    found = host(tmp_path, flags, **modules)
    assert found == expected and str(found) == text
    assert found.paravirtual == ("kvm_pvm" in modules)


def test_a_host_that_tells_nothing_has_nothing(tmp_path: Path) -> None:
    assert extension(str(tmp_path)) == Extension("", "", "", None)
