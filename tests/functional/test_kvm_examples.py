"""The two guests of docs/guide/kvm.md run as they stand there, on this host's /dev/kvm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/guide/kvm.md").read_text(), re.DOTALL | re.MULTILINE)
SAID = (
    "the guest says 5\nthe guest halted\n",
    "the interrupt handler wrote 42\nrax is 42 in code of 64 bits\n",
)

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm may not be opened here")


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
    assert (done.returncode, done.stdout) == (0, SAID[number]), done.stderr
