"""Figures: exits of each vCPU by kind, counters of devices.

Reference: QEMU's qapi/stats.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvik.vmm import metrics
from kvik.vmm.monitor import cpus
from kvik.vmm.monitor.schema import ANYTHING, ID, TEXT, Enum, List, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROVIDER = "kvm"
TARGETS = ("vm", "vcpu")


def _wanted(arguments: Arguments) -> set[str] | None:
    names: set[str] = set()
    for item in arguments.get("providers", ()):
        if item["provider"] == PROVIDER:
            if "names" not in item:
                return None
            names |= set(item["names"])
    return names if "providers" in arguments else None


def _told(figures: dict[str, int], wanted: set[str] | None) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in figures.items() if wanted is None or name in wanted]


def query_stats(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    wanted = _wanted(arguments)
    if arguments["target"] == "vcpu":
        only = arguments.get("vcpus")
        return [
            {"provider": PROVIDER, "qom-path": path, "stats": _told(metrics.exits(vcpu), wanted)}
            for vcpu in context.machine.vcpus
            if (path := cpus.qom_path(context, vcpu.index)) and (only is None or path in only)
        ]
    return [{"provider": PROVIDER, "stats": _told(metrics.machine_figures(context.machine), wanted)}]


def query_stats_schemas(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    machine = context.machine
    names = {
        "vm": list(metrics.machine_figures(machine)),
        "vcpu": list(metrics.exits(machine.vcpus[0])) if machine.vcpus else [],
    }
    return [
        {
            "provider": PROVIDER,
            "target": target,
            "stats": [{"name": name, "type": "cumulative", "exponent": 0} for name in listed],
        }
        for target, listed in names.items()
    ]


def query_kvik_metrics(context: Context, arguments: Arguments) -> dict[str, Any]:
    return metrics.snapshot(context.machine)


_PROVIDER = Struct({"provider": ID, "*names": List(ID)})

COMMANDS: Sequence[Command] = (
    Command(
        "query-stats",
        query_stats,
        Struct({"target": Enum(*TARGETS), "*vcpus": List(TEXT), "*providers": List(_PROVIDER)}),
        summary="exits by kind and other counters",
    ),
    Command("query-stats-schemas", query_stats_schemas, Struct({"*provider": Enum(PROVIDER)})),
    Command("x-kvik-metrics", query_kvik_metrics, returns=ANYTHING, summary="all counters, also of devices"),
)
