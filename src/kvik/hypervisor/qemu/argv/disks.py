"""<disk>: a chain of block nodes and the drive in front of it.

The format of every layer is stated, never probed; an image's own backing reference is never followed by QEMU: either
the chain names the next layer or it ends with `backing: null`.
"""

from __future__ import annotations

from kvik.conf.devices.disk import Disk, DiskDriver, Host
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.layers import Layer, layers
from kvik.hypervisor.names import alias_of, image_name, overlay_name
from kvik.hypervisor.qemu.argv.options import Chardev, Context, Files, Parts, Props, node_name, on_off, virtio_options
from kvik.hypervisor.secrets import (
    Need,
    auth_of,
    auth_secret,
    cookie_secret,
    cookies_of,
    encryption_of,
    luks_secret,
    needs,
    tls_credentials,
)

__all__ = ["block_nodes", "disk_parts", "top_node"]

FORMATS = frozenset(
    {"raw", "qcow2", "qcow", "vmdk", "vdi", "vpc", "vhdx", "qed", "luks", "bochs", "cloop", "dmg", "parallels"}
)
# cache mode -> (direct, no-flush, the guest's view of a write cache)
CACHE: dict[str, tuple[bool, bool, bool]] = {
    "none": (True, False, True),
    "writethrough": (False, False, False),
    "writeback": (False, False, True),
    "directsync": (True, False, False),
    "unsafe": (False, True, True),
}
# SCSI adapters whose targets have one unit each: what libvirt numbers as units are targets there.
_ONE_UNIT = frozenset({"lsilogic", "am53c974", "dc390", "vmpvscsi", "lsisas1068"})
QUEUE_MAPPING = 9_000_000  # QEMU's version
_PORTS = {"nbd": "10809", "iscsi": "3260", "rbd": "6789", "ssh": "22", "gluster": "24007"}


def top_node(disk: Disk) -> str:
    """What the drive reads and writes."""
    kind = "cor" if disk.driver is not None and disk.driver.copy_on_read else "format"
    if disk.transient is not None:
        kind = "over"
    return node_name(alias_of(disk), disk.source.index or 0 if disk.source is not None else 0, kind)


def block_nodes(files: Files, disk: Disk) -> list[Props]:
    """blockdev-add arguments, lowest layer first."""
    alias = alias_of(disk)
    chain = list(layers(disk))
    nodes: list[Props] = []
    below: str | None = None
    for layer in reversed(chain):
        encrypted = encryption_of(disk, layer) is not None
        if layer.format not in FORMATS:
            raise ConfigUnsupported(f"disk {disk.target.dev}: QEMU knows no image format {layer.format!r}")
        storage = node_name(alias, layer.key, "storage")
        cache = _cache(disk)
        discard = _discard(disk)
        node = {
            **_storage(files, disk, layer),
            "node-name": storage,
            # Some protocols can only tell by trying whether they may write; a passed descriptor knows. What lies below
            # is opened for reading, and for writing when a commit brings a descriptor that can be written.
            "auto-read-only": True if layer.type == "network" or layer.number else None,
            "read-only": layer.read_only if not layer.number else None,
            "cache": cache,
            "discard": discard,
        }
        nodes.append(node)
        node = {
            "node-name": node_name(alias, layer.key, "format"),
            "read-only": layer.read_only,
            "cache": cache,
            "discard": discard,
            "detect-zeroes": _detect_zeroes(disk) if layer.number == 0 else None,
            "driver": "luks" if encrypted and layer.format == "raw" else layer.format,
            "file": storage,
        }
        if encrypted and layer.format == "raw":
            node["key-secret"] = luks_secret(disk, layer)
        elif encrypted:
            node["encrypt"] = {"format": "luks", "key-secret": luks_secret(disk, layer)}
        if layer.source.slices is not None and layer.format == "raw" and layer.source.slices.slices:
            piece = layer.source.slices.slices[0]
            node |= {"offset": piece.offset, "size": piece.size}
        if layer.format == "qcow2" and disk.driver is not None and layer.number == 0:
            node["discard-no-unref"] = disk.driver.discard_no_unref
            if disk.driver.metadata_cache is not None:
                node["cache-size"] = disk.driver.metadata_cache.max_size
        if layer.format in ("qcow2", "qcow", "qed", "vmdk"):
            node["backing"] = below
            node["__backing__"] = True  # null is meaningful here: it ends the chain
        nodes.append(node)
        below = node_name(alias, layer.key, "format")
    if disk.driver is not None and disk.driver.copy_on_read and chain:
        nodes.append({"driver": "copy-on-read", "node-name": top_node(disk), "file": below, "discard": _discard(disk)})
    if disk.transient is not None and chain:
        nodes += _overlay(files, disk, chain[0], below)
    return [_clean(node) for node in nodes]


