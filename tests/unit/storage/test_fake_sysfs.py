"""SCSI hosts, Fibre Channel ports and multipath maps in a tree that stands in for sysfs: no such hardware is here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from world import opened

from kvik.errors import ConfigError, HostError
from kvik.storage.backends import iscsi, mpath, scsi
from kvik.storage.scsi_units import Unit, units

PORT = "<adapter type='fc_host' wwnn='20000000c9831b4b' wwpn='10000000c9831b4b'{}/>"
POOL = "<pool type='scsi'><name>s</name><source>{}</source><target><path>/dev/disk/by-path</path></target></pool>"


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """host0 is a plain controller, host4 and host5 are ports; 5 is full."""
    root = tmp_path / "sys"
    pci = "devices/pci0000:00/0000:00:1f.2"
    put(root, f"{pci}/host0/scsi_host/host0/unique_id", "2\n")
    put(root, f"{pci}/host0/scsi_host/host0/scan", "")
    (root / "class/scsi_host").mkdir(parents=True)
    (root / "class/scsi_host/host0").symlink_to(root / f"{pci}/host0/scsi_host/host0")
    for number, used in ((4, "3"), (5, "7")):
        put(root, f"class/scsi_host/host{number}/scan", "")
        for name, text in (
            ("node_name", f"0x2000000000000{number:03}\n"), ("port_name", f"0x1000000000000{number:03}\n"),
            ("fabric_name", "0x2002000000000001\n"), ("port_state", "Online\n"),
            ("vport_create", ""), ("vport_delete", ""),
            ("npiv_vports_inuse", used), ("max_npiv_vports", "7\n"),
        ):  # fmt: skip
            put(root, f"class/fc_host/host{number}/{name}", text)
    for address, kind, block in (("4:0:0:0", "0", "sdx"), ("4:0:0:1", "5", ""), ("4:0:1:12", "0", "")):
        put(root, f"bus/scsi/devices/{address}/type", f"{kind}\n")
        put(root, f"bus/scsi/devices/{address}/wwid", f"naa.{address.replace(':', '')}\n")
        if block:
            put(root, f"bus/scsi/devices/{address}/block/{block}/size", "0")
    for module in (scsi, mpath, iscsi):
        monkeypatch.setattr(module.Backend, "sysfs", root)
    monkeypatch.setattr("kvik.storage.scsi_units.APPEARING", 0.0)
    monkeypatch.setattr("kvik.storage.backends.scsi.APPEARING", 0.0)
    return root


def test_only_disks_are_units_in_the_order_of_their_addresses(sysfs: Path) -> None:
    assert units(4, sysfs) == [Unit(0, 0, 0, "sdx", "naa.4000"), Unit(0, 1, 12, "", "naa.40112")]
    assert [unit.name for unit in units(4, sysfs)] == ["unit:0:0:0", "unit:0:1:12"]
    assert units(9, sysfs) == []


async def test_a_host_is_found_by_its_name_or_its_place(sysfs: Path, tmp_path: Path) -> None:
    async with opened(tmp_path / "root") as pools:
        pool = await pools.create_xml(POOL.format("<adapter name='scsi_host4'/>"))
        assert (sysfs / "class/scsi_host/host4/scan").read_text() == "- - -"
        assert "'unit:0:1:12' is not shown as a volume: it has no device yet" in pool.warnings
        await pool.destroy()
        address = "<address domain='0' bus='0' slot='0x1f' function='2'/>"
        place = f"<adapter type='scsi_host'><parentaddr unique_id='{{}}'>{address}"
        await pools.create_xml(POOL.format(place.format(2) + "</parentaddr></adapter>"))
        assert (sysfs / "class/scsi_host/host0/scan").read_text() == "- - -"
        await pools.lookup_name("s").destroy()
        for wrong in ("<adapter name='host9'/>", place.format(3) + "</parentaddr></adapter>"):
            with pytest.raises(HostError, match="there is no SCSI host"):
                await pools.create_xml(POOL.format(wrong))
        with pytest.raises(ConfigError):
            await pools.create_xml(POOL.format("<adapter name='../../etc'/>"))


async def test_a_virtual_port_is_created_on_a_port_with_room_and_deleted_with_its_pool(
    sysfs: Path, tmp_path: Path
) -> None:
    create, delete = sysfs / "class/fc_host/host4/vport_create", sysfs / "class/fc_host/host4/vport_delete"
    async with opened(tmp_path / "root") as pools:
        pool = await pools.define(POOL.format(PORT.format("")))
        with pytest.raises(HostError, match="no SCSI host 20000000c9831b4b:10000000c9831b4b"):
            await pool.start()  # the kernel of this tree makes nothing of what is written
        assert create.read_text() == "10000000c9831b4b:20000000c9831b4b"
        put(sysfs, "class/fc_host/host6/node_name", "0x20000000c9831b4b")
        put(sysfs, "class/fc_host/host6/port_name", "0x10000000C9831B4B")
        put(sysfs, "class/scsi_host/host6/scan", "")
        await pool.start()  # it is there: nothing is created, and nothing of others deleted
        await pool.destroy()
        assert delete.read_text() == ""
        await pools.undefine(pool)
        pool = await pools.create_xml(POOL.format(PORT.format(" parent='scsi_host4' managed='yes'")))
        await pool.destroy()
        assert delete.read_text() == "10000000c9831b4b:20000000c9831b4b"


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (" parent='scsi_host9'", "no Fibre Channel adapter"),
        (" parent='nonsense'", "no Fibre Channel adapter"),
        (" parent_wwnn='2000000000000009' parent_wwpn='1000000000000009'", "no Fibre Channel adapter"),
        (" parent_fabric_wwn='2002000000000009'", "no Fibre Channel adapter"),
    ],
)
async def test_a_virtual_port_without_a_parent_is_refused(sysfs: Path, tmp_path: Path, more: str, what: str) -> None:
    async with opened(tmp_path / "root") as pools:
        with pytest.raises(HostError, match=what):
            await pools.create_xml(POOL.format(PORT.format(more)))
        assert (sysfs / "class/fc_host/host4/vport_create").read_text() == ""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to make device nodes")
async def test_multipath_maps_and_no_others_are_volumes(
    sysfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpath.Backend, "devices", tmp_path / "dev")
    (tmp_path / "dev/mapper").mkdir(parents=True)
    loop = os.stat("/dev/loop0").st_rdev if Path("/dev/loop0").exists() else os.makedev(7, 0)
    for number, uuid, name in ((0, "mpath-3600a\n", "mpatha"), (1, "LVM-xyz\n", "vg-lv"), (2, "mpath-3600b\n", "gone")):
        put(sysfs, f"block/dm-{number}/dm/uuid", uuid)
        put(sysfs, f"block/dm-{number}/dm/name", f"{name}\n")
    put(sysfs, "block/sda/size", "0")
    os.mknod(tmp_path / "dev/mapper/mpatha", 0o060660, loop)
    async with opened(tmp_path / "root") as pools:
        pool = await pools.create_xml("<pool type='mpath'><name>m</name></pool>")
        assert [(volume.name, volume.key) for volume in pool.volumes()] == [("dm-0", "3600a")]
        assert "'dm-2'" in pool.warnings[0]


async def test_an_iscsi_session_that_was_lost_is_said(sysfs: Path, tmp_path: Path) -> None:
    xml = """<pool type='iscsi'><name>i</name><source><host name='192.0.2.1'/><device path='iqn.2026-01.org:t'/>
    </source>    <target><path>/dev/disk/by-path</path></target></pool>"""
    session = "devices/platform/host4/session1/iscsi_session/session1"
    put(sysfs, f"{session}/targetname", "iqn.2026-01.org:t\n")
    put(sysfs, f"{session}/state", "LOGGED_IN\n")
    (sysfs / session / "device").symlink_to(sysfs / "devices/platform/host4/session1")
    (sysfs / "class/iscsi_session").mkdir(parents=True)
    (sysfs / "class/iscsi_session/session1").symlink_to(sysfs / session)
    async with opened(tmp_path / "root") as pools:
        pool = await pools.create_xml(xml)
        put(sysfs, f"{session}/state", "FAILED\n")
        with pytest.raises(
            HostError, match=r"session with target iqn.2026-01.org:t is lost \(FAILED\).*192.0.2.1:3260"
        ):
            await pool.refresh()
        assert pool.is_active and any("is lost" in line for line in pool.warnings)
        put(sysfs, f"{session}/state", "LOGGED_IN\n")
        await pool.refresh()
        assert not any("is lost" in line for line in pool.warnings)
