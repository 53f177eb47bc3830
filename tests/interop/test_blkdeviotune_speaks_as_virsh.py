"""`virsh blkdeviotune` and `kvik blkdeviotune`: the same words, on a real libvirtd and on kvikd."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_words import same_words
from test_net_speaks_as_virsh import kvikd, libvirtd

__all__ = ["kvikd", "libvirtd"]  # the fixtures

pytestmark = [pytest.mark.interop, pytest.mark.root]

DOMAIN = """<domain type='{}'><name>t</name><memory>65536</memory><os><type arch='x86_64' machine='q35'>hvm</type></os>
<devices><disk type='file' device='disk'><source file='/tmp/a'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><source file='/tmp/b'/><target dev='vdb' bus='virtio'/></disk></devices></domain>"""
SESSION = """\
blkdeviotune t vda
blkdeviotune t vda --total-bytes-sec 1M --config
blkdeviotune t vda --read-bytes-sec 5 --config
blkdeviotune t vda --total-bytes-sec 5 --read-bytes-sec 5 --config
blkdeviotune t vda --total-iops-sec 5 --total-iops-sec-max 30 --total-iops-sec-max-length 3 --size-iops-sec 4096
blkdeviotune t vda
blkdeviotune t vda --write-bytes-sec 7 --group-name g --config
blkdeviotune t vdb --group-name g --config
blkdeviotune t vdb --config
blkdeviotune t vdb --total-iops-sec 9 --config
blkdeviotune t vda --config
blkdeviotune t nope
blkdeviotune t vda --live --read-iops-sec 4
blkdeviotune t vda --current --config
blkdeviotune t vda --read-bytes-sec 99999999999999999
"""


def test_same_words_on_both_daemons(libvirtd: str, kvikd: str, tmp_path: Path) -> None:
    same_words(libvirtd, kvikd, tmp_path, DOMAIN, SESSION)
