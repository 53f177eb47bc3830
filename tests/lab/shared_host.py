"""One of two hosts that share storage. Runs inside its lab: python -m lab.shared_host NAME, with NAME a or b.

a has the NFS server, and runs a machine; b tries to run it, too. They speak of where they are by files on OCFS2. At the
end b dies while its machine has an image on GFS2, which a goes on with.
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
from lab import gfs2_cluster

PATIENCE = 300.0  # seconds for anything, by a lab's clock, which may be fast; the test has its own deadline
OCFS2, GFS2, NFS = Path("/srv/ocfs2"), Path("/srv/gfs2"), Path("/srv/nfs")
POOLS = {"ocfs2": OCFS2, "gfs2": GFS2, "nfs": NFS}
DISKS = ("/dev/vda", "/dev/vdb")  # that both have: for OCFS2, for GFS2
FLAGS = OCFS2 / "flags"
HOSTS = ("a", "b")
ADDRESSES = ("10.7.0.1", "10.7.0.2")
MIB = 1 << 20
CLUSTER = "cluster:\n\tname = kvik\n\theartbeat_mode = local\n\tnode_count = 2\n"
NODE = "node:\n\tname = {}\n\tcluster = kvik\n\tnumber = {}\n\tip_address = {}\n\tip_port = 7777\n\n"
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
    """For OCFS2 the kernel's own cluster stack, of which no program goes on running; for GFS2 DLM."""
    Path("/etc/ocfs2").mkdir(exist_ok=True)
    nodes = "".join(NODE.format(HOSTS[n], n, address) for n, address in enumerate(ADDRESSES))
    Path("/etc/ocfs2/cluster.conf").write_text(nodes + CLUSTER)
    sh(
        f"""
        echo {me} >/proc/sys/kernel/hostname
        ip link set lo up
        card=$(ls /sys/class/net | grep -v lo)
        ip link set $card up
        ip addr add {ADDRESSES[HOSTS.index(me)]}/24 dev $card
        mount -t configfs configfs /sys/kernel/config 2>/dev/null || true
        o2cb register-cluster kvik
        mkdir -p {OCFS2} {GFS2} {NFS}
        """
    )
    gfs2_cluster.join(sh, tuple(zip(HOSTS, ADDRESSES, strict=True)))


def make_file_systems() -> None:
    sh(f"mkfs.ocfs2 -q -N 2 -b 4K -C 4K -J size=4M -F --cluster-stack=o2cb --cluster-name=kvik {DISKS[0]} </dev/null")
    gfs2_cluster.make(sh, DISKS[1])


def mount(kind: str, disk: str) -> subprocess.Popen[str]:
    return subprocess.Popen(["mount", "-t", kind, disk, str(POOLS[kind])], stderr=subprocess.PIPE, text=True)


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
        make_file_systems()
        Path("/run/lab/formatted").touch()
    # b is told by the test, which sees both hosts' shares.
    until("the file systems are made", Path("/run/lab/formatted").exists)
    mounting = {kind: mount(kind, disk) for kind, disk in zip(("ocfs2", "gfs2"), DISKS, strict=True)}
    if me == "a":
        nfs_server()
    assert daemon.wait(PATIENCE) == 0
    said("daemon")
    connection = connect("kvik:///system")
    for kind, process in mounting.items():
        assert process.wait(PATIENCE) == 0, process.stderr and process.stderr.read()
        said(f"{kind} mounted")
    if me == "a":
        FLAGS.mkdir()
        tell("served")
    wait_for("served")
    for name in ("ocfs2", "gfs2"):
        target = f"<target><path>{POOLS[name]}</path></target>"
        storage.create_pool(connection, f"<pool type='dir'><name>{name}</name>{target}</pool>")
    storage.create_pool(
        connection,
        "<pool type='netfs'><name>nfs</name><source><host name='10.7.0.1'/><dir path='/'/><format type='nfs'/>"
        f"<protocol ver='4.2'/></source><target><path>{NFS}</path></target></pool>",
    )
    for name in POOLS:
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
        assert "is in use by another process" in str(error) and "on any host that shares it" in str(error), error
    else:
        raise AssertionError(f"not refused: {disks}")


def own(*places: Path) -> list[str]:
    return [disk(place, "own", f"vd{letter}") for letter, place in zip("abc", places, strict=False)]


def together() -> list[str]:
    """Disks that machines of both hosts may have: one that they share, and one that they only read."""
    wanted = (("both", "<shareable/>"), ("read", "<readonly/>"))
    places = [(place, *each) for place in (OCFS2, GFS2) for each in wanted]
    return [disk(place, name, f"vd{dev}", more) for dev, (place, name, more) in zip("defg", places, strict=True)]


def a() -> None:
    connection = host("a")
    volume = "<volume><name>{}</name><capacity>{}</capacity><allocation>0</allocation></volume>"
    for pool, names in (("ocfs2", ("own", "both", "read")), ("gfs2", ("own", "both", "read")), ("nfs", ("own",))):
        for name in names:
            storage.pool(connection, pool).create_volume(volume.format(name, MIB))
    said("volumes")
    start(connection, "machine", *own(*POOLS.values()), *together())
    tell("runs")
    wait_for("looked")
    # Whatever becomes of it, what it held is free when it has ended.
    (pid,) = map(int, sh("pgrep -x qemu-system-x86").split())
    os.kill(pid, signal.SIGKILL)
    until("it is gone", lambda: not connection.domains())
    tell("ended")
    wait_for("taken")
    for place in POOLS.values():
        refused(connection, *own(place))
    tell("over")
    # b dies. Nobody has what it had open before it is fenced and its journal was played back.
    until("b is to be fenced", Path(gfs2_cluster.FENCE).exists)
    said("fence asked for")
    until("b's machine goes on here", lambda: went_on(connection))
    assert (GFS2 / "synced").read_text() == "by b"
    said("went on")


def went_on(connection: Connection) -> bool:
    try:
        start(connection, "machine", disk(GFS2, "own", "vda"))
    except KvikError as error:
        assert "is in use" in str(error) or "does not answer" in str(error), error
        return False
    return True


def b() -> None:
    connection = host("b")
    wait_for("runs")
    for name in POOLS:
        storage.pool(connection, name).refresh()
    for place in POOLS.values():
        refused(connection, *own(place))
    for place in (OCFS2, GFS2):
        refused(connection, disk(place, "own", "vda", "<readonly/>"))
        refused(connection, disk(place, "both", "vda"))  # the other shares it, this one does not
        refused(connection, disk(place, "read", "vda"))
    said("machines refused")
    for name in POOLS:
        volume = storage.pool(connection, name).volume("own")
        for change in (volume.wipe, volume.delete):
            try:
                change()
            except KvikError as error:
                assert "is in use by another process" in str(error), error
            else:
                raise AssertionError(f"{change} of a volume that the other host's machine has open")
    said("changes refused")
    start(connection, "beside", *together())
    tell("looked")
    wait_for("ended")
    start(connection, "machine", *own(*POOLS.values()))
    tell("taken")
    wait_for("over")
    with (GFS2 / "synced").open("w") as file:
        file.write("by b")
        file.flush()
        os.fsync(file.fileno())
    Path("/run/lab/dying").touch()
    time.sleep(PATIENCE)  # until the power is gone


if __name__ == "__main__":
    try:
        {"a": a, "b": b}[sys.argv[1]]()
        print("well")
    finally:
        Path("/run/lab/ended").touch()
