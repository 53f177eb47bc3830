"""The small devices: rng, balloon, watchdog, TPM, panic, vsock, IOMMU, memory modules, shared memory, file systems,
hub, crypto, and devices of the host."""

from __future__ import annotations

from kvik.conf.devices.hostdev import Hostdev
from kvik.conf.devices.memory import Memballoon, Memory, Shmem
from kvik.conf.devices.other import Crypto, Filesystem, Hub, Iommu, Panic, Rng, Tpm, Vsock, Watchdog
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.qemu.argv.chardevs import backend, chardev_id
from kvik.hypervisor.qemu.argv.options import Chardev, Context, Parts, Props, keyval, on_off, virtio_options
from kvik.hypervisor.qemu.argv.processor import parse_set

__all__ = [
    "balloon_parts",
    "crypto_parts",
    "filesystem_parts",
    "hostdev_parts",
    "hub_parts",
    "iommu_parts",
    "memory_parts",
    "panic_parts",
    "rng_parts",
    "shmem_parts",
    "tpm_parts",
    "vsock_parts",
    "watchdog_parts",
]


def rng_parts(context: Context, device: Rng) -> Parts:
    alias = alias_of(device)
    source = device.backend
    chardevs: list[Chardev] = []
    name = f"obj{alias}"
    if source is None or source.model == "random":
        props: Props = {"qom-type": "rng-random", "id": name}
        props["filename"] = context.files.path(f"rng:{alias}", (source.value if source else None) or "/dev/urandom")
    elif source.model == "builtin":
        props = {"qom-type": "rng-builtin", "id": name}
    else:
        chardevs.append(backend(context, source, alias))
        props = {"qom-type": "rng-egd", "id": name, "chardev": chardev_id(alias)}
    driver: Props = {"driver": context.virtio_name("rng", device.model), "rng": name, "id": alias}
    if device.rate is not None:
        driver |= {"max-bytes": device.rate.bytes, "period": device.rate.period or 1000}
    driver |= context.address(device) | virtio_options(device.driver)
    return Parts(objects=[props], chardevs=chardevs, devices=[driver])


def balloon_parts(context: Context, device: Memballoon) -> Parts:
    if device.model == "none":
        return Parts()
    if device.model == "xen":
        raise ConfigUnsupported("QEMU has no balloon of model 'xen'")
    props: Props = {
        "driver": context.virtio_name("balloon", device.model),
        "id": alias_of(device),
        **context.address(device),
        "deflate-on-oom": device.autodeflate,
        "free-page-reporting": device.free_page_reporting,
        **virtio_options(device.driver),
    }
    return Parts(devices=[props])


def watchdog_parts(context: Context, device: Watchdog, first: bool) -> Parts:
    action = {"dump": "pause", None: "reset"}.get(device.action, device.action)
    arguments = ["-action", f"watchdog={action}"] if first else []
    if device.model == "itco":  # part of q35; it counts only when told to
        return Parts(arguments=[*arguments, "-global", "ICH9-LPC.noreboot=off"])
    if device.model not in ("i6300esb", "ib700"):
        raise ConfigUnsupported(f"QEMU has no watchdog {device.model} for this machine")
    props: Props = {"driver": device.model, "id": alias_of(device), **context.address(device)}
    return Parts(arguments=arguments, devices=[props])


def tpm_parts(context: Context, device: Tpm) -> Parts:
    """The emulator (swtpm) is a process of its own: its socket is passed, or named, by the driver."""
    alias = alias_of(device)
    model = device.model or "tpm-tis"
    source = device.backend
    if source is None or model not in ("tpm-tis", "tpm-crb"):
        raise ConfigUnsupported(f"QEMU has no TPM of model {model!r} for this machine")
    chardevs: list[Chardev] = []
    options: Props = {"id": f"tpm-{alias}"}
    if source.type == "passthrough":
        options["path"] = context.files.path(
            f"tpm:{alias}", (source.device.path if source.device else None) or "/dev/tpm0"
        )
        options["cancel-path"] = context.files.path(f"tpm-cancel:{alias}", "/dev/null")
        arguments = ["-tpmdev", keyval("passthrough", options)]
    else:
        fd = context.files.fd(f"tpm:{alias}")
        path = source.source.path if source.source and source.type == "external" else None
        chardevs.append(Chardev(f"chr-{alias}", "socket", {"fd": fd} if fd else {"path": path or f"{alias}.sock"}))
        arguments = ["-tpmdev", keyval("emulator", options | {"chardev": f"chr-{alias}"})]
    props: Props = {"driver": context.require(model), "tpmdev": options["id"], "id": alias}
    return Parts(chardevs=chardevs, arguments=arguments, devices=[props])


