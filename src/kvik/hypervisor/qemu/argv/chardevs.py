"""<serial>, <parallel>, <console>, <channel>, <smartcard>, <redirdev>: a host side and what the guest sees of it.

Listening Unix sockets are made by us and passed open, so that a restarted daemon connects to them again and QEMU
creates nothing in the file system. The first serial line or console also logs into a passed pipe, by which the
machine's first output is noticed.
"""

from __future__ import annotations

from kvik.conf.devices.chardev import Channel, ChardevSource, Console, Parallel, Serial
from kvik.conf.devices.hostdev import Redirdev, Smartcard
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.names import HostSide, alias_of, chardev_name, log_name
from kvik.hypervisor.qemu.argv.options import Chardev, Context, Parts, Props

__all__ = [
    "backend",
    "channel_parts",
    "chardev_id",
    "console_parts",
    "parallel_parts",
    "redirdev_parts",
    "serial_parts",
    "smartcard_parts",
]


def chardev_id(alias: str) -> str:
    return f"char{alias}"


def backend(context: Context, device: HostSide, alias: str) -> Chardev:
    """Raises `ConfigUnsupported` for host sides QEMU has not."""
    made = _backend(context, device, alias)
    log = getattr(device, "log", None)
    logfile = log.file if log is not None else None
    passed = context.files.path(log_name(alias), logfile or "")
    if passed:
        # QEMU sets the flags of a passed descriptor anew: a file that began empty (append='off') is still appended to.
        made.options |= {"logfile": passed, "logappend": True}
        made.data |= {"logfile": passed, "logappend": True}
    return made


def _backend(context: Context, device: HostSide, alias: str) -> Chardev:
    name = chardev_id(alias)
    source = device.sources[0] if device.sources else ChardevSource()
    kind = device.type
    if kind in ("pty", "null", "vc", "stdio"):
        return Chardev(name, kind)
    if kind == "unix":
        return _unix(context, name, alias, source)
    if kind == "tcp":
        return _tcp(device, name, source)
    if kind == "udp":
        return _udp(device, name)
    if kind == "file":
        path = context.files.path(chardev_name(alias), source.path or "")
        append = None if source.append is None else source.append
        return Chardev(name, "file", {"path": path, "append": append}, {"out": path, "append": append})
    if kind in ("pipe", "dev"):
        backend_name = "serial" if kind == "dev" else "pipe"
        return Chardev(name, backend_name, {"path": source.path}, {"device": source.path})
    if kind == "spicevmc":
        channel = "usbredir" if isinstance(device, Redirdev) else "vdagent"
        channel = "smartcard" if isinstance(device, Smartcard) else channel
        return Chardev(name, "spicevmc", {"name": channel}, {"type": channel})
    if kind == "spiceport":
        return Chardev(name, "spiceport", {"name": source.channel}, {"fqdn": source.channel})
    if kind == "qemu-vdagent":
        clipboard = source.clipboard.copypaste if source.clipboard else None
        mouse = None if source.mouse is None else source.mouse.mode == "client"
        options = {"clipboard": clipboard, "mouse": mouse}
        return Chardev(name, "qemu-vdagent", {"name": "vdagent", **options}, options)
    if kind == "dbus":
        return Chardev(name, "dbus", {"name": source.channel}, {"name": source.channel})
    raise ConfigUnsupported(f"QEMU has no character device of type {kind!r} ({alias})")


def _reconnect(source: ChardevSource) -> int | None:
    if source.reconnect is None or not source.reconnect.enabled:
        return None
    return source.reconnect.timeout or 1


def _unix(context: Context, name: str, alias: str, source: ChardevSource) -> Chardev:
    if source.mode == "connect":
        reconnect = _reconnect(source)
        return Chardev(
            name,
            "socket",
            {"path": source.path, "reconnect": reconnect},
            {"addr": {"type": "unix", "data": {"path": source.path}}, "server": False, "reconnect": reconnect},
        )
    fd = context.files.fd(chardev_name(alias))
    if fd is not None:
        return Chardev(
            name,
            "socket",
            {"fd": fd, "server": True, "wait": False},
            {"addr": {"type": "fd", "data": {"str": fd}}, "server": True, "wait": False},
        )
    return Chardev(
        name,
        "socket",
        {"path": source.path, "server": True, "wait": False},
        {"addr": {"type": "unix", "data": {"path": source.path}}, "server": True, "wait": False},
    )


