"""Network interfaces: back ends for hot-plug, link state, filters.

Reference: QEMU's qapi/net.json.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from kvik.vmm import config as c
from kvik.vmm.monitor.errors import QmpError, device_not_found, refused
from kvik.vmm.monitor.schema import ID, NOTHING, Bool, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_NETDEVS = 64
MAX_QUEUES = 64


def netdevs(context: Context) -> dict[str, c.NetConfig]:
    kept: dict[str, c.NetConfig] = context.server.values.setdefault("netdevs", {})
    return kept


def nics(context: Context) -> Iterator[Any]:
    yield from context.devices("virtio-net")


def named_fd(context: Context, name: str) -> int:
    """Takes over the descriptor that getfd named; a number is one the process inherited. Raises `QmpError`."""
    if name.isdecimal() and len(name) < 8:
        try:
            os.fstat(int(name))
        except OSError as error:
            raise QmpError(f"File descriptor {name} is not open") from error
        return int(name)
    fd = context.server.named_fds.pop(name, None)
    if fd is None:
        raise QmpError(f"File descriptor named '{name[:80]}' has not been found")
    return fd


def _descriptors(context: Context, arguments: Arguments, one: str, many: str) -> tuple[int, ...]:
    value = arguments.get(many, arguments.get(one))
    if value is None:
        return ()
    if not isinstance(value, str) or not value:
        raise QmpError(f"Invalid parameter type for '{many if many in arguments else one}', expected: string")
    names = value.split(":") if many in arguments else [value]
    if len(names) > MAX_QUEUES:
        raise QmpError(f"more than {MAX_QUEUES} queues")
    return tuple(named_fd(context, name) for name in names)


_KNOWN = {
    "tap": {"fd", "fds", "vhost", "vhostfd", "vhostfds", "ifname", "script", "downscript", "queues", "sndbuf",
            "vnet_hdr"},
    "stream": {"addr", "server", "reconnect"},
}  # fmt: skip


def netdev_add(context: Context, arguments: Arguments) -> None:
    kind, name = arguments["type"], arguments["id"]
    if kind not in _KNOWN:
        if kind in ("user", "bridge", "socket", "dgram", "vhost-user", "vde", "l2tpv3", "vhost-vdpa", "hubport"):
            raise refused(f"has no network of type {kind}", "use tap, or stream to passt")
        raise QmpError(f"Parameter 'type' does not accept value '{kind[:80]}'")
    if name in netdevs(context):
        raise QmpError(f"Duplicate ID '{name}' for netdev")
    if len(netdevs(context)) >= MAX_NETDEVS:
        raise QmpError(f"more than {MAX_NETDEVS} network back ends without a device")
    for key in arguments:
        if key not in _KNOWN[kind] and key not in ("type", "id"):
            raise QmpError(f"Parameter '{key[:80]}' is unexpected")
    settings = _tap(context, arguments) if kind == "tap" else _stream(context, arguments)
    netdevs(context)[name] = settings


def _tap(context: Context, arguments: Arguments) -> c.NetConfig:
    ifname = arguments.get("ifname", "")
    if not isinstance(ifname, str) or len(ifname) > 15:
        raise QmpError("Parameter 'ifname' expects a name of at most 15 characters")
    fds = _descriptors(context, arguments, "fd", "fds")
    vhost_fds = _descriptors(context, arguments, "vhostfd", "vhostfds")
    vhost = arguments.get("vhost", False)
    if not fds and not ifname:
        raise QmpError("Parameter 'fd' or 'ifname' is missing")
    return c.NetConfig(
        backend="tap",
        fds=fds,
        vhost_fds=vhost_fds,
        ifname=ifname,
        queues=max(len(fds), 1),
        vhost="on" if vhost is True or vhost == "on" or vhost_fds else "off",
    )


def _stream(context: Context, arguments: Arguments) -> c.NetConfig:
    address = arguments.get("addr")
    if not isinstance(address, dict):
        raise QmpError("Parameter 'addr' is missing")
    if address.get("type") == "unix" and isinstance(address.get("path"), str):
        return c.NetConfig(backend="passt", path=address["path"])
    if address.get("type") == "fd" and isinstance(address.get("str"), str):
        return c.NetConfig(backend="passt", fds=(named_fd(context, address["str"]),))
    raise QmpError("Parameter 'addr.type' must be unix or fd")


def settings_of(context: Context, name: str) -> c.NetConfig:
    """What a device on back end `name` is made of; descriptors are duplicated."""
    known = netdevs(context).get(name)
    if known is None:
        raise QmpError(f"Property 'virtio-net-pci.netdev' can't find value '{name[:80]}'")
    if any(getattr(nic, "netdev", None) == name for nic in nics(context)):
        raise QmpError(f"Property 'virtio-net-pci.netdev' can't take value '{name}', it's in use")
    return c.NetConfig(
        backend=known.backend,
        path=known.path,
        ifname=known.ifname,
        queues=known.queues,
        vhost=known.vhost,
        fds=tuple(os.dup(fd) for fd in known.fds),
        vhost_fds=tuple(os.dup(fd) for fd in known.vhost_fds),
    )


def netdev_del(context: Context, arguments: Arguments) -> None:
    settings = netdevs(context).pop(arguments["id"], None)
    if settings is None:
        raise device_not_found(arguments["id"])
    for fd in settings.fds + settings.vhost_fds:
        os.close(fd)


def _nic(context: Context, name: str) -> Any:
    for nic in nics(context):
        if name in (nic.name, f"/machine/peripheral/{nic.name}", f"host{nic.name}"):
            return nic
    return None


def set_link(context: Context, arguments: Arguments) -> None:
    nic = _nic(context, arguments["name"])
    if nic is None:
        raise device_not_found(arguments["name"])
    nic.set_link(arguments["up"])


def query_rx_filter(context: Context, arguments: Arguments) -> list[dict[str, Any]]:
    wanted = arguments.get("name")
    found = list(nics(context))
    if wanted is not None:
        nic = _nic(context, wanted)
        if nic is None:
            raise QmpError(f"invalid net client name: {wanted}")
        found = [nic]
    return [nic.rx_filter() for nic in found]


COMMANDS: Sequence[Command] = (
    Command(
        "netdev_add", netdev_add, Struct({"type": ID, "id": ID}, others=True), NOTHING, summary="tap, or stream (passt)"
    ),
    Command("netdev_del", netdev_del, Struct({"id": ID}), NOTHING),
    Command("set_link", set_link, Struct({"name": ID, "up": Bool()}), NOTHING, summary="pull the cable, or put it in"),
    Command("query-rx-filter", query_rx_filter, Struct({"*name": ID}), summary="which frames an interface takes"),
)