def panic_parts(context: Context, device: Panic) -> Parts:
    if device.model in (None, "isa"):
        port = device.address.iobase if device.address and device.address.type == "isa" else None
        return Parts(devices=[{"driver": "pvpanic", "ioport": port}])
    if device.model == "pvpanic":
        return Parts(devices=[{"driver": "pvpanic-pci", "id": alias_of(device), **context.address(device)}])
    if device.model == "hyperv":
        raise ConfigUnsupported("panic model 'hyperv' is a CPU feature (hv-crash), which is not supported yet")
    raise ConfigUnsupported(f"QEMU has no panic device of model {device.model!r} for this machine")


def vsock_parts(context: Context, device: Vsock) -> Parts:
    alias = alias_of(device)
    cid = device.cid.address if device.cid else None
    if cid is None:
        raise ConfigUnsupported("the vsock device has no CID yet", path="/domain/devices/vsock/cid")
    name = context.virtio_name("vsock", device.model)
    props: Props = {"driver": name.replace("virtio-", "vhost-"), "id": alias, "guest-cid": cid}
    props["vhostfd"] = context.files.fd(f"vsock:{alias}")
    return Parts(devices=[props | context.address(device) | virtio_options(device.driver)])


def iommu_parts(context: Context, device: Iommu) -> Parts:
    driver = device.driver
    names = {"intel": "intel-iommu", "virtio": "virtio-iommu-pci", "amd": "amd-iommu"}
    if device.model not in names:
        raise ConfigUnsupported(f"machine type {context.machine} has no IOMMU of model {device.model}")
    props: Props = {"driver": context.require(names[device.model])}
    if device.model == "virtio":
        return Parts(devices=[props | {"id": alias_of(device)} | context.address(device)])
    if not context.is_q35:
        raise ConfigUnsupported(f"an {device.model} IOMMU needs machine type q35", path="/domain/devices/iommu")
    if driver is not None:
        props["intremap"] = None if driver.intremap is None else on_off(driver.intremap)  # on, off or auto
        props["device-iotlb"] = driver.iotlb
        if device.model == "intel":
            props |= {"caching-mode": driver.caching_mode, "aw-bits": driver.aw_bits}
            props["eim"] = None if driver.eim is None else on_off(driver.eim)
            props |= {"dma-translation": driver.dma_translation}
        else:
            props |= {"xtsup": driver.xtsup, "pt": driver.passthrough}
    return Parts(devices=[props])


def memory_parts(context: Context, device: Memory) -> Parts:
    alias = alias_of(device)
    target, source = device.target, device.source
    if target is None or not target.size:
        raise ConfigUnsupported(f"memory module {alias} has no size")
    name = f"mem{alias}"
    path = source.path if source else None
    shared = True if device.access == "shared" else None
    props: Props = {"qom-type": "memory-backend-ram", "id": name, "size": target.size * 1024, "share": shared}
    if path:
        props |= {"qom-type": "memory-backend-file", "mem-path": context.files.path(f"memory:{alias}", path)}
        props |= {"discard-data": device.discard, "pmem": True if source and source.pmem else None}
        props |= {"align": source.alignsize * 1024 if source and source.alignsize else None}
        props |= {"readonly": True if target.readonly else None}
    elif source is not None and source.pagesize and source.pagesize != 4:
        props |= {"qom-type": "memory-backend-memfd", "hugetlb": True, "hugetlbsize": source.pagesize * 1024}
    if source is not None and source.nodemask:
        props |= {"host-nodes": sorted(parse_set(source.nodemask)), "policy": "bind"}
    kinds = {"dimm": "pc-dimm", "nvdimm": "nvdimm", "virtio-pmem": "virtio-pmem-pci", "virtio-mem": "virtio-mem-pci"}
    if device.model not in kinds:
        raise ConfigUnsupported(f"memory model {device.model!r} is not supported yet")
    unit: Props = {"driver": context.require(kinds[device.model]), "memdev": name, "id": alias}
    address = device.address
    if device.model in ("dimm", "nvdimm"):
        unit["node"] = target.node
        if address is not None and address.type == "dimm":
            unit |= {"slot": address.slot, "addr": address.base}
        if device.model == "nvdimm":
            unit |= {"label-size": target.label.size * 1024 if target.label and target.label.size else None}
            unit |= {"uuid": device.uuid, "unarmed": True if target.readonly else None}
    else:
        unit |= context.address(device)
        if device.model == "virtio-mem":
            unit |= {"node": target.node, "block-size": target.block and target.block * 1024}
            unit |= {"requested-size": target.requested * 1024 if target.requested is not None else None}
    return Parts(objects=[props], devices=[unit])


def shmem_parts(context: Context, device: Shmem) -> Parts:
    alias = alias_of(device)
    kind = device.model.type if device.model else "ivshmem-plain"
    size = device.size or 4096
    master = {"master": None if device.role is None else device.role == "master"}
    if kind == "ivshmem-plain":
        name = f"shmmem-{alias}"
        path = context.files.path(f"shmem:{alias}", f"/dev/shm/{device.name}")
        props: Props = {"qom-type": "memory-backend-file", "id": name, "mem-path": path, "size": size * 1024}
        unit: Props = {"driver": "ivshmem-plain", "id": alias, "memdev": name, **master, **context.address(device)}
        return Parts(objects=[props | {"share": True}], devices=[unit])
    if kind == "ivshmem-doorbell":
        server = device.server.path if device.server else None
        chardev = Chardev(chardev_id(alias), "socket", {"path": server})
        vectors = device.msi.vectors if device.msi else None
        unit = {"driver": "ivshmem-doorbell", "id": alias, "chardev": chardev.id, "vectors": vectors, **master}
        return Parts(chardevs=[chardev], devices=[unit | context.address(device)])
    raise ConfigUnsupported(f"QEMU has no shared memory of model {kind!r} any more")


