"""The way from a document to QEMU's words, as the golden tests walk it: nothing of this host, nothing random."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from kvik.conf.aliases import assign_aliases
from kvik.conf.domain import Domain, parse_domain
from kvik.conf.machine import MachineDefaults
from kvik.conf.postparse import postparse
from kvik.hypervisor.qemu.argv.build import CommandLine, build
from kvik.hypervisor.qemu.capabilities import QemuCapabilities
from kvik.hypervisor.words import shell_text

DATA = Path(__file__).parents[3] / "data" / "qemu"


def capabilities() -> QemuCapabilities:
    """Those of a QEMU 7.2, as probed once."""
    return msgspec.json.decode((DATA / "capabilities-7.2.json").read_bytes(), type=QemuCapabilities)


def complete_domain(xml: str, known: QemuCapabilities) -> Domain:
    domain = parse_domain(xml)
    machine = known.machine(domain.os.type.machine or "")
    assert machine is not None
    domain.os.type.machine = machine.name
    postparse(domain, MachineDefaults(random=bytes, emulator=known.binary))
    assign_aliases(domain)
    return domain


def command_line(xml: str, files: Mapping[str, int] | None = None) -> CommandLine:
    known = capabilities()
    return build(complete_domain(xml, known), known, files)


def golden_text(xml: str, files: Mapping[str, int] | None = None) -> str:
    line = command_line(xml, files)
    return shell_text(line.argv, line.env) + "\n"
