"""Runs in namespaces of its own (network, mounts, processes), which end with it: a Ceph cluster, a daemon with a pool
on it, and a machine whose disks are there."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from functional.daemon.ceph_cluster import POOL, USER, Cluster, hide_host_settings
from functional.daemon.conftest import AGENT, CONSOLE, Kvikd, Make
from functional.daemon.test_changes import sees, shell
from kvik.guest.tiny import tiny
from kvik.paths import Paths
from lab.kernel import cache_directory

MIB = 1 << 20
SECRET = "<secret ephemeral='no' private='yes'><usage type='ceph'><name>{}</name></usage></secret>"
POOL_XML = """<pool type='rbd' xmlns:rbd='http://libvirt.org/schemas/storagepool/rbd/1.0'><name>{name}</name>
<source><host name='127.0.0.1'/><name>{pool}</name>
<auth type='ceph' username='{user}'><secret usage='{usage}'/></auth></source>
<rbd:config_opts><rbd:option name='client_mount_timeout' value='3'/></rbd:config_opts></pool>"""
NETWORK_DISK = """<disk type='network' device='disk'><driver name='qemu' type='raw'/>
<auth username='{user}'><secret type='ceph' usage='right'/></auth>
<source protocol='rbd' name='{pool}/{name}'><host name='127.0.0.1' port='6789'/></source>
<target dev='vda' bus='virtio'/></disk>"""
VOLUME_DISK = """<disk type='volume' device='disk'><driver name='qemu' type='raw'/><source pool='ceph' volume='{name}'/>
<target dev='vdb' bus='virtio'/></disk>"""


class Scene:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.cluster = Cluster(root / "ceph")
        self.began = time.monotonic()

    def step(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:5.1f} s: {text}", flush=True)

    def good(self, *words: str) -> str:
        done = self.kvikd.kvik(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def bad(self, wanted: str, *words: str) -> None:
        done = self.kvikd.kvik(*words)
        assert done.returncode != 0 and wanted in done.stderr, (words, wanted, done.stdout, done.stderr)

    def secret(self, usage: str, value: bytes) -> None:
        document = self.root / f"{usage}.xml"
        document.write_text(SECRET.format(usage))
        uuid = self.good("secret-define", str(document)).split()[1]
        file = self.root / f"{usage}.key"
        file.write_bytes(base64.b64encode(value))
        self.good("secret-set-value", uuid, "--file", str(file))
        file.unlink()

    def pool(self, name: str, usage: str, user: str = USER, pool: str = POOL) -> str:
        document = self.root / f"{name}.pool"
        document.write_text(POOL_XML.format(name=name, pool=pool, user=user, usage=usage))
        return str(document)

    def play(self) -> None:
        hide_host_settings()
        self.cluster.serve()
        self.step("the cluster is there")
        self.kvikd = Kvikd()
        try:
            self.access()
            self.volumes()
            self.machine()
            self.silence()
        except BaseException:
            print(self.kvikd.messages(), flush=True)
            raise
        finally:
            for domain in self.kvikd.connection.domains(1):
                domain.destroy()
            assert self.kvikd.end() == 0
            shutil.rmtree(self.kvikd.root, ignore_errors=True)
            self.cluster.close()

    def access(self) -> None:
        key = self.cluster.key()
        self.secret("right", key)
        self.secret("wrong", key[:-4] + bytes(4))
        self.bad(f"does not let user '{USER}'", "pool-create", self.pool("ceph", "wrong"))
        self.bad("does not let user 'nobody'", "pool-create", self.pool("ceph", "right", user="nobody"))
        self.bad("No such file or directory", "pool-create", self.pool("ceph", "right", pool="missing"))
        self.good("pool-define", self.pool("ceph", "right"))
        self.good("pool-start", "ceph")
        self.step("keys and users")

    def taken(self, name: str) -> int:
        found = re.search(r"<allocation unit='bytes'>(\d+)<", self.good("vol-dumpxml", name, "ceph"))
        assert found is not None
        return int(found[1])

    def volumes(self) -> None:
        cluster, good = self.cluster, self.good
        good("vol-create-as", "ceph", "one", "8000000B")
        self.bad("exists already", "vol-create-as", "ceph", "one", "1M")
        assert "<capacity unit='bytes'>8000000</capacity>" in good("vol-dumpxml", "one", "ceph")
        assert self.taken("one") == 0  # nothing was written to it
        good("vol-resize", "one", "8M", "--pool", "ceph")
        good("vol-resize", "one", "16M", "--pool", "ceph")
        good("vol-resize", "one", "8M", "--pool", "ceph", "--shrink")
        data = os.urandom(3 * MIB) + bytes(4 * MIB) + os.urandom(MIB)
        (self.root / "local").write_bytes(data)
        good("vol-upload", "one", str(self.root / "local"), "--pool", "ceph")
        assert cluster.image("one") == data
        assert self.taken("one") == 8 * MIB  # whole objects, of 4 MiB each
        good("vol-clone", "one", "two", "--pool", "ceph")
        assert hashlib.sha256(cluster.image("two")).digest() == hashlib.sha256(data).digest()
        good("vol-download", "two", str(self.root / "back"), "--pool", "ceph", "--sparse")
        assert (self.root / "back").read_bytes() == data
        # From Ceph into a file of another format, and back.
        (self.root / "files").mkdir()
        good("pool-create-as", "files", "dir", "--target", str(self.root / "files"))
        document = self.root / "v.xml"
        form = "<volume><name>{}</name><capacity>{}</capacity><target><format type='{}'/></target></volume>"
        document.write_text(form.format("disk.qcow2", len(data), "qcow2"))
        good("vol-create-from", "files", str(document), "two", "--inputpool", "ceph")
        document.write_text(form.format("three", len(data), "raw"))
        good("vol-create-from", "ceph", str(document), "disk.qcow2", "--inputpool", "files")
        assert cluster.image("three") == data
        self.step("made, resized, written, read, copied")
        good("vol-wipe", "two", "--pool", "ceph")
        assert cluster.image("two") == bytes(len(data))
        good("vol-wipe", "three", "--pool", "ceph", "--algorithm", "trim")
        assert cluster.image("three") == bytes(len(data))
        assert self.taken("three") == 0
        cluster.run("rbd", "create", "--size", "1", f"{POOL}/theirs")  # by somebody else
        cluster.run("rbd", "snap", "create", "--no-progress", f"{POOL}/theirs@s")
        good("pool-refresh", "ceph")
        assert sorted(line.split()[0] for line in good("vol-list", "ceph").splitlines()[2:] if line.strip()) == [
            "one", "theirs", "three", "two",
        ]  # fmt: skip
        self.bad("has snapshots", "vol-delete", "theirs", "--pool", "ceph")
        cluster.run("rbd", "snap", "purge", "--no-progress", f"{POOL}/theirs")
        good("vol-delete", "theirs", "--pool", "ceph")
        good("vol-delete", "three", "--pool", "ceph")
        cluster.counted()
        good("pool-refresh", "ceph")
        figures = dict(line.split(":", 1) for line in good("pool-info", "ceph", "--bytes").splitlines() if ":" in line)
        sizes = {name: int(figures[name].split()[0]) for name in ("Capacity", "Allocation", "Available")}
        assert sizes["Capacity"] == 256 * MIB and 0 < sizes["Available"] <= 256 * MIB, figures
        assert sizes["Allocation"] < 64 * MIB, figures
        self.step("wiped, found, deleted, measured")

    def machine(self) -> None:
        image = tiny(Paths.system(cache_directory() / "tiny"))
        make = Make(self.kvikd, image)
        disks = NETWORK_DISK.format(user=USER, pool=POOL, name="one") + VOLUME_DISK.format(name="two")
        domain = make.ready("m", CONSOLE + AGENT + disks)
        self.step("a machine runs from them")
        data = (self.root / "local").read_bytes()
        sees(domain, "cat /proc/partitions", "8192 vdb")
        found = shell(domain, "busybox sha256sum /dev/vda")
        assert found.split()[:1] == [hashlib.sha256(data).hexdigest()], found
        shell(domain, "printf 'the guest wrote this' | dd of=/dev/vdb bs=512 seek=8 conv=sync,fsync")
        assert self.cluster.image("two")[4096:].startswith(b"the guest wrote this\0")
        for name in ("one", "two"):
            for verb in ("vol-delete", "vol-wipe"):
                self.bad("machine 'm' is running from it", verb, name, "--pool", "ceph")
        assert self.cluster.image("one") == data
        domain.destroy()
        make.clean()
        words = b"".join(path.read_bytes() for path in (self.kvikd.root / "var/log").rglob("*.log"))
        assert base64.b64encode(self.cluster.key()) not in words
        self.step("and the guest's bytes are in the cluster")

    def silence(self) -> None:
        """The only monitor is gone: an error, not a wait without end."""
        self.cluster.end("mon")
        begun = time.monotonic()
        self.bad("does not answer (monitors 127.0.0.1)", "pool-refresh", "ceph")
        self.bad("does not answer (monitors 127.0.0.1)", "vol-create-as", "ceph", "late", "1M")
        assert "one" in self.good("vol-list", "ceph")  # from memory
        assert time.monotonic() - begun < 60
        self.good("pool-destroy", "ceph")
        self.bad("does not answer (monitors 127.0.0.1)", "pool-start", "ceph")
        self.step("without a monitor")


def main(root: Path) -> None:
    scene: Any = Scene(root)
    scene.play()
    print("well")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
