"""The Python of the user guide runs, against a daemon whose machines exist in memory only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvik.client

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLES = BLOCK.findall((ROOT / "docs/guide/python.md").read_text())
DOCUMENT = """<domain type='qemu'><name>tiny-1</name><memory>65536</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><serial type='pty'/><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices></domain>"""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of a process whose default connection is a daemon of its own."""
    with tempfile.TemporaryDirectory(prefix="kvik-") as root:
        socket = Path(root) / "s"
        command = [sys.executable, "-m", "kvik.daemon.main", "--system", "--root", root, "--driver", "test"]
        environ = os.environ | {"PYTHONPATH": str(ROOT / "src"), "KVIK_URI": f"qemu+unix:///system?socket={socket}"}
        done = subprocess.run([*command, "--socket", str(socket), "--detach"], env=environ, check=True, timeout=30)
        assert done.returncode == 0
        with kvik.client.connect(environ["KVIK_URI"]) as connection:
            connection.define(DOCUMENT)
            try:
                yield environ
            finally:
                connection.shutdown_daemon()


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(environment: dict[str, str], number: int) -> None:
    code = EXAMPLES[number].replace("timeout=10", "timeout=0.1")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "timeout" in code or done.stdout.strip()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
