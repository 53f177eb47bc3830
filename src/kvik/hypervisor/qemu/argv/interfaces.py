"""<interface>: a netdev on the host and a NIC in the guest. Taps and vhost devices arrive as descriptors."""

from __future__ import annotations

from kvik.conf.devices.interface import Interface
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.names import TAP_TYPES, alias_of, is_passt, passt_name, switch_name, tap_name, vhost_name
from kvik.hypervisor.qemu.argv.options import Chardev, Context, Parts, Props, on_off, virtio_options

__all__ = ["interface_parts", "netdev_id"]

# document's model -> QEMU's device; others pass through by their own name, if this QEMU has them
_MODELS = {"virtio": "virtio-net", "i82551": "i82551", "ne2k_isa": "ne2k_isa", "ne2k_pci": "ne2k_pci"}


def netdev_id(alias: str) -> str:
    return f"host{alias}"


def interface_parts(context: Context, device: Interface) -> Parts:
    alias = alias_of(device)
    if device.type == "hostdev" or device.host_function:
        return _hostdev(context, device)
    chardevs: list[Chardev] = []
    netdev = _netdev(context, device, chardevs)
    nic = _nic(context, device)
    if netdev is not None:
        netdev["id"] = netdev_id(alias)
        nic["netdev"] = netdev_id(alias)
    return Parts(chardevs=chardevs, netdevs=[netdev] if netdev is not None else [], devices=[nic])


def _netdev(context: Context, device: Interface, chardevs: list[Chardev]) -> Props | None:
    alias, source = alias_of(device), device.source
    if device.type == "null":
        return None
    if is_passt(device):
        return _passt(context, device)
    if device.type == "user":
        return _user(device)
    if (switch := context.files.fd(switch_name(alias))) is not None:
        _need_stream(context, "a session's network")
        # QEMU listens: when its switch ends, another one can connect.
        return {"type": "stream", "addr": {"type": "fd", "str": switch}, "server": True}
    if device.type in TAP_TYPES:
        return _tap(context, device)
    if device.type in ("server", "client", "mcast", "udp"):
        return _socket(device)
    if device.type == "vhostuser":
        if source is None or not source.path:
            raise ConfigUnsupported(f"interface {alias}: a vhostuser source needs a path")
        server = source.mode == "server"
        reconnect = source.reconnect.timeout if source.reconnect and source.reconnect.enabled else None
        options: Props = {"path": source.path, "server": True if server else None, "reconnect": reconnect}
        data: Props = {"addr": {"type": "unix", "data": {"path": source.path}}, "server": server}
        chardevs.append(Chardev(f"char{alias}", "socket", options, data))
        queues = device.driver.queues if device.driver else None
        return {"type": "vhost-user", "chardev": f"char{alias}", "queues": queues}
    if device.type == "vdpa":
        path = context.files.path(f"vdpa:{alias}", (source.dev if source else None) or "")
        return {"type": "vhost-vdpa", "vhostdev": path}
    raise ConfigUnsupported(f"interface {alias}: type {device.type!r} is not supported by QEMU")


def _tap(context: Context, device: Interface) -> Props:
    alias = alias_of(device)
    taps = context.files.numbered(tap_name(alias))
    props: Props = {"type": "tap"}
    if len(taps) == 1:
        props["fd"] = taps[0]
    elif taps:
        props["fds"] = ":".join(taps)
    elif device.target is not None and device.target.dev:
        # A tap that exists already (type ethernet), or the command line shown to a person: QEMU opens it by name.
        props |= {"ifname": device.target.dev, "script": "no", "downscript": "no"}
        props["queues"] = device.driver.queues if device.driver else None
    elif context.files.fds:
        raise ConfigUnsupported(f"interface {alias}: nobody provided its tap device")
    else:
        props |= {"script": "no", "downscript": "no"}
    if device.tune is not None and device.tune.sndbuf is not None:
        props["sndbuf"] = device.tune.sndbuf
    vhosts = context.files.numbered(vhost_name(alias))
    if vhosts:
        props["vhost"] = True
        props["vhostfd" if len(vhosts) == 1 else "vhostfds"] = ":".join(vhosts)
    return props


def _need_stream(context: Context, what: str) -> None:
    if context.capabilities.version < 7_002_000:
        raise ConfigUnsupported(f"{what} needs QEMU 7.2", remedy="write <interface type='user'> without <backend>")


