"""One of two hosts that share storage. Runs inside its lab: python -m lab.shared_host NAME, with NAME a or b.

a has the NFS server, and runs a machine; b tries to run it, too. They speak of where they are by files on OCFS2.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kvik.client import Connection, connect, storage
from kvik.errors import KvikError

PATIENCE = 300.0  # seconds for anything, by a lab's clock, which may be fast; the test has its own deadline
OCFS2, NFS = Path("/srv/ocfs2"), Path("/srv/nfs")
FLAGS = OCFS2 / "flags"
HOSTS = ("a", "b")
MIB = 1 << 20
CLUSTER = "cluster:\n\tname = kvik\n\theartbeat_mode = local\n\tnode_count = 2\n"
NODE = "node:\n\tname = {}\n\tcluster = kvik\n\tnumber = {}\n\tip_address = 10.7.0.{}\n\tip_port = 7777\n\n"
DISK = (
    "<disk type='file'><driver name='qemu' type='raw'/><source file='{path}'/><target dev='{dev}' bus='virtio'/>"
    "{more}</disk>"
)
MACHINE = (
    "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><os><type machine='q35'>hvm</type></os>"
    "<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}</devices></domain>"
)
START_PAUSED = 1  # virDomainCreateFlags


def said(what: str) -> None:
    with open("/run/lab/progress", "a") as file:
        file.write(f"{time.monotonic():.1f} {what}\n")


def sh(script: str) -> str:
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def until(what: str, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.2)


def tell(flag: str) -> None:
    (FLAGS / flag).touch()
    said(flag)


def wait_for(flag: str) -> None:
    until(flag, (FLAGS / flag).exists)


def cluster(me: str) -> None:
    """OCFS2 on the disk that both have, by the kernel's own cluster stack: no program of it goes on running."""
    number = HOSTS.index(me)
    Path("/etc/ocfs2").mkdir(exist_ok=True)
    nodes = "".join(NODE.format(name, n, n + 1) for n, name in enumerate(HOSTS))
    Path("/etc/ocfs2/cluster.conf").write_text(nodes + CLUSTER)
    sh(
        f"""
        echo {me} >/proc/sys/kernel/hostname
        ip link set lo up
        card=$(ls /sys/class/net | grep -v lo)
        ip link set $card up
        ip addr add 10.7.0.{number + 1}/24 dev $card
        mount -t configfs configfs /sys/kernel/config 2>/dev/null || true
        o2cb register-cluster kvik
        mkdir -p {OCFS2} {NFS}
        """
    )


def make_file_system() -> None:
    sh("mkfs.ocfs2 -q -N 2 -b 4K -C 4K -J size=4M -F --cluster-stack=o2cb --cluster-name=kvik /dev/vda </dev/null")


def nfs_server() -> None:
    sh(
        """
        mkdir -p /srv/export; mount -t tmpfs tmpfs /srv/export; chmod 777 /srv/export
        mkdir -p /var/lib/nfs/v4recovery /var/lib/nfs/sm /run/rpcbind /run/sendsigs.omit.d
        touch /var/lib/nfs/etab /var/lib/nfs/rmtab
        mount -t nfsd nfsd /proc/fs/nfsd 2>/dev/null || true
        rpcbind -w
        exportfs -o rw,no_root_squash,insecure,no_subtree_check,fsid=0 '*:/srv/export'
        rpc.mountd
        rpc.nfsd --no-nfs-version 3 2
        echo Y >/proc/fs/nfsd/v4_end_grace
        """
    )


