"""The CPU models that a kvik-vmm has, as it tells them itself (`kvik-vmm --cpu help`); host-model made one of them.

What runs is asked, not what is installed beside us: <emulator> may name another version. The answer is kept as long as
the daemon runs; a host's CPU does not change meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvik.conf.cpu import CpuModel
from kvik.conf.domain import Domain
from kvik.errors import ConfigUnsupported, HypervisorError
from kvik.host import tools
from kvik.hypervisor.kvik import program

__all__ = ["ModelSource", "Models"]

_DEADLINE = 20.0
_MOST = 256  # lines that are read


@dataclass(frozen=True, slots=True)
class Models:
    usable: dict[str, bool]  # name -> whether a machine can have it on this host, in kvik-vmm's order
    nearest: str  # the richest usable one; empty: none


class ModelSource:
    """Asks each emulator once."""

    def __init__(self) -> None:
        self._known: dict[str, Models] = {}

    async def of(self, emulator: str) -> Models:
        """Raises `HypervisorError`, `HostError`."""
        known = self._known.get(emulator)
        if known is None:
            done = await tools.run_async(program.command([emulator, "--cpu", "help"]), timeout=_DEADLINE)
            known = _read(done.text, emulator)
            if "unknown" not in done.text:
                self._known[emulator] = known
        return known

    async def check(self, domain: Domain, emulator: str) -> None:
        """Raises `ConfigUnsupported` for a model that there is not."""
        cpu = domain.cpu
        name = cpu.model.value if cpu is not None and cpu.model is not None else None
        if cpu is None or cpu.mode not in (None, "custom") or not name or name in ("host", "max"):
            return
        models = await self.of(emulator)
        if name not in models.usable:
            here = ", ".join(item for item, usable in models.usable.items() if usable)
            raise ConfigUnsupported(
                f"kvik-vmm has no CPU model {name!r}",
                path="/domain/cpu/model",
                remedy=f"one of those that this host can be: {here}; or mode='host-model', mode='host-passthrough'",
            )

    async def resolve(self, domain: Domain, emulator: str) -> None:
        """In the document of a machine that starts: host-model becomes the model that it means on this host."""
        cpu = domain.cpu
        if cpu is None or cpu.mode != "host-model":
            return
        models = await self.of(emulator)
        if not models.nearest:
            raise ConfigUnsupported(
                "this host's KVM has too little for any of kvik-vmm's CPU models",
                path="/domain/cpu/@mode",
                remedy="write <cpu mode='host-passthrough'/>",
            )
        cpu.mode, cpu.match = "custom", "exact"
        cpu.model = CpuModel(value=models.nearest, fallback="forbid")


def _read(text: str, emulator: str) -> Models:
    usable: dict[str, bool] = {}
    nearest = ""
    for line in text.splitlines()[:_MOST]:
        name, _, told = line.partition(" ")
        told = told.strip()
        if not name or not told.startswith(("usable", "unusable", "unknown")):
            raise HypervisorError(f"{emulator} --cpu help: {line[:80]!r} tells of no CPU model")
        if name != "host":
            usable[name] = told.startswith("usable")
            nearest = name if "nearest" in told else nearest
    if not usable:
        raise HypervisorError(f"{emulator} --cpu help names no CPU model")
    return Models(usable, nearest)
