"""Which of nftables' expressions the kernel has: found by having it check one rule of each, which changes nothing.

    missing = nft_probe.missing("masquerade", "dynset")   # {"masquerade": "this kernel's nftables has no ...", ...}

Whoever needs an expression asks first and can say by name what is lacking, instead of failing on a rule.
"""

from __future__ import annotations

import errno
from typing import Any

from kvik.errors import HostError
from kvik.host import nftables
from kvik.host.nftables import Command

Expression = list[dict[str, Any]]
_NAME = "kvik-probe"


def _payload(protocol: str, field: str, right: object) -> dict[str, Any]:
    return {"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": field}}, "right": right}}


def _meta(key: str, right: object) -> dict[str, Any]:
    return {"match": {"op": "==", "left": {"meta": {"key": key}}, "right": right}}


def _ct(right: object) -> dict[str, Any]:
    return {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": right}}


_FILTER = {"type": "filter", "hook": "forward", "prio": 0}
_SOURCE_NAT = {"type": "nat", "hook": "postrouting", "prio": 100}
_DESTINATION_NAT = {"type": "nat", "hook": "prerouting", "prio": -100}
_BRIDGE_PREROUTING = {"type": "filter", "hook": "prerouting", "prio": 0}
_INGRESS = {"type": "filter", "hook": "ingress", "dev": "lo", "prio": 0}
_REJECT = {"reject": {"type": "icmpx", "expr": "port-unreachable"}}
_ADDRESSES = {"type": "ipv4_addr"}
_FIB = {"match": {"op": "==", "left": {"fib": {"result": "type", "flags": ["daddr"]}}, "right": "local"}}
_ADD_SOURCE = {
    "set": {
        "op": "update",
        "set": "@dynset-set",
        "elem": {"elem": {"val": {"payload": {"protocol": "ip", "field": "saddr"}}, "timeout": 60}},
    }
}

# Each: the family, the chain that it stands in, the set that it needs, the rule; and the kernel's option.
_PROBES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, Expression, str]] = {
    "inet": ("inet", _FILTER, None, [{"accept": None}], "CONFIG_NF_TABLES_INET"),
    "bridge": ("bridge", _FILTER, None, [{"accept": None}], "CONFIG_NF_TABLES_BRIDGE"),
    "ct": ("inet", _FILTER, None, [_ct(["established", "related"])], "CONFIG_NFT_CT"),
    "masquerade": ("inet", _SOURCE_NAT, None, [{"masquerade": None}], "CONFIG_NFT_MASQ"),
    "snat": ("ip", _SOURCE_NAT, None, [{"snat": {"addr": "192.0.2.1"}}], "CONFIG_NFT_NAT"),
    "dnat": ("ip", _DESTINATION_NAT, None, [{"dnat": {"addr": "192.0.2.1"}}], "CONFIG_NFT_NAT"),
    "redirect": (
        "inet", _DESTINATION_NAT, None,
        [_payload("tcp", "dport", 80), {"redirect": {"port": 8080}}], "CONFIG_NFT_REDIR",
    ),
    "reject": ("inet", _FILTER, None, [_REJECT], "CONFIG_NFT_REJECT_INET"),
    "log": ("inet", _FILTER, None, [{"log": {"prefix": "kvik"}}], "CONFIG_NFT_LOG"),
    "limit": ("inet", _FILTER, None, [{"limit": {"rate": 10, "per": "second"}}], "CONFIG_NFT_LIMIT"),
    "quota": ("inet", _FILTER, None, [{"quota": {"val": 1, "val_unit": "mbytes"}}], "CONFIG_NFT_QUOTA"),
    "fib": ("inet", _FILTER | {"hook": "prerouting"}, None, [_FIB], "CONFIG_NFT_FIB_INET"),
    "set": ("ip", _FILTER, _ADDRESSES, [_payload("ip", "saddr", "@set-set")], "CONFIG_NF_TABLES"),
    "interval": (
        "ip", _FILTER, _ADDRESSES | {"flags": ["interval"]},
        [_payload("ip", "saddr", "@interval-set")], "CONFIG_NF_TABLES",
    ),
    "dynset": ("ip", _FILTER, _ADDRESSES | {"flags": ["timeout"]}, [_ADD_SOURCE], "CONFIG_NF_TABLES"),
    "queue": ("inet", _FILTER, None, [{"queue": {"num": 1}}], "CONFIG_NFT_QUEUE"),
    "bridge-port": ("bridge", _FILTER, None, [_meta("iifname", "vnet0"), {"drop": None}], "CONFIG_NF_TABLES_BRIDGE"),
    "bridge-name": ("bridge", _FILTER, None, [_meta("ibrname", "virbr0")], "CONFIG_NFT_BRIDGE_META"),
    "bridge-ether": ("bridge", _FILTER, None, [_payload("ether", "saddr", "52:54:00:00:00:01")], "CONFIG_NF_TABLES"),
    "bridge-ip": ("bridge", _FILTER, None, [_payload("ip", "saddr", "192.0.2.1")], "CONFIG_NF_TABLES"),
    "bridge-ip6": ("bridge", _FILTER, None, [_payload("ip6", "saddr", "2001:db8::1")], "CONFIG_NF_TABLES"),
    "bridge-arp": ("bridge", _FILTER, None, [_payload("arp", "saddr ip", "192.0.2.1")], "CONFIG_NF_TABLES"),
    "bridge-vlan": ("bridge", _FILTER, None, [_payload("vlan", "id", 10)], "CONFIG_NF_TABLES"),
    "bridge-ct": ("bridge", _FILTER, None, [_ct(["established"])], "CONFIG_NF_CONNTRACK_BRIDGE"),
    "bridge-log": ("bridge", _FILTER, None, [{"log": None}], "CONFIG_NFT_LOG"),
    "bridge-limit": ("bridge", _FILTER, None, [{"limit": {"rate": 10, "per": "second"}}], "CONFIG_NFT_LIMIT"),
    "bridge-reject": ("bridge", _BRIDGE_PREROUTING, None, [_REJECT], "CONFIG_NFT_BRIDGE_REJECT"),
    "ingress": ("netdev", _INGRESS, None, [{"drop": None}], "CONFIG_NETFILTER_INGRESS"),
}  # fmt: skip
NAMES = tuple(_PROBES)


