"""The run loop made visible: every exit with its kind and its time.

Events are kept in memory, bounded, and written at the end: a table of kinds, a line of characters over time, and, to a
file, one JSON object an exit. Costs about a microsecond an exit, nothing when off.
"""

from __future__ import annotations

import time
from array import array

from kvik.kvm.constants import ExitReason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.vmm.vcpu import VcpuThread

__all__ = ["Trace"]

MAX_EVENTS = 1 << 20  # of 32 bytes a vCPU; later exits are counted, not kept
_WIDTH = 72
_SHADES = " .:-=+*#%@"


class Trace:
    """Records of a run. An event is four words: entered, left (ns), reason, detail (port or address)."""

    def __init__(self) -> None:
        self.started = time.monotonic_ns()
        self.events: dict[int, array[int]] = {}
        self.dropped = 0

    def wrap(self, thread: VcpuThread) -> Callable[[], int]:
        """`vcpu.enter`, recorded."""
        enter, vcpu, clock = thread.vcpu.enter, thread.vcpu, time.monotonic_ns
        events = self.events.setdefault(thread.index, array("Q"))
        io, mmio = int(ExitReason.IO), int(ExitReason.MMIO)

        def traced() -> int:
            begun = clock()
            reason = enter()
            ended = clock()
            if len(events) >= 4 * MAX_EVENTS:
                self.dropped += 1
            else:
                detail = vcpu.io()[2] if reason == io else vcpu.mmio()[0] if reason == mmio else 0
                events.extend((begun, ended, reason, detail))
            return reason

        return traced

    def summary(self) -> str:
        """Tables and a plot, 80 columns wide."""
        lines = []
        for index, events in sorted(self.events.items()):
            kinds: dict[tuple[int, int], list[int]] = {}
            guest = user = last = 0
            for at in range(0, len(events), 4):
                begun, ended, reason, detail = events[at : at + 4]
                entry = kinds.setdefault((reason, detail & ~0xFFF if reason == ExitReason.MMIO else detail), [0, 0])
                entry[0] += 1
                entry[1] += ended - begun
                guest += ended - begun
                user += begun - last if last else 0
                last = ended
            count = len(events) // 4
            lines.append(
                f"vCPU {index}: {count} exits to user mode; {guest / 1e9:.3f} s in guest and kernel mode, "
                f"{user / 1e9:.3f} s in user mode"
            )
            lines.append(f"  {'exit':<18}{'where':>14}{'count':>10}{'in guest, ms':>14}")
            for (reason, detail), (number, spent) in sorted(kinds.items(), key=lambda item: -item[1][0])[:12]:
                where = f"{detail:#x}" if detail else ""
                lines.append(f"  {ExitReason.name_of(reason):<18}{where:>14}{number:>10}{spent / 1e6:>14.1f}")
            if count > 1:
                lines += self._plot(events)
        if self.dropped:
            lines.append(f"{self.dropped} later exits were not recorded")
        return "\n".join(lines) + "\n"

    @staticmethod
    def _plot(events: array[int]) -> list[str]:
        begin, end = events[0], events[-3]
        span = max(end - begin, 1)
        buckets = [0] * _WIDTH
        for at in range(1, len(events), 4):
            buckets[min((events[at] - begin) * _WIDTH // span, _WIDTH - 1)] += 1
        top = max(buckets)
        bar = "".join(_SHADES[-(-count * (len(_SHADES) - 1) // top)] if count else _SHADES[0] for count in buckets)
        return [
            f"  |{bar}|",
            f"  0 s{f'{span / 1e9:.2f} s':>{_WIDTH - 2}}  (most: {top} exits in {span / _WIDTH / 1e6:.1f} ms)",
        ]

    def write(self, file: str | int) -> None:
        """One JSON object an exit, to a path or an open descriptor, which is closed."""
        with open(file, "w", encoding="ascii") as stream:  # noqa: PTH123 - pathlib is not imported by a machine
            for index, events in sorted(self.events.items()):
                for at in range(0, len(events), 4):
                    begun, ended, reason, detail = events[at : at + 4]
                    stream.write(
                        f'{{"vcpu": {index}, "entered_ns": {begun - self.started}, "left_ns": {ended - self.started}, '
                        f'"exit": "{ExitReason.name_of(reason)}", "where": {detail}}}\n'
                    )