def _overlay(files: Files, disk: Disk, top: Layer, below: str | None) -> list[Props]:
    """What a transient disk is written to: it refers to nothing by itself, for it is read by nobody else."""
    alias = alias_of(disk)
    storage = node_name(alias, top.key, "overfile")
    name = overlay_name(alias)
    image = files.path(name, f"{top.source.location}.TRANSIENT")
    common = {"cache": _cache(disk), "discard": _discard(disk)}
    aio = (disk.driver.io if disk.driver else None) or files.host_io(name)
    return [
        {"driver": "file", "filename": image, "aio": aio, "node-name": storage, **common},
        {
            "driver": "qcow2",
            "node-name": top_node(disk),
            **common,
            "detect-zeroes": _detect_zeroes(disk),
            "file": storage,
            "backing": below,
        },
    ]


def _clean(node: Props) -> Props:
    keep_backing = node.pop("__backing__", False)
    return {key: value for key, value in node.items() if value is not None or (key == "backing" and keep_backing)}


def secret_objects(files: Files, disk: Disk) -> list[Props]:
    """What the nodes' `key-secret`, `password-secret` and `tls-creds` name. A value comes as a descriptor, never in
    words."""
    return [_object(need, files.own_path(need.file)) for need in needs(disk)]


def _object(need: Need, path: str) -> Props:
    if need.certificates:
        return {"qom-type": "tls-creds-x509", "id": need.id, "dir": path, "endpoint": "client", "verify-peer": True}
    return {"qom-type": "secret", "id": need.id, "format": "raw", "file": path}


def _cache(disk: Disk) -> Props | None:
    mode = disk.driver.cache if disk.driver else None
    if mode is None or mode == "default":
        return None
    direct, no_flush, _ = CACHE[mode]
    return {"direct": direct, "no-flush": no_flush}


def _write_cache(disk: Disk) -> str | None:
    mode = disk.driver.cache if disk.driver else None
    return on_off(CACHE[mode][2]) if mode and mode != "default" else None


def _discard(disk: Disk) -> str | None:
    # A guest that trims gives space back: that is what people expect of a sparse image, and costs nothing.
    if disk.driver is not None and disk.driver.discard is not None:
        return disk.driver.discard
    return "unmap"


def _detect_zeroes(disk: Disk) -> str | None:
    return disk.driver.detect_zeroes if disk.driver else None


# -- where the bytes are


def _storage(files: Files, disk: Disk, layer: Layer) -> Props:
    source = layer.source
    if layer.type in ("file", "block"):
        path = source.location
        if not path:
            raise ConfigUnsupported(f"disk {disk.target.dev}: layer {layer.number} names no file")
        driver = "host_device" if layer.type == "block" else "file"
        if layer.type == "block" and disk.device == "cdrom" and path.startswith("/dev/sr"):
            driver = "host_cdrom"
        name = image_name(alias_of(disk), layer.number)
        return {
            "driver": driver,
            "filename": files.path(name, path),
            "aio": (disk.driver.io if disk.driver else None) or files.host_io(name),
        }
    if layer.type == "dir":
        return {"driver": "vvfat", "dir": source.dir, "floppy": disk.device == "floppy", "rw": not layer.read_only}
    if layer.type == "nvme":
        if source.address is None:
            raise ConfigUnsupported(f"disk {disk.target.dev}: an nvme source needs an address")
        return {"driver": "nvme", "device": source.address.pci_text, "namespace": source.namespace}
    if layer.type == "network":
        return _network(disk, layer)
    raise ConfigUnsupported(f"disk {disk.target.dev}: source type {layer.type} is not supported here")