def host(me: str) -> Connection:
    """A daemon, and its pools on what is shared."""
    daemon = subprocess.Popen([sys.executable, "-m", "kvik.daemon", "--system", "--detach"])
    cluster(me)
    said("cluster")
    if me == "a":
        make_file_system()
        Path("/run/lab/formatted").touch()
    # b is told by the test, which sees both hosts' shares.
    until("the file system is made", Path("/run/lab/formatted").exists)
    mounting = subprocess.Popen(["mount", "-t", "ocfs2", "/dev/vda", str(OCFS2)], stderr=subprocess.PIPE, text=True)
    if me == "a":
        nfs_server()
    assert daemon.wait(PATIENCE) == 0
    said("daemon")
    connection = connect("kvik:///system")
    assert mounting.wait(PATIENCE) == 0, mounting.stderr and mounting.stderr.read()
    said("mounted")
    if me == "a":
        FLAGS.mkdir()
        tell("served")
    wait_for("served")
    storage.create_pool(connection, f"<pool type='dir'><name>ocfs2</name><target><path>{OCFS2}</path></target></pool>")
    storage.create_pool(
        connection,
        "<pool type='netfs'><name>nfs</name><source><host name='10.7.0.1'/><dir path='/'/><format type='nfs'/>"
        f"<protocol ver='4.2'/></source><target><path>{NFS}</path></target></pool>",
    )
    for name in ("ocfs2", "nfs"):
        (line,) = storage.pool(connection, name).messages()
        assert line.startswith(f"other hosts may use it at the same time ({name}): a machine that runs keeps"), line
    said("pools")
    return connection


def disk(place: Path, name: str, dev: str, more: str = "") -> str:
    return DISK.format(path=place / name, dev=dev, more=more)


def start(connection: Connection, name: str, *disks: str) -> None:
    connection.create(MACHINE.format(name=name, disks="".join(disks)), START_PAUSED)
    said(f"{name} runs")


def refused(connection: Connection, *disks: str) -> None:
    try:
        start(connection, "refused", *disks)
    except KvikError as error:
        assert "is in use by another process" in str(error), error
    else:
        raise AssertionError(f"not refused: {disks}")


TOGETHER = ("<shareable/>", "<readonly/>")


def a() -> None:
    connection = host("a")
    volume = "<volume><name>{}</name><capacity>{}</capacity><allocation>0</allocation></volume>"
    for name in ("own", "both", "read"):
        storage.pool(connection, "ocfs2").create_volume(volume.format(name, MIB))
    storage.pool(connection, "nfs").create_volume(volume.format("own", MIB))
    start(
        connection,
        "machine",
        disk(OCFS2, "own", "vda"),
        disk(NFS, "own", "vdb"),
        disk(OCFS2, "both", "vdc", "<shareable/>"),
        disk(OCFS2, "read", "vdd", "<readonly/>"),
    )
    tell("runs")
    wait_for("looked")
    # Whatever becomes of it, what it held is free when it has ended.
    (pid,) = map(int, sh("pgrep -x qemu-system-x86").split())
    os.kill(pid, signal.SIGKILL)
    until("it is gone", lambda: not connection.domains())
    tell("ended")
    wait_for("taken")
    refused(connection, disk(OCFS2, "own", "vda"))
    refused(connection, disk(NFS, "own", "vda"))
    tell("over")


def b() -> None:
    connection = host("b")
    wait_for("runs")
    for name in ("ocfs2", "nfs"):
        storage.pool(connection, name).refresh()
    refused(connection, disk(OCFS2, "own", "vda"))
    refused(connection, disk(NFS, "own", "vda"))
    refused(connection, disk(OCFS2, "own", "vda", "<readonly/>"))
    refused(connection, disk(OCFS2, "both", "vda"))  # the other shares it, this one does not
    refused(connection, disk(OCFS2, "read", "vda"))
    for name in ("ocfs2", "nfs"):
        volume = storage.pool(connection, name).volume("own")
        for change in (volume.wipe, volume.delete):
            try:
                change()
            except KvikError as error:
                assert "is in use by another process" in str(error), error
            else:
                raise AssertionError(f"{change} of a volume that the other host's machine has open")
    start(connection, "beside", *(disk(OCFS2, n, d, m) for n, d, m in zip(("both", "read"), ("vda", "vdb"), TOGETHER)))
    tell("looked")
    wait_for("ended")
    start(connection, "machine", disk(OCFS2, "own", "vda"), disk(NFS, "own", "vdb"))
    tell("taken")
    wait_for("over")


if __name__ == "__main__":
    {"a": a, "b": b}[sys.argv[1]]()
    print("well")
