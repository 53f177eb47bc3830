"""Runs in namespaces of its own (network, mounts, processes), which end with it: an iSCSI target in user space (tgt),
and a pool whose volumes are its units."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

from kvik.conf.enums import StorageVolWipeAlgorithm as Algorithm
from kvik.errors import HostError, KvikError, OperationUnsupported
from kvik.paths import Paths
from kvik.storage import volumes
from kvik.storage.pool import PoolObject
from kvik.storage.pools import Pools
from kvik.storage.types import find_sources

MIB = 1 << 20
TARGET, INITIATOR = "iqn.2026-01.org.example:disks", "iqn.2026-01.org.example:me"
PASSWORD = b"twelve-or-more"
FILES = Path("/run/tgtd")
PORTAL = f"<host name='127.0.0.1'/><initiator><iqn name='{INITIATOR}'/></initiator>"
POOL = f"""<pool type='iscsi-direct'><name>own</name><source><host name='127.0.0.1'/><device path='{TARGET}'/>
<auth type='chap' username='me'><secret usage='chap'/></auth><initiator><iqn name='{INITIATOR}'/></initiator></source>
</pool>"""


def sh(script: str) -> str:
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def serve() -> None:
    FILES.mkdir(exist_ok=True)
    sh(f"ip link set lo up; mount -t tmpfs tmpfs {FILES}; tgtd --iscsi portal=127.0.0.1:3260 >/dev/null 2>&1")
    lines = [f"--op new --mode target --tid 1 -T {TARGET}"]
    for number in (1, 2):
        (FILES / f"unit{number}").write_bytes(b"somebody's data " * (4 * MIB // 16))
        lines.append(f"--op new --mode logicalunit --tid 1 --lun {number} -b {FILES}/unit{number}")
    lines += [
        "--op bind --mode target --tid 1 -I ALL",
        f"--op new --mode account --user me --password {PASSWORD.decode()}",
        "--op bind --mode account --tid 1 --user me",
    ]
    # tgtd answers a moment after it has gone to the background.
    ready = (
        "for i in $(seq 50); do tgtadm --lld iscsi --op show --mode system >/dev/null 2>&1 && break; sleep 0.1; done\n"
    )
    sh(ready + "\n".join(f"tgtadm --lld iscsi {line}" for line in lines))


async def refused(call: Awaitable[object], kind: type[KvikError], text: str) -> None:
    try:
        await call
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"not refused: {text}")


async def bytes_there_and_back(pools: Pools, pool: PoolObject, name: str) -> None:
    """Read, written, copied to a file, and wiped with another pattern, all as for any other volume."""
    unit = FILES / f"unit{name[-1]}"
    before = unit.read_bytes()
    async with volumes.open_bytes(pools, pool, name, 0, 0, writable=False) as opened:
        assert opened.end == len(before) and os.pread(opened.fd, MIB, 2 * MIB) == before[2 * MIB : 3 * MIB]
        assert PASSWORD not in b"".join(path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline"))
    async with volumes.open_bytes(pools, pool, name, 0, 0, writable=True) as opened:
        os.pwrite(opened.fd, b"there", 3 * MIB)
        os.fdatasync(opened.fd)
        assert unit.read_bytes() == before[: 3 * MIB] + b"there" + before[3 * MIB + 5 :]
        os.pwrite(opened.fd, before[3 * MIB : 3 * MIB + 5], 3 * MIB)
    (FILES / "copies").mkdir()
    files = await pools.create_xml(
        f"<pool type='dir'><name>f</name><target><path>{FILES}/copies</path></target></pool>"
    )
    for kind in ("raw", "qcow2"):
        document = f"<volume><name>{kind}</name><target><format type='{kind}'/></target></volume>"
        copied = await volumes.copy(pools, files, document, pool, name)
        assert (copied.size, copied.format) == (len(before), kind)
    assert (FILES / "copies/raw").read_bytes() == before
    async with volumes.open_bytes(pools, files, "qcow2", 0, 0, writable=False) as opened:
        assert os.pread(opened.fd, 4, 0) == b"QFI\xfb"
    await files.destroy()
    await volumes.wipe(pools, pool, name, Algorithm.RANDOM)
    assert b"somebody's data" not in unit.read_bytes()
    unit.write_bytes(before)


HOLDER = """import json, sys, time
from kvik.storage.served import Node, served
with served(Node(json.loads(sys.argv[1]), 'password-secret', sys.stdin.buffer.readline())) as fd:
    print('open', flush=True)
    time.sleep(600)
"""


def killed_with_one_open() -> None:
    """Nothing is left of it: no process, no mount, no file."""
    node = {"driver": "iscsi", "transport": "tcp", "portal": "127.0.0.1:3260", "target": TARGET, "lun": 1}
    options = json.dumps({**node, "initiator-name": INITIATOR, "user": "me"})
    words = [sys.executable, "-c", HOLDER, options]
    environ = {**os.environ, "TMPDIR": str(FILES)}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write(PASSWORD)
        holder.stdin.close()
        assert holder.stdout.readline() == b"open\n" and servers() == 1
        holder.kill()
    end = time.monotonic() + 30
    while servers():
        assert time.monotonic() < end, "still there"
        time.sleep(0.02)
    assert "kvik-volume" not in Path("/proc/self/mountinfo").read_text()
    assert not [*FILES.glob("kvik-volume-*")]


def servers() -> int:
    """Processes of this namespace that show a volume. What has ended, and nobody reaps, has no command line."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    return sum(b"qemu-storage-daemon\0" in line for line in lines)


async def main(root: Path) -> None:
    serve()
    tempfile.tempdir = str(FILES)
    assert f"<device path='{TARGET}'/>" in find_sources("iscsi-direct", f"<source>{PORTAL}</source>")
    pools = Pools(Paths.system(root))
    await pools.open()
    password = b"wrong-password"
    pools.secret = lambda usage, which: password
    await refused(pools.create_xml(POOL), HostError, "")
    password = PASSWORD
    pool = await pools.create_xml(POOL)
    found = [(each.name, each.size, each.type) for each in pool.volumes()]
    assert found == [("unit:0:0:1", 4 * MIB, "network"), ("unit:0:0:2", 4 * MIB, "network")], found
    # Wiped through a session of its own; the other unit is left alone.
    wiping = asyncio.ensure_future(volumes.wipe(pools, pool, "unit:0:0:1", 0))
    seen = b""
    while not wiping.done():
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen += process.read_bytes() + (process.parent / "environ").read_bytes()
            except OSError:
                continue
        await asyncio.sleep(0.01)
    await wiping
    assert PASSWORD not in seen
    assert b"qemu-img" in seen
    assert (FILES / "unit1").read_bytes() == bytes(4 * MIB)
    assert (FILES / "unit2").read_bytes().startswith(b"somebody's data somebody")
    await bytes_there_and_back(pools, pool, "unit:0:0:2")
    await refused(volumes.delete(pools, pool, "unit:0:0:2"), OperationUnsupported, "deleting volumes")
    password = b"wrong-password"
    await refused(volumes.wipe(pools, pool, "unit:0:0:2", 0), HostError, "")
    assert (FILES / "unit2").read_bytes().startswith(b"somebody's data somebody")

    async def read() -> None:
        async with volumes.open_bytes(pools, pool, "unit:0:0:2", 0, 0, writable=False):
            raise AssertionError("opened with a wrong password")

    await refused(read(), HostError, "cannot be opened here")
    assert not [*Path(tempfile.gettempdir()).glob("kvik-volume-*")], "left behind"
    killed_with_one_open()
    await pool.destroy()
    print("well")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
