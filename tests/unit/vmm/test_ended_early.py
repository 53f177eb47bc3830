"""A signal while a machine is built ends it, wherever in the interpreter it arrives."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kvik

SOURCE = str(Path(kvik.__file__).parents[1])

# A machine that is built by a function of the test's; `where` says what runs when the signal comes.
START = """
import os, signal, sys, types, weakref
import kvik.vmm.build as build
from kvik.vmm.config import MachineConfig
from kvik.vmm.main import run

class Referent: ...

def told(ref):
    os.kill(os.getpid(), {number})
    for _ in range(1000): pass  # the interpreter looks for signals here

class Machine:
    trace = None
    def start(self, paused): print("started")
    def close(self): print("closed")

def made(config, confinement, boot):
    {where}
    print("built")
    return Machine()

build.build = made
config = MachineConfig(sandbox="off")
sys.exit(run(config))
"""
WHERE = {
    "in its code": ("told(None)", ""),
    "in a callback whose exceptions are forgotten": (
        "one = Referent(); ref = weakref.ref(one, told); del one",
        "built",
    ),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", WHERE)
def test_a_signal_while_it_is_built_is_never_lost(where: str, number: signal.Signals) -> None:
    code, reached = WHERE[where]
    script = START.format(number=int(number), where=code)
    environment = {"PYTHONPATH": SOURCE}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ([reached, "closed"] if reached else [])
