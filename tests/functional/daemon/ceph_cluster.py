"""The smallest Ceph cluster: one monitor, one manager, one OSD that keeps its objects in memory; cephx is on.

In network and mount namespaces of its own; its processes are children, and end with whoever made it.
"""

from __future__ import annotations

import base64
import os
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

TOOLS = ("ceph-mon", "ceph-osd", "ceph-mgr", "ceph", "rbd", "ceph-authtool", "monmaptool")
POOL, USER = "images", "kvik"
DEADLINE = 60.0  # seconds; about ten are usual
SETTINGS = """[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:3300,v1:127.0.0.1:6789]
public_addr = 127.0.0.1
auth_allow_insecure_global_id_reclaim = false
osd_pool_default_size = 1
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
memstore_device_bytes = 268435456
mon_data = {place}/mon
mgr_data = {place}/mgr
osd_data = {place}/osd
keyring = {place}/admin.keyring
log_file = {place}/$name.log
run_dir = {place}
admin_socket =
pid_file =
mgr_initial_modules =
mgr_stats_period = 1
mon_osd_min_in_ratio = 0
[mon]
keyring = {place}/mon/keyring
[osd]
keyring = {place}/osd/keyring
[mgr]
keyring = {place}/mgr/keyring
"""


class Cluster:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("mon", "mgr", "osd"):
            (place / name).mkdir(parents=True)
        self.settings = place / "ceph.conf"
        self.fsid = str(uuid.uuid4())
        self.settings.write_text(SETTINGS.format(fsid=self.fsid, place=place))

    def run(self, tool: str, *words: str, check: bool = True) -> str:
        argv = [tool, "--conf", str(self.settings), *words]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=DEADLINE)
        assert not check or done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout

    def start(self, name: str, tool: str, *words: str) -> None:
        with (self.place / f"{name}.said").open("ab") as said:
            argv = [tool, "--conf", str(self.settings), "-f", *words]
            self.processes[name] = subprocess.Popen(argv, stdout=said, stderr=said)

    def serve(self) -> None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        keys, admin, monmap = self.place / "mon.keys", self.place / "admin.keyring", self.place / "monmap"
        make = ("--create-keyring", "--gen-key", "-n")
        self.run("ceph-authtool", str(keys), *make, "mon.", "--cap", "mon", "allow *")
        self.run("ceph-authtool", str(admin), *make, "client.admin", *everything)
        self.run("ceph-authtool", str(keys), "--import-keyring", str(admin))
        addresses = "[v2:127.0.0.1:3300,v1:127.0.0.1:6789]"
        self.run("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", addresses, str(monmap))
        self.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monmap), "--keyring", str(keys))
        self.start("mon", "ceph-mon", "-i", "a")
        caps = ("mon", "allow profile mgr", "osd", "allow *", "mds", "allow *")
        (self.place / "mgr/keyring").write_text(self.run("ceph", "auth", "get-or-create", "mgr.x", *caps))
        self.start("mgr", "ceph-mgr", "-i", "x")
        identity = str(uuid.uuid4())
        self.run("ceph", "osd", "new", identity)
        caps = ("mon", "allow profile osd", "mgr", "allow profile osd", "osd", "allow *")
        (self.place / "osd/keyring").write_text(self.run("ceph", "auth", "get-or-create", "osd.0", *caps))
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", identity)
        self.start("osd", "ceph-osd", "-i", "0")
        self.run("ceph", "osd", "pool", "create", POOL, "8", "8")
        self.run("rbd", "pool", "init", POOL)
        self.run(
            "ceph", "auth", "get-or-create", f"client.{USER}", "mon", "profile rbd", "osd", f"profile rbd pool={POOL}"
        )

    def key(self, user: str = USER) -> bytes:
        """As a secret holds it: not in Base64."""
        return base64.b64decode(self.run("ceph", "auth", "get-key", f"client.{user}"))

    def counted(self) -> Any:
        """Wait until the manager has counted the pool."""
        end = time.monotonic() + DEADLINE
        while f'"{POOL}"' not in self.run("ceph", "--format", "json", "df"):
            assert time.monotonic() < end, self.run("ceph", "status")
            time.sleep(0.2)

    def image(self, name: str) -> bytes:
        """What is in one, by Ceph's own tool."""
        path = self.place / "exported"
        path.unlink(missing_ok=True)
        self.run("rbd", "export", "--no-progress", f"{POOL}/{name}", str(path))
        return path.read_bytes()

    def end(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def close(self) -> None:
        for name in list(self.processes):
            self.end(name)


def hide_host_settings() -> None:
    """Nobody shall find a ceph.conf that leads elsewhere."""
    if os.path.isdir("/etc/ceph"):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/etc/ceph"], check=True)
