"""Debian's python3-libvirt, driven by the system's Python, sees what it expects."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from kvikd_process import Kvikd, domain_xml

PYTHON = Path("/usr/bin/python3")


def has_bindings() -> bool:
    if not PYTHON.exists():
        return False
    return subprocess.run([PYTHON, "-c", "import libvirt"], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not has_bindings(), reason="python3-libvirt is not installed (apt install python3-libvirt)"),
]

PROLOGUE = """
import json, libvirt, sys
libvirt.registerErrorHandler(lambda *a: None, None)
conn = libvirt.open(sys.argv[1])
result = {}
def code(f, *a):
    try:
        f(*a)
    except libvirt.libvirtError as error:
        return error.get_error_code()
"""


def run(kvikd: Kvikd, script: str, *arguments: str) -> dict[str, Any]:
    """Run `script`, which fills `result`; it has `conn` and `code(call, ...)`, the number of the error it raises."""
    text = PROLOGUE + script + "\nprint(json.dumps(result))\n"
    done = subprocess.run(
        [PYTHON, "-c", text, kvikd.uri, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def document(kvikd: Kvikd) -> str:
    disk = kvikd.root / "bound.img"
    disk.write_bytes(bytes(1 << 20))
    return domain_xml("bound", disk)


def test_the_error_numbers_that_clients_test_for(kvikd: Kvikd) -> None:
    result = run(
        kvikd,
        """
result["domain"] = code(conn.lookupByName, "none")
result["uuid"] = code(conn.lookupByUUIDString, "6399df22-1f90-4e14-b346-a3cf2a609b7d")
result["id"] = code(conn.lookupByID, 999)
result["network"] = code(conn.networkLookupByName, "none")
result["pool"] = code(conn.storagePoolLookupByName, "none")
result["volume"] = code(conn.storageVolLookupByPath, "/nonexistent")
result["secret"] = code(conn.secretLookupByUUIDString, "6399df22-1f90-4e14-b346-a3cf2a609b7d")
result["device"] = code(conn.nodeDeviceLookupByName, "none")
result["interface"] = code(conn.interfaceLookupByName, "none")
result["filter"] = code(conn.nwfilterLookupByName, "none")
result["xml"] = code(conn.defineXML, "<domain")
result["unsupported"] = code(conn.suspendForDuration, 0, 60)
""",
    )
    assert result == {
        "domain": 42,
        "uuid": 42,
        "id": 42,
        "network": 43,
        "pool": 49,
        "volume": 50,
        "secret": 66,
        "device": 53,
        "interface": 57,
        "filter": 62,
        "xml": 27,
        "unsupported": 84,
    }


def test_a_machine_through_the_bindings(kvikd: Kvikd, document: str) -> None:
    result = run(
        kvikd,
        """
dom = conn.defineXML(sys.argv[2])
result["twice"] = code(dom.destroy)
dom.create()
result["again"] = code(dom.create)
result["info"] = dom.info()[:4]
result["active"] = dom.isActive()
result["names"] = [d.name() for d in conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)]
result["ids"] = conn.listDomainsID() == [dom.ID()]
result["vcpus"] = len(dom.vcpus()[0])
result["pins"] = len(dom.vcpuPinInfo())
result["snapshots"] = [dom.snapshotNum(), len(dom.listAllSnapshots()), dom.hasCurrentSnapshot()]
result["snapshot"] = code(dom.snapshotCurrent)
result["checkpoint"] = code(dom.checkpointLookupByName, "c")
result["label"] = dom.securityLabel()
stats = conn.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE | libvirt.VIR_DOMAIN_STATS_VCPU)
result["stats"] = sorted(stats[0][1])[:2]
result["files"] = code(dom.createWithFiles, [0, 1], 0)
dom.destroy()
dom.undefine()
result["gone"] = code(dom.info)
""",
        document,
    )
    assert result == {
        "twice": 55,
        "again": 55,
        "info": [1, 262144, 262144, 1],
        "active": 1,
        "names": ["bound"],
        "ids": True,
        "vcpus": 1,
        "pins": 1,
        "snapshots": [0, 0, 0],
        "snapshot": 72,
        "checkpoint": 103,
        "label": ["", False],
        "stats": ["state.reason", "state.state"],
        "files": 55,
        "gone": 42,
    }


def test_streams_through_the_bindings(kvikd: Kvikd, document: str) -> None:
    result = run(
        kvikd,
        """
dom = conn.createXML(sys.argv[2], 0)
stream = conn.newStream()
result["mime"] = dom.screenshot(stream, 0)
image = bytearray()
stream.recvAll(lambda s, data, o: image.extend(data), None)
stream.finish()
result["image"] = len(image) > 0
stream = conn.newStream()
dom.openConsole(None, stream, 0)
stream.send(b"ping\\r")
text = b""
while b"ping" not in text:
    text += stream.recv(1000)
result["second"] = code(dom.openConsole, None, conn.newStream(), 0)
stream.abort()
stream = conn.newStream()
dom.openConsole(None, stream, libvirt.VIR_DOMAIN_CONSOLE_SAFE)
stream.finish()
dom.destroy()
result["transient"] = code(dom.info)
""",
        document,
    )
    assert result == {"mime": result["mime"], "image": True, "second": 87, "transient": 42}


def test_autodestroy_ends_a_machine_with_its_connection(kvikd: Kvikd, document: str) -> None:
    run(kvikd, "conn.createXML(sys.argv[2], libvirt.VIR_DOMAIN_START_AUTODESTROY)", document)
    script = """
import time
for _ in range(100):
    if not conn.listAllDomains():
        break
    time.sleep(0.05)
result["left"] = [d.name() for d in conn.listAllDomains()]
"""
    assert run(kvikd, script) == {"left": []}
