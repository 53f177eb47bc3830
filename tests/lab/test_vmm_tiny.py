"""The tests with tiny guests on a true KVM: also of what KVM-PVM lacks, as interrupts in service and their end."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

import pytest

from lab.harness import REPOSITORY, Lab

FILES = ("test_x86.py", "test_interrupts.py", "test_memory_edges.py", "test_cpu_state.py")
LACKING = "has no 1 GiB pages"  # what the lab's CPU may lack, and nothing else


@pytest.mark.lab(deadline=240)
def test_the_platform_as_tiny_guests_see_it(lab: Lab) -> None:
    """Booted and restored, as on the host; nothing is skipped that the host skips."""
    files = [f"tests/functional/vmm/{name}" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "--junitxml=/run/lab/tiny.xml", *files]
    tree = f"PYTHONPATH={REPOSITORY}/src:{REPOSITORY}/tests"
    done = lab.run(["env", tree, *command], timeout=220, cwd=str(REPOSITORY))
    assert done.code == 0, done.stdout[-8000:] + done.stderr[-2000:]
    cases = list(ET.parse(lab.share / "tiny.xml").getroot().iter("testcase"))
    skipped = {f"{case.get('name')}: {skip.get('message')}" for case in cases for skip in case.iter("skipped")}
    assert not {name for name in skipped if LACKING not in name}, skipped
    print(f"{len(cases)} tests in {done.seconds:.0f} s")
