"""attach-disk, attach-interface, change-media: devices from options, written as documents."""

from __future__ import annotations

from kvik.cli import document, flags
from kvik.cli.common import CONFIG, CURRENT, DOMAIN, LIVE, PERSISTENT, PRINT_XML, exclusive, impact
from kvik.cli.document import escape, open_tag, tag
from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError, Verb
from kvik.errors import OperationInvalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options


def attach(ctx: Context, options: Options, xml: str, what: str) -> int:
    if options.flag("print-xml"):
        if not ctx.put({"xml": xml}):
            ctx.document(xml)
        return 0
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Failed to attach {what.lower()}"
    domain.attach_device(xml, impact(options, active=domain.id > 0))
    ctx.say(f"{what} attached successfully")
    return 0


# disk

ADDRESS_FORMS = {
    # kind: (separator, attributes)
    "pci": (("domain", "bus", "slot", "function"), 16),
    "usb": (("bus", "port"), 10),
    "scsi": (("controller", "bus", "unit"), 10),
    "ide": (("controller", "bus", "unit"), 10),
    "sata": (("controller", "bus", "unit"), 10),
    "ccw": (("cssid", "ssid", "devno"), 16),
}


def address_tag(text: str, *, multifunction: bool = False) -> str:
    """`<address .../>` of `pci:0000.00.0a.0`, `scsi:0.0.1`, `usb:1.2`, ..."""
    kind, _, rest = text.partition(":")
    parts = rest.split(".")
    if kind not in ADDRESS_FORMS or len(parts) != len(ADDRESS_FORMS[kind][0]):
        raise UsageError(
            f"Invalid address '{text}'",
            remedy="write it as pci:DOMAIN.BUS.SLOT.FUNCTION, usb:BUS.PORT, or scsi|ide|sata:CONTROLLER.BUS.UNIT",
        )
    names, base = ADDRESS_FORMS[kind]
    try:
        numbers = [int(part, base) for part in parts]
    except ValueError:
        raise UsageError(f"Invalid address '{text}'") from None
    widths = {"domain": 4, "devno": 4, "cssid": 2, "ssid": 1, "function": 1}
    values: dict[str, str | None] = {
        name: f"0x{number:0{widths.get(name, 2)}x}" if base == 16 else str(number)
        for name, number in zip(names, numbers, strict=True)
    }
    if multifunction:
        values["multifunction"] = "on"
    return tag("address", type="drive" if kind in ("scsi", "ide", "sata") else kind, **values)


def disk_xml(options: Options) -> str:
    """The `<disk>` of attach-disk's options."""
    source, target = options.data("source"), options.data("target")
    kind, protocol = options.text("sourcetype"), options.text("source-protocol")
    device, mode = options.text("type"), options.text("mode")
    if kind not in (None, "file", "block", "network"):
        raise UsageError(f"Unknown source type: '{kind}'", remedy="one of: file, block, network")
    if mode not in (None, "readonly", "shareable"):
        raise UsageError(f"No support for {mode} in command 'attach-disk'", remedy="one of: readonly, shareable")
    if kind is None:
        import os
        import stat

        try:
            # A network disk cannot be told from a file by its name: only a block device on this host is.
            kind = "block" if stat.S_ISBLK(os.stat(source).st_mode) else "file"  # noqa: PTH116
        except OSError:
            kind = "network" if protocol else "file"
    if protocol and kind != "network":
        raise UsageError("--source-protocol can be used only with --sourcetype network")
    lines = [open_tag("disk", type=kind, device=device, rawio="yes" if options.flag("rawio") else None)]
    driver = tag(
        "driver",
        name=options.text("driver"),
        type=options.text("subdriver"),
        iothread=options.text("iothread"),
        cache=options.text("cache"),
        io=options.text("io"),
    )
    if driver != "<driver/>":
        lines.append(f"  {driver}")
    if source:
        host = tag(
            "host",
            transport=options.text("source-host-transport"),
            socket=options.text("source-host-socket"),
            name=options.text("source-host-name"),
        )
        if kind == "network":
            opened = open_tag("source", protocol=protocol, name=source)
            lines += [f"  {opened}", f"    {host}", "  </source>"] if host != "<host/>" else [f"  {opened[:-1]}/>"]
        else:
            lines.append("  " + tag("source", **{"dev" if kind == "block" else "file": source}))
    lines.append("  " + tag("target", dev=target, bus=options.text("targetbus")))
    if options.text("alias"):
        lines.append("  " + tag("alias", name=options.text("alias")))
    if mode:
        lines.append(f"  <{mode}/>")
    for name in ("serial", "wwn"):
        value = options.text(name)
        if value is not None:
            lines.append(f"  <{name}>{escape(value)}</{name}>")
    place = options.text("address")
    multifunction = options.flag("multifunction")
    if place:
        lines.append("  " + address_tag(place, multifunction=multifunction))
    return "\n".join([*lines, "</disk>", ""])


