"""Runs inside the lab, whose kernel has ZFS and which has udev: pools of type zfs, on /dev/vda and in a data set."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

from kvik.errors import HostError, KvikError, OperationInvalid, ResourceBusy, StoragePoolBuilt, StorageVolumeExists
from kvik.paths import Paths
from kvik.storage import encryption, volumes
from kvik.storage.pools import Pools
from lab.storage_scenario import MIB, SECRET, VOLUME, WORK, again, building, bytes_there_and_back, refused, sh

POOL = "<pool type='zfs'><name>{}</name><source><name>{}</name>{}</source></pool>"
SEALED = (
    "<target><encryption format='luks'><secret type='passphrase' uuid='55806c7d-8e93-456f-829b-607d8c198300'/>"
    "</encryption></target>"
)


async def whole_pool(pools: Pools) -> None:
    encryption.iteration_ms = 10
    pools.secret = lambda usage, which: SECRET
    pool = await pools.define(POOL.format("tank", "tank", "<device path='/dev/vda'/>"))
    await refused(pool.start(), HostError, "there is no ZFS pool 'tank'")
    sh("mkfs.ext4 -q -F /dev/vda")
    await refused(pool.build(building()), StoragePoolBuilt, "already contains ext4")
    await pool.build(building(overwrite=True))
    await pool.start()
    assert 300 * MIB < pool.contents.capacity < 512 * MIB, pool.contents
    one = await volumes.create(pools, pool, VOLUME.format("one", 32 * MIB, ""))
    assert (one.path, one.key, one.size, one.allocated) == ("/dev/zvol/tank/one", "tank/one", 32 * MIB, 32 * MIB), one
    assert pool.contents.allocation >= 32 * MIB
    thin = await volumes.create(pools, pool, VOLUME.format("thin", 1 << 40, "<allocation>0</allocation>"))
    assert thin.size == 1 << 40 and thin.allocated < MIB, thin
    await refused(volumes.create(pools, pool, VOLUME.format("one", MIB, "")), StorageVolumeExists, "exists already")
    await refused(volumes.create(pools, pool, VOLUME.format("big", 1 << 40, "")), HostError, "out of space")
    assert sorted(sh("zfs list -H -o name -t volume").split()) == ["tank/one", "tank/thin"]
    await bytes_there_and_back(pools, pool, "one")
    await volumes.resize(pools, pool, "one", 48 * MIB)
    assert pool.volume("one").size == 48 * MIB
    await volumes.resize(pools, pool, "one", 16 * MIB, shrink=True)
    assert pool.volume("one").size == 16 * MIB
    odd = await volumes.create(pools, pool, VOLUME.format("odd", 1000000, ""))
    assert 1000000 <= odd.size < MIB, odd
    copy = await volumes.copy(pools, pool, VOLUME.format("two", MIB, ""), pool, "one")
    assert copy.size == 16 * MIB
    sealed = await volumes.create(pools, pool, VOLUME.format("sealed", 8 * MIB, SEALED))
    assert sealed.physical is not None and 8 * MIB <= sealed.size < sealed.physical.value, sealed
    await volumes.resize(pools, pool, "sealed", 16 * MIB)
    assert 16 * MIB <= pool.volume("sealed").size < 17 * MIB, pool.volume("sealed")
    sh(f"mkfs.ext4 -q -F /dev/zvol/tank/two && mkdir -p {WORK}/m && mount /dev/zvol/tank/two {WORK}/m")
    await refused(volumes.wipe(pools, pool, "two", 0), ResourceBusy, "in use")
    await refused(volumes.delete(pools, pool, "two"), ResourceBusy, "busy")
    sh(f"umount {WORK}/m")
    sh("zfs snapshot tank/two@s")
    await refused(volumes.delete(pools, pool, "two"), OperationInvalid, "has snapshots")
    sh("zfs destroy tank/two@s; zfs create tank/set")
    await pool.refresh()
    assert sorted(pool.contents.volumes) == ["odd", "one", "sealed", "thin", "two"]
    await again(pools, pool)
    await pool.destroy()
    assert Path("/dev/zvol/tank/one").exists()  # as in libvirt: the ZFS pool itself is not exported
    await refused(pool.delete(), OperationInvalid, "holds 'tank/")
    await pool.start()
    for name in ("odd", "one", "sealed", "thin", "two"):
        await volumes.delete(pools, pool, name)
        assert not Path(f"/dev/zvol/tank/{name}").exists()
    await pool.destroy()


async def data_set(pools: Pools) -> None:
    """In a part of a ZFS pool of somebody's, with room of its own."""
    sh("zfs set quota=64M tank/set")
    pool = await pools.define(POOL.format("part", "tank/set", ""))
    await pool.start()
    assert pool.contents.capacity <= 64 * MIB, pool.contents
    made = await volumes.create(pools, pool, VOLUME.format("v", 4 * MIB, ""))
    assert made.path == "/dev/zvol/tank/set/v"
    await refused(volumes.create(pools, pool, VOLUME.format("w", 128 * MIB, "")), HostError, "out of space")
    await volumes.delete(pools, pool, "v")
    await pool.destroy()
    await refused(pool.build(building()), KvikError, "built of devices")
    sh("zfs destroy tank/set")
    await pools.lookup_name("tank").delete()
    assert subprocess.run(["zpool", "list", "tank"], check=False, capture_output=True).returncode != 0


async def main() -> None:
    pools = Pools(Paths.system(WORK / "root-zfs"))
    pools.patience = pools.glance = 60.0
    await pools.open()
    await whole_pool(pools)
    await data_set(pools)
    pools.close()
    print("well")


if __name__ == "__main__":
    WORK.mkdir(exist_ok=True)
    asyncio.run(main())
