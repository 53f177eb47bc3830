"""Devices by document: attach, detach, update; detach a disk or interface by what it is; set a link."""

from __future__ import annotations

from kvik.cli import document, flags
from kvik.cli.common import CONFIG, CURRENT, DOMAIN, FILE, LIVE, PERSISTENT, PRINT_XML, impact
from kvik.cli.domain_net import INTERFACE, find_interface
from kvik.cli.options import DATA, FLAG, TEXT, Option, UsageError, Verb
from kvik.errors import NoDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Domain


def attach_device(ctx: Context, options: Options) -> int:
    path = options.data("file")
    domain = ctx.domain(options.data("domain"))
    bits = impact(options, active=domain.id > 0)
    ctx.doing = f"Failed to attach device from {path}"
    domain.attach_device(ctx.read_file(path), bits)
    ctx.say("Device attached successfully")
    return 0


def detach_device(ctx: Context, options: Options) -> int:
    path = options.data("file")
    domain = ctx.domain(options.data("domain"))
    bits = impact(options, active=domain.id > 0)
    ctx.doing = f"Failed to detach device from {path}"
    domain.detach_device(ctx.read_file(path), bits)
    ctx.say("Device detached successfully")
    return 0


def update_device(ctx: Context, options: Options) -> int:
    path = options.data("file")
    domain = ctx.domain(options.data("domain"))
    bits = impact(options, active=domain.id > 0)
    if options.flag("force"):
        bits |= flags.DEVICE_MODIFY_FORCE
    ctx.doing = f"Failed to update device from {path}"
    domain.update_device(ctx.read_file(path), bits)
    ctx.say("Device updated successfully")
    return 0


def detach_device_alias(ctx: Context, options: Options) -> int:
    alias = options.data("alias")
    domain = ctx.domain(options.data("domain"))
    ctx.doing = f"Failed to detach device with alias {alias}"
    domain.detach_device_alias(alias, impact(options))
    ctx.say("Device detach request sent successfully")
    return 0


def configured(domain: Domain, options: Options, bits: int) -> document.Element:
    """The document that a change of kind `bits` is about: the persistent one for --config alone."""
    inactive = bits & flags.AFFECT_CONFIG and not bits & flags.AFFECT_LIVE
    return document.parse(domain.xml(flags.XML_INACTIVE if inactive else 0))


def find_disk(root: document.Element, key: str) -> document.Disk:
    for disk in document.disks(root):
        if key and key in (disk.target, disk.source):
            return disk
    raise NoDevice(
        f"No disk found whose source path or target is {key}", remedy="'kvik domblklist' shows the machine's disks"
    )


def detach_disk(ctx: Context, options: Options) -> int:
    domain = ctx.domain(options.data("domain"))
    bits = impact(options, active=domain.id > 0)
    disk = find_disk(configured(domain, options, bits), options.data("target"))
    xml = document.text_of(disk.element)
    if options.flag("print-xml"):
        if not ctx.put({"xml": xml}):
            ctx.last(xml)
        return 0
    ctx.doing = "Failed to detach disk"
    domain.detach_device(xml, bits)
    ctx.say("Disk detached successfully")
    return 0


def detach_interface(ctx: Context, options: Options) -> int:
    kind, mac = options.data("type"), options.text("mac")
    domain = ctx.domain(options.data("domain"))
    bits = impact(options, active=domain.id > 0)
    of_kind = [nic for nic in document.interfaces(configured(domain, options, bits)) if nic.kind == kind]
    ctx.doing = "Failed to detach interface"
    if not of_kind:
        raise NoDevice(f"No interface found whose type is {kind}")
    found = [nic for nic in of_kind if mac is None or nic.mac.lower() == mac.lower()]
    if not found:
        raise NoDevice(f"No interface with MAC address {mac} was found")
    if len(found) > 1:
        raise UsageError(f"Domain has {len(found)} interfaces. Please specify which one to detach using --mac")
    xml = document.text_of(found[0].element)
    if options.flag("print-xml"):
        if not ctx.put({"xml": xml}):
            ctx.last(xml)
        return 0
    domain.detach_device(xml, bits)
    ctx.say("Interface detached successfully")
    return 0


def domif_setlink(ctx: Context, options: Options) -> int:
    state, config = options.data("state"), options.flag("config")
    if state not in ("up", "down"):
        raise UsageError(f"invalid link state '{state}'", remedy="one of: up, down")
    domain = ctx.domain(options.data("domain"))
    root = document.parse(domain.xml(flags.XML_INACTIVE if config else 0))
    element = find_interface(root, options.data("interface")).element
    link = element.find("link")
    if link is None:
        link = document.SubElement(element, "link")
    link.set("state", state)
    xml = document.text_of(element)
    if options.flag("print-xml"):
        if not ctx.put({"xml": xml}):
            ctx.last(xml)
        return 0
    ctx.doing = "Failed to update interface link state"
    domain.update_device(xml, flags.AFFECT_CONFIG if config else flags.AFFECT_CURRENT)
    ctx.say("Device updated successfully")
    return 0


COMMANDS = {
    "attach-device": Verb(
        attach_device, "Attach device from an XML <file>.", DOMAIN, FILE, PERSISTENT, CONFIG, LIVE, CURRENT
    ),
    "detach-device": Verb(
        detach_device, "Detach device from an XML <file>", DOMAIN, FILE, PERSISTENT, CONFIG, LIVE, CURRENT
    ),
    "update-device": Verb(
        update_device,
        "Update device from an XML <file>.",
        DOMAIN,
        FILE,
        PERSISTENT,
        CONFIG,
        LIVE,
        CURRENT,
        Option("force", FLAG, "force device update"),
    ),
    "detach-device-alias": Verb(
        detach_device_alias,
        "Detach device identified by the given alias from a domain",
        DOMAIN,
        Option("alias", DATA, "device alias"),
        CONFIG,
        LIVE,
        CURRENT,
    ),
    "detach-disk": Verb(
        detach_disk,
        "Detach disk device.",
        DOMAIN,
        Option("target", DATA, "target of disk device", complete="disk"),
        PERSISTENT,
        CONFIG,
        LIVE,
        CURRENT,
        PRINT_XML,
    ),
    "detach-interface": Verb(
        detach_interface,
        "Detach network interface.",
        DOMAIN,
        Option("type", DATA, "network interface type", complete=("network", "bridge", "direct", "user", "hostdev")),
        Option("mac", TEXT, "MAC address", complete="mac"),
        PERSISTENT,
        CONFIG,
        LIVE,
        CURRENT,
        PRINT_XML,
    ),
    "domif-setlink": Verb(
        domif_setlink,
        "Set link state of a domain's virtual interface. This command wraps\nusage of update-device command.",
        DOMAIN,
        INTERFACE,
        Option("state", DATA, "new state of the device", complete=("up", "down")),
        Option("config", FLAG, "affect next boot"),
        PRINT_XML,
    ),
}
