"""How far a machine's boot has come, and if it stalls, where and why.

Stages are reached in order of the table. A stage that this machine cannot show (no serial line, no agent channel) is
skipped and says so; readiness is that every other stage is done.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import NamedTuple

from kvik.conf.domain import Domain

NAMES = ("defined", "vmm started", "guest running", "first output", "agent", "address")
AGENT_CHANNEL = "org.qemu.guest_agent.0"

FAILED = ("the guest's kernel panicked", "the guest found no root", "the firmware found nothing to boot")

# What to look for in the last lines of a console, and what to tell. It goes on from some; from FAILED it does not.
_SYMPTOMS = (
    (re.compile(r"Kernel panic - not syncing[^\r\n]*"), "the guest's kernel panicked: {0}"),
    (re.compile(r"VFS: Unable to mount root fs[^\r\n]*"), "the guest found no root file system: {0}"),
    (re.compile(r"No bootable device[^\r\n]*|Boot failed[^\r\n]*"), "the firmware found nothing to boot: {0}"),
    (re.compile(r"Out of memory: Killed process[^\r\n]*"), "the guest ran out of memory: {0}"),
    (re.compile(r"You are in emergency mode[^\r\n]*"), "the guest is in emergency mode: {0}"),
    (re.compile(r"udhcpc: no lease[^\r\n]*|No DHCPOFFERS received[^\r\n]*"), "no DHCP server answered: {0}"),
    (re.compile(r"^grub>.*$", re.MULTILINE), "the guest waits at its boot loader's prompt"),
)


class Stage(NamedTuple):
    name: str
    seconds: float  # since the start was asked for; 0.0 if not reached
    state: str  # "done", "waiting", "stalled" (so far), "skipped", "failed" (will not come)
    hint: str = ""


def symptom(console: str) -> str:
    """What the console's last output says is wrong, "" if nothing is known."""
    for pattern, text in _SYMPTOMS:
        found = pattern.findall(console)
        if found:
            return text.format(found[-1].strip())
    return ""


class BootStages:
    """The stages of one run of one machine."""

    __slots__ = ("_began", "_changed", "_reached", "_skipped", "ended")

    def __init__(self, definition: Domain, began: float | None = None) -> None:
        """`began`: seconds since the epoch, for a machine that was found running."""
        self._began = time.time() if began is None else began
        self._reached: dict[str, float] = {"defined": 0.0}
        self._skipped = _skipped(definition)
        self._changed: asyncio.Event | None = None
        self.ended = ""  # why the machine is gone

    def reach(self, name: str) -> float | None:
        """Seconds since the start if this is news, else None. What comes before is thereby reached, too."""
        if name in self._reached:
            return None
        seconds = max(0.0, time.time() - self._began)
        for earlier in NAMES[: NAMES.index(name)]:
            # The agent and the address may come in any order, and a quiet kernel may never use its console.
            if earlier in ("vmm started", "guest running"):
                self._reached.setdefault(earlier, seconds)
            elif earlier == "first output" and earlier not in self._reached:
                self._skipped.setdefault(earlier, "the console stayed silent")
        self._reached[name] = seconds
        self._tell()
        return seconds

    @property
    def reached(self) -> dict[str, float]:
        return dict(self._reached)

    def restore(self, reached: Mapping[str, float]) -> None:
        """What an earlier daemon saw; whether the agent is still there must be asked anew."""
        self._reached |= {name: reached[name] for name in NAMES[:4] if name in reached}

    def lose(self, *names: str) -> None:
        """The guest rebooted, or its agent went away."""
        for name in names:
            self._reached.pop(name, None)

    def end(self, why: str) -> None:
        self.ended = why or "the machine ended"
        self._tell()

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed.set()

    async def changed(self) -> None:
        """Return when something was reached, or the machine ended, since the last call."""
        if self._changed is None:
            self._changed = asyncio.Event()
        await self._changed.wait()
        self._changed.clear()

    def has(self, name: str) -> bool:
        return name in self._reached

    @property
    def wants(self) -> list[str]:
        """What is still to come, in order."""
        return [name for name in NAMES if name not in self._reached and name not in self._skipped]

    @property
    def ready(self) -> bool:
        return not self.ended and not self.wants

    def table(self, *, stalled: str = "") -> list[Stage]:
        """All stages; with `stalled`, the first missing one is marked so, with this hint."""
        rows = []
        wants = self.wants
        for name in NAMES:
            if name in self._reached:
                rows.append(Stage(name, round(self._reached[name], 3), "done"))
            elif name in self._skipped:
                rows.append(Stage(name, 0.0, "skipped", self._skipped[name]))
            elif stalled and name == wants[0]:
                rows.append(Stage(name, 0.0, "failed" if stalled.startswith(FAILED) else "stalled", stalled))
            else:
                rows.append(Stage(name, 0.0, "waiting"))
        return rows

    def hint(self, console: str = "", agent_error: str = "") -> str:
        """Why the first missing stage may not come."""
        if self.ended:
            return self.ended
        if not self.wants:
            return ""
        found = symptom(console)
        if found:
            return found
        match self.wants[0]:
            case "vmm started":
                return "the VMM has not answered yet"
            case "guest running":
                return "the VMM runs but the guest's CPUs do not: is the machine paused?"
            case "first output":
                return "nothing came on the serial line: does the guest's kernel have console=ttyS0?"
            case "agent":
                last = console.strip().rsplit("\n", 1)[-1].strip()
                text = "the guest agent did not connect: is qemu-guest-agent installed and running in the guest?"
                return f"{text} (last console line: {last[-120:]})" if last else text
            case "address":
                if agent_error:
                    return f"the agent does not tell the guest's addresses: {agent_error}"
                return "the guest has no address: no DHCP server answered, or its interface is down"
        return ""


def _skipped(definition: Domain) -> dict[str, str]:
    devices = definition.devices
    skipped = {}
    if not devices.serials and not devices.consoles:
        skipped["first output"] = "the machine has no serial line or console"
    if not any(channel.target and channel.target.name == AGENT_CHANNEL for channel in devices.channels):
        skipped["agent"] = f"the machine has no channel {AGENT_CHANNEL}"
        skipped["address"] = "without the agent's channel the guest cannot tell its address"
    if not devices.interfaces:
        skipped["address"] = "the machine has no network interface"
    return skipped
