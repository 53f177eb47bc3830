"""The examples of docs/guide/machine.md run as they stand there, on this host's /dev/kvm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from functional.vmm.guests import needs_kvm

ROOT = Path(__file__).parents[3]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/guide/machine.md").read_text(), re.DOTALL | re.MULTILINE)
SAID = (
    r"the guest says 7\nit ended with guest-shutdown\n",
    r"counted: True at 0x1000\n",
    r"vCPU 0: \d+ exits to user mode; .*\n(?s:.*)IO +0x80 +3 ",
)

pytestmark = needs_kvm


@pytest.mark.parametrize("number", range(len(SAID)))
def test_an_example_says_what_the_page_promises(number: int) -> None:
    assert len(EXAMPLES) == len(SAID)
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[number]],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and re.match(SAID[number], done.stdout), done.stdout + done.stderr
