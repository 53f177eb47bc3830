"""What a rule matches, as nftables expressions (libnftables-json(5)).

A rule is written from one end's view. `swap` turns it round: source for destination, which is how the packets of the
other direction look.
"""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

from kvik.conf.nwfilter import Condition
from kvik.conf.nwfilter_fields import ARP_OPCODES, ETHER_TYPES, IP_PROTOCOLS, TCP_FLAGS, number
from kvik.errors import ConfigUnsupported
from kvik.network.filters.variables import set_name

__all__ = ["BPDU_MAC", "Expression", "Never", "family_of", "is_transport", "match", "of_condition", "payload"]

Expression = dict[str, Any]

BPDU_MAC = "01:80:c2:00:00:00"  # IEEE 802.1D-2004, table 7-10: the bridge group address

# Where BPDU fields begin, in bytes from the frame's start: Ethernet with length 14, LLC 3, then IEEE 802.1D-2004, 9.3.1
_BPDU = {
    "type": (20, 1), "flags": (21, 1), "root-priority": (22, 2), "root-address": (24, 6), "root-cost": (30, 4),
    "sender-priority": (34, 2), "sender-address": (36, 6), "port": (42, 2), "age": (44, 2), "max-age": (46, 2),
    "hello-time": (48, 2), "forward-delay": (50, 2),
}  # fmt: skip
# RFC 826, for Ethernet and IPv4; nftables knows the names for ARP only, RARP has the same layout (RFC 903)
_ARP = {
    "hwtype": ("htype", 0, 2), "protocoltype": ("ptype", 2, 2), "opcode": ("operation", 6, 2),
    "arpsrcmacaddr": ("saddr ether", 8, 6), "arpsrcipaddr": ("saddr ip", 14, 4),
    "arpdstmacaddr": ("daddr ether", 18, 6), "arpdstipaddr": ("daddr ip", 24, 4),
}  # fmt: skip


class Never(Exception):
    """The condition cannot match any packet: the rule says nothing."""


def payload(protocol: str, field: str) -> Expression:
    return {"payload": {"protocol": protocol, "field": field}}


def _raw(base: str, offset: int, length: int) -> Expression:
    """Bytes of the packet by their place."""
    return {"payload": {"base": base, "offset": offset * 8, "len": length * 8}}


def match(left: Any, right: Any, equal: bool = True) -> Expression:
    return {"match": {"op": "==" if equal else "!=", "left": left, "right": right}}


def is_transport(protocol: str) -> bool:
    """Filtered after the layer 2 rules and by them: iptables' part in libvirt."""
    return bool(protocol) and protocol not in ("mac", "vlan", "stp", "arp", "rarp", "ip", "ipv6")


def family_of(protocol: str) -> int:
    return 6 if protocol.endswith("v6") else 4


def of_condition(condition: Condition, *, swap: bool, device: str = "") -> list[Expression]:
    """`device` is the interface whose sets are looked up. Raises Never, ConfigUnsupported."""
    return _Matcher(condition, swap, device).all()


