"""What the lab's /dev/kvm says to the binding, to the probe and to `kvik doctor`."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET

from lab.harness import REPOSITORY, Lab

CPU_STATE = "tests/functional/vmm/test_cpu_state.py"
OTHER_HOSTS = "KVM-PVM"  # a test of another kind of KVM is the one that may be skipped here


def test_the_tests_of_the_binding_and_of_the_probe_pass_with_a_true_kvm(new_lab: Lab) -> None:
    lab = new_lab
    report = lab.share / "kvm.xml"
    done = lab.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--junitxml=/run/lab/kvm.xml"),
            *("tests/unit/kvm", "tests/unit/host/test_probe.py", "tests/functional/test_kvm_examples.py"),
            f"{CPU_STATE}::test_the_tsc_goes_on_where_it_was_however_old_the_other_machine_is",
        ],
        timeout=100,
        cwd=str(REPOSITORY),
    ).check()
    cases = ET.parse(report).getroot().iter("testcase")
    skipped = {f"{case.get('name')}: {skip.get('message')}" for case in cases for skip in case.iter("skipped")}
    assert not {name for name in skipped if OTHER_HOSTS not in name}, done.stdout


def test_doctor_finds_kvm_and_says_what_it_is(lab: Lab) -> None:
    done = lab.kvik("doctor", "--json").check()
    report = json.loads(done.stdout)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert report["usable"] is True and report["accelerator"] == "kvm"
    assert findings["kvm"]["status"] == "ok" and "SVM with NPT" in findings["kvm"]["why"]
    assert findings["extension"]["what"] == "SVM with NPT"
    assert findings["inside"]["what"] == "virtual machine"
    assert findings["cgroups"]["what"] == "v2"
