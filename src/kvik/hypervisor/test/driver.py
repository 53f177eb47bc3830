"""The in-memory driver: every layer above runs on it, fast, and every fault can be had on demand.

    driver = TestDriver()
    driver.behaviours["web"] = Behaviour(ignores_acpi=True)
    manager = Manager(paths, {"test": driver})

The "VMM processes" live in the driver object, not in the manager: a new manager on the same driver finds them again,
as a restarted daemon finds real ones.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvik.conf.aliases import assign_aliases
from kvik.conf.devices.disk import Disk
from kvik.conf.domain import Domain, format_domain
from kvik.errors import ConfigUnsupported, HypervisorError
from kvik.hypervisor.driver import (
    Bases,
    EventKind,
    EventSink,
    Feature,
    HostVerdict,
    MachineEvent,
    StartRequest,
    no_bases,
)
from kvik.hypervisor.test.behaviour import Behaviour
from kvik.hypervisor.test.machine import TestMachine

MAX_VCPUS = 288
_PID_BASE = 1 << 23  # above the kernel's largest pid, so that no process is ever mistaken for one of these


class TestDriver:
    __test__ = False

    name = "test"

    def __init__(self) -> None:
        self.bases: Bases = no_bases
        self.behaviours: dict[str, Behaviour] = {}  # by machine name
        self.default = Behaviour()
        self.machines: dict[str, TestMachine] = {}  # those that run, by name
        self.starts: dict[str, int] = {}
        self.forgotten: list[tuple[str, bool | None]] = []  # what was asked of `forget`
        self.without: set[Feature] = set()
        self.inside: dict[str, dict[str, bytes]] = {}  # memory in images, by machine and snapshot
        self.tpms: dict[str, Path] = {}  # where a machine's emulated TPM has its state
        self._pids = itertools.count(_PID_BASE)

    def features(self) -> frozenset[Feature]:
        return frozenset(Feature) - {Feature.KVM} - self.without

    def verdict(self) -> HostVerdict:
        return HostVerdict(usable=False, reason="machines of the test driver exist in memory only")

    async def version(self) -> int:
        return 1_000_000

    async def default_emulator(self, arch: str) -> str:
        return "/usr/bin/kvik-test"

    async def complete(self, definition: Domain) -> None:
        if definition.os.type.arch is None:
            definition.os.type.arch = "x86_64"
        if definition.os.type.machine in (None, "q35"):
            definition.os.type.machine = "pc-q35-7.2"  # a board whose buses the document's defaults know

    async def validate(self, definition: Domain) -> None:
        if definition.vcpu and definition.vcpu.value > MAX_VCPUS:
            raise ConfigUnsupported(
                f"{definition.vcpu.value} vCPUs are too many: at most {MAX_VCPUS}", path="/domain/vcpu"
            )

    async def start(self, request: StartRequest) -> TestMachine:
        definition = request.definition
        name = definition.name
        behaviour = self.behaviours.get(name, self.default)
        self.starts[name] = self.starts.get(name, 0) + 1
        os.write(request.log_fd, f"kvik-test -name {name}\n".encode())
        if behaviour.start_delay:
            await asyncio.sleep(behaviour.start_delay)
        if behaviour.fail_start and self.starts[name] > behaviour.fail_after:
            os.write(request.log_fd, f"{behaviour.fail_start}\n".encode())
            raise HypervisorError(f"cannot start {name!r}: {behaviour.fail_start}")
        memory = b""
        while request.state is not None and (data := await asyncio.to_thread(request.state.read, 4096)):
            memory += data
        sink = request.sink
        assign_aliases(definition)
        machine = TestMachine(next(self._pids), definition, str(request.directory), behaviour, sink)
        machine.sink = self._watch(name, machine, sink)
        machine.memory = memory or machine.memory
        machine.inside = self.inside.setdefault(name, {})
        if request.inside is not None:
            machine.memory = machine.inside[request.inside[0]]
        self.machines[name] = machine
        (request.directory / "pid").write_text(f"{machine.pid}\n")
        devices = definition.devices
        for number, serial in enumerate([*devices.serials, *devices.consoles]):
            if serial.source is not None and serial.type == "pty":
                serial.source.path = f"/dev/pts/test-{number}"
        machine.power_on(request.paused)
        return machine

    def _watch(self, name: str, machine: TestMachine, sink: EventSink) -> EventSink:
        def watched(event: MachineEvent) -> None:
            if event.kind is EventKind.ENDED and self.machines.get(name) is machine:
                del self.machines[name]
            sink(event)

        return watched

    async def attach(
        self, definition: Domain, directory: Path, handle: Mapping[str, Any], sink: EventSink
    ) -> TestMachine | None:
        """With an empty handle: what a start that was never confirmed left in `directory`."""
        for name, machine in self.machines.items():
            if handle.get("pid", machine.pid) == machine.pid and machine.directory == str(directory):
                machine.definition = definition
                machine.sink = self._watch(name, machine, sink)
                return machine
        return None

    def tpm_state(self, definition: Domain) -> Path | None:
        return self.tpms.get(definition.name)

    def written_last(self, directory: Path, disk: Disk, places: Sequence[str]) -> str | None:
        return None  # it leaves nothing

    async def forget(self, definition: Domain, *, keep_tpm: bool | None = None) -> None:
        self.forgotten.append((definition.name, keep_tpm))

    async def close(self) -> None:
        """There is nothing but machines."""

    async def native(self, definition: Domain) -> str:
        return f"kvik-test -name {definition.name}"

    async def domain_capabilities(self, arch: str, machine: str, virttype: str, emulator: str) -> str:
        return (
            f"<domainCapabilities><path>{emulator or '/usr/bin/kvik-test'}</path><domain>test</domain>"
            f"<machine>{machine or 'pc-q35-7.2'}</machine><arch>{arch or 'x86_64'}</arch>"
            f"<vcpu max='{MAX_VCPUS}'/></domainCapabilities>"
        )

    def abandon(self) -> None:
        """For tests: the daemon that listened is gone; machines go on."""
        for name, machine in self.machines.items():
            machine.sink = self._watch(name, machine, lambda event: None)

    def describe(self, name: str) -> str:
        """The live document of a running machine, for tests that look behind the manager."""
        return format_domain(self.machines[name].definition)
