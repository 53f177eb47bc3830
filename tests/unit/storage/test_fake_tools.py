"""Pool types whose tools are asked and whose answers are read: a script stands in for them (Ceph, Gluster, ZFS),
remembers images and answers in the documented forms. What is proved is what we ask and what we make of the answers; the
real ones are in tests/functional and tests/lab.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from world import opened

from kvik.conf.devices.disk import DiskSource, Host
from kvik.conf.storage_pool import load_pool
from kvik.conf.storage_state import PoolOrigin, PoolState
from kvik.conf.storage_volume import StorageVolume
from kvik.errors import ConfigUnsupported, HostError, ResourceBusy, StorageVolumeExists
from kvik.storage import volumes
from kvik.storage.backends import gluster, iscsi
from kvik.storage.backends import rbd as rbd_module
from kvik.storage.mounts import Mount
from kvik.storage.resolve import places
from kvik.storage.types import find_sources

MIB = 1 << 20
TOOL = """#!{python} -S
import json, os, sys
state = json.load(open({state!r}))
argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
state["calls"].append(argv)
def end(out="", code=0, err=""):
    json.dump(state, open({state!r}, "w"))
    sys.stdout.write(out); sys.stderr.write(err); sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)
{body}
"""
RBD = """
if "--keyfile" in argv:
    state["key"] = open(argv[argv.index("--keyfile") + 1]).read()
images, last = state["images"], argv[-1].partition("/")[2]
if argv[0] == "ceph":
    end(json.dumps({"stats": {"total_bytes": 1 << 40},
        "pools": [{"name": "images", "stats": {"bytes_used": 5 << 20, "max_avail": 1 << 30}}]}))
verb = next(word for word in argv if word in ("ls", "info", "create", "rm", "resize", "du"))
if verb == "ls":
    end(json.dumps([{"image": name, "size": size, "format": 2} for name, size in images.items()] +
        [{"image": name, "snapshot": "s", "size": size} for name, size in images.items()]))
if verb == "info":
    if last not in images: end(code=2, err="no such image")
    end(json.dumps({"name": last, "size": images[last], **state.get("counted", {})}))
if verb == "du":
    used = [{"name": last, "snapshot": "s", "used_size": 1 << 20}, {"name": last, "used_size": 4096}]
    end(json.dumps({"images": used}))
if verb == "create":
    if last in images: end(code=17, err="rbd: image exists")
    images[last] = int(argv[argv.index("--size") + 1].removesuffix("B"))
if verb == "resize":
    size = int(argv[argv.index("--size") + 1].removesuffix("B"))
    if size < images[last] and "--allow-shrink" not in argv: end(code=22, err="shrinking an image")
    images[last] = size
if verb == "rm":
    if last == "busy": end(code=16, err="image has watchers")
    del images[last]
end()
"""
ZFS = """
images, last = state["images"], argv[-1].rpartition("/")[2]
if argv[0] == "zpool": end()
if argv[1] == "list" and "used,available" in argv: end(f"{1 << 20}\\t{9 << 20}\\n")
if argv[1] == "list" and "volume" in argv:
    end("".join(f"tank/{name}\\t{size}\\t0\\t4096\\n" for name, size in images.items()))
if argv[1] == "get": end("8192\\n")
if argv[1] == "list": end("tank\\n" + "".join(f"tank/{name}\\n" for name in images))
if argv[1] == "create":
    os.mknod(state["zvol"] + "/" + last, 0o660 | 0o060000, os.makedev(7, 0))
    images[last] = int(argv[argv.index("-V") + 1])
if argv[1] == "set": images[last] = int(argv[2].partition("=")[2])
if argv[1] == "destroy":
    if last == "busy": end(code=1, err="cannot destroy 'tank/busy': dataset is busy")
    del images[last]
end()
"""
GLUSTER = """
end('<?xml version="1.0"?><cliOutput><opRet>0</opRet><volList><count>2</count><volume>a</volume><volume>b</volume>'
    '</volList></cliOutput>')
