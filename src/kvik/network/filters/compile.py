"""From a flat list of rules to one interface's part of the table. Pure.

What is as in libvirt, where its documentation leaves it open (tests/nwfilterxml2firewalldata of its source shows it):
- a chain of a filter is entered for packets of its protocol; what runs off its end goes back to the root chain, what
  runs off the root chain is accepted;
- an `inout` rule of layer 2 describes packets to the machine, one about IP those from it; both are turned round for
  the other direction;
- `drop` and `reject` of rules about IP hold for both directions of what they describe; `reject` on layer 2 drops.

Answers to what a stateful rule accepts are recognised by sets of our own, one for each machine and bounded, which the
accepted packet itself writes to: not every kernel has connection tracking in bridges, and its one table is shared by
all machines, so that any of them can fill it for the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvik.conf.nwfilter import Condition, Rule
from kvik.conf.nwfilter_fields import ETHER_TYPES
from kvik.errors import ConfigUnsupported
from kvik.network.filters.match import (
    BPDU_MAC,
    Expression,
    Never,
    family_of,
    is_transport,
    match,
    of_condition,
    payload,
)
from kvik.network.filters.table import STAGES, Command, add, dispatch
from kvik.network.filters.tree import Placed
from kvik.network.filters.variables import ALLOWED, KEPT, LEARNED, set_name

__all__ = ["Features", "Ruleset", "address_set", "compile_rules"]

ALLOWED_MAX = 4096  # addresses that names on an allow-list resolved to
FLOWS_MAX = 65536  # remembered for one interface and family
_SECONDS = {"tcp": 3600, "": 180, "icmp": 30, "icmpv6": 30}  # that an answer may take; the next packet starts anew
_TCP, _OTHERS = 6, [17, 132, 136]  # UDP, SCTP, UDP-Lite; all four begin with two 16-bit ports
_OPENS = {"&": [payload("tcp", "flags"), {"|": ["syn", "ack"]}]}  # == syn: a packet that begins a connection
# A rule with one of these is about the direction it names alone: there is no answer that looks like it.
_ONE_WAY = {"type", "state", "connlimit-above", "flags"}
# What enters a chain, by the prefix of its name (section "Filtering chains").
_GATES: list[tuple[str, list[Expression]]] = [
    ("mac", []),
    ("stp", [match(payload("ether", "daddr"), BPDU_MAC)]),
    *((name, [match(payload("ether", "type"), ETHER_TYPES[name])]) for name in ("vlan", "ipv4", "ipv6", "rarp", "arp")),
]
# Never a machine's own address: "this network", loopback, multicast, reserved (RFC 6890).
_NO_SOURCE = [
    {"prefix": {"addr": "0.0.0.0", "len": 8}},
    {"prefix": {"addr": "127.0.0.0", "len": 8}},
    {"prefix": {"addr": "224.0.0.0", "len": 3}},
]


@dataclass(frozen=True, slots=True)
class Features:
    """What this kernel has in the bridge family."""

    connection_tracking: bool = False
    reject: bool = False
    ingress: bool = False  # the netdev family's hook


@dataclass(slots=True)
class Ruleset:
    """One interface's part: chains, sets, and the commands that fill it once those exist.

    `notes` say where less is done than the document asks, and why.
    """

    device: str
    chains: list[str] = field(default_factory=list)
    sets: dict[str, Command] = field(default_factory=dict)  # name -> what makes it
    commands: list[Command] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    guarded: bool = False  # bridge protocol data units are dropped before the bridge


def address_set(device: str) -> str:
    """The name of the set with an interface's learned IPv4 addresses."""
    return set_name(LEARNED, device)


def _update(name: str, key: Expression, seconds: int) -> Expression:
    return {"set": {"op": "update", "elem": {"elem": {"val": key, "timeout": seconds}}, "set": f"@{name}"}}