class _Matcher:
    def __init__(self, condition: Condition, swap: bool, device: str) -> None:
        self.values = condition.values
        self.protocol = condition.protocol
        self.equal = condition.match
        self.swap = swap
        self.device = device
        self.found: list[Expression] = []

    def all(self) -> list[Expression]:
        if is_transport(self.protocol):
            self._transport()
        else:
            getattr(self, f"_{self.protocol}")()
        return self.found

    # protocols

    def _mac(self) -> None:
        self._hardware("ether")
        self._ether_type(payload("ether", "type"), "protocolid")

    def _vlan(self) -> None:
        self.found.append(match(payload("ether", "type"), ETHER_TYPES["vlan"]))
        self._hardware("ether")
        self._number(payload("vlan", "id"), "vlanid")
        self._ether_type(payload("vlan", "type"), "encap-protocol")

    def _stp(self) -> None:
        self.found.append(match(payload("ether", "daddr"), BPDU_MAC))
        self._masked_mac(payload("ether", "daddr" if self.swap else "saddr"), "srcmacaddr", "srcmacmask")
        for name, (offset, length) in _BPDU.items():
            field = _raw("ll", offset, length)
            if name.endswith("-address"):
                self._masked_mac(field, name, f"{name}-mask", raw=True)
            else:
                self._number(field, name, f"{name}-hi")

    def _arp(self) -> None:
        self.found.append(match(payload("ether", "type"), ETHER_TYPES[self.protocol]))
        self._hardware("ether")
        raw = self.protocol == "rarp"
        for name, (field, offset, length) in _ARP.items():
            if self.swap and name.startswith("arp"):
                name = name.replace("src", "dst") if "src" in name else name.replace("dst", "src")
            text = self.values.get(name)
            if text is None:
                continue
            left = _raw("nh", offset, length) if raw else payload("arp", field)
            if "macaddr" in name:
                self._add(left, "0x" + text.replace(":", "") if raw else text)
            elif "ipaddr" in name:
                self._address(left, name, 4, raw=raw)
            else:
                self._add(left, ARP_OPCODES.get(text) or number(text))
        if "gratuitous" in self.values:
            raise ConfigUnsupported(
                f"<{self.protocol} gratuitous='...'>: nftables cannot compare two addresses of one packet",
                remedy="match arpsrcipaddr and arpdstipaddr with $IP",
            )

    _rarp = _arp

    def _ip(self) -> None:
        family = family_of(self.protocol)
        self.found.append(match(payload("ether", "type"), ETHER_TYPES[f"ipv{family}"]))
        self._hardware("ether")
        self._addresses(family)
        if text := self.values.get("protocol"):
            self._add({"meta": {"key": "l4proto"}}, IP_PROTOCOLS.get(text) or number(text))
        self._ports()
        self._number(payload("ip" if family == 4 else "ip6", "dscp"), "dscp")
        self._number(payload("icmpv6", "type"), "type", "typeend")
        self._number(payload("icmpv6", "code"), "code", "codeend")

    _ipv6 = _ip

    def _transport(self) -> None:
        family = family_of(self.protocol)
        name = self.protocol.removesuffix("-ipv6")
        self.found.append(match(payload("ether", "type"), ETHER_TYPES[f"ipv{family}"]))
        if name != "all":
            self.found.append(match({"meta": {"key": "l4proto"}}, IP_PROTOCOLS[name]))
        if not self.swap:  # it is about who sends; iptables, too, matches nothing else
            self._masked_mac(payload("ether", "saddr"), "srcmacaddr", "srcmacmask")
        self._addresses(family)
        self._number(payload("ip" if family == 4 else "ip6", "dscp"), "dscp")
        self._ports()
        if name in ("icmp", "icmpv6"):
            self._number(payload(name, "type"), "type")
            self._number(payload(name, "code"), "code")
        self._tcp_flags()
        self._states()
        if "ipset" in self.values:
            raise ConfigUnsupported(
                "ipset cannot be matched: nftables has sets of its own", remedy="list the addresses in a variable"
            )

    # fields

    def _add(self, left: Expression, right: Any) -> None:
        self.found.append(match(left, right, self.equal))

    def _hardware(self, protocol: str) -> None:
        source, destination = ("daddr", "saddr") if self.swap else ("saddr", "daddr")
        self._masked_mac(payload(protocol, source), "srcmacaddr", "srcmacmask")
        self._masked_mac(payload(protocol, destination), "dstmacaddr", "dstmacmask")

    def _masked_mac(self, left: Expression, name: str, mask_name: str, raw: bool = False) -> None:
        text = self.values.get(name)
        if text is None:
            return
        address, mask = _mac_number(text), _mac_number(self.values.get(mask_name, "ff:ff:ff:ff:ff:ff"))
        write = (lambda value: f"0x{value:012x}") if raw else _mac_text
        if mask == 0:
            if not self.equal:
                raise Never
        elif mask == (1 << 48) - 1:
            self._add(left, write(address))
        else:
            self._add({"&": [left, write(mask)]}, write(address & mask))

    def _ether_type(self, left: Expression, name: str) -> None:
        if text := self.values.get(name):
            self._add(left, ETHER_TYPES.get(text) or number(text))

    def _number(self, left: Expression, name: str, end: str = "") -> None:
        text = self.values.get(name)
        if text is None:
            return
        low = number(text)
        high = number(self.values.get(end, text))
        if high < low:
            raise ConfigUnsupported(f"<{self.protocol}>: the range {name} {low} to {high} is empty")
        self._add(left, low if low == high else {"range": [low, high]})

    def _ports(self) -> None:
        for name in ("src", "dst"):
            side = ("d" if name == "src" else "s") if self.swap else name[0]
            self._number(payload("th", f"{side}port"), f"{name}portstart", f"{name}portend")

    def _addresses(self, family: int) -> None:
        protocol = "ip" if family == 4 else "ip6"
        for name in ("src", "dst"):
            side = ("d" if name == "src" else "s") if self.swap else name[0]
            left = payload(protocol, f"{side}addr")
            if f"{name}ipaddr" in self.values:
                self._address(left, f"{name}ipaddr", family)
            first, last = self.values.get(f"{name}ipfrom"), self.values.get(f"{name}ipto")
            if first is not None or last is not None:
                low, high = first or last, last or first
                self._add(left, low if low == high else {"range": [low, high]})

    def _address(self, left: Expression, name: str, family: int, raw: bool = False) -> None:
        text = self.values[name]
        if text.startswith("@"):
            if raw:
                raise ConfigUnsupported(f"<{self.protocol} {name}>: an address that is yet to be learned")
            self._add(left, f"@{set_name(text, self.device)}")
            return
        length = int(self.values.get(name.replace("addr", "mask"), 32 if family == 4 else 128))
        network = ip_network((text, length), strict=False)
        if length == 0:
            if not self.equal:
                raise Never
        elif raw:
            mask = int(network.netmask)
            left = left if mask == 0xFFFFFFFF else {"&": [left, mask]}
            self._add(left, int(network.network_address))
        elif length == network.max_prefixlen:
            self._add(left, text)
        else:
            self._add(left, {"prefix": {"addr": str(network.network_address), "len": length}})

    def _tcp_flags(self) -> None:
        if text := self.values.get("flags"):
            mask, flags = (_flag_bits(part) for part in text.split("/"))
            self._add({"&": [payload("tcp", "flags"), mask]}, flags)

    def _states(self) -> None:
        states = self.values.get("state", "NONE")
        if states != "NONE":
            self._add({"ct": {"key": "state"}}, [state.lower() for state in states.split(",")])
        if above := self.values.get("connlimit-above"):
            self.found.append({"ct count": {"val": number(above), "inv": self.equal}})


def _mac_number(text: str) -> int:
    return int(text.replace(":", ""), 16)


def _mac_text(value: int) -> str:
    return value.to_bytes(6).hex(":")


def _flag_bits(text: str) -> int:
    if text == "ALL":
        return sum(TCP_FLAGS.values())
    return 0 if text == "NONE" else sum(TCP_FLAGS[name] for name in set(text.split(",")))
