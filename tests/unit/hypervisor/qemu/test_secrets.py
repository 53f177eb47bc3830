"""There is no store of secrets yet: a disk that needs one is refused by name, never opened without its protection."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvik.errors import ConfigUnsupported

sys.path.insert(0, str(Path(__file__).parent))
from golden import command_line

SECRET = "<secret type='passphrase' uuid='0a81f5b2-8403-4b23-c8d6-21ccc2f80d6f'/>"
ENCRYPTION = f"<encryption format='luks'>{SECRET}</encryption>"
AUTH = "<auth username='me'><secret type='ceph' uuid='0a81f5b2-8403-4b23-c8d6-21ccc2f80d6f'/></auth>"
RBD = "<source protocol='rbd' name='pool/image'><host name='h'/>{}</source>"


def document(disk: str) -> str:
    return (
        "<domain type='qemu'><name>m</name><memory>65536</memory>"
        f"<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>{disk}</devices></domain>"
    )


def disk(source: str, extra: str = "", kind: str = "file") -> str:
    return (
        f"<disk type='{kind}' device='disk'><driver name='qemu' type='raw'/>{source}"
        f"<target dev='vda' bus='virtio'/>{extra}</disk>"
    )


@pytest.mark.parametrize(
    ("xml", "word"),
    [
        (disk("<source file='/a'/>", ENCRYPTION), "encryption"),
        (disk(f"<source file='/a'>{ENCRYPTION}</source>"), "encryption"),
        (disk("<source dev='/dev/sdz'/>", ENCRYPTION, "block"), "encryption"),
        (
            disk(
                "<source file='/a'/>",
                f"<backingStore type='file'><format type='raw'/><source file='/b'>{ENCRYPTION}</source>"
                "<backingStore/></backingStore>",
            ).replace("type='raw'/><source file='/a'", "type='qcow2'/><source file='/a'"),
            "encryption",
        ),
        (disk(RBD.format(AUTH), kind="network"), "<auth>"),
        (disk(RBD.format(""), AUTH, "network"), "<auth>"),
        (disk(RBD.format(""), ENCRYPTION, "network"), "encryption"),
    ],
)
def test_a_disk_that_needs_a_secret_is_refused(xml: str, word: str) -> None:
    with pytest.raises(ConfigUnsupported, match=rf"(?s){word}.*secrets"):
        command_line(document(xml))


def test_without_a_secret_it_is_not() -> None:
    assert any("/a" in word for word in command_line(document(disk("<source file='/a'/>"))).argv)
