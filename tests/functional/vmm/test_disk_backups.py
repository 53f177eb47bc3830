"""Checkpoints and backups of a kvik-vmm that runs: real kvik-blks, and a tiny guest that writes when it is told to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from disk_world import Death, Killed, World, checked, daemons, disk, image, kill, soon, take, told, two, word
from guests import needs_kvm
from tiny_kernel import IDLE

from kvik.conf.enums import DomainBlockJobType, DomainJobType, DomainState
from kvik.conf.enums import DomainCheckpointDeleteFlags as Delete
from kvik.errors import CheckpointInconsistent, ConfigUnsupported, KvikError, OperationUnsupported, ResourceBusy
from kvik.manager.backup import begin, job
from kvik.manager.checkpoints import create, delete, sizes
from kvik.manager.domain import DomainObject
from kvik.manager.store import Store
from kvik.qmp.aio import QmpConnection

pytestmark = [pytest.mark.functional, needs_kvm]

CHECKPOINT = "<domaincheckpoint><name>{}</name></domaincheckpoint>"


def document(root: Path, name: str, since: str = "", *, disks: str = "ab", kind: str = "qcow2") -> str:
    """Disk vda goes to NAME.a, vdb to NAME.b."""
    given = "".join(
        f"<disk name='vd{one}' type='file'><driver type='{kind}'/><target file='{root}/{name}.{one}'/></disk>"
        for one in disks
    )
    incremental = f"<incremental>{since}</incremental>" if since else ""
    return f"<domainbackup>{incremental}<disks>{given}</disks></domainbackup>"


async def push(domain: DomainObject, xml: str, checkpoint: str = "") -> None:
    await begin.begin(domain, xml, CHECKPOINT.format(checkpoint) if checkpoint else None, 0)
    await over(domain)


async def ended(domain: DomainObject, death: Death | None = None) -> None:
    await soon(lambda: (domain.run is not None and domain.run.backup is None) or (death is not None and death.came))


def pulled(root: Path, since: str = "", *, tls: str = "") -> str:
    given = "".join(f"<disk name='vd{one}' type='file'><scratch file='{root}/scratch.{one}'/></disk>" for one in "ab")
    incremental = f"<incremental>{since}</incremental>" if since else ""
    server = f"<server transport='unix' socket='{root}/nbd'{tls}/>"
    return f"<domainbackup mode='pull'>{incremental}{server}<disks>{given}</disks></domainbackup>"


async def over(domain: DomainObject, outcome: DomainJobType = DomainJobType.COMPLETED) -> None:
    await ended(domain)
    assert domain.completed_job is not None and domain.completed_job[0] == outcome, domain.completed_job


def rest(path: Path, below: Path) -> None:
    subprocess.run(["qemu-img", "rebase", "-q", "-u", "-F", "qcow2", "-b", str(below), str(path)], check=True)


async def test_full_and_incremental_backups_of_all_disks(world: World) -> None:
    paths, code, xml = two(world)
    domain = await world.start(code, xml)
    root = world.root
    await told(world, b"up")
    await told(world, b"oneone")
    await push(domain, document(root, "full"), "c1")
    assert [word(root / f"full.{one}") for one in "ab"] == [b"one"] * 2
    assert domain.completed_job is not None and domain.completed_job[1]["disk_total"] == 2 * (8 << 20)
    await told(world, b"twotwo")
    await push(domain, document(root, "i1", "c1"), "c2")
    # the machine is snapshot, and its checkpoints go on
    await take(domain, "s1")
    await told(world, b"threethree")
    await push(domain, document(root, "i2", "c2"), "c3")
    shown = await sizes.with_sizes(domain, domain.checkpoints.get("c1"))
    assert shown.disks is not None and [item.size for item in shown.disks.disks] == [65536, 65536]
    assert domain.checkpoints.current == "c3" and domain.checkpoints.parent("c3") == "c2"
    for one in "ab":
        for name, below, then in (("i1", "full", b"two"), ("i2", "i1", b"three")):
            rest(root / f"{name}.{one}", root / f"{below}.{one}")
            checked(root / f"{name}.{one}")
            assert word(root / f"{name}.{one}") == then
    # the next daemon knows them, and the next run of the machine, too
    domain = await world.next_manager()
    await told(world, b"fourfour")
    await push(domain, document(root, "i3", "c3"))
    await domain.destroy()
    for path in (*paths, *root.glob("[ab].s1")):
        checked(path)
    await domain.start()
    await push(domain, document(root, "i4", "c3"))
    for one in "ab":
        rest(root / f"i4.{one}", root / f"i2.{one}")
        assert word(root / f"i4.{one}") == b"four"
    await delete.delete(domain, "c1", Delete.CHILDREN)
    assert not len(domain.checkpoints)
    await domain.destroy()
    assert b"bitmaps" not in subprocess.run(["qemu-img", "info", paths[0]], check=True, capture_output=True).stdout


async def test_disks_that_can_have_none_are_named(world: World) -> None:
    raw, served = world.root / "a.raw", world.root / "d.raw"
    for path in (raw, served):
        path.write_bytes(bytes(1 << 20))
    theirs = image(world.root / "c.qcow2")
    xml = disk(raw, "raw") + disk(image(world.root / "b.qcow2"), slot=6, dev="vdb")
    xml += disk(theirs, slot=7, dev="vdc", name="qemu-storage-daemon")
    xml += disk(served, "raw", slot=8, dev="vdd", name="kvik-blk")
    domain = await world.start(IDLE, xml)
    for one, words in (
        ("a", "kvik-vmm reads and writes itself, as it does raw"),
        ("c", "served by qemu-storage-daemon"),
    ):
        with pytest.raises(OperationUnsupported, match=f"disk vd{one} .*{words}") as refused:
            await begin.begin(domain, document(world.root, "no", disks=one), None, 0)
        assert f"<disk name='vd{one}' backup='no'/>" in refused.value.remedy
    only = "<domaincheckpoint><disks><disk name='{}'/></disks></domaincheckpoint>"
    with pytest.raises(ConfigUnsupported, match="storage type raw"):
        await create.create(domain, only.format("vda"), 0)
    with pytest.raises(OperationUnsupported, match="served by qemu-storage-daemon"):
        await create.create(domain, only.format("vdc"), 0)
    assert not list(world.root.glob("no.*")) and not len(domain.checkpoints)
    await push(domain, document(world.root, "yes", disks="bd", kind="raw"))
    assert (world.root / "yes.d").stat().st_size == 1 << 20


async def test_what_a_killed_process_did_not_write_is_no_checkpoint(world: World) -> None:
    _, code, xml = two(world)
    domain = await world.start(code, xml)
    await told(world, b"up")
    await create.create(domain, CHECKPOINT.format("c1"), 0)
    await told(world, b"oneone")
    await kill(world, domain)
    with pytest.raises(CheckpointInconsistent, match="inconsistent"):
        await push(domain, document(world.root, "no", "c1"), "c2")
    await told(world, b"twotwo")
    assert domain.state == DomainState.RUNNING and not list(world.root.glob("no.*")) and len(domain.checkpoints) == 1
    await domain.destroy()
    domain = await world.start(code, xml)
    with pytest.raises(CheckpointInconsistent, match="inconsistent") as refused:
        await push(domain, document(world.root, "i1", "c1"))
    assert "full backup" in refused.value.remedy
    await push(domain, document(world.root, "i1", "c1", disks="b"))  # that one was written
    await delete.delete(domain, "c1", 0)
    await push(domain, document(world.root, "full"), "c1")


async def tool(*words: str) -> str:
    """While the daemon, which is this process, goes on."""
    made = await asyncio.create_subprocess_exec(*words, stdout=-1, stderr=-2)
    said = (await made.communicate())[0].decode()
    assert made.returncode == 0, (words, said)
    return said


async def test_all_disks_are_pulled_from_one_socket_as_they_were(world: World) -> None:
    _, code, xml = two(world)
    domain = await world.start(code, xml)
    root = world.root
    await told(world, b"up")
    await create.create(domain, CHECKPOINT.format("c1"), 0)
    await told(world, b"oneone")
    with pytest.raises(KvikError):
        await begin.begin(domain, pulled(root, tls=" tls='yes'"), None, 0)
    await begin.begin(domain, pulled(root, "c1"), CHECKPOINT.format("c2"), 0)
    assert domain.run is not None and domain.run.backup is not None
    await told(world, b"twotwo")
    with pytest.raises(ResourceBusy):
        await take(domain, "s1")
    shown = await domain.block_job_info("vda")
    assert shown is not None and shown.type == DomainBlockJobType.BACKUP
    listed = await tool("qemu-nbd", "--list", "-k", str(root / "nbd"))
    assert all(f"export: 'vd{one}'" in listed and f"qemu:dirty-bitmap:backup-vd{one}" in listed for one in "ab"), listed
    for one in "ba":
        address = f"driver=nbd,server.type=unix,server.path={root}/nbd,export=vd{one}"
        await tool("qemu-img", "convert", "-O", "qcow2", "--image-opts", address, f"{root}/pulled.{one}")
        assert word(root / f"pulled.{one}") == b"one"
        dirty = f"{address},x-dirty-bitmap=qemu:dirty-bitmap:backup-vd{one}"
        changed = json.loads(await tool("qemu-img", "map", "--output=json", "--image-opts", dirty))
        assert [(item["start"], item["length"]) for item in changed if not item["data"]] == [(0, 65536)]
    # the next daemon goes on with it
    domain = await world.next_manager()
    assert domain.run is not None and domain.run.backup is not None
    await told(world, b"threethree")
    await tool("qemu-img", "convert", "-O", "qcow2", f"nbd+unix:///vda?socket={root}/nbd", str(root / "again"))
    assert word(root / "again") == b"one"
    await job.abort(domain)
    await over(domain)
    assert not list(root.glob("scratch.*")) and not (root / "nbd").exists() and "c2" in domain.checkpoints.all
    # a process that is killed ends it, and not its machine
    await begin.begin(domain, pulled(root), None, 0)
    os.kill(daemons(domain)[1][0], signal.SIGKILL)
    await over(domain, DomainJobType.FAILED)
    assert domain.state == DomainState.RUNNING and not list(root.glob("scratch.*"))


@pytest.mark.parametrize("mode", ["push", "pull"])
async def test_the_daemon_is_killed_at_each_command_of_a_backup(
    mode: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is: the guest goes on, there is a backup with its checkpoint, or nothing of either."""
    paths, code, xml = two(world, words=(b"x",) * 40)
    domain = await world.start(code, xml)
    await told(world, b"up")
    whole: list[bool] = []
    for number in range(60):
        death = Death(number)
        name = f"n{number}"
        with monkeypatch.context() as patch:
            patch.setattr(QmpConnection, "execute", death.commands(QmpConnection.execute))
            patch.setattr(Store, "run", death.files(Store.run))
            try:
                xml = pulled(world.root) if mode == "pull" else document(world.root, name)
                await begin.begin(domain, xml, CHECKPOINT.format(name), 0)
                if mode == "pull":
                    await job.abort(domain)
                await ended(domain, death)
            except (Killed, KvikError):
                assert death.came
            await world.bury(domain)
        domain = await world.after_death()
        if domain.run is not None and domain.run.backup is not None and mode == "pull":
            await job.abort(domain)
        await ended(domain)
        assert domain.state == DomainState.RUNNING, number
        whole.append(name in domain.checkpoints.all)
        left = list(world.root.glob(f"{name}.*"))
        assert not domain.checkpoints.pending and len(left) == (2 * whole[-1] if mode == "push" else 0), number
        assert not list(world.root.glob("scratch.*")) and not (world.root / "nbd").exists(), number
        await told(world, b"xx")
        if not death.came:
            break
        if whole[-1]:
            await delete.delete(domain, name, 0)
    else:
        pytest.fail("the backup never came to its end")
    assert not all(whole) and any(whole[:-1])
    await domain.destroy()
    for path in paths:
        checked(path)
