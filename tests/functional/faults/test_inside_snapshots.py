"""Snapshots inside the images of a real QEMU, with its memory: taken, gone back to, mixed with others, deleted."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from fault_harness import Host

from kvik.client import snapshot

from .test_memory_snapshots import RAN, count, counting, define
from .test_snapshots import byte, guest_writes, sources

INSIDE = "--memspec", "snapshot=internal"


def inside(path: Path) -> list[str]:
    """What qemu-img finds in an image that nobody writes to."""
    told = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", str(path)], check=True, capture_output=True, text=True
    )
    return [item["name"] for item in json.loads(told.stdout).get("snapshots", [])]


def test_a_guest_goes_back_inside_its_images(host: Host) -> None:
    paths = define(host, 2)
    domain = host.connection.domain("m")
    domain.start()
    counting(host)
    guest_writes(host, 1)
    guest_writes(host, 1, disk=1)
    before = count(host)
    said = host.kvik("snapshot-create-as", "m", "s1", *INSIDE)
    assert "held up for at most" in said and domain.state().state == RAN
    counting(host)
    after = count(host)
    assert "internal" in host.kvik("snapshot-info", "m", "s1") and sources(host) == [str(path) for path in paths]
    guest_writes(host, 2)
    guest_writes(host, 2, disk=1)
    host.kvik("snapshot-create-as", "m", "s2", "--diskspec", "vda,snapshot=internal")
    guest_writes(host, 3)
    snapshot.lookup(domain, "s1").revert(2)
    assert before <= count(host) < after
    domain.resume()
    counting(host)
    domain.destroy()
    assert [byte(path) for path in paths] == [1, 1] and inside(paths[0]) == inside(paths[1]) == ["s1", "s2"]
    host.kvik("snapshot-revert", "m", "s2")
    assert domain.state().state == RAN
    counting(host)
    # an external one on top: what is below is not changed any more
    host.kvik("snapshot-create-as", "m", "s3", "--disk-only")
    host.kvik("snapshot-revert", "m", "s1", fails="would change")
    assert domain.state().state == RAN
    # deleted while other images rest on them: forgotten at once, taken out when the machine is off
    assert "take snapshot s2 out of" in host.kvik("snapshot-delete", "m", "s2", "--plan")
    host.kvik("snapshot-delete", "m", "s2")
    host.kvik("snapshot-delete", "m", "s3")
    domain.destroy()
    host.restart()
    host.kvik("snapshot-list", "m")
    assert byte(sources(host, inactive=True)[0]) == 2
    snapshot.lookup(host.connection.domain("m"), "s1").delete()
    assert inside(paths[0]) == inside(paths[1]) == []
    subprocess.run(["qemu-img", "check", "-q", str(paths[0])], check=True)
