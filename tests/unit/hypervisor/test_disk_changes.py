"""What update-device may change in a running disk: nothing that the guest was told, and nothing is dropped."""

from __future__ import annotations

import pytest

from kvik.conf.devices.disk import Disk
from kvik.conf.devices_xml import format_device, parse_device
from kvik.errors import OperationUnsupported
from kvik.hypervisor.changes import check_disk, check_drive, keep_chain

DISK = """<disk type='file' device='disk'>
<driver name='qemu' type='qcow2' cache='none' error_policy='stop' queues='2'/>
<source file='/a' index='3'/>
<target dev='vda' bus='virtio'/>
<serial>one</serial>
</disk>"""
DRIVE = """<disk type='file' device='cdrom'><driver name='qemu' type='raw' cache='none'/><source file='/a'/>
<target dev='sda' bus='sata'/><readonly/></disk>"""


def parsed(text: str) -> Disk:
    _, device = parse_device(text)
    assert isinstance(device, Disk)
    return device


@pytest.mark.parametrize(
    ("was", "wanted", "field"),
    [
        ("<serial>one</serial>", "<serial>two</serial>", "serial"),
        ("cache='none'", "cache='writeback'", "cache"),
        ("error_policy='stop'", "error_policy='report'", "error_policy"),
        ("queues='2'", "queues='4'", "queues"),
        ("queues='2'", "queues='2' iothread='1'", "iothread"),
        ("bus='virtio'", "bus='scsi'", "bus"),
        ("type='qcow2'", "type='raw'", "type"),
        ("</disk>", "<readonly/></disk>", "readonly"),
        ("</disk>", "<shareable/></disk>", "shareable"),
        ("</disk>", "<transient/></disk>", "transient"),
        ("</disk>", "<wwn>5000c50015ea71aa</wwn></disk>", "wwn"),
        ("device='disk'", "device='lun'", "device"),
        ("</disk>", "<boot order='2'/></disk>", "boot"),
    ],
)
def test_what_the_guest_was_told_is_refused_by_name(was: str, wanted: str, field: str) -> None:
    with pytest.raises(OperationUnsupported, match=f"cannot modify field '{field}'"):
        check_disk(parsed(DISK), parsed(DISK.replace(was, wanted)))


def test_what_is_left_out_stays() -> None:
    old = parsed(DISK)
    new = parsed("<disk type='file' device='disk'><target dev='vda'/><iotune><total_iops_sec>9</total_iops_sec>"
                 "</iotune></disk>")  # fmt: skip
    check_disk(old, new)
    keep_chain(old, new)
    assert new.iotune is not None and new.iotune.total_iops_sec == 9
    new.iotune = None
    assert format_device(new) == format_device(old)


def test_another_image_is_refused() -> None:
    with pytest.raises(OperationUnsupported, match="image of disk vda cannot change"):
        check_disk(parsed(DISK), parsed(DISK.replace("'/a'", "'/b'")))


def test_a_medium_may_be_served_in_another_way_but_not_its_drive() -> None:
    other = DRIVE.replace("'/a'", "'/b'").replace("cache='none'", "cache='writeback'").replace("<readonly/>", "")
    new = parsed(other)
    check_drive(parsed(DRIVE), new)
    assert new.readonly and new.driver is not None and new.driver.cache == "writeback"
    with pytest.raises(OperationUnsupported, match="field 'bus'"):
        check_drive(parsed(DRIVE), parsed(other.replace("bus='sata'", "bus='scsi'")))
