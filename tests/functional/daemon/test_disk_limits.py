"""Limits of disks in a real QEMU: what it was told at the start and while it runs, and whom a group binds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import KvikError

from .conftest import Kvikd
from .test_changes import image

LIVE, CONFIG = 1, 2
DISK = (
    "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>"
    "<target dev='{}' bus='virtio'/><iotune>{}</iotune></disk>"
)
LIMITS = "<read_bytes_sec>5000</read_bytes_sec><read_bytes_sec_max>9000</read_bytes_sec_max><group_name>g</group_name>"
FIELDS = ("bps_rd", "bps_rd_max", "bps_wr", "iops", "group")


def told(kvikd: Kvikd, name: str) -> dict[str, dict[str, Any]]:
    done = kvikd.virsh("qemu-monitor-command", name, '{"execute":"query-block"}')
    inserted = {item["qdev"].split("/")[3]: item.get("inserted", {}) for item in json.loads(done.stdout)["return"]}
    return {alias: {field: value[field] for field in FIELDS if value.get(field)} for alias, value in inserted.items()}


def test_what_qemu_was_told(make: Any, kvikd: Kvikd, tmp_path: Path) -> None:
    disks = DISK.format(image(tmp_path / "a"), "vda", LIMITS) + DISK.format(
        image(tmp_path / "b"), "vdb", "<group_name>g</group_name>"
    )
    domain = make("limited", disks, kernel=False)
    domain.start()
    group = {"bps_rd": 5000, "bps_rd_max": 9000, "group": "g"}
    assert told(kvikd, "limited") == {"virtio-disk0": group, "virtio-disk1": group}
    events = kvikd.connection
    events.register("tunable", domain)
    domain.set_block_io_tune("vdb", {"write_bytes_sec": 700, "total_iops_sec": 3}, LIVE | CONFIG)
    changed = {"bps_wr": 700, "iops": 3, "group": "g"}
    assert told(kvikd, "limited") == {"virtio-disk0": changed, "virtio-disk1": changed}
    event = events.next_event(10)
    assert event is not None and "vdb" in str(event)
    with pytest.raises(KvikError, match="cannot be smaller"):
        domain.set_block_io_tune("vda", {"total_iops_sec": 3, "total_iops_sec_max": 1}, LIVE)
    domain.set_block_io_tune("vda", {"group_name": "h"}, LIVE)
    assert told(kvikd, "limited")["virtio-disk0"] == {"bps_wr": 700, "iops": 3, "group": "h"}
    domain.set_block_io_tune("vda", {"write_bytes_sec": 0, "total_iops_sec": 0}, LIVE)
    assert told(kvikd, "limited")["virtio-disk0"] == {}  # who has no limits is in no group
