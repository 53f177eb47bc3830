"""Runs in namespaces of its own (network, mounts, processes), which end with it: a Gluster server, and a pool on it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from kvik.errors import HostError, ResourceBusy
from kvik.image.lock import lock_image
from kvik.paths import Paths
from kvik.storage import volumes
from kvik.storage.backends import gluster
from kvik.storage.mounts import mounted_at
from kvik.storage.pool import PoolObject
from kvik.storage.pools import Pools
from kvik.storage.types import find_sources

MIB = 1 << 20
ADDRESS = "10.3.0.1"
POOL = f"""<pool type='gluster'><name>g</name><source><host name='{ADDRESS}'/><name>v</name><dir path='/'/></source>
</pool>"""
VOLUME = "<volume><name>{}</name><capacity>{}</capacity><allocation>0</allocation>{}</volume>"
PLACES = ("/var/lib/glusterd", "/var/log/glusterfs", "/run/gluster")


def sh(script: str) -> str:
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def serve() -> None:
    sh(f"ip link set lo up; ip addr add {ADDRESS}/24 dev lo")
    for place in PLACES:
        sh(f"mkdir -p {place}; mount -t tmpfs tmpfs {place}")
    sh("mkdir /run/gluster/brick; glusterd --log-level WARNING >/dev/null 2>&1")
    end = time.monotonic() + 30
    while True:
        try:
            sh(f"gluster --mode=script volume create v {ADDRESS}:/run/gluster/brick force")
            break
        except AssertionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    sh("gluster --mode=script volume start v")


async def main(root: Path) -> None:
    serve()
    found = find_sources("gluster", f"<source><host name='{ADDRESS}'/></source>")
    assert "<name>v</name>" in found and f"<host name='{ADDRESS}'/>" in found, found
    gluster.Backend.below = root / "mounts"
    pools = Pools(Paths.system(root))
    await pools.open()
    pool = await pools.create_xml(POOL)
    assert pool.backend is not None and (pool.contents.shared, pool.contents.lockless) == ("glusterfs", "")
    (remark,) = pool.remarks()
    assert remark.startswith("other hosts may use it at the same time (glusterfs): a machine that runs keeps"), remark
    for name, kind in (("r", "raw"), ("q", "qcow2")):
        made = await volumes.create(pools, pool, VOLUME.format(name, MIB, f"<target><format type='{kind}'/></target>"))
        assert (made.type, made.size, made.path) == ("network", MIB, f"gluster://{ADDRESS}/v/{name}"), made
    async with volumes.open_bytes(pools, pool, "r", 0, 0, writable=True) as opened:
        os.pwrite(opened.fd, b"there", 4096)
    copied = await volumes.copy(
        pools, pool, VOLUME.format("c", MIB, "<target><format type='qcow2'/></target>"), pool, "r"
    )
    assert copied.format == "qcow2"
    async with volumes.open_bytes(pools, pool, "r", 0, 0, writable=False) as opened:
        assert os.pread(opened.fd, 5, 4096) == b"there"
    await volumes.resize(pools, pool, "q", 2 * MIB)
    assert pool.volume("q").size == 2 * MIB
    await another_client(pools, pool, root)
    await volumes.delete(pools, pool, "q")
    # The next daemon finds it; and without the server the pool can be given up.
    other = Pools(Paths.system(root))
    await other.open()
    again = other.lookup_name("g")
    assert again.is_active and sorted(each.name for each in again.volumes()) == ["c", "r"]
    await again.destroy()
    assert mounted_at(pool.backend.files.document.path) is None  # type: ignore[attr-defined]  # of this backend
    sh("gluster --mode=script volume stop v")
    try:
        await other.create_xml(POOL)
    except HostError as error:
        print(error)
    else:
        raise AssertionError("a pool of a volume that is not served")
    print("well")


async def another_client(pools: Pools, pool: PoolObject, root: Path) -> None:
    """Another mount of the same volume is what another host has: it holds an image, and is respected."""
    (root / "there").mkdir()
    sh(f"mount -t glusterfs {ADDRESS}:/v {root}/there")
    fd = os.open(root / "there/r", os.O_RDWR)
    lock_image(fd, "r", write=True)
    for change in (volumes.wipe(pools, pool, "r", 0), volumes.delete(pools, pool, "r")):
        try:
            await change
        except ResourceBusy as error:
            assert "is in use by another process" in str(error), error
        else:
            raise AssertionError("changed in another's hands")
    os.close(fd)
    end = time.monotonic() + 30
    while True:
        try:
            await volumes.wipe(pools, pool, "r", 0)
            break
        except ResourceBusy:  # FUSE tells its server of a close a moment later
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
    assert (root / "there/r").read_bytes() == bytes(MIB)
    sh(f"umount {root}/there")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
