"""What QEMU is told of a disk that needs a secret: where the value lies, never the value itself."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

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


FD = "/proc/self/fd/77"


def arguments(xml: str, option: str, *passed: str) -> list[dict[str, Any]]:
    words = command_line(document(xml), dict.fromkeys(passed, 77)).argv
    return [json.loads(after) for word, after in pairwise(words) if word == option and after.startswith("{")]


def secrets_of(xml: str, *ids: str) -> list[dict[str, Any]]:
    found = arguments(xml, "-object", *("secret:" + ":".join(id_.rsplit("-", 2)) for id_ in ids))
    return [item for item in found if item["qom-type"] == "secret"]


@pytest.mark.parametrize(
    "xml",
    [
        disk("<source file='/a'/>", ENCRYPTION),
        disk(f"<source file='/a'>{ENCRYPTION}</source>"),
        disk("<source dev='/dev/sdz'/>", ENCRYPTION, "block"),
        disk(RBD.format(""), ENCRYPTION, "network"),
    ],
)
def test_a_raw_image_is_read_by_the_luks_driver(xml: str) -> None:
    assert secrets_of(xml, "virtio-disk0-0-luks") == [
        {"qom-type": "secret", "id": "virtio-disk0-0-luks", "format": "raw", "file": FD}
    ]
    top = arguments(xml, "-blockdev")[-1]
    assert (top["driver"], top["key-secret"]) == ("luks", "virtio-disk0-0-luks")


def test_each_layer_of_a_chain_has_its_own() -> None:
    below = (
        f"<backingStore type='file'><format type='raw'/><source file='/b'>{ENCRYPTION}</source>"
        "<backingStore/></backingStore>"
    )
    xml = disk(f"<source file='/a'>{ENCRYPTION}</source>", below).replace(
        "type='raw'/><source file='/a'", "type='qcow2'/><source file='/a'"
    )
    ids = ("virtio-disk0-0-luks", "virtio-disk0-1-luks")
    assert [item["id"] for item in secrets_of(xml, *ids)] == [*ids]
    nodes = {node["node-name"]: node for node in arguments(xml, "-blockdev")}
    assert nodes["virtio-disk0-1-format"]["key-secret"] == ids[1]
    assert nodes["virtio-disk0-0-format"]["encrypt"] == {"format": "luks", "key-secret": ids[0]}


@pytest.mark.parametrize(
    ("protocol", "name", "expected"),
    [
        ("rbd", "pool/image", {"user": "me", "key-secret": "virtio-disk0-0-auth"}),
        ("iscsi", "iqn.2013-07.com.example/1", {"user": "me", "password-secret": "virtio-disk0-0-auth"}),
        ("https", "x.iso", {"username": "me", "password-secret": "virtio-disk0-0-auth"}),
    ],
)
def test_a_network_disk_says_who_it_is(protocol: str, name: str, expected: dict[str, str]) -> None:
    source = f"<source protocol='{protocol}' name='{name}'><host name='h'/>{{}}</source>"
    for xml in (disk(source.format(AUTH), kind="network"), disk(source.format(""), AUTH, "network")):
        storage = arguments(xml, "-blockdev")[0]
        assert {key: storage[key] for key in expected} == expected
        assert secrets_of(xml, "virtio-disk0-0-auth")[0]["file"] == FD


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        (disk("<source file='/a'/>", "<encryption format='qcow'/>"), "encryption 'qcow' is not supported"),
        (disk("<source file='/a'/>", "<encryption format='luks'/>"), "needs one <secret"),
        (disk("<source file='/a'/>", ENCRYPTION.replace("'luks'", "'luks' engine='librbd'")), "by librbd"),
        (disk("<source file='/a'/>", ENCRYPTION).replace("type='raw'", "type='vmdk'"), "format 'vmdk'"),
        (disk(RBD.format("<auth username='me'/>"), kind="network"), "needs a username and a <secret>"),
        (disk(RBD.replace("rbd", "nbd").format(AUTH), kind="network"), "nbd has no <auth>"),
    ],
)
def test_what_cannot_be_done_is_refused(xml: str, why: str) -> None:
    with pytest.raises(ConfigUnsupported, match=why):
        command_line(document(xml))


def test_without_a_secret_there_is_none() -> None:
    assert any("/a" in word for word in command_line(document(disk("<source file='/a'/>"))).argv)
