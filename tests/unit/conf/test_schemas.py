"""libvirt's own RELAX NG schemas as oracle: what we write is what they allow."""

from __future__ import annotations

from pathlib import Path

import pytest
from lxml import etree

from kvik.conf.capabilities import (
    DomainCapabilities,
    GuestArch,
    GuestMachine,
    HostCapabilities,
    HostCell,
    format_capabilities,
    format_domain_capabilities,
)

SCHEMAS = Path("/usr/share/libvirt/schemas")
GOLDEN = sorted((Path(__file__).parents[2] / "data/conf/postparse").glob("*.xml"))

pytestmark = pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"libvirt's schemas are not installed in {SCHEMAS}")


def check(text: str, schema: str) -> None:
    grammar = etree.RelaxNG(etree.parse(str(SCHEMAS / schema)))
    document = etree.fromstring(text)
    assert grammar.validate(document), [str(entry) for entry in grammar.error_log]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_completed_document_is_valid(path: Path) -> None:
    check(path.read_text(), "domain.rng")


def test_host_capabilities_are_valid() -> None:
    cell = HostCell(0, 16 << 20, cpus=[(0, 0, 0, 0, "0-1"), (1, 0, 0, 0, "0-1")], pages={4: 4194304}, distances={0: 10})
    host = HostCapabilities(
        uuid="2f1d4f0a-5b1d-4a52-8a5f-0d3c6d6f8f10", arch="x86_64", model="EPYC-Rome", vendor="AMD", threads=2,
        features=["svm"], cells=[cell], security_models=[("dac", "0")],
        guests=[
            GuestArch(
                "x86_64", "/usr/bin/qemu-system-x86_64", domains=("qemu", "kvm"),
                machines=[GuestMachine("pc-q35-7.2", 288), GuestMachine("q35", 288, "pc-q35-7.2")],
            )
        ],
    )  # fmt: skip
    text = format_capabilities(host)
    check(text, "capability.rng")
    assert "<machine canonical='pc-q35-7.2' maxCpus='288'>q35</machine>" in text


def test_domain_capabilities_are_valid() -> None:
    caps = DomainCapabilities(
        path="/usr/bin/qemu-system-x86_64", domain="qemu", machine="pc-q35-7.2", arch="x86_64", max_vcpus=288,
        firmwares=["efi"], loaders=["/usr/share/OVMF/OVMF_CODE_4M.fd"], cpu_models=[("qemu64", True, "unknown"), ("Nehalem", False, "Intel")],  # noqa: E501
        devices={
            "disk": {"diskDevice": ["disk", "cdrom"], "bus": ["virtio", "sata"]}, "graphics": {"type": ["vnc"]},
            "video": {"modelType": ["vga", "virtio"]},
        },
        features={"vmcoreinfo": True, "genid": True},
    )  # fmt: skip
    check(format_domain_capabilities(caps), "domaincaps.rng")