def filesystem_parts(context: Context, device: Filesystem) -> Parts:
    alias = alias_of(device)
    tag = device.target.dir if device.target else None
    if not tag:
        raise ConfigUnsupported(f"file system {alias} has no target tag")
    driver = device.driver
    if driver is not None and driver.type == "virtiofs":
        path = device.source.socket if device.source else None
        fd = context.files.fd(f"fs:{alias}")
        chardev = Chardev(f"chr-vu-{alias}", "socket", {"fd": fd} if fd else {"path": path or f"{alias}.sock"})
        unit: Props = {"driver": context.require("vhost-user-fs-pci"), "id": alias, "chardev": chardev.id, "tag": tag}
        unit |= {"queue-size": driver.queue, "bootindex": context.boot(device)}
        return Parts(chardevs=[chardev], devices=[unit | context.address(device) | virtio_options(driver)])
    if device.type != "mount" or device.source is None or not device.source.dir:
        raise ConfigUnsupported(f"file system {alias}: type {device.type!r} is not supported by QEMU")
    model = {"mapped": "mapped-xattr", "squash": "none"}.get(device.accessmode or "passthrough", "passthrough")
    options: Props = {
        "security_model": model,
        "writeout": driver.wrpolicy if driver else None,
        "id": f"fsdev-{alias}",
        "path": device.source.dir,
        "readonly": True if device.readonly else None,
        "multidevs": None if device.multidevs in (None, "default") else device.multidevs,
        "fmode": device.fmode,
        "dmode": device.dmode,
    }
    name = context.virtio_name("9p", device.model)
    unit = {"driver": context.require(name), "id": alias, "fsdev": options["id"], "mount_tag": tag}
    unit |= context.address(device) | virtio_options(driver)
    return Parts(arguments=["-fsdev", keyval("local", options)], devices=[unit])


def hub_parts(context: Context, device: Hub) -> Parts:
    return Parts(devices=[{"driver": "usb-hub", "id": alias_of(device), **context.address(device)}])


def crypto_parts(context: Context, device: Crypto) -> Parts:
    alias = alias_of(device)
    model = device.backend.model if device.backend else "builtin"
    kind = {"builtin": "cryptodev-backend-builtin", "lkcf": "cryptodev-backend-lkcf"}[model]
    props: Props = {"qom-type": kind, "id": f"obj{alias}", "queues": device.backend.queues if device.backend else None}
    unit: Props = {"driver": context.virtio_name("crypto"), "cryptodev": f"obj{alias}", "id": alias}
    return Parts(objects=[props], devices=[unit | context.address(device) | virtio_options(device.driver)])


def hostdev_parts(context: Context, device: Hostdev) -> Parts:
    alias, source = alias_of(device), device.source
    if device.mode != "subsystem" or source is None:
        raise ConfigUnsupported(f"host device {alias}: mode {device.mode!r} is not supported by QEMU")
    if device.type == "pci":
        if source.address is None:
            raise ConfigUnsupported(f"host device {alias} has no source address")
        unit: Props = {"driver": context.require("vfio-pci"), "host": source.address.pci_text}
    elif device.type == "mdev":
        if source.address is None or not source.address.uuid:
            raise ConfigUnsupported(f"mediated device {alias} has no UUID")
        unit = {"driver": context.require("vfio-pci"), "sysfsdev": f"/sys/bus/mdev/devices/{source.address.uuid}"}
        unit |= {"display": device.display, "ramfb": device.ramfb}
    elif device.type == "usb":
        unit = {"driver": context.require("usb-host")}
        if source.address is not None:
            number = source.address.unit if source.address.unit is not None else source.address.slot
            unit |= {"hostbus": source.address.bus, "hostaddr": number}
        elif source.vendor is not None and source.product is not None:
            unit |= {"vendorid": source.vendor.id, "productid": source.product.id}
        else:
            raise ConfigUnsupported(f"USB device {alias} is named by neither address nor vendor and product")
        if source.guest_reset is not None:
            unit |= {"guest-reset": source.guest_reset != "off"}
    else:
        raise ConfigUnsupported(f"host devices of type {device.type!r} are not supported yet")
    unit |= {"id": alias, "bootindex": context.boot(device), **context.address(device)}
    if device.teaming is not None and device.teaming.type == "transient":
        unit["failover_pair_id"] = device.teaming.persistent
    return Parts(devices=[unit])
