"""Whether two documents show a guest the same machine: a saved one can only go on in a machine like the one it left.

What the guest cannot see (where images lie, names on the host, limits, displays) may differ; all else may not.
libvirt's rule: https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainSaveImageDefineXML
"""

from __future__ import annotations

from lxml import etree

from kvik.conf.domain import Domain, format_domain
from kvik.errors import ConfigUnsupported

__all__ = ["check_same_machine"]

# Children of <domain>, and of any device, that are the host's side of things.
_HOST = {
    *("title", "description", "metadata", "memtune", "blkiotune", "cputune", "numatune", "resource", "iothreads"),
    *("iothreadids", "memoryBacking", "on_poweroff", "on_reboot", "on_crash", "pm", "perf", "seclabel", "keywrap"),
    *("launchSecurity", "defaultiothread", "currentMemory", "clock"),
    "{http://libvirt.org/schemas/domain/qemu/1.0}commandline",
}
_BEHIND = {
    *("source", "driver", "backingStore", "mirror", "alias", "log", "protocol", "bandwidth", "iotune", "encryption"),
    *("link", "guest"),
}
_DEVICES = {"emulator", "graphics", "audio"}
_OS = {"kernel", "initrd", "cmdline", "loader", "nvram", "boot", "bootmenu", "bios"}


def check_same_machine(before: Domain, after: Domain) -> None:
    """`ConfigUnsupported` that names the first difference a guest would see."""
    for what, old, new in (("name", before.name, after.name), ("uuid", before.uuid, after.uuid)):
        if old != new:
            raise ConfigUnsupported(f"the {what} cannot change: {old} before, {new} now", path=f"/domain/{what}")
    path = _difference(_visible(before), _visible(after), "/domain")
    if path is not None:
        raise ConfigUnsupported(
            f"the machine would not be the one that was saved: {path} differs",
            path=path,
            remedy="only what the guest does not see may change, such as where an image lies",
        )


def _visible(document: Domain) -> etree._Element:
    root = etree.fromstring(format_domain(document, secure=True, inactive=True).encode())
    root.attrib.clear()
    for child in list(root):
        if child.tag in _HOST:
            root.remove(child)
        elif child.tag == "os":
            _drop(child, _OS)
        elif child.tag == "devices":
            _drop(child, _DEVICES)
            for device in child:
                _drop(device, _BEHIND)
                if device.tag != "hostdev":
                    device.attrib.pop("type", "")  # of a disk or interface: what is behind it
                if device.tag == "interface":
                    _drop(device, {"target"})
    return root


def _drop(element: etree._Element, names: set[str]) -> None:
    for child in list(element):
        if child.tag in names:
            element.remove(child)


def _difference(old: etree._Element, new: etree._Element, path: str) -> str | None:
    if (old.text or "").strip() != (new.text or "").strip() or sorted(old.attrib.items()) != sorted(new.attrib.items()):
        return path
    if [child.tag for child in old] != [child.tag for child in new]:
        return path
    for first, second in zip(old, new, strict=True):
        same = [child for child in old if child.tag == first.tag]
        number = f"[{same.index(first) + 1}]" if len(same) > 1 else ""
        found = _difference(first, second, f"{path}/{first.tag}{number}")
        if found is not None:
            return found
    return None
