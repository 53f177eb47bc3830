"""Collect pairs of figures and print them as ratios beside their targets."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class Row:
    what: str
    ours: float
    peer: float | None
    unit: str
    target: str
    met: bool | None
    spread: str = ""  # of the ratios of the rounds


def _spread(ours: list[float], peer: list[float]) -> str:
    """The least and the greatest ratio of one round, where every round measured both."""
    if len(ours) != len(peer) or len(ours) < 2 or not all(peer):
        return ""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return f" ({min(ratios):.2f} to {max(ratios):.2f})"


@dataclass
class Report:
    title: str
    rows: list[Row] = field(default_factory=list)

    def faster(self, what: str, ours: list[float], peer: list[float], unit: str, times: float) -> None:
        """Durations: the target is met when ours is at most the peer's divided by `times`."""
        a, b = statistics.median(ours), statistics.median(peer)
        self.rows.append(Row(what, a, b, unit, f"<= 1/{times:g} of the peer's", a * times <= b, _spread(ours, peer)))

    def within(self, what: str, ours: list[float], peer: list[float], unit: str, times: float) -> None:
        """Durations: the target is met when ours is at most `times` the peer's."""
        a, b = statistics.median(ours), statistics.median(peer)
        self.rows.append(Row(what, a, b, unit, f"<= {times:g}x the peer's", a <= times * b, _spread(ours, peer)))

    def more(self, what: str, ours: list[float], peer: list[float], unit: str, times: float) -> None:
        """Rates: the target is met when ours is at least `times` the peer's."""
        a, b = statistics.median(ours), statistics.median(peer)
        self.rows.append(Row(what, a, b, unit, f">= {times:g}x the peer's", a >= times * b, _spread(ours, peer)))

    def below(self, what: str, ours: list[float], unit: str, limit: float, peer: list[float] | None = None) -> None:
        a = statistics.median(ours)
        b = statistics.median(peer) if peer else None
        self.rows.append(Row(what, a, b, unit, f"<= {limit:g} {unit}", a <= limit, _spread(ours, peer or [])))

    def told(self, what: str, ours: list[float], peer: list[float], unit: str) -> None:
        """Figures without a target."""
        self.rows.append(
            Row(what, statistics.median(ours), statistics.median(peer), unit, "", None, _spread(ours, peer))
        )

    def show(self) -> None:
        print(f"\n{self.title}", flush=True)
        head = ("what", "kvik", "peer", "ratio", "target", "")
        table = [head]
        for row in self.rows:
            peer = f"{row.peer:,.4g} {row.unit}" if row.peer is not None else "-"
            ratio = f"{row.ours / row.peer:.2f}{row.spread}" if row.peer else "-"
            verdict = {True: "met", False: "MISSED", None: ""}[row.met]
            table.append((row.what, f"{row.ours:,.4g} {row.unit}", peer, ratio, row.target, verdict))
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        for line in table:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
