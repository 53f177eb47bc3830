"""The debugger's port on a true KVM: what KVM-PVM cannot do (int3 exits, watchpoints) included."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

from lab.harness import REPOSITORY, Lab


def test_breakpoints_and_watchpoints_of_gdb_on_a_true_kvm(lab: Lab) -> None:
    report = lab.share / "control.xml"
    done = lab.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--junitxml=/run/lab/control.xml"),
            *("tests/functional/vmm/test_gdb.py", "-k", "breakpoints or watchpoint or left_behind"),
        ],
        timeout=170,
        cwd=str(REPOSITORY),
    ).check()
    cases = list(ET.parse(report).getroot().iter("testcase"))
    assert len(cases) == 5 and not [case.get("name") for case in cases if case.find("skipped") is not None], done.stdout
