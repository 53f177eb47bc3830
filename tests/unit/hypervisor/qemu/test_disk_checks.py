"""What QEMU cannot do for a disk is refused by the element's name; what it can do is not."""

from __future__ import annotations

import pytest

from kvik.conf.domain import parse_domain
from kvik.conf.machine import MachineDefaults
from kvik.conf.postparse import postparse
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.qemu.disk_checks import check_disks

DOMAIN = (
    "<domain type='qemu'><name>m</name><memory>65536</memory><os><type>hvm</type></os><devices>{}</devices></domain>"
)
QEMU_7_2 = 7_002_000


def disk(bus: str, more: str = "", *, driver: str = "", source: str = "", top: str = "", format_: str = "raw") -> str:
    dev = {"virtio": "vda", "ide": "hda", "nvme": "nvme0n1", "fdc": "fda", "xen": "xvda"}.get(bus, "sda")
    source = source or "<source file='/a'/>"
    kind = "network" if "protocol" in source else "nvme" if "namespace" in source else "file"
    device = "floppy" if bus == "fdc" else "disk"
    top = top or f"device='{device}'"
    attributes, elements = (more, "") if more.startswith(" ") else ("", more)
    return (
        f"<disk type='{kind}' {top}><driver name='qemu' type='{format_}' {driver}/>{source}"
        f"<target dev='{dev}' bus='{bus}'{attributes}/>{elements}</disk>"
    )


def net(protocol: str, inner: str = "", more: str = "", readonly: bool = True) -> str:
    source = f"<source protocol='{protocol}' name='a/b' {more}><host name='h'/>{inner}</source>"
    return disk("virtio", "<readonly/>" if readonly else "", source=source)


