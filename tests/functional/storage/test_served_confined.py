"""The process that shows a volume of a server as a file: what it has of the host, and what it cannot do whoever has
taken it over. Its block drivers are its own way to try: they open whatever they are told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvik.errors import HostError
from kvik.storage.served import Node, served

pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="needs qemu-storage-daemon"),
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs FUSE"),
]
SERVER = Node({"driver": "null-co", "size": 1 << 20, "read-zeroes": True})
NAMESPACES = ("user", "mnt", "ipc", "uts")
ATTEMPT = """
import ctypes, errno, os, sys
sys.path.insert(0, sys.argv[1])
from kvik.vmm.sandbox import own_root
import json, socket
own_root.enter(sys.argv[2], ["/usr", *(p for p in ("/lib", "/lib64", "/bin") if os.path.exists(p))], {"/key": b"x"})
own_root.restrict()
libc = ctypes.CDLL(None, use_errno=True)

def tried(work):
    try:
        work()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

print(json.dumps({
    "/etc/shadow": tried(lambda: open("/etc/shadow")),
    "/proc": tried(lambda: open("/proc/1/environ")),
    "/usr": tried(lambda: open("/usr/bin/kvik-was-here", "w")),
    "above": tried(lambda: open("/../etc/passwd")),
    "kill": tried(lambda: os.kill(int(sys.argv[3]), 0)),
    "ptrace": tried(lambda: call("ptrace", 16, int(sys.argv[3]), 0, 0)),
    "unshare": tried(lambda: call("unshare", 0x10000000)),
    "chroot": tried(lambda: os.chroot("/usr")),
    "writable again": tried(lambda: call("mount", b"", b"/usr", b"", ctypes.c_ulong(32 | 4096), b"")),
    "taken off": tried(lambda: call("umount2", b"/usr", 2)),
    "socket": tried(lambda: socket.socket().close()),
}))
"""


def children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def test_it_has_a_root_and_namespaces_of_its_own() -> None:
    before, mounts = set(children()), Path("/proc/self/mountinfo").read_text()
    with served(SERVER, writable=True) as fd:
        (pid,) = set(children()) - before
        assert os.fstat(fd).st_size == 1 << 20 and os.pread(fd, 4, 0) == bytes(4)
        for name in NAMESPACES:
            assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"), name
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 1 << 21  # CAP_SYS_ADMIN, in its namespaces
        assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
        there = set(os.listdir(f"/proc/{pid}/root/"))
        assert there <= {"bin", "dev", "etc", "lib", "lib32", "lib64", "nix", "gnu", "usr", "volume"}
        assert set(os.listdir(f"/proc/{pid}/root/dev")) <= {"fuse", "null", "random", "urandom"}
        assert not os.path.exists(f"/proc/{pid}/root/etc/passwd")
        assert Path("/proc/self/mountinfo").read_text() == mounts  # nobody else sees what it mounted
    assert set(children()) == before


@pytest.mark.parametrize(
    ("path", "writable", "why"),
    [
        ("/etc/shadow", False, "No such file"),
        ("/proc/1/environ", False, "No such file"),
        ("/usr/bin/env", True, "Read-only"),
    ],
    ids=["file", "proc", "program"],
)
def test_what_it_is_told_to_open_is_not_the_hosts(path: str, writable: bool, why: str) -> None:
    with (
        pytest.raises(HostError, match=why),
        served(Node({"driver": "file", "filename": path}), writable=writable),
    ):
        pass


def test_whoever_takes_it_over_gets_nowhere(tmp_path: Path) -> None:
    import json

    import kvik

    root = tmp_path / "root"
    root.mkdir()
    source = str(Path(kvik.__file__).parent.parent)
    victim = subprocess.Popen(["sleep", "600"])
    try:
        done = subprocess.run(
            [sys.executable, "-c", ATTEMPT, source, str(root), str(victim.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {
            "/etc/shadow": "ENOENT",
            "/proc": "ENOENT",
            "/usr": "EROFS",
            "above": "ENOENT",
            "kill": "ENOSYS",
            "ptrace": "ENOSYS",
            "unshare": "ENOSYS",
            "chroot": "ENOSYS",
            "writable again": "EPERM",
            "taken off": "EINVAL",
            "socket": "done",
        }
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