def attach_disk(ctx: Context, options: Options) -> int:
    return attach(ctx, options, disk_xml(options), "Disk")


# interface

SOURCES = {"network": "network", "bridge": "bridge", "direct": "dev", "hostdev": ""}


def bandwidth_tag(name: str, text: str) -> str:
    parts = text.split(",")
    if len(parts) > 4 or not all(part.isdigit() or not part for part in parts) or not (parts[0] or parts[-1]):
        raise UsageError(f"{name} format is incorrect", remedy="write AVERAGE[,PEAK[,BURST[,FLOOR]]], in KiB/s")
    names = ("average", "peak", "burst", "floor")
    return tag(name, **{key: part or None for key, part in zip(names, parts, strict=False)})


def interface_xml(options: Options) -> str:
    """The `<interface>` of attach-interface's options."""
    kind, source, mode = options.data("type"), options.data("source"), options.text("source-mode")
    if kind not in SOURCES:
        raise UsageError(f"No support for {kind} in command 'attach-interface'", remedy="one of: " + ", ".join(SOURCES))
    managed = options.flag("managed")
    lines = [open_tag("interface", type=kind, managed="yes" if kind == "hostdev" and managed else None)]
    if kind == "hostdev":
        place = "pci:" + source.replace(":", ".") if not source.startswith("pci:") else source
        lines += ["  <source>", f"    {address_tag(place)}", "  </source>"]
    elif mode and kind != "direct":
        raise UsageError(f"--source-mode means nothing for an interface of type {kind}")
    else:
        lines.append("  " + tag("source", **{SOURCES[kind]: source}, mode=mode))
    if options.text("target"):
        lines.append("  " + tag("target", dev=options.text("target")))
    if options.text("mac"):
        lines.append("  " + tag("mac", address=options.text("mac")))
    if options.text("script"):
        lines.append("  " + tag("script", path=options.text("script")))
    if options.text("model"):
        lines.append("  " + tag("model", type=options.text("model")))
    if options.text("alias"):
        lines.append("  " + tag("alias", name=options.text("alias")))
    limits = [
        f"    {bandwidth_tag(name, text)}"
        for name in ("inbound", "outbound")
        if (text := options.text(name)) is not None
    ]
    if limits:
        lines += ["  <bandwidth>", *limits, "  </bandwidth>"]
    return "\n".join([*lines, "</interface>", ""])


def attach_interface(ctx: Context, options: Options) -> int:
    return attach(ctx, options, interface_xml(options), "Interface")


# media


def change_media(ctx: Context, options: Options) -> int:
    source = options.text("source")
    eject, insert, update = (options.flag(name) for name in ("eject", "insert", "update"))
    block = options.flag("block")
    exclusive(options, ("eject", "insert"), ("eject", "update"), ("insert", "update"), ("eject", "block"))
    if eject and source:
        raise UsageError("Option --source and --eject are mutually exclusive")
    if not (eject or insert or update):
        insert, update, eject = False, source is not None, source is None
    if not eject and source is None:
        raise UsageError("option --source is required to insert or update media")
    domain = ctx.domain(options.data("domain"))
    bits = impact(options) | (flags.DEVICE_MODIFY_FORCE if options.flag("force") else 0)
    inactive = bits & flags.AFFECT_CONFIG and not bits & flags.AFFECT_LIVE
    root = document.parse(domain.xml(flags.XML_INACTIVE if inactive else 0))
    key = options.data("path")
    disk = next(
        (d for d in document.disks(root) if d.device in ("cdrom", "floppy") and key in (d.target, d.source)), None
    )
    if disk is None:
        raise OperationInvalid(
            f"No disk found whose source path or target is {key}",
            remedy="only a CD-ROM or floppy drive has media; 'kvik domblklist --details' shows them",
        )
    if eject and not disk.source:
        raise OperationInvalid(f"The disk device '{key}' doesn't have media")
    if insert and disk.source:
        raise OperationInvalid(f"The disk device '{key}' already has media")
    old = disk.element.find("source")
    if old is not None:
        disk.element.remove(old)
    if source is not None:
        new = document.Element("source", {"dev" if block else "file": source})
        disk.element.insert(next((i for i, e in enumerate(disk.element) if e.tag == "target"), 0), new)
        disk.element.set("type", "block" if block else "file")
    xml = document.text_of(disk.element)
    if options.flag("print-xml"):
        if not ctx.put({"xml": xml}):
            ctx.last(xml)
        return 0
    verb, done = ("eject", "ejected") if eject else ("insert", "inserted") if insert else ("update", "updated")
    ctx.doing = f"Failed to complete action {verb} on media"
    domain.update_device(xml, bits)
    ctx.say(f"Successfully {done} media.")
    return 0