REFUSED = [
    (disk("virtio", "<wwn>5000c50015ea71aa</wwn>"), "/wwn"),
    (disk("sata", "<vendor>A</vendor>"), "/vendor"),
    (disk("usb", "<product>A</product>"), "/product"),
    (disk("virtio", " rotation_rate='7200'"), "/target/@rotation_rate"),
    (disk("virtio", " removable='on'"), "/target/@removable"),
    (disk("sata", " dpofua='on'"), "/target/@dpofua"),
    (disk("usb", "<geometry cyls='1' heads='1' secs='1'/>"), "/geometry"),
    (disk("virtio", "<geometry cyls='1' heads='1' secs='1' trans='lba'/>"), "/geometry/@trans"),
    (disk("sata", top="device='disk' model='virtio'"), "/@model"),
    (disk("fdc", "<serial>A</serial>"), "/serial"),
    (disk("virtio", top="device='lun'"), "/@device"),
    (disk("scsi", top="device='lun'"), "/@type"),
    (disk("scsi", top="device='disk' rawio='yes'"), "/@rawio"),
    (disk("scsi", top="device='disk' sgio='unfiltered'"), "/@sgio"),
    (disk("virtio", "<backenddomain name='d'/>"), "/backenddomain"),
    (disk("xen"), "/target/@bus"),
    (disk("usb", top="device='cdrom'"), "/@device"),
    (disk("virtio", driver="max_bootsize='1'"), "/driver/@max_bootsize"),
    (disk("nvme", driver="error_policy='stop'"), "/driver/@error_policy"),
    (disk("virtio", driver="io='native' cache='writeback'"), "/driver/@io"),
    (disk("virtio", "<readonly/>", driver="copy_on_read='on'"), "/driver/@copy_on_read"),
    (disk("virtio", driver="discard_no_unref='on'"), "/driver/@discard_no_unref"),
    (disk("virtio", driver="discard_no_unref='on'", format_="qcow2"), "/driver/@discard_no_unref"),
    (disk("virtio", driver="detect_zeroes='unmap' discard='ignore'"), "/driver/@detect_zeroes"),
    (disk("sata", driver="queues='2'"), "/driver/@queues"),
    (disk("scsi", driver="packed='on'"), "/driver/@packed"),
    (disk("virtio", source="<source file='/a'><slices><slice type='storage' offset='0' size='1'/></slices></source>",
          format_="qcow2"), "/source/slices"),
    (disk("scsi", source="<source file='/a'><reservations managed='yes'/></source>"), "/source/reservations"),
    (disk("virtio", source="<source type='pci' managed='yes' namespace='1'><address type='pci' domain='0' bus='1' "
          "slot='0' function='0'/></source>"), "/source/@managed"),
    (net("http", more="tls='yes'"), "/source/@tls"),
    (net("nbd", more="tlsHostname='h'"), "/source/@tlsHostname"),
    (net("https", "<cookies><cookie name='a'>b; c</cookie></cookies>"), "/source/cookies"),
    (net("https", "<cookies><cookie name='a b'>c</cookie></cookies>"), "/source/cookies"),
    (net("nbd", "<cookies><cookie name='a'>b</cookie></cookies>"), "/source/cookies"),
    (net("iscsi", "<reconnect delay='1'/>"), "/source/reconnect"),
    (net("ssh", "<knownHosts path='/k'/>"), "/source/identity"),
    (net("ssh", "<identity username='u' keyfile='/k'/>"), "/source/identity"),
    (net("iscsi", "<identity username='u'/>"), "/source/identity"),
    (net("ssh").replace("<host name='h'/>", "<host transport='unix' socket='/s'/>"), "/source/host/@transport"),
    (net("http", readonly=False), "/readonly"),
    (net("nbd", more="query='a=b'"), "/source/@query"),
    (net("nbd", readonly=False).replace("</disk>", "<transient/></disk>"), "/transient"),
    (disk("virtio", "<readonly/><transient/>"), "/transient"),
    (disk("virtio", "<shareable/><transient/>"), "/transient"),
    (disk("virtio", "<transient/>", driver="copy_on_read='on'"), "/transient"),
    (disk("virtio", "<transient/>", format_="vmdk"), "/transient"),
    (disk("virtio", "<transient/><encryption format='luks'/>"), "/transient"),
]  # fmt: skip
TAKEN = [
    disk("scsi", "<wwn>5000c50015ea71aa</wwn><vendor>A</vendor><product>B</product>"),
    disk("usb", " removable='on'"),
    disk("ide", "<geometry cyls='1' heads='1' secs='1' trans='lba'/>"),
    disk("nvme", "<serial>A</serial>"),
    disk(
        "virtio", driver="io='native' cache='none' queues='2' packed='on' error_policy='enospace' rerror_policy='stop'"
    ),
    disk("scsi", driver="detect_zeroes='unmap' discard='unmap'", top="device='disk' sgio='filtered'"),
    net("nbd", "<reconnect delay='1'/>"),
    net("nbd", more="tls='yes' tlsHostname='h'"),
    net("ssh", "<identity username='u'/>"),
    net("http", more="query='a=b'"),
    net("https", "<cookies><cookie name='a'>b-c/d=</cookie></cookies>"),
    disk("virtio", "<transient/>", format_="qcow2"),
    disk("sata", "<transient shareBacking='yes'/>"),
]


def checked(text: str, version: int = QEMU_7_2) -> None:
    domain = parse_domain(DOMAIN.format(text))
    postparse(domain, MachineDefaults())
    check_disks(domain, version)


@pytest.mark.parametrize(("text", "path"), REFUSED, ids=lambda item: item if item.startswith("/") else "")
def test_a_refusal_names_the_element(text: str, path: str) -> None:
    with pytest.raises(ConfigUnsupported) as caught:
        checked(text)
    found = caught.value
    assert (found.path or "").replace("[1]", "") == f"/domain/devices/disk{path}" and (
        found.remedy or "transient" in path
    )
    assert caught.value.message.count("disk ") >= 1


@pytest.mark.parametrize("text", TAKEN)
def test_what_can_be_done_is_not_refused(text: str) -> None:
    checked(text)


def test_a_newer_qemu_does_more() -> None:
    checked(disk("virtio", driver="discard_no_unref='on'", format_="qcow2"), 8_001_000)
