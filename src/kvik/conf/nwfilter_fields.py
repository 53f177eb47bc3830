"""What a rule of a network filter can match: each protocol, its attributes in the order they are written, their types.

https://libvirt.org/formatnwfilter.html#supported-protocols. Every value may be a variable instead ("$IP", "$PORTS[2]",
"$PORTS[@1]"), which is checked again once it has a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

__all__ = [
    "ARP_OPCODES",
    "ETHER_TYPES",
    "IP_PROTOCOLS",
    "PROTOCOLS",
    "TCP_FLAGS",
    "VARIABLE",
    "check_value",
    "number",
    "prefix_length",
]

VARIABLE = re.compile(r"\$\s*([A-Za-z0-9_]{1,64})\s*(?:\[\s*(@?)\s*([0-9]{1,5})\s*\])?\s*")

ETHER_TYPES = {"ipv4": 0x0800, "arp": 0x0806, "rarp": 0x8035, "vlan": 0x8100, "ipv6": 0x86DD}
IP_PROTOCOLS = {
    "icmp": 1, "igmp": 2, "tcp": 6, "udp": 17, "esp": 50, "ah": 51, "icmpv6": 58, "sctp": 132, "udplite": 136,
}  # fmt: skip
ARP_OPCODES = {
    "Request": 1, "Reply": 2, "Request_Reverse": 3, "Reply_Reverse": 4, "DRARP_Request": 5, "DRARP_Reply": 6,
    "DRARP_Error": 7, "InARP_Request": 8, "ARP_NAK": 9,
}  # fmt: skip
TCP_FLAGS = {"FIN": 0x01, "SYN": 0x02, "RST": 0x04, "PSH": 0x08, "ACK": 0x10, "URG": 0x20}
_STATES = ("NEW", "ESTABLISHED", "RELATED", "INVALID")

_MAC = re.compile(r"(?:[0-9a-f]{1,2}:){5}[0-9a-f]{1,2}")
_IPSET = re.compile(r"[A-Za-z0-9_.:\-+ ]{1,31}")


def number(text: str) -> int:
    """Decimal, or hexadecimal with 0x. ValueError."""
    if not re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10}", text):
        raise ValueError(f"{text!r} is not a number")
    return int(text, 16) if text[:2] in ("0x", "0X") else int(text)


def prefix_length(text: str, family: int) -> int:
    """Of a mask, written as a length or as an address. ValueError if it has holes."""
    bits = 32 if family == 4 else 128
    if text.isascii() and text.isdecimal():
        length = int(text[:4])
        if length > bits:
            raise ValueError(f"a prefix has at most {bits} bits, not {text}")
        return length
    mask = int(IPv4Address(text) if family == 4 else IPv6Address(text))
    length = mask.bit_count()
    if mask != ((1 << length) - 1) << (bits - length):
        raise ValueError(f"the mask {text} has holes")
    return length


def _unsigned(low: int, high: int, words: dict[str, int] | None = None) -> Callable[[str], str]:
    known = {word.lower(): word for word in words or {}}

    def check(text: str) -> str:
        word = known.get(text.lower())
        if word is not None:
            return word
        try:
            value = number(text)
        except ValueError:
            hint = f" nor one of {', '.join(known.values())}" if known else ""
            raise ValueError(f"{text!r} is not a number{hint}") from None
        if not low <= value <= high:
            raise ValueError(f"{text} is not in {low} to {high}")
        return text.lower()

    return check


def _mac(text: str) -> str:
    text = text.lower()
    if not _MAC.fullmatch(text):
        raise ValueError(f"{text!r} is not a MAC address")
    return ":".join(part.zfill(2) for part in text.split(":"))


def _ipv4(text: str) -> str:
    return str(IPv4Address(text))


def _ipv6(text: str) -> str:
    if "%" in text:
        raise ValueError(f"{text!r} names a zone")
    return str(IPv6Address(text))


def _mask(family: int) -> Callable[[str], str]:
    def check(text: str) -> str:
        return str(prefix_length(text, family))

    return check


def _boolean(text: str) -> str:
    if text.lower() in ("yes", "true", "1"):
        return "true"
    if text.lower() in ("no", "false", "0"):
        return "false"
    raise ValueError(f"{text!r} is neither 'true' nor 'false'")


def _words(known: tuple[str, ...], alone: tuple[str, ...]) -> Callable[[str], str]:
    def check(text: str) -> str:
        words = text.upper().split(",")
        if len(words) > 8 or (any(word not in known for word in words) and (len(words) > 1 or words[0] not in alone)):
            raise ValueError(f"{text[:40]!r} is not a list of {', '.join(known)}")
        return ",".join(words)

    return check


_flag_list = _words(tuple(TCP_FLAGS), ("ALL", "NONE"))


def _tcp_flags(text: str) -> str:
    mask, slash, flags = text.partition("/")
    if not slash:
        raise ValueError(f"{text[:40]!r} is not of the form MASK/FLAGS")
    return f"{_flag_list(mask)}/{_flag_list(flags)}"


def _comment(text: str) -> str:
    if len(text) > 256:
        raise ValueError("a comment has at most 256 characters")
    return text


def _ipset(text: str) -> str:
    if not _IPSET.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is not the name of an ipset")
    return text


Check = Callable[[str], str]
U8, U16, U32 = _unsigned(0, 0xFF), _unsigned(0, 0xFFFF), _unsigned(0, 0xFFFFFFFF)
_ETHER = _unsigned(0x600, 0xFFFF, ETHER_TYPES)
_PROTOCOL = _unsigned(0, 0xFF, IP_PROTOCOLS)
_DSCP = _unsigned(0, 63)

_SOURCE_MAC: dict[str, Check] = {"srcmacaddr": _mac, "srcmacmask": _mac}
_MACS = _SOURCE_MAC | {"dstmacaddr": _mac, "dstmacmask": _mac}
_COMMENT: dict[str, Check] = {"comment": _comment}
_PORTS: dict[str, Check] = dict.fromkeys(("srcportstart", "srcportend", "dstportstart", "dstportend"), U16)
_ARP = (
    _MACS
    | {"hwtype": U16, "protocoltype": U16, "opcode": _unsigned(0, 0xFFFF, ARP_OPCODES)}
    | {"arpsrcmacaddr": _mac, "arpdstmacaddr": _mac}
    | {"arpsrcipaddr": _ipv4, "arpsrcipmask": _mask(4), "arpdstipaddr": _ipv4, "arpdstipmask": _mask(4)}
    | {"gratuitous": _boolean}
    | _COMMENT
)


def _addresses(family: int) -> dict[str, Check]:
    address = _ipv4 if family == 4 else _ipv6
    return {"srcipaddr": address, "srcipmask": _mask(family), "dstipaddr": address, "dstipmask": _mask(family)}


def _transport(family: int, ports: bool = False, more: dict[str, Check] | None = None) -> dict[str, Check]:
    address = _ipv4 if family == 4 else _ipv6
    return (
        {"srcmacaddr": _mac}
        | _addresses(family)
        | dict.fromkeys(("srcipfrom", "srcipto", "dstipfrom", "dstipto"), address)
        | {"dscp": _DSCP, "connlimit-above": U16}
        | (_PORTS if ports else {})
        | (more or {})
        | {"state": _words(_STATES, ("NONE",)), "ipset": _ipset, "ipsetflags": _words(("SRC", "DST"), ())}
        | _COMMENT
    )


def _stp() -> dict[str, Check]:
    fields: dict[str, Check] = _SOURCE_MAC | {"type": U8, "flags": U8}
    fields |= {"root-priority": U16, "root-priority-hi": U16, "root-address": _mac, "root-address-mask": _mac}
    fields |= {"root-cost": U32, "root-cost-hi": U32, "sender-priority": U16, "sender-priority-hi": U16}
    fields |= {"sender-address": _mac, "sender-address-mask": _mac}
    for name in ("port", "age", "max-age", "hello-time", "forward-delay"):
        fields |= {name: U16, f"{name}-hi": U16}
    return fields | _COMMENT


_FLAGS: dict[str, Check] = {"flags": _tcp_flags}
_ICMP: dict[str, Check] = {"type": U8, "code": U8}
_ICMP_RANGES: dict[str, Check] = {"type": U8, "typeend": U8, "code": U8, "codeend": U8}

PROTOCOLS: dict[str, dict[str, Check]] = {
    "mac": _MACS | {"protocolid": _ETHER} | _COMMENT,
    "vlan": _MACS | {"vlanid": _unsigned(0, 4095), "encap-protocol": _ETHER} | _COMMENT,
    "stp": _stp(),
    "arp": _ARP,
    "rarp": _ARP,
    "ip": _MACS | _addresses(4) | {"protocol": _PROTOCOL} | _PORTS | {"dscp": _DSCP} | _COMMENT,
    "ipv6": _MACS | _addresses(6) | {"protocol": _PROTOCOL} | _PORTS | _ICMP_RANGES | _COMMENT,
}
for _family, _suffix in ((4, ""), (6, "-ipv6")):
    PROTOCOLS |= {
        f"tcp{_suffix}": _transport(_family, ports=True, more=_FLAGS),
        f"udp{_suffix}": _transport(_family, ports=True),
        f"sctp{_suffix}": _transport(_family, ports=True),
        "icmp" if _family == 4 else "icmpv6": _transport(_family, more=_ICMP),
        f"udplite{_suffix}": _transport(_family),
        f"esp{_suffix}": _transport(_family),
        f"ah{_suffix}": _transport(_family),
        f"all{_suffix}": _transport(_family),
    }
PROTOCOLS["igmp"] = _transport(4)


def check_value(protocol: str, attribute: str, text: str) -> str:
    """`text` as it is kept: checked, in one spelling. A variable is left as it is. ValueError; KeyError if unknown."""
    check = PROTOCOLS[protocol][attribute]
    text = text.strip()
    if text.startswith("$") and attribute != "comment":
        if not VARIABLE.fullmatch(text):
            raise ValueError(f"{text[:40]!r} is not a variable")
        return text
    return check(text)