"""


class Tools:
    """`state` of the fakes; `calls` of them, each a list of words."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / "state.json"
        self.path.write_text(json.dumps({"calls": [], "images": {}, "zvol": str(directory)}))

    def make(self, body: str, *names: str) -> None:
        for name in names:
            tool = self.directory / name
            tool.write_text(TOOL.format(python=sys.executable, state=str(self.path), body=body))
            tool.chmod(0o755)

    @property
    def state(self) -> Any:
        return json.loads(self.path.read_text())


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    made = Tools(tmp_path)

    def find(name: str) -> str | None:
        path = tmp_path / name
        return str(path) if path.exists() else None

    for module in ("kvik.storage.tool", "kvik.host.tools"):
        monkeypatch.setattr(f"{module}.find_program", find)
    return made


RBD_POOL = """<pool type='rbd' xmlns:rbd='http://libvirt.org/schemas/storagepool/rbd/1.0'><name>ceph</name>
<source><host name='a'/><host name='2001:db8::1' port='6790'/><name>images</name>
<auth type='ceph' username='admin'><secret usage='ceph'/></auth></source>
<rbd:config_opts><rbd:option name='client_mount_timeout' value='5'/></rbd:config_opts></pool>"""


async def test_rbd_images_are_volumes_and_the_key_is_on_no_command_line(tools: Tools, tmp_path: Path) -> None:
    tools.make(RBD, "rbd", "ceph")
    async with opened(tmp_path / "root") as pools:
        pools.secret = lambda usage, which: b"the key itself"
        pool = await pools.create_xml(RBD_POOL)
        assert (pool.contents.capacity, pool.contents.available) == (1 << 40, 1 << 30)
        made = await volumes.create(pools, pool, "<volume><name>v</name><capacity>1000000</capacity></volume>")
        assert (made.type, made.path, made.size) == ("network", "images/v", 1000000)
        with pytest.raises(StorageVolumeExists):
            assert pool.backend is not None
            pool.backend.create_volume(made)
        await volumes.resize(pools, pool, "v", 4 * MIB)
        await volumes.resize(pools, pool, "v", 2 * MIB, shrink=True)
        await pool.refresh()
        assert [(volume.name, volume.size) for volume in pool.volumes()] == [("v", 2 * MIB)]
        sealed = "<target><encryption format='luks'><secret type='passphrase' usage='x'/></encryption></target>"
        with pytest.raises(ConfigUnsupported, match="images of pool 'ceph', of type rbd, cannot be made encrypted"):
            await volumes.create(pools, pool, f"<volume><name>s</name><capacity>1</capacity>{sealed}</volume>")
        await volumes.create(pools, pool, "<volume><name>busy</name><capacity>1</capacity></volume>")
        with pytest.raises(ResourceBusy, match="watchers"):
            await volumes.delete(pools, pool, "busy")
        await volumes.delete(pools, pool, "v")
        assert [volume.name for volume in pool.volumes()] == ["busy"]
    state = tools.state
    assert state["key"] == "dGhlIGtleSBpdHNlbGY="
    words = [word for call in state["calls"] for word in call]
    assert not any("dGhlIGtleSB" in word or "the key" in word for word in words)
    assert "a,[2001:db8::1]:6790" in words and "--client-mount-timeout=5" in words
    assert "--rados-osd-op-timeout=30" in words and all("--conf" in call for call in state["calls"])
    assert all(call[call.index("--") + 1].startswith("images/") for call in state["calls"] if "--" in call)


@pytest.mark.parametrize(
    ("counted", "taken"),
    [
        ({}, 4 * MIB),
        ({"features": ["layering"], "flags": []}, 4 * MIB),
        ({"features": ["object-map", "fast-diff"], "flags": []}, MIB + 4096),
        ({"features": ["object-map", "fast-diff"], "flags": ["fast diff invalid"]}, 4 * MIB),
    ],
    ids=["old", "without", "counted", "invalid"],
)
async def test_an_image_takes_what_the_cluster_has_counted(
    tools: Tools, tmp_path: Path, counted: dict[str, list[str]], taken: int
) -> None:
    """With its snapshots; where nobody has counted, all of it at most."""
    tools.make(RBD, "rbd", "ceph")
    async with opened(tmp_path / "root") as pools:
        pools.secret = lambda usage, which: b"the key itself"
        pool = await pools.create_xml(RBD_POOL)
        tools.path.write_text(json.dumps({**tools.state, "counted": counted}))
        made = await volumes.create(pools, pool, f"<volume><name>v</name><capacity>{4 * MIB}</capacity></volume>")
        assert made.allocated == taken