COMMANDS = {
    "attach-disk": Verb(
        attach_disk,
        "Attach new disk device.",
        DOMAIN,
        Option("source", DATA, "source of disk device or name of network disk", complete="file"),
        Option("target", DATA, "target of disk device"),
        Option("targetbus", TEXT, "target bus of disk device", complete=("virtio", "sata", "scsi", "usb", "ide")),
        Option("driver", TEXT, "driver of disk device", complete=("qemu",)),
        Option("subdriver", TEXT, "subdriver of disk device", complete=("raw", "qcow2")),
        Option("iothread", TEXT, "IOThread to be used by supported device"),
        Option("cache", TEXT, "cache mode of disk device", complete=("none", "writeback", "writethrough", "unsafe")),
        Option("io", TEXT, "io policy of disk device", complete=("threads", "native", "io_uring")),
        Option("type", TEXT, "target device type", complete=("disk", "cdrom", "floppy", "lun")),
        Option("mode", TEXT, "mode of device reading and writing", complete=("readonly", "shareable")),
        Option("sourcetype", TEXT, "type of source (block|file|network)", complete=("block", "file", "network")),
        Option("serial", TEXT, "serial of disk device"),
        Option("wwn", TEXT, "wwn of disk device"),
        Option("alias", TEXT, "custom alias name of disk device"),
        Option("rawio", FLAG, "needs rawio capability"),
        Option("address", TEXT, "address of disk device"),
        Option("multifunction", FLAG, "use multifunction pci under specified address"),
        PRINT_XML,
        Option("source-protocol", TEXT, "protocol used by disk device source"),
        Option("source-host-name", TEXT, "host name for source of disk device"),
        Option("source-host-transport", TEXT, "host transport for source of disk device"),
        Option("source-host-socket", TEXT, "host socket for source of disk device"),
        PERSISTENT,
        CONFIG,
        LIVE,
        CURRENT,
    ),
    "attach-interface": Verb(
        attach_interface,
        "Attach new network interface.",
        DOMAIN,
        Option("type", DATA, "network interface type", complete=tuple(SOURCES)),
        Option("source", DATA, "source of network interface"),
        Option("target", TEXT, "target network name"),
        Option("mac", TEXT, "MAC address"),
        Option("script", TEXT, "script used to bridge network interface", complete="file"),
        Option("model", TEXT, "model type", complete=("virtio", "e1000e", "e1000", "rtl8139")),
        Option("alias", TEXT, "custom alias name of interface device"),
        Option("inbound", TEXT, "control domain's incoming traffics"),
        Option("outbound", TEXT, "control domain's outgoing traffics"),
        PERSISTENT,
        CONFIG,
        LIVE,
        CURRENT,
        PRINT_XML,
        Option("managed", FLAG, "detach/attach the device from/to the host automatically"),
        Option("source-mode", TEXT, "mode attribute of <source/> element", complete=("bridge", "vepa", "private")),
    ),
    "change-media": Verb(
        change_media,
        "Change media of CD or floppy drive.",
        DOMAIN,
        Option("path", DATA, "Fully-qualified path or target of disk device", complete="disk"),
        Option("source", TEXT, "source of the media", complete="file"),
        Option("eject", FLAG, "Eject the media"),
        Option("insert", FLAG, "Insert the media"),
        Option("update", FLAG, "Update the media"),
        Option("current", FLAG, "can be either or both of --live and --config, depends on the hypervisor driver"),
        LIVE,
        CONFIG,
        Option("force", FLAG, "force media changing"),
        PRINT_XML,
        Option("block", FLAG, "source media is a block device"),
    ),
}
