"""Character devices: <serial>, <parallel>, <console>, <channel>, and the same host side under <smartcard>,
<redirdev> and <rng>. https://libvirt.org/formatdomain.html#consoles-serial-parallel-channel-devices"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import Element, OnOff, YesNo
from kvik.conf.devices.common import Device, DeviceSeclabel, Reconnect

ChardevType = Literal[
    "null", "vc", "pty", "dev", "file", "pipe", "stdio", "udp", "tcp", "unix", "spicevmc", "spiceport", "nmdm",
    "qemu-vdagent", "dbus",
]  # fmt: skip


class ChardevSource(Element):
    """`path` (dev, file, pipe, pty, unix); `mode`, `host`, `service` (tcp, udp); `channel` (spiceport, dbus)."""

    path: str | None = None
    append: OnOff = None
    mode: Literal["bind", "connect"] | None = None
    host: str | None = None
    service: str | None = None
    tls: YesNo = None
    channel: str | None = None
    clipboard: Clipboard | None = None
    mouse: Mouse | None = None
    reconnect: Reconnect | None = None
    seclabels: Annotated[list[DeviceSeclabel], "seclabel"] = []


class Clipboard(Element):
    copypaste: YesNo = None


class Mouse(Element):
    mode: Literal["client", "server"] | None = None


class Protocol(Element):
    type: Literal["raw", "telnet", "telnets", "tls"]


class Log(Element):
    """Everything that the guest writes is written to `file` as well."""

    file: str
    append: OnOff = None


class ChardevTargetModel(Element):
    name: str


class Chardev(Device):
    """The host side, shared by all. udp has two sources (bind and connect), everything else at most one."""

    type: ChardevType = "pty"
    tty: str | None = None
    sources: Annotated[list[ChardevSource], "source"] = []
    protocol: Protocol | None = None
    log: Log | None = None

    @property
    def source(self) -> ChardevSource | None:
        return self.sources[0] if self.sources else None


class SerialTarget(Element):
    type: str | None = None
    port: int | None = None
    model: ChardevTargetModel | None = None


class Serial(Chardev):
    target: SerialTarget | None = None


class ParallelTarget(Element):
    type: str | None = None
    port: int | None = None


class Parallel(Chardev):
    target: ParallelTarget | None = None


class ConsoleTarget(Element):
    type: Literal["serial", "virtio", "xen", "uml", "lxc", "openvz", "sclp", "sclplm"] | None = None
    port: int | None = None


class Console(Chardev):
    target: ConsoleTarget | None = None


class ChannelTarget(Element):
    type: Literal["virtio", "guestfwd", "xen"] | None = None
    address: str | None = None
    port: int | None = None
    name: str | None = None
    state: Literal["connected", "disconnected"] | None = None


class Channel(Chardev):
    target: ChannelTarget | None = None