async def test_an_image_that_is_written_to_starts_no_machine_and_the_other_way_round(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def there(self: rbd_module.Backend, volume: StorageVolume, *, writable: bool = False) -> Iterator[int]:
        with (tmp_path / "image").open("w+b") as file:
            yield file.fileno()

    tools.make(RBD, "rbd", "ceph")
    monkeypatch.setattr(rbd_module.Backend, "opened", there)
    disk = DiskSource(protocol="rbd", name="images/v", hosts=[Host(name="2001:db8::1", port="6789")])
    other = DiskSource(protocol="rbd", name="images/v", hosts=[Host(name="elsewhere")])
    async with opened(tmp_path / "root") as pools:
        pools.secret = lambda usage, which: b"the key itself"
        pool = await pools.create_xml(RBD_POOL)
        await volumes.create(pools, pool, "<volume><name>v</name><capacity>1000000</capacity></volume>")
        async with volumes.open_bytes(pools, pool, "v", 0, 0, writable=True):
            with pytest.raises(
                ResourceBusy, match="images/v is volume 'v' of storage pool 'ceph': it is being written"
            ):
                pools.check_idle(places(disk), "images/v", writes=False)
            pools.check_idle(places(other), "images/v", writes=True)
        pools.check_idle(places(disk), "images/v", writes=True)
        pools.users = lambda: [(place, "web", True) for place in places(disk)]
        for change in (volumes.wipe(pools, pool, "v", 0), volumes.delete(pools, pool, "v")):
            with pytest.raises(ResourceBusy, match="machine 'web' is running from it"):
                await change
        pools.users = lambda: [(place, "web", True) for place in places(other)]
        await volumes.delete(pools, pool, "v")


async def test_an_answer_that_is_no_json_is_an_error(tools: Tools, tmp_path: Path) -> None:
    tools.make("end('nonsense')", "rbd", "ceph")
    async with opened(tmp_path / "root") as pools:
        pools.secret = lambda usage, which: b"x"
        with pytest.raises(HostError, match="rbd did not answer in JSON"):
            await pools.create_xml(RBD_POOL)
        assert not pools.list()
    tools.make("import sys; sys.stdout.write('[' * 100000); end()", "rbd")
    backend = rbd_module.Backend(load_pool(RBD_POOL), lambda usage, which: b"x")
    with pytest.raises(HostError, match="did not answer in JSON"):
        backend.refresh()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to make device nodes")
async def test_zfs_volumes(tools: Tools, tmp_path: Path) -> None:
    tools.make(ZFS, "zfs", "zpool")
    async with opened(tmp_path / "root") as pools:
        pool = await pools.define("<pool type='zfs'><name>z</name><source><name>tank</name></source></pool>")
        assert pool.definition.path == "/dev/zvol/tank"
        assert pool.definition.target is not None
        pool.definition.target.path = str(tmp_path)
        await pool.start()
        assert (pool.contents.capacity, pool.contents.allocation) == (10 * MIB, MIB)
        text = "<volume><name>{}</name><capacity>100000</capacity><allocation>0</allocation></volume>"
        made = await volumes.create(pools, pool, text.format("v"))
        assert (made.size, made.allocated, made.key) == (7 * 16384, 4096, "tank/v")
        assert stat.S_ISBLK(Path(made.path).stat().st_mode)
        assert any(call[:3] == ["zfs", "create", "-s"] for call in tools.state["calls"])
        await volumes.resize(pools, pool, "v", MIB)
        assert pool.volume("v").size == MIB
        await volumes.create(pools, pool, text.format("busy"))
        with pytest.raises(ResourceBusy, match="dataset is busy"):
            await volumes.delete(pools, pool, "busy")
        await volumes.delete(pools, pool, "v")
        assert [volume.name for volume in pool.volumes()] == ["busy"]


async def test_gluster_volumes_are_files_of_a_mount_that_machines_open_over_the_network(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.make(GLUSTER, "gluster")
    tools.make("state['mounted'] = argv; end()", "mount", "mount.glusterfs")
    tools.make("state['mounted'] = None; end()", "umount")

    def mounted_at(path: str) -> Mount | None:
        return Mount("0:1", path, "fuse.glusterfs", "a:/b") if tools.state.get("mounted") else None

    monkeypatch.setattr("kvik.storage.mounts.mounted_at", mounted_at)
    monkeypatch.setattr(gluster.Backend, "below", tmp_path / "mounts")
    found = find_sources("gluster", "<source><host name='h'/></source>")
    assert found.count("<source>") == 2 and "<name>b</name>" in found and "<host name='h'/>" in found
    async with opened(tmp_path / "root") as pools:
        source = "<source><host name='h'/><name>b</name><dir path='/sub'/></source>"
        xml = f"<pool type='gluster'><name>g</name>{source}</pool>"
        pool = await pools.create_xml(xml)
        assert "--source" in tools.state["mounted"] and "h:/b/sub" in tools.state["mounted"]
        made = await volumes.create(pools, pool, "<volume><name>v</name><capacity>4096</capacity></volume>")
        assert (made.type, made.path) == ("network", "gluster://h/b/sub/v")
        assert "<target>" not in pool.xml()  # where it is mounted is nobody's business
        await volumes.resize(pools, pool, "v", 8192)
        assert (pool.volume("v").size, pool.volume("v").type) == (8192, "network")
        await volumes.wipe(pools, pool, "v", 0)
        await volumes.delete(pools, pool, "v")
        await pool.destroy()
        assert tools.state["mounted"] is None


ISCSI = """
if "--op" in argv and argv[argv.index("--op") + 1] == "delete": state["images"].pop("record", None)
end()
"""


async def test_what_a_killed_login_wrote_down_of_a_target_is_taken_away(tools: Tools, tmp_path: Path) -> None:
    """No session is there, but open-iscsi's record is, with the password."""
    tools.make(ISCSI, "iscsiadm")
    xml = """<pool type='iscsi'><name>san</name><source><host name='a'/><device path='iqn.2026-01.org:t'/>
    <auth type='chap' username='me'><secret usage='chap'/></auth></source>
    <target><path>/dev/disk/by-path</path></target></pool>"""
    async with opened(tmp_path / "root") as pools:
        pool = await pools.define(xml)
        origin = PoolOrigin(state="starting", boot=pools.store.boot, persistent=True)
        pools.store.save_state(PoolState(pool=pool.definition.copy(), origin=origin))
    state = tools.state
    tools.path.write_text(json.dumps({**state, "images": {"record": 1}}))
    async with opened(tmp_path / "root") as pools:
        assert not pools.lookup_name("san").is_active
        assert pools.warnings == ["storage pool 'san' was starting when the daemon was stopped: it is inactive"]
    assert not tools.state["images"]
    assert tools.state["calls"][-1][3:] == ["--targetname", "iqn.2026-01.org:t", "--op", "delete"]


async def test_a_kernel_without_iscsi_is_said_and_is_no_host_without_targets(
    tools: Tools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tools.make("end(code=21, err='iscsiadm: No portals found')", "iscsiadm")
    monkeypatch.setattr(iscsi, "SYSFS", tmp_path)
    wanted = "<source><host name='a'/></source>"
    with pytest.raises(HostError, match="this kernel has no iSCSI") as refused:
        find_sources("iscsi", wanted)
    assert refused.value.remedy == "modprobe iscsi_tcp"
    (tmp_path / "class/iscsi_transport").mkdir(parents=True)
    assert "<source>" not in find_sources("iscsi", wanted)