def commands(name: str) -> list[Command]:
    """What is checked for one expression."""
    family, chain, wanted, expression, _ = _PROBES[name]
    place = {"family": family, "table": _NAME}
    found: list[Command] = [
        {"add": {"table": {"family": family, "name": _NAME}}},
        {"add": {"chain": place | chain | {"name": name}}},
    ]
    if wanted is not None:
        found.append({"add": {"set": place | wanted | {"name": f"{name}-set"}}})
    found.append({"add": {"rule": place | {"chain": name, "expr": expression}}})
    return found


_known: dict[str, str] = {}  # a kernel does not change while it runs


def _check(names: list[str]) -> HostError | None:
    try:
        nftables.check([command for name in names for command in commands(name)])
    except HostError as error:
        if error.errno in (0, errno.EPERM, errno.EACCES, errno.ENOMEM, errno.ENOBUFS):
            raise  # no root, no library, no memory: that says nothing about the kernel
        return error
    return None


def missing(*names: str) -> dict[str, str]:
    """Of these expressions (none given: of all), those that cannot be used here, with the reason. Takes some 15 ms, and
    that again for each where one is missing; the answer is kept. `HostError` if nftables cannot be used at all."""
    wanted = names or NAMES
    unknown = [name for name in wanted if name not in _known]
    if unknown and _check(unknown) is None:
        _known.update(dict.fromkeys(unknown, ""))
        unknown = []
    for name in unknown:
        error = _check([name])
        why = f"this kernel's nftables has no {name.replace('-', ' ')} ({_PROBES[name][4]})"
        _known[name] = f"{why}: {error.message.rpartition('}: ')[2]}" if error else ""
    return {name: _known[name] for name in wanted if _known[name]}