def _host(host: Host, protocol: str) -> tuple[str, str]:
    if not host.name:
        raise ConfigUnsupported(f"a {protocol} source needs a host name")
    return host.name, host.port or _PORTS.get(protocol, "")


def _network(disk: Disk, layer: Layer) -> Props:
    source = layer.source
    protocol = source.protocol or ""
    name = source.name or ""
    hosts = source.hosts
    auth = auth_of(disk, source, layer.number)
    user = auth.username if auth is not None else None
    secret = auth_secret(disk, layer) if auth is not None else None
    if auth is not None and protocol not in ("http", "https", "ftp", "ftps", "iscsi", "rbd"):
        raise ConfigUnsupported(f"disk {disk.target.dev}: {protocol} has no <auth>")
    if protocol not in ("rbd",) and not hosts:
        raise ConfigUnsupported(f"disk {disk.target.dev}: a {protocol} source needs a host")
    if protocol == "nbd":
        return {
            "driver": "nbd",
            "server": _socket_address(hosts[0], protocol),
            "export": name or None,
            "reconnect-delay": source.reconnect.delay if source.reconnect is not None else None,
            "tls-creds": tls_credentials(disk, layer) if source.tls else None,
            "tls-hostname": source.tls_hostname if source.tls else None,
        }
    if protocol in ("http", "https", "ftp", "ftps"):
        host, port = _host(hosts[0], protocol)
        url = f"{protocol}://{host}{':' + port if port else ''}/{name.lstrip('/')}"
        props: Props = {"driver": protocol, "url": url + (f"?{source.query}" if source.query else "")}
        if protocol in ("https", "ftps") and source.ssl is not None:
            props["sslverify"] = source.ssl.verify
        props["readahead"] = source.readahead.size if source.readahead else None
        props["timeout"] = source.timeout.seconds if source.timeout else None
        props |= {"username": user, "password-secret": secret}
        props["cookie-secret"] = cookie_secret(disk, layer) if cookies_of(source) else None
        return props
    if protocol == "iscsi":
        host, port = _host(hosts[0], protocol)
        target, _, lun = name.partition("/")
        return {
            "driver": "iscsi",
            "portal": f"{host}:{port}",
            "target": target,
            "lun": int(lun) if lun.isdecimal() else 0,
            "transport": "tcp",
            "initiator-name": source.initiator.iqn.name if source.initiator and source.initiator.iqn else None,
            "user": user,
            "password-secret": secret,
        }
    if protocol == "rbd":
        pool, _, image = name.partition("/")
        servers = [dict(zip(("host", "port"), _host(host, protocol), strict=True)) for host in hosts]
        return {
            "driver": "rbd",
            "pool": pool,
            "image": image,
            "server": servers or None,
            "conf": source.config.file if source.config else None,
            "snapshot": source.snapshot.name if source.snapshot else None,
            "user": user,
            "key-secret": secret,
        }
    if protocol == "ssh":
        host, port = _host(hosts[0], protocol)
        who = source.identity.username if source.identity is not None else None
        return {"driver": "ssh", "path": name, "server": {"host": host, "port": port}, "user": who}
    if protocol == "gluster":
        volume, _, path = name.partition("/")
        return {
            "driver": "gluster",
            "volume": volume,
            "path": path,
            "server": [_socket_address(host, protocol) for host in hosts],
        }
    if protocol == "nfs":
        identity = source.identity
        return {
            "driver": "nfs",
            "server": {"type": "inet", "host": _host(hosts[0], protocol)[0]},
            "path": name,
            "user": _number(disk, identity.user if identity is not None else None),
            "group": _number(disk, identity.group if identity is not None else None),
        }
    raise ConfigUnsupported(f"disk {disk.target.dev}: network protocol {protocol!r} is not supported")


