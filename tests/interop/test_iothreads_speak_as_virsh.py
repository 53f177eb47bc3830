"""`virsh` and `kvik` on I/O threads: the same words, on a real libvirtd and on kvikd."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_words import same_words
from test_net_speaks_as_virsh import kvikd, libvirtd

__all__ = ["kvikd", "libvirtd"]  # the fixtures

pytestmark = [pytest.mark.interop, pytest.mark.root]

DOMAIN = """<domain type='{}'><name>t</name><memory>65536</memory><iothreads>2</iothreads>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices><disk type='file' device='disk'>
<driver name='qemu' type='raw' iothread='2'/><source file='/tmp/a'/><target dev='vda' bus='virtio'/></disk></devices>
</domain>"""
SESSION = """\
iothreadinfo t
iothreadadd t 7 --config
iothreadadd t 7 --config
iothreadadd t 0 --config
iothreadpin t 7 0 --config
iothreadpin t 9 0 --config
iothreadset t 7 --thread-pool-max 9 --thread-pool-min 2 --config
iothreadset t 7 --thread-pool-min 10 --config
iothreadset t 7
iothreadinfo t --config
iothreaddel t 2 --config
iothreaddel t 8 --config
iothreaddel t 7 --config
iothreadinfo t
iothreadadd t 4 --live
iothreadadd t 4 --current --live
"""


def test_same_words_on_both_daemons(libvirtd: str, kvikd: str, tmp_path: Path) -> None:
    same_words(libvirtd, kvikd, tmp_path, DOMAIN, SESSION)
