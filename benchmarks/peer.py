"""Two daemons to compare: kvikd, and libvirtd in a mount and network namespace of its own.

libvirtd gets a private /dev without a kvm node and `namespaces = []`: with an unusable /dev/kvm it probes QEMU anew
at every look-up, which takes seconds and would make any comparison void. Both run real QEMU under software emulation.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src"

LIBVIRTD_NAMESPACE = r"""
set -eu
base=$1
mount --make-rprivate /
mkdir -p "$base/dev" && mount -t tmpfs none "$base/dev"
for node in null zero full random urandom tty; do
    touch "$base/dev/$node"
    mount --bind "/dev/$node" "$base/dev/$node"
done
mkdir "$base/dev/pts" "$base/dev/shm" "$base/dev/net"
if [ -e /dev/net/tun ]; then touch "$base/dev/net/tun"; mount --bind /dev/net/tun "$base/dev/net/tun"; fi
mount --bind /dev/pts "$base/dev/pts"; mount --bind /dev/shm "$base/dev/shm"
ln -s pts/ptmx "$base/dev/ptmx"; ln -s /proc/self/fd "$base/dev/fd"
mount --rbind "$base/dev" /dev
for directory in /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /run; do
    mkdir -p "$base/root$directory" "$directory"
    mount --bind "$base/root$directory" "$directory"
done
mkdir -p /var/lib/libvirt/qemu /run/libvirt "$base/sock"
printf "%s\n" "namespaces = []" 'user = "root"' 'group = "root"' 'security_driver = "none"' \
    "cgroup_controllers = []" 'stdio_handler = "file"' \
    >/etc/libvirt/qemu.conf
printf 'auth_unix_rw = "none"\nunix_sock_dir = "%s/sock"\n' "$base" >/etc/libvirt/libvirtd.conf
ip link set lo up
exec libvirtd -f /etc/libvirt/libvirtd.conf -p "$base/libvirtd.pid"
"""


@dataclass(frozen=True)
class Daemon:
    """A running daemon: `command` is its own client's argv prefix, such as `["virsh", "-c", URI]`."""

    name: str
    socket: Path
    pid: int
    command: list[str]
    environ: dict[str, str]

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run its own client once; returns standard output."""
        done = subprocess.run(
            [*self.command, *arguments], capture_output=True, text=True, env=self.environ, check=False, timeout=120
        )
        if check and done.returncode:
            raise RuntimeError(f"{self.name} {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def rss_mb(self) -> float:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("no VmRSS")


def wait_for_socket(path: Path, process: subprocess.Popen[bytes], log: Path, deadline: float = 20.0) -> float:
    """Seconds until something accepts on `path`."""
    start = time.perf_counter()
    while time.perf_counter() - start < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"daemon ended with status {process.returncode}: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return time.perf_counter() - start
        time.sleep(0.005)
    raise RuntimeError(f"nothing listens on {path}: {log.read_text()[-2000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def stop_daemon(daemon: Daemon) -> None:
    """End it by its process id and wait until it is gone; the machines and files stay."""
    os.kill(daemon.pid, signal.SIGTERM)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(daemon.pid, 0)


@contextlib.contextmanager
def libvirtd() -> Iterator[Daemon]:
    base = Path(tempfile.mkdtemp(prefix="peer-", dir="/tmp"))
    log = base / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--mount", "--net", "sh", "-c", LIBVIRTD_NAMESPACE, "sh", str(base)],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
    path = base / "sock/libvirt-sock"
    try:
        wait_for_socket(path, process, log)
        virsh = ["virsh", "-c", f"qemu+unix:///system?socket={path}"]
        daemon = Daemon("libvirtd", path, process.pid, virsh, dict(os.environ))
        daemon.run("version")  # the first call waits for the drivers to come up
        yield daemon
    finally:
        stop(process)
        shutil.rmtree(base, ignore_errors=True)


def kvikd_command(base: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    environ = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"},
        "KVIK_ROOT": str(base),
        "PYTHONPATH": str(SOURCE),
    }
    return [sys.executable, "-m", "kvik.daemon.main", "--system", "--root", str(base), *options], environ


@contextlib.contextmanager
def kvikd(*options: str, base: Path | None = None, own_network: bool = False) -> Iterator[Daemon]:
    """`own_network`: in a network namespace of its own, with loopback up."""
    own = base is None
    base = base or Path(tempfile.mkdtemp(prefix="kvik-", dir="/tmp"))
    command, environ = kvikd_command(base, *options)
    if own_network:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    log = base / "kvikd.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    path = base / "run/kvik/kvikd.sock"
    console_script = Path(sys.executable).parent / "kvik"
    kvik = [str(console_script)] if console_script.exists() else [sys.executable, "-m", "kvik.cli.main"]
    try:
        wait_for_socket(path, process, log)
        yield Daemon("kvikd", path, process.pid, [*kvik, "-c", f"kvik+unix:///system?socket={path}"], environ)
    finally:
        stop(process)
        if own:
            shutil.rmtree(base, ignore_errors=True)
