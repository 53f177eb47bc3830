"""<portForward> in passt's words."""

from __future__ import annotations

from kvik.conf.devices.interface import PortForward
from kvik.errors import ConfigUnsupported

__all__ = ["passt_ports"]


def passt_ports(forward: PortForward) -> str:
    """`127.0.0.1%eth0/2000-2100:3000-3100,~2050`, as in passt(1), --tcp-ports; without ranges: all ports."""
    words = []
    for ports in forward.ranges:
        word = f"{'~' if ports.exclude else ''}{ports.start}"
        if ports.end is not None:
            word += f"-{ports.end}"
        if ports.to is not None:
            if ports.exclude:
                raise ConfigUnsupported("an excluded port range leads nowhere", path="/domain/devices/interface")
            word += f":{ports.to}"
            if ports.end is not None:
                word += f"-{ports.to + ports.end - ports.start}"
        words.append(word)
    where = (forward.address or "") + (f"%{forward.dev}" if forward.dev else "")
    text = ",".join(words) or "all"
    return f"{where}/{text}" if where else text