def _passt(context: Context, device: Interface) -> Props:
    alias = alias_of(device)
    _need_stream(context, "the passt backend")
    fd = context.files.fd(passt_name(alias))
    if fd is None and (context.files.fds or context.files.hotplug):
        raise ConfigUnsupported(f"interface {alias}: passt cannot be started for a machine that already runs")
    address: Props = {"type": "unix", "path": f"{alias}-passt.sock"} if fd is None else {"type": "fd", "str": fd}
    return {"type": "stream", "addr": address, "server": False}


def _user(device: Interface) -> Props:
    props: Props = {"type": "user"}
    for ip in device.ips:
        if ip.family == "ipv6":
            props |= {"ipv6-prefix": ip.address, "ipv6-prefixlen": ip.prefix}
        else:
            props["net"] = f"{ip.address}/{ip.prefix}" if ip.prefix is not None else ip.address
    forwards = []
    for forward in device.port_forwards:
        excluded = {
            port
            for ports in forward.ranges
            if ports.exclude
            for port in range(ports.start, (ports.end or ports.start) + 1)
        }
        for ports in forward.ranges:
            if ports.exclude:
                continue
            end = ports.end if ports.end is not None else ports.start
            if not 0 <= end - ports.start < 1024 or end > 65535:
                raise ConfigUnsupported(f"port range {ports.start} to {end} is not valid")
            first = ports.to if ports.to is not None else ports.start
            for offset in range(end - ports.start + 1):
                if ports.start + offset in excluded:
                    continue
                host = f"{forward.address or ''}:{ports.start + offset}"
                forwards.append({"str": f"{forward.proto}:{host}-:{first + offset}"})
    if forwards:
        props["hostfwd"] = forwards
    return props


def _socket(device: Interface) -> Props:
    source = device.source
    if source is None or source.port is None:
        raise ConfigUnsupported(f"interface {alias_of(device)}: type {device.type} needs a source with a port")
    where = f"{source.address or ''}:{source.port}"
    if device.type == "udp":
        local = source.local
        near = f"{(local.address if local else None) or ''}:{(local.port if local else None) or 0}"
        return {"type": "socket", "udp": where, "localaddr": near}
    return {"type": "socket", {"server": "listen", "client": "connect", "mcast": "mcast"}[device.type]: where}


def _nic(context: Context, device: Interface) -> Props:
    model = (device.model.type if device.model else None) or "virtio"
    driver = device.driver
    is_virtio = model.startswith("virtio")
    name = context.virtio_name("net", model) if is_virtio else _MODELS.get(model, model)
    boot = context.boot(device)
    props: Props = {
        "driver": context.require(name),
        "id": alias_of(device),
        "mac": device.mac.address if device.mac else None,
        "bootindex": boot,
        "host_mtu": device.mtu.size if device.mtu and is_virtio else None,
        **context.address(device),
    }
    if boot is None and "romfile" not in props:
        props["romfile"] = ""  # an option ROM nobody boots from only costs time
    if not is_virtio:
        return props
    if driver is not None:
        props |= virtio_options(driver)
        props |= {
            "ioeventfd": driver.ioeventfd,
            "event_idx": driver.event_idx,
            "tx": {"iothread": "bh", "timer": "timer"}.get(driver.txmode or ""),
            "rx_queue_size": driver.rx_queue_size,
            "tx_queue_size": driver.tx_queue_size,
            "rss": driver.rss,
            "hash": driver.rss_hash_report,
        }
        if driver.queues is not None and driver.queues > 1:
            props |= {"mq": True, "vectors": 2 * driver.queues + 2}
        if driver.host is not None:
            offload = driver.host
            props |= {f"host_{key}": getattr(offload, key) for key in ("tso4", "tso6", "ecn", "ufo")}
            props |= {"csum": offload.csum, "gso": offload.gso, "mrg_rxbuf": offload.mrg_rxbuf}
        if driver.guest is not None:
            props |= {f"guest_{key}": getattr(driver.guest, key) for key in ("csum", "tso4", "tso6", "ecn", "ufo")}
    if device.teaming is not None:
        props["failover"] = on_off(device.teaming.type == "persistent")
    return props


def _hostdev(context: Context, device: Interface) -> Parts:
    source = device.source
    if source is None or source.host_address is None or source.host_address.type not in (None, "pci"):
        raise ConfigUnsupported(f"interface {alias_of(device)}: a hostdev interface needs a PCI source address")
    props: Props = {
        "driver": context.require("vfio-pci"),
        "host": source.host_address.pci_text,
        "id": alias_of(device),
        "bootindex": context.boot(device),
        **context.address(device),
    }
    if device.teaming is not None and device.teaming.type == "transient":
        props["failover_pair_id"] = device.teaming.persistent
    return Parts(devices=[props])