def _tcp(device: HostSide, name: str, source: ChardevSource) -> Chardev:
    server = source.mode == "bind"
    if source.tls:
        raise ConfigUnsupported("TLS on a character device is not supported yet")
    telnet = device.protocol is not None and device.protocol.type == "telnet"
    reconnect = _reconnect(source)
    return Chardev(
        name,
        "socket",
        {
            "host": source.host or ("127.0.0.1" if server else None),
            "port": source.service,
            "telnet": True if telnet else None,
            "server": True if server else None,
            "wait": False if server else None,
            "reconnect": reconnect,
        },
        {
            "addr": {"type": "inet", "data": {"host": source.host or "127.0.0.1", "port": source.service}},
            "server": server,
            "wait": False if server else None,
            "telnet": telnet,
            "reconnect": reconnect,
        },
    )


def _udp(device: HostSide, name: str) -> Chardev:
    local = next((item for item in device.sources if item.mode == "bind"), None)
    remote = next((item for item in device.sources if item.mode != "bind"), None)
    if remote is None or not remote.service:
        raise ConfigUnsupported("a udp character device needs a source to connect to")
    options: Props = {"host": remote.host or "127.0.0.1", "port": remote.service}
    data: Props = {"remote": {"type": "inet", "data": dict(options)}}
    if local is not None:
        options |= {"localaddr": local.host, "localport": local.service}
        data["local"] = {"type": "inet", "data": {"host": local.host or "", "port": local.service or "0"}}
    return Chardev(name, "udp", options, data)


# -- guest sides


def serial_parts(context: Context, device: Serial) -> Parts:
    alias = alias_of(device)
    chardev = backend(context, device, alias)
    if context.is_microvm:  # its serial line is part of the machine
        return Parts(chardevs=[chardev], arguments=["-serial", f"chardev:{chardev.id}"])
    target = device.target
    kind = (target.type if target else None) or "isa-serial"
    model = target.model.name if target and target.model else kind
    props: Props = {"driver": context.require(model), "chardev": chardev.id, "id": alias}
    if model == "isa-serial":
        props["index"] = (target.port if target else None) or 0
    props |= context.address(device)
    return Parts(chardevs=[chardev], devices=[props])


def parallel_parts(context: Context, device: Parallel) -> Parts:
    alias = alias_of(device)
    chardev = backend(context, device, alias)
    props: Props = {"driver": "isa-parallel", "chardev": chardev.id, "id": alias, **context.address(device)}
    return Parts(chardevs=[chardev], devices=[props])


def console_parts(context: Context, device: Console) -> Parts:
    kind = device.target.type if device.target else None
    if kind in (None, "serial"):
        return Parts()  # another name for the first serial line
    if kind != "virtio":
        raise ConfigUnsupported(f"QEMU has no console of type {kind!r}")
    alias = alias_of(device)
    chardev = backend(context, device, alias)
    return Parts(
        chardevs=[chardev],
        devices=[{"driver": "virtconsole", **context.address(device), "chardev": chardev.id, "id": alias}],
    )


def channel_parts(context: Context, device: Channel) -> Parts:
    alias = alias_of(device)
    target = device.target
    chardev = backend(context, device, alias)
    kind = target.type if target else "virtio"
    if kind == "guestfwd":
        assert target is not None
        forward = f"tcp:{target.address}:{target.port}-chardev:{chardev.id}"
        netdev = {"type": "user", "id": f"user-{alias}", "guestfwd": [{"str": forward}]}
        return Parts(chardevs=[chardev], netdevs=[netdev])
    if kind != "virtio":
        raise ConfigUnsupported(f"QEMU has no channel of type {kind!r}")
    props: Props = {
        "driver": "virtserialport",
        **context.address(device),
        "chardev": chardev.id,
        "id": alias,
        "name": (target.name if target else None) or ("com.redhat.spice.0" if device.type == "spicevmc" else None),
    }
    return Parts(chardevs=[chardev], devices=[props])


def redirdev_parts(context: Context, device: Redirdev) -> Parts:
    alias = alias_of(device)
    chardev = backend(context, device, alias)
    props: Props = {
        "driver": context.require("usb-redir"),
        "chardev": chardev.id,
        "id": alias,
        "bootindex": context.boot(device),
        **context.address(device),
    }
    return Parts(chardevs=[chardev], devices=[props])


def smartcard_parts(context: Context, device: Smartcard) -> Parts:
    alias = alias_of(device)
    if device.mode == "host":
        props: Props = {"driver": "ccid-card-emulated", "backend": "nss-emulated", "id": alias}
        return Parts(devices=[props | context.address(device)])
    if device.mode == "passthrough":
        chardev = backend(context, device, alias)
        props = {"driver": "ccid-card-passthru", "chardev": chardev.id, "id": alias}
        return Parts(chardevs=[chardev], devices=[props | context.address(device)])
    if len(device.certificates) != 3:
        raise ConfigUnsupported("a smartcard of mode host-certificates needs three certificates")
    props = {"driver": "ccid-card-emulated", "backend": "certificates", "id": alias, "db": device.database}
    props |= {f"cert{number}": name for number, name in enumerate(device.certificates, 1)}
    return Parts(devices=[props | context.address(device)])
