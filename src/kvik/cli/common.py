"""Options that many verbs share, and numbers as people write them."""

from __future__ import annotations

from kvik.cli import flags
from kvik.cli.options import DATA, FLAG, Option, Options, UsageError

DOMAIN = Option("domain", DATA, "domain name, id or uuid", complete="domain")
ACTIVE = Option("domain", DATA, "domain name, id or uuid", complete="domain-active")
INACTIVE = Option("domain", DATA, "name of the inactive domain", complete="domain-inactive")
NETWORK = Option("network", DATA, "network name or uuid", complete="network")
NETWORK_ACTIVE = Option("network", DATA, "network name or uuid", complete="network-active")
NETWORK_INACTIVE = Option("network", DATA, "network name or uuid", complete="network-inactive")
FILE = Option("file", DATA, "XML file", complete="file")
PERSISTENT = Option("persistent", FLAG, "make live change persistent")
CONFIG = Option("config", FLAG, "affect next boot")
LIVE = Option("live", FLAG, "affect running domain")
CURRENT = Option("current", FLAG, "affect current domain")
PRINT_XML = Option("print-xml", FLAG, "print XML document rather than do it")


def exclusive(options: Options, *pairs: tuple[str, str]) -> None:
    """`UsageError` if both of a pair are given."""
    for left, right in pairs:
        if options.flag(left) and options.flag(right):
            raise UsageError(f"Options --{left} and --{right} are mutually exclusive")


def impact(options: Options, *, active: bool | None = None) -> int:
    """virDomainModificationImpact of --config, --live, --current, and (with `active`) --persistent."""
    exclusive(options, ("current", "live"), ("current", "config"))
    bits = flags.AFFECT_CURRENT
    if options.flag("config"):
        bits |= flags.AFFECT_CONFIG
    if options.flag("live"):
        bits |= flags.AFFECT_LIVE
    if active is not None and options.flag("persistent"):
        exclusive(options, ("current", "persistent"))
        bits |= flags.AFFECT_CONFIG | (flags.AFFECT_LIVE if active else 0)
    return bits


def chosen(options: Options, table: dict[str, int]) -> int:
    """The bits of those flags of `table` that are given."""
    bits = 0
    for name, bit in table.items():
        if options.flag(name):
            bits |= bit
    return bits


SUFFIXES = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}


def scaled(text: str, name: str, default: int) -> int:
    """Bytes of a size as people write it: `512M`, `2GiB`, `1GB` (powers of ten), or a number of `default` bytes."""
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    suffix = text[len(digits) :].lower()
    scale: int | None
    if not suffix:
        scale = default
    elif suffix in ("b", "byte", "bytes"):
        scale = 1
    elif suffix[0] in SUFFIXES and suffix[0] != "b" and suffix[1:] in ("", "ib"):
        scale = SUFFIXES[suffix[0]]
    elif suffix[0] in SUFFIXES and suffix[0] != "b" and suffix[1:] == "b":
        scale = 1000 ** "bkmgtpe".index(suffix[0])
    else:
        raise UsageError(
            f"Scaled numeric value '{text}' for <{name}> option is malformed or out of range",
            remedy=f"unknown suffix '{suffix}'; write a size such as 512M or 2GiB",
        )
    if not digits.isascii() or not digits.isdigit() or int(digits) * scale >= 1 << 64:
        raise UsageError(
            f"Scaled numeric value '{text}' for <{name}> option is malformed or out of range",
            remedy="write a size such as 512M or 2GiB",
        )
    return int(digits) * scale


def pretty_size(size: int) -> str:
    """`1.500 GiB`, as virsh prints sizes for people."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            return f"{value:.3f} {unit}"
        value /= 1024
    raise AssertionError


def choice(value: str, table: dict[str, int], what: str) -> int:
    if value not in table:
        raise UsageError(f"invalid {what} '{value}'", remedy="one of: " + ", ".join(table))
    return table[value]