def _without_names(rule: Rule) -> Rule | None:
    """The rule less its conditions on what names resolve to; None if it has none of those."""
    names = {*ALLOWED.values(), *KEPT.values()}
    if not any(text in names for one in rule.conditions for text in one.values.values()):
        return None
    rest = [
        Condition(
            protocol=one.protocol,
            match=one.match,
            values={key: text for key, text in one.values.items() if text not in names},
        )
        for one in rule.conditions
    ]
    return Rule(
        action=rule.action,
        direction=rule.direction,
        priority=rule.priority,
        statematch=rule.statematch,
        conditions=rest,
    )


def compile_rules(device: str, mac: str, rules: Sequence[Placed], features: Features, *, learn: str = "") -> Ruleset:
    """`learn`: "" for no learning of addresses, "any" from the first packet that shows one, "dhcp" by the caller.

    Raises ConfigUnsupported for what nftables, or this kernel, cannot do and nothing weaker replaces.
    """
    return _Compiler(device, mac, features, learn).compile(rules)


class _Compiler:
    def __init__(self, device: str, mac: str, features: Features, learn: str) -> None:
        self.made = Ruleset(device)
        self.device = device
        self.mac = mac
        self.features = features
        self.learn = learn
        self.rules: list[Command] = []
        self.live: set[tuple[str, str]] = set()  # chain and conditions of what goes on there when its name has lapsed

    def compile(self, rules: Sequence[Placed]) -> Ruleset:
        layer_2 = [placed for placed in rules if not is_transport(placed.rule.protocol)]
        layer_3 = sorted(
            (placed.rule for placed in rules if is_transport(placed.rule.protocol)), key=lambda rule: rule.priority
        )
        if self.learn:
            self._set(address_set(self.device), "ipv4_addr", 1 if self.learn == "any" else 64)
        named = {text for placed in rules for one in placed.rule.conditions for text in one.values.values()}
        for family, value in ALLOWED.items():
            if value in named:
                self._allow_set(set_name(value, self.device), f"ipv{family}_addr")
        for family, value in KEPT.items():
            if value in named:
                self._set(set_name(value, self.device), f"ipv{family}_addr", ALLOWED_MAX)
        roots = {}
        for direction in ("out", "in"):
            roots[f"{direction}_l2"] = self._layer_2(direction, layer_2)
            roots[f"{direction}_l3"] = self._layer_3(direction, layer_3)
        self._guard([placed.rule for placed in layer_2])
        # Maps last: a packet goes to chains that are complete.
        enter = [dispatch(stage, self.device, roots[stage]) for stage in STAGES]
        self.made.commands = [*self.rules, *enter]
        return self.made

    def _guard(self, rules: Sequence[Rule]) -> None:
        """A machine whose frames are restricted may take part in the spanning tree only if a rule about it says so."""
        out = [rule for rule in rules if rule.direction != "in"]
        restricted = any(rule.action in ("drop", "reject") for rule in out)
        if not restricted or any(rule.protocol == "stp" and rule.action == "accept" for rule in out):
            return
        self.made.guarded = self.features.ingress
        if not self.features.ingress:
            self._note("spanning tree frames are not held back on a bridge with STP: this kernel has no netdev ingress")

    # layer 2

    def _layer_2(self, direction: str, placed: Sequence[Placed]) -> str:
        root = self._chain(f"{self.device}/{direction}")
        if direction == "out" and self.learn == "any":
            self._learn(root)
        groups: dict[str, tuple[int, list[Rule]]] = {}
        for one in placed:
            if one.rule.direction in (direction, "inout"):
                groups.setdefault(one.chain, (one.chain_priority, []))[1].append(one.rule)
        _, own = groups.pop("root", (0, []))
        # Rules of the root chain and entries to other chains, interleaved by priority; an entry before a rule.
        steps: list[tuple[int, int, str | Rule]] = [(rule.priority, 1, rule) for rule in own]
        steps += [(priority, 0, name) for name, (priority, _) in sorted(groups.items())]
        for number, (_, _, step) in enumerate(sorted(steps, key=lambda step: step[:2])):
            if isinstance(step, Rule):
                self._rule_2(root, step, direction)
                continue
            chain = self._chain(f"{root}/{number}-{re.sub('[^A-Za-z0-9_-]', '_', step)}")
            gate = next(expressions for prefix, expressions in _GATES if step.startswith(prefix))
            self._rule(root, [*gate, {"jump": {"target": chain}}])
            for rule in sorted(groups[step][1], key=lambda rule: rule.priority):
                self._rule_2(chain, rule, direction)
        return root

    def _rule_2(self, chain: str, rule: Rule, direction: str) -> None:
        if rule.action == "continue":
            return
        matches = self._matches(rule, swap=rule.direction == "inout" and direction == "out")
        if matches is not None:
            self._rule(chain, [*matches, {"drop" if rule.action == "reject" else rule.action: None}])

    def _learn(self, chain: str) -> None:
        """The first address that the machine shows becomes its own: the set holds one, and a full set takes no more."""
        for protocol, sender in (("arp", payload("arp", "saddr ip")), ("ipv4", payload("ip", "saddr"))):
            checks = [
                match(payload("ether", "type"), ETHER_TYPES[protocol]),
                match(payload("ether", "saddr"), self.mac),
                *([match(payload("arp", "saddr ether"), self.mac)] if protocol == "arp" else []),
                *(match(sender, none, False) for none in _NO_SOURCE),
            ]
            self._rule(chain, [*checks, {"set": {"op": "add", "elem": sender, "set": f"@{address_set(self.device)}"}}])

    # rules about IP

    def _layer_3(self, direction: str, rules: Sequence[Rule]) -> str:
        chain = self._chain(f"{self.device}/{direction}_ip")
        for rule in rules:
            if rule.action == "continue":
                continue
            forward = rule.direction in (direction, "inout")
            stateful = rule.statematch and rule.direction != "inout" and rule.action in ("accept", "return")
            if any(condition.values.keys() & _ONE_WAY for condition in rule.conditions):
                if not forward:
                    continue
                stateful = stateful and not any("state" in condition.values for condition in rule.conditions)
            # Written from the sender's side, or the machine's for both directions.
            swap = not forward if rule.direction != "inout" else direction == "in"
            matches = self._matches(rule, swap=swap)
            if matches is None or (not forward and self._only_hardware(rule)):
                continue
            if stateful and (live := _without_names(rule)) is not None:
                self._named(chain, rule, live, matches, forward=forward)
            elif stateful:
                self._stateful(chain, rule, matches, forward=forward)
            else:
                self._rule(chain, [*matches, self._verdict(rule, direction)])
        return chain

    @staticmethod
    def _only_hardware(rule: Rule) -> bool:
        """Turned round, nothing would be left of it: it is about who sends."""
        return (
            rule.protocol in ("all", "all-ipv6")
            and bool(rule.conditions)
            and rule.action != "accept"
            and all(
                set(condition.values) <= {"srcmacaddr", "comment"} and condition.values for condition in rule.conditions
            )
        )

    def _verdict(self, rule: Rule, direction: str) -> Expression:
        if rule.action != "reject":
            return {rule.action: None}
        # Documentation of nft(8): in the bridge family, reject is for prerouting and input only.
        if direction == "out" and self.features.reject:
            return {"reject": {"type": "icmpx", "expr": "port-unreachable"}}
        if direction == "out":
            self._note("rejected packets are dropped without an answer: this kernel has no nft_reject_bridge")
        return {"drop": None}

    def _named(self, chain: str, rule: Rule, live: Rule, matches: list[Expression], *, forward: bool) -> None:
        """Of a name's addresses: they may lapse before a connection ends, which goes on, in both directions."""
        if forward:
            self._stateful(chain, rule, matches, forward=True)
        if (chain, key := repr(live.conditions)) in self.live:
            return  # for another of the rule's sets
        self.live.add((chain, key))
        gate = self._matches(live, swap=not forward)
        if gate is not None and forward:
            self._go_on(chain, rule, gate)
        elif gate is not None:
            self._stateful(chain, rule, gate, forward=False)

    def _stateful(self, chain: str, rule: Rule, matches: list[Expression], *, forward: bool) -> None:
        """The packets themselves with their answer noted; or the answers, if noted."""
        for only, ports, seconds in self._kinds(rule):
            key, noted = self._flow(family_of(rule.protocol), ports, forward), self._flow_set(rule, ports)
            note = _update(noted, key, seconds) if forward else match(key, f"@{noted}")
            self._rule(chain, [*matches, *only, note, {rule.action: None}])

    def _go_on(self, chain: str, rule: Rule, gate: list[Expression]) -> None:
        """The machine's packets of what is noted; those that would begin a TCP connection are none of them."""
        for only, ports, seconds in self._kinds(rule):
            if not ports:
                continue  # an echo request is as good as the next one: nothing that goes on
            key, noted = self._flow(family_of(rule.protocol), ports, True), self._flow_set(rule, ports)
            old = [match(_OPENS, "syn", False)] if seconds == _SECONDS["tcp"] else []
            known = match(key, f"@{noted}")
            self._rule(chain, [*gate, *only, *old, known, _update(noted, key, seconds), {rule.action: None}])

    @staticmethod
    def _kinds(rule: Rule) -> list[tuple[list[Expression], bool, int]]:
        """(what tells these packets from others that the rule matches, whether they have ports, seconds)"""
        name = rule.protocol.removesuffix("-ipv6")
        if name != "all":
            ports = name in ("tcp", "udp", "sctp", "udplite")
            return [([], ports, _SECONDS.get(name, _SECONDS[""]))]
        l4proto = {"meta": {"key": "l4proto"}}
        return [
            ([match(l4proto, _TCP)], True, _SECONDS["tcp"]),
            ([match(l4proto, {"set": _OTHERS})], True, _SECONDS[""]),
            ([match(l4proto, {"set": [_TCP, *_OTHERS]}, False)], False, _SECONDS[""]),
        ]

    @staticmethod
    def _flow(family: int, ports: bool, turned: bool) -> Expression:
        """Source, destination, protocol and ports; `turned`: as in the answer to this packet."""
        ip = "ip" if family == 4 else "ip6"
        ends = ("d", "s") if turned else ("s", "d")
        parts = [payload(ip, f"{end}addr") for end in ends]
        parts.append({"meta": {"key": "l4proto"}})
        if ports:
            parts += [payload("th", f"{end}port") for end in ends]
        return {"concat": parts}

    def _flow_set(self, rule: Rule, ports: bool) -> str:
        family = family_of(rule.protocol)
        name = f"{self.device}/{'flows' if ports else 'peers'}{family}"
        if name not in self.made.sets:
            address = f"ipv{family}_addr"
            kinds = [address, address, "inet_proto", *(["inet_service"] * 2 if ports else [])]
            self._set(name, kinds, FLOWS_MAX)
        return name

    # both

    def _matches(self, rule: Rule, *, swap: bool) -> list[Expression] | None:
        found: list[Expression] = []
        try:
            for condition in rule.conditions:
                found += of_condition(condition, swap=swap, device=self.device)
        except Never:
            return None
        needs_ct = any("ct" in one.get("match", {}).get("left", {}) or "ct count" in one for one in found)
        if needs_ct and not self.features.connection_tracking:
            raise ConfigUnsupported(
                f"<{rule.protocol}> matches the state of connections, and this kernel has no nf_conntrack_bridge",
                remedy="leave out 'state' and 'connlimit-above': answers to what is accepted are accepted without them",
            )
        return found

    def _chain(self, name: str) -> str:
        self.made.chains.append(name)
        return name

    def _set(self, name: str, kind: str | list[str], size: int) -> None:
        # "dynamic" would say what the set is for, but libnftables 1.0.6 does not know the word in JSON; it is implied.
        self.made.sets[name] = add("set", name=name, type=kind, flags=["timeout"], size=size)

    def _allow_set(self, name: str, kind: str) -> None:
        """dnsmasq fills it through nft's own language, which must be able to name it."""
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name):
            raise ConfigUnsupported(f"the interface name {self.device!r} cannot have an allow-list by name")
        self.made.sets[name] = add("set", name=name, type=kind, size=ALLOWED_MAX)

    def _rule(self, chain: str, expressions: list[Any]) -> None:
        self.rules.append(add("rule", chain=chain, expr=expressions))

    def _note(self, text: str) -> None:
        if text not in self.made.notes:
            self.made.notes.append(text)
