"""What a disk of type volume means: a file, a device, a directory or a place on the network."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from world import opened, pool_xml, volume_xml

from kvik.conf.devices.disk import DiskSource
from kvik.conf.storage_pool import load_pool
from kvik.conf.storage_volume import StorageVolume, VolumeFormat, VolumeTarget
from kvik.errors import ConfigError, ConfigUnsupported, NoStoragePool, NoStorageVolume, OperationInvalid, ResourceBusy
from kvik.storage import volumes
from kvik.storage.backend import Backend, Contents
from kvik.storage.pool import PoolObject
from kvik.storage.pools import Pools
from kvik.storage.resolve import resolve

AUTH = "<auth type='{type}' username='me'><secret usage='there'/></auth>"
ISCSI = f"""<pool type='{{type}}'><name>san</name><source><host name='192.0.2.1'/><device path='iqn.2026-01.org:t'/>
{AUTH.format(type="chap")}<initiator><iqn name='iqn.2026-01.org:me'/></initiator></source>
<target><path>/dev/disk/by-path</path></target></pool>"""
RBD = f"""<pool type='rbd'><name>ceph</name><source><host name='a'/><host name='b' port='6790'/><name>images</name>
{AUTH.format(type="ceph")}</source></pool>"""
GLUSTER = """<pool type='gluster'><name>g</name><source><host name='a'/><name>vol1</name>
<dir path='/sub/'/></source></pool>"""


def reference(pool: str = "p", volume: str = "v", **more: str) -> DiskSource:
    return replace(DiskSource(pool=pool, volume=volume), **more)


def active(pools: Pools, xml: str, *found: StorageVolume) -> None:
    """A pool whose server is not here, as it is once that was asked."""
    pool = PoolObject(pools, load_pool(xml), persistent=False)
    pool.adopt(Backend(pool.definition.copy()), Contents(volumes={volume.name: volume for volume in found}))
    pools.add(pool)


def volume(name: str, type_: str, path: str) -> StorageVolume:
    made = StorageVolume(name=name, target=VolumeTarget(path=path, format=VolumeFormat(type="raw")))
    return replace(made, type=type_)


async def test_a_file_is_a_file_with_what_else_the_reference_said(tmp_path: Path) -> None:
    async with opened(tmp_path) as pools:
        pool = await pools.create_xml(pool_xml("p", tmp_path / "p"), lambda backend: backend.build())
        await volumes.create(pools, pool, volume_xml("v", 4096, more="<target><format type='qcow2'/></target>"))
        given = reference(startup_policy="optional")
        found = resolve(pools, given)
        assert (found.type, found.format, found.pool_type) == ("file", "qcow2", "dir")
        assert (found.source.file, found.source.startup_policy) == (f"{tmp_path}/p/v", "optional")
        assert (found.source.pool, found.source.volume) == (None, None)
        assert (given.pool, given.volume, given.file) == ("p", "v", None)
        (tmp_path / "p/d").mkdir()
        await pool.refresh()
        directory = resolve(pools, reference(volume="d"))
        assert (directory.type, directory.source.dir) == ("dir", f"{tmp_path}/p/d")
        with pool.working("v", "it is being wiped"), pytest.raises(ResourceBusy, match="it is being wiped"):
            resolve(pools, reference())
        for wrong, error, text in (
            (reference("q"), NoStoragePool, "no storage pool with matching name 'q'"),
            (reference(volume="w"), NoStorageVolume, "no storage vol with matching name 'w'"),
            (reference(mode="host"), ConfigError, "mode is only valid when storage pool is of iscsi type"),
            (reference(volume="d", startup_policy="optional"), ConfigUnsupported, "only valid for 'file'"),
            (DiskSource(pool="p"), ConfigError, "names a pool and a volume"),
        ):
            with pytest.raises(error, match=text):
                resolve(pools, wrong)
        await pools.define(pool.xml())
        await pool.destroy()
        with pytest.raises(OperationInvalid, match="pool 'p' containing volume 'v' is not active"):
            resolve(pools, reference())


async def test_a_unit_of_an_iscsi_target_is_a_device_here_or_the_machines_own_session(tmp_path: Path) -> None:
    async with opened(tmp_path) as pools:
        unit = volume("unit:0:0:1", "block", "/dev/disk/by-path/x-lun-1")
        active(pools, ISCSI.format(type="iscsi"), unit)
        for mode in ({}, {"mode": "host"}):
            here = resolve(pools, reference("san", unit.name, **mode))
            assert (here.type, here.source.dev, here.format) == ("block", unit.path, "raw")
        direct = resolve(pools, reference("san", unit.name, mode="direct"))
        assert (direct.type, direct.source.protocol, direct.source.name) == (
            "network", "iscsi", "iqn.2026-01.org:t/1",
        )  # fmt: skip
        assert [(host.name, host.port) for host in direct.source.hosts] == [("192.0.2.1", "3260")]
        auth = direct.source.auth
        assert auth is not None and auth.secret is not None
        assert (auth.username, auth.secret.type, auth.secret.usage) == ("me", "iscsi", "there")


async def test_volumes_that_no_path_leads_to_are_reached_over_the_network(tmp_path: Path) -> None:
    async with opened(tmp_path) as pools:
        active(pools, RBD, volume("disk", "network", "images/disk"))
        active(pools, GLUSTER, volume("disk", "network", "gluster://a/vol1/sub/disk"), volume("d", "netdir", "x"))
        found = resolve(pools, reference("ceph", "disk"))
        assert (found.type, found.source.protocol, found.source.name) == ("network", "rbd", "images/disk")
        assert [(host.name, host.port) for host in found.source.hosts] == [("a", None), ("b", "6790")]
        assert found.source.auth is not None and found.source.auth.secret is not None
        assert found.source.auth.secret.type == "ceph"
        found = resolve(pools, reference("g", "disk"))
        assert (found.source.protocol, found.source.name) == ("gluster", "vol1/sub/disk")
        with pytest.raises(ConfigUnsupported, match="'d' of pool 'g' cannot be a disk"):
            resolve(pools, reference("g", "d"))