def _number(disk: Disk, text: str | None) -> int | None:
    """A user or group of an NFS server: a number, as in libvirt with or without its `+`."""
    if text is None:
        return None
    digits = text.removeprefix("+")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 10:
        raise ConfigUnsupported(
            f"disk {disk.target.dev}: {text!r} is no user or group of an NFS server", remedy="write its number"
        )
    return int(digits)


def _socket_address(host: Host, protocol: str) -> Props:
    if host.transport == "unix":
        return {"type": "unix", "path": host.socket}
    if host.transport not in (None, "tcp"):
        raise ConfigUnsupported(f"{protocol} over {host.transport} is not supported")
    name, port = _host(host, protocol)
    return {"type": "inet", "host": name, "port": port}


# -- the drive


def disk_parts(context: Context, disk: Disk) -> Parts:
    if disk.type == "vhostuser":
        return _vhost_user(context, disk)
    nodes = block_nodes(context.files, disk)
    boot = context.boot(disk)
    arguments = []
    if disk.target.bus == "fdc" and boot is not None:  # the boot order of a floppy is its controller's
        drive = "AB"[min((disk.address.unit if disk.address else 0) or 0, 1)]
        arguments = ["-global", f"isa-fdc.bootindex{drive}={boot}"]
    return Parts(
        objects=secret_objects(context.files, disk),
        blockdevs=nodes,
        arguments=arguments,
        devices=[_drive(context, disk, bool(nodes))],
    )


def _vhost_user(context: Context, disk: Disk) -> Parts:
    alias = alias_of(disk)
    path = disk.source.path if disk.source else None
    if not path:
        raise ConfigUnsupported(f"disk {disk.target.dev}: a vhostuser source needs a path")
    again = disk.source.reconnect if disk.source is not None else None
    seconds = (again.timeout or 1) if again is not None and again.enabled else None
    chardev = Chardev(
        f"chr-vu-{alias}",
        "socket",
        {"path": path, "reconnect": seconds},
        {"addr": {"type": "unix", "data": {"path": path}}, "server": False, "reconnect": seconds},
    )
    device = {
        "driver": context.require("vhost-user-blk-pci"),
        "chardev": chardev.id,
        "id": alias,
        "bootindex": context.boot(disk),
        "num-queues": disk.driver.queues if disk.driver else None,
        **context.address(disk),
    }
    return Parts(chardevs=[chardev], devices=[device])


def _drive(context: Context, disk: Disk, medium: bool) -> Props:
    driver = disk.driver
    common: Props = {
        "drive": top_node(disk) if medium else None,
        "id": alias_of(disk),
        "bootindex": context.boot(disk),
        "serial": disk.serial or None,
        "write-cache": _write_cache(disk) if disk.device == "disk" else None,
        "share-rw": True if disk.shareable else None,
        "logical_block_size": disk.blockio.logical_block_size if disk.blockio else None,
        "physical_block_size": disk.blockio.physical_block_size if disk.blockio else None,
        "discard_granularity": disk.blockio.discard_granularity if disk.blockio else None,
    }
    if driver is not None:
        common["werror"] = "enospc" if driver.error_policy == "enospace" else driver.error_policy
        common["rerror"] = driver.rerror_policy or ("ignore" if driver.error_policy == "ignore" else None)
    if disk.geometry is not None:
        common["bios-chs-trans"] = disk.geometry.trans
        common |= {"cyls": disk.geometry.cyls, "heads": disk.geometry.heads, "secs": disk.geometry.secs}
    bus = disk.target.bus
    if bus == "virtio":
        return {**_virtio(context, disk), **common}
    if bus == "scsi":
        return {**_scsi(context, disk), **common}
    if bus in ("ide", "sata"):
        return {**_ata(context, disk, bus), **common}
    if bus == "nvme":
        return {**_nvme(context, disk), **common, "serial": None}  # the controller has it
    if bus == "usb":
        removable = disk.target.removable
        return {"driver": "usb-storage", **context.address(disk), "removable": removable, **common}
    if bus == "fdc":
        unit = disk.address.unit if disk.address else None
        return {"driver": "floppy", "unit": unit or 0, "drive": common["drive"], "id": common["id"]}
    raise ConfigUnsupported(f"disk {disk.target.dev}: QEMU has no disk bus {bus!r}")


