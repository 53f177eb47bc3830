"""<controller>: buses. Those that the machine type brings along are not asked for again."""

from __future__ import annotations

from kvik.conf.devices.controller import Controller
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.names import alias_of
from kvik.hypervisor.qemu.argv.options import Context, Parts, Props, virtio_options

__all__ = ["controller_parts"]

_USB = {
    "piix3-uhci": "piix3-usb-uhci",
    "piix4-uhci": "piix4-usb-uhci",
    "vt82c686b-uhci": "vt82c686b-usb-uhci",
    "ehci": "usb-ehci",
    "ich9-ehci1": "ich9-usb-ehci1",
    "ich9-uhci1": "ich9-usb-uhci1",
    "ich9-uhci2": "ich9-usb-uhci2",
    "ich9-uhci3": "ich9-usb-uhci3",
    "pci-ohci": "pci-ohci",
    "nec-xhci": "nec-usb-xhci",
    "qemu-xhci": "qemu-xhci",
}
_SCSI = {
    "lsilogic": "lsi53c895a",
    "lsisas1068": "mptsas1068",
    "lsisas1078": "megasas",
    "vmpvscsi": "pvscsi",
    "am53c974": "am53c974",
    "dc390": "dc390",
}
_PCI = {
    "pcie-root-port": "pcie-root-port",
    "pcie-switch-upstream-port": "x3130-upstream",
    "pcie-switch-downstream-port": "xio3130-downstream",
    "dmi-to-pci-bridge": "i82801b11-bridge",
    "pcie-to-pci-bridge": "pcie-pci-bridge",
    "pci-bridge": "pci-bridge",
    "pci-expander-bus": "pxb",
    "pcie-expander-bus": "pxb-pcie",
}
_OPTIONAL_PCI = {"pcie-root-port": ("ioh3420", "pcie-root-port")}


def controller_parts(context: Context, device: Controller) -> Parts:
    props = _controller(context, device)
    return Parts(devices=[props] if props is not None else [])


def _controller(context: Context, device: Controller) -> Props | None:
    kind = device.type
    if kind == "pci":
        return _pci(context, device)
    if kind == "usb":
        return _usb(context, device)
    if kind == "scsi":
        return _scsi(context, device)
    if kind == "virtio-serial":
        return {
            "driver": context.virtio_name("serial", device.model),
            "id": alias_of(device),
            "max_ports": device.ports,
            "vectors": device.vectors,
            **context.address(device),
            **virtio_options(device.driver),
        }
    if kind == "sata":
        if context.is_q35 and not device.index:
            return None
        return {"driver": "ahci", "id": alias_of(device), **context.address(device)}
    if kind == "ide":
        if context.is_i440fx and not device.index:
            return None
        raise ConfigUnsupported(f"machine type {context.machine} has no IDE controller; use bus 'sata'")
    if kind == "fdc":
        return None if context.is_i440fx else {"driver": "isa-fdc", "id": "fdc"}
    if kind == "ccid":
        return {"driver": context.require("usb-ccid"), "id": alias_of(device), **context.address(device)}
    if kind == "nvme":
        props = {"driver": context.require("nvme"), "id": alias_of(device), "serial": device.serial}
        return {**props, **context.address(device)}
    if kind == "isa":
        return None
    raise ConfigUnsupported(f"QEMU has no controller of type {kind!r}")


def _pci(context: Context, device: Controller) -> Props | None:
    model = device.model or ""
    if model in ("pci-root", "pcie-root"):
        return None
    name = device.model_name.name if device.model_name else ""
    if model not in _PCI or (name and name not in _OPTIONAL_PCI.get(model, (_PCI[model],))):
        raise ConfigUnsupported(f"QEMU has no PCI controller {model} {name}".rstrip())
    props: Props = {"driver": name or _PCI[model]}
    target = device.target
    if target is not None:
        if model in ("pcie-root-port", "pcie-switch-downstream-port"):
            props |= {"port": target.port, "chassis": target.chassis, "hotplug": target.hotplug}
        elif model == "pci-bridge":
            props["chassis_nr"] = target.chassis_nr
        elif model in ("pci-expander-bus", "pcie-expander-bus"):
            props |= {"bus_nr": target.bus_nr, "numa_node": target.node}
        if target.mem_reserve is not None:
            props["mem-reserve"] = target.mem_reserve * 1024
    return {**props, "id": alias_of(device), **context.address(device)}


def _usb(context: Context, device: Controller) -> Props | None:
    model = device.model or ("piix3-uhci" if context.is_i440fx else "qemu-xhci")
    if model in ("none", "default"):
        return None
    if model not in _USB:
        raise ConfigUnsupported(f"QEMU has no USB controller {model}")
    props: Props = {"driver": context.require(_USB[model])}
    if model in ("nec-xhci", "qemu-xhci"):
        props |= {"p2": device.ports, "p3": device.ports}
    if device.master is not None:
        # A UHCI companion has no bus of its own: it serves ports of the EHCI with the same index.
        props |= {"masterbus": f"{context.controller('usb', device.index or 0)}.0"}
        props |= {"firstport": device.master.startport, **context.address(device)}
        return props
    return {**props, "id": alias_of(device), **context.address(device)}


def _scsi(context: Context, device: Controller) -> Props:
    model = device.model or "virtio-scsi"
    alias = alias_of(device)
    if not model.startswith("virtio"):
        if model not in _SCSI:
            raise ConfigUnsupported(f"QEMU has no SCSI controller {model}")
        return {"driver": context.require(_SCSI[model]), "id": alias, **context.address(device)}
    props: Props = {"driver": context.virtio_name("scsi", model), "id": alias, **context.address(device)}
    driver = device.driver
    if driver is not None:
        props |= virtio_options(driver)
        props |= {
            "num_queues": driver.queues,
            "cmd_per_lun": driver.cmd_per_lun,
            "max_sectors": driver.max_sectors,
            "ioeventfd": driver.ioeventfd,
            "iothread": f"iothread{driver.iothread}" if driver.iothread else None,
        }
    return props
