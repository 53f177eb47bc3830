"""Emulators that are silent, talk garbage or die: always an error by the deadline, and nothing left behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import msgspec
import pytest

from kvik.conf.domain import parse_domain
from kvik.errors import HypervisorError, KvikError, OperationTimeout
from kvik.hypervisor import launch
from kvik.hypervisor.driver import HostVerdict, MachineEvent, StartRequest
from kvik.hypervisor.qemu import capabilities as module
from kvik.hypervisor.qemu.capabilities import QemuCapabilities
from kvik.hypervisor.qemu.driver import QemuDriver
from kvik.paths import Paths

sys.path.insert(0, str(Path(__file__).parent))
from golden import capabilities

# Takes the monitor's listening descriptor from its own command line, as QEMU does.
PEER = """#!{python}
import re, socket, sys, time
fd = int(re.search(r"charmonitor,fd=(\\d+)", " ".join(sys.argv)).group(1))
listener = socket.socket(fileno=fd)
{body}
"""
ACCEPT = "peer, _ = listener.accept()\n"
GREETING = r"""peer.sendall(b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}}}\n')
"""
NEGOTIATE = (
    GREETING
    + "peer.recv(1000)\n"
    + r"""peer.sendall(b'{"return": {}, "id": 1}\n')
"""
)
FAULTS = {
    "silent": ("time.sleep(60)", OperationTimeout, "within"),
    "accepts and is silent": (ACCEPT + "time.sleep(60)", OperationTimeout, "within"),
    "talks garbage": (ACCEPT + "peer.sendall(b'HTTP/1.1 200 OK\\r\\n'); time.sleep(60)", HypervisorError, "nonsense"),
    "never ends its line": (
        ACCEPT + "\ntry:\n  while True: peer.sendall(b'x' * 100000)\nexcept OSError: time.sleep(60)",
        HypervisorError,
        "limit",
    ),
    "greets and hangs up": (ACCEPT + GREETING + "peer.close(); time.sleep(60)", HypervisorError, "monitor"),
    "answers with the wrong types": (
        ACCEPT + NEGOTIATE + "peer.recv(1000)\n"
        + r"""peer.sendall(b'{"return": 7, "id": 2}\n{"return": "x", "id": 3}\n'); time.sleep(60)""",
        HypervisorError,
        "malformed",
    ),
    "answers what was not asked": (
        ACCEPT + NEGOTIATE + r"""peer.sendall(b'{"return": {}, "id": 99}\n'); time.sleep(60)""",
        HypervisorError,
        "never sent",
    ),
    "dies with a message": ("sys.exit('out of luck')", HypervisorError, r"exit code 1.*out of luck"),
    "crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", HypervisorError, "SIGSEGV"),
}  # fmt: skip


@pytest.mark.parametrize("fault", sorted(FAULTS))
async def test_a_bad_emulator(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, error, text = FAULTS[fault]
    binary = tmp_path / "qemu"
    binary.write_text(PEER.format(python=sys.executable, body=body))
    binary.chmod(0o755)

    async def probe(name: str, identity: tuple[int, ...], home: Path) -> QemuCapabilities:
        return msgspec.structs.replace(capabilities(), binary=name, identity=identity)

    monkeypatch.setattr(module, "probe", probe)
    monkeypatch.setattr(launch, "START_DEADLINE", 1.0)
    driver = QemuDriver(Paths.system(tmp_path / "root"), lambda: HostVerdict(False, ""), emulator=str(binary))
    domain = parse_domain(
        f"<domain type='qemu'><name>m</name><memory>1024</memory><os><type arch='x86_64' machine='q35'>hvm</type></os>"
        f"<devices><emulator>{binary}</emulator></devices></domain>"
    )
    directory = tmp_path / "run"
    directory.mkdir()
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    events: list[MachineEvent] = []
    began = time.monotonic()
    with pytest.raises(error, match=text) as raised:
        await driver.start(StartRequest(domain, directory, log, sink=events.append))
    os.close(log)
    assert isinstance(raised.value, KvikError)
    assert time.monotonic() - began < 5
    assert list(directory.iterdir()) == []
    assert events == []
    running = [Path(f"/proc/{entry}/cmdline") for entry in os.listdir("/proc") if entry.isdecimal()]
    assert not any(str(binary).encode() in path.read_bytes() for path in running if path.exists())
