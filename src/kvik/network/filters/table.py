"""The table `bridge kvik_filter`: what all interfaces share, and how one interface's part is put in and taken out.

    prerouting  out_l2 (-310), out_l3 (-300)      a machine's packets, before the bridge learns their source
    input       out_local (-310)                  ... to link-local groups, which the bridge takes for itself
    postrouting in_l2 (-310), in_l3 (-300)        packets to a machine, from other ports and from the host

Each base chain is one look-up of the interface's name in a verdict map, so the cost does not grow with the number of
machines. `accept` ends a base chain, not the hook: what layer 2 rules accept, the rules about IP still see, as with
ebtables and iptables under libvirt.

Bridge protocol data units come by none of these hooks while the bridge's spanning tree is on (br_handle_frame in
net/bridge/br_input.c): a guest could make itself the root of the tree. `guard` drops them at the device's own ingress,
in a table of the netdev family.
"""

from __future__ import annotations

from typing import Any

from kvik.network.filters.match import BPDU_MAC, match, payload

__all__ = [
    "FAMILY",
    "STAGES",
    "TABLE",
    "Command",
    "add",
    "base",
    "delete",
    "dispatch",
    "flush",
    "guard",
    "place",
    "undispatch",
    "unguard",
]

Command = dict[str, Any]

FAMILY, TABLE = "bridge", "kvik_filter"
STAGES = ("out_l2", "out_l3", "in_l2", "in_l3")

_LAYER_2, _LAYER_3 = -310, -300  # before everything else on the bridge; -300 is bridge's own "dstnat"
_BASE = {
    "out_l2": ("prerouting", _LAYER_2, "iifname"),
    "out_l3": ("prerouting", _LAYER_3, "iifname"),
    "in_l2": ("postrouting", _LAYER_2, "oifname"),
    "in_l3": ("postrouting", _LAYER_3, "oifname"),
}


def _object(kind: str, **fields: Any) -> Command:
    return {kind: {"family": FAMILY, "table": TABLE, **fields}}


def place(name: str) -> dict[str, Any]:
    """Where an object of ours is."""
    return {"family": FAMILY, "table": TABLE, "name": name}


def add(kind: str, **fields: Any) -> Command:
    return {"add": _object(kind, **fields)}


def delete(kind: str, **fields: Any) -> Command:
    return {"delete": _object(kind, **fields)}


def flush(chain: str) -> Command:
    return {"flush": _object("chain", name=chain)}


def base() -> list[Command]:
    """The shared part; as often as wanted, it ends in the same state."""
    commands: list[Command] = [{"add": {"table": {"family": FAMILY, "name": TABLE}}}]
    for stage, (hook, priority, _) in _BASE.items():
        commands.append(add("map", name=f"{stage}_ports", type="ifname", map="verdict"))
        commands.append(_base_chain(stage, hook, priority))
    commands.append(_base_chain("out_local", "input", _LAYER_2))
    for stage, (_, _, key) in _BASE.items():
        commands += [flush(stage), _look_up(stage, key, stage)]
    # net/bridge/br_input.c: frames to 01:80:c2:00:00:0X come to the input hook alone (802.1X, LLDP, ...).
    link_local = match({"&": [payload("ether", "daddr"), "ff:ff:ff:ff:ff:f0"]}, "01:80:c2:00:00:00")
    return [*commands, flush("out_local"), _look_up("out_local", "iifname", "out_l2", link_local)]


def _base_chain(name: str, hook: str, priority: int) -> Command:
    return add("chain", name=name, type="filter", hook=hook, prio=priority, policy="accept")


def _look_up(chain: str, key: str, stage: str, *before: Command) -> Command:
    vmap = {"vmap": {"key": {"meta": {"key": key}}, "data": f"@{stage}_ports"}}
    return add("rule", chain=chain, expr=[*before, vmap])


def dispatch(stage: str, device: str, chain: str) -> Command:
    """Packets of `device` go to `chain`."""
    return add("element", name=f"{stage}_ports", elem=[[device, {"jump": {"target": chain}}]])


def undispatch(stage: str, device: str) -> Command:
    return delete("element", name=f"{stage}_ports", elem=[device])


def guard(device: str) -> list[Command]:
    """Drop what `device` sends to the bridge group address. As often as wanted."""
    chain = {"family": "netdev", "table": TABLE, "name": device}
    hook = {"type": "filter", "hook": "ingress", "prio": _LAYER_2, "dev": device, "policy": "accept"}
    drop = [match(payload("ether", "daddr"), BPDU_MAC), {"drop": None}]
    return [
        {"add": {"table": {"family": "netdev", "name": TABLE}}},
        {"add": {"chain": {**chain, **hook}}},
        {"flush": {"chain": chain}},
        {"add": {"rule": {"family": "netdev", "table": TABLE, "chain": device, "expr": drop}}},
    ]


def unguard(device: str) -> list[Command]:
    """The chain need not be there: it goes with its device."""
    chain = {"family": "netdev", "table": TABLE, "name": device}
    add_table: Command = {"add": {"table": {"family": "netdev", "name": TABLE}}}
    return [add_table, {"add": {"chain": chain}}, {"flush": {"chain": chain}}, {"delete": {"chain": chain}}]