def _virtio(context: Context, disk: Disk) -> Props:
    driver = disk.driver
    props: Props = {"driver": context.virtio_name("blk", disk.model), **context.address(disk), **virtio_options(driver)}
    if driver is not None:
        props |= {
            "ioeventfd": driver.ioeventfd,
            "event_idx": driver.event_idx,
            "iothread": f"iothread{driver.iothread}" if driver.iothread else None,
            "iothread-vq-mapping": _mapping(context, driver),
            "num-queues": driver.queues,
            "queue-size": driver.queue_size,
        }
    return props


def _mapping(context: Context, driver: DiskDriver) -> list[Props] | None:
    """Which I/O thread serves which queue: QEMU 9.0 and later. Raises `ConfigUnsupported`."""
    if driver.iothreads is None:
        return None
    if context.capabilities.version < QUEUE_MAPPING:
        raise ConfigUnsupported(
            f"{context.capabilities.binary} cannot give a disk several I/O threads: QEMU 9.0 can",
            path="/domain/devices/disk/driver/iothreads",
            remedy="one of them: <driver iothread='...'>",
        )
    return [
        {"iothread": f"iothread{item.id}", **({"vqs": [queue.id for queue in item.queues]} if item.queues else {})}
        for item in driver.iothreads.iothreads
    ]


def _scsi(context: Context, disk: Disk) -> Props:
    address = disk.address
    controller = (address.controller if address else 0) or 0
    kind = {"cdrom": "scsi-cd", "lun": "scsi-block"}.get(disk.device, "scsi-hd")
    target, unit = (address.target if address else 0) or 0, (address.unit if address else 0) or 0
    models = {item.index or 0: item.model for item in context.domain.devices.controllers if item.type == "scsi"}
    if models.get(controller) in _ONE_UNIT:
        target, unit = target or unit, 0
    props: Props = {
        "driver": kind,
        "bus": f"{context.controller('scsi', controller)}.0",
        "channel": (address.bus if address else 0) or 0,
        "scsi-id": target,
        "lun": unit,
    }
    if kind != "scsi-block":
        props |= {
            "device_id": disk.serial or alias_of(disk)[:20],
            "wwn": int(disk.wwn, 16) if disk.wwn else None,
            "vendor": disk.vendor or None,
            "product": disk.product or None,
        }
    if kind == "scsi-hd":
        props |= {"rotation_rate": disk.target.rotation_rate, "removable": disk.target.removable}
        props["dpofua"] = disk.target.dpofua
    return props


def _nvme(context: Context, disk: Disk) -> Props:
    """A namespace: its number is the second one in nvme0n1."""
    address = disk.address
    controller = context.controller("nvme", (address.controller if address else 0) or 0)
    return {
        "driver": context.require("nvme-ns"),
        "bus": controller,
        "nsid": ((address.unit if address else 0) or 0) + 1,
    }


def _ata(context: Context, disk: Disk, bus: str) -> Props:
    address = disk.address
    controller = context.controller(bus, (address.controller if address else 0) or 0)
    unit = (address.unit if address else 0) or 0
    props: Props = {"driver": "ide-cd" if disk.device == "cdrom" else "ide-hd"}
    if bus == "sata":  # each port of an AHCI controller is a bus of its own
        props["bus"] = f"{controller}.{unit}"
    else:
        props |= {"bus": f"{controller}.{(address.bus if address else 0) or 0}", "unit": unit}
    props["wwn"] = int(disk.wwn, 16) if disk.wwn else None
    if disk.device == "disk":
        props["rotation_rate"] = disk.target.rotation_rate
    return props
