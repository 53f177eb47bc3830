"""What this host's kernel may lack and the lab's has: VLAN filtering of bridges, and the policer of traffic control."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

from lab.harness import REPOSITORY, Lab

WITHOUT_POLICER = "this kernel has a policer"  # the one test that is for other kernels


def test_vlan_filtering_and_the_policer_work_on_a_kernel_that_has_them(lab: Lab) -> None:
    report = lab.share / "network.xml"
    files = [f"tests/functional/network/test_host_{name}.py" for name in ("vlan", "traffic")]
    lab.run(
        [sys.executable, "-m", "pytest", "-q", "--junitxml=/run/lab/network.xml", *files],
        timeout=120,
        cwd=str(REPOSITORY),
    ).check()
    cases = list(ET.parse(report).getroot().iter("testcase"))
    skipped = [str(skip.get("message")) for case in cases for skip in case.iter("skipped")]
    assert len(cases) >= 8 and all(WITHOUT_POLICER in message for message in skipped), skipped
