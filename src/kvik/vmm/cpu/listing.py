"""`kvik-vmm --cpu help`: the CPU models, and which of them a machine can have on this host.

    host                   usable: all that KVM has for a guest here
    x86-64-v2              usable
    EPYC                   usable, nearest to this host
    x86-64-v4              unusable: the host has no avx512bw, avx512cd

One model a line, its name first: programs read it too (`hypervisor.kvik.models`). The nearest is the richest one that
this host can be: a machine that has it moves to every host that can be it as well.
"""

from __future__ import annotations

from kvik.vmm.cpu.cpuid import LEAF_1_ECX_ALWAYS, leaves
from kvik.vmm.cpu.models import HOST, MODELS, why_not

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.kvm.structs import CpuidTable
    from kvik.vmm.cpu.cpuid import Leaves

__all__ = ["listing", "nearest"]


def nearest(found: Leaves) -> str:
    """Of the models that this host can be the one with most features, a vendor's before a level; empty: none."""
    able = [
        (len(model.features), bool(model.vendor), name) for name, model in MODELS.items() if not why_not(found, model)
    ]
    return max(able)[2] if able else ""


def listing(supported: CpuidTable | None) -> str:
    """`supported` is KVM's table; without it, nobody can tell what is usable."""
    if supported is None:
        return "".join(f"{name:<22} unknown: KVM cannot be asked\n" for name in (HOST[0], *MODELS))
    found, _ = leaves(supported)
    found[1, 0][2] |= LEAF_1_ECX_ALWAYS  # as `cpuid_for` has them
    best = nearest(found)
    lines = [f"{HOST[0]:<22} usable: all that KVM has for a guest here"]
    for name, model in MODELS.items():
        reason = why_not(found, model)
        told = f"unusable: {reason}" if reason else "usable, nearest to this host" if name == best else "usable"
        lines.append(f"{name:<22} {told}")
    return "\n".join(lines) + "\n"
