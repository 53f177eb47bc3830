"""The programs that bring a host's interfaces up at boot, run for real: ifupdown, systemd-networkd, NetworkManager,
netplan. None of them is installed, for that would configure the machine that runs the tests: their Debian packages are
unpacked into a cache, and laid over /usr in a mount namespace, in the network namespace of a `Host`.

    tools = RealTools(host, "ifupdown")
    tools.boot()                # the program reads the host's configuration and brings up what it says
    host.network("br0")         # what came of it
    tools.shut_down()           # as a host that is switched off: nothing of it is left
    tools.serve()               # the program as the service that it is, and a kvikd whose host this is
"""

from __future__ import annotations

import fcntl
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from functional.network.bridged_host import Host, until
from kvik.client import Connection, connect
from kvik.errors import HostError, NotFound
from kvik.guest.debs import Apt, deb_members
from lab.kernel import cache_directory

# What each needs that a system without it has not; libraries of the distribution's base are the machine's own.
PACKAGES = {
    "ifupdown": ("ifupdown", "bridge-utils"),
    "NetworkManager": (
        "network-manager",
        "libnm0",
        "libndp0",
        "libteamdctl0",
        "libmm-glib0",
        "libbluetooth3",
        "dbus-daemon",
    ),
    "netplan": ("netplan.io", "libnetplan0"),
    "systemd-networkd": ("systemd", "libsystemd-shared", "dbus-daemon", "dbus-bin"),
}
# A system bus where root may all, and nobody else is.
BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
<allow send_type="method_call"/></policy></busconfig>"""
DHCP = "dnsmasq -d -C /dev/null --port=0 --interface=lan0 --dhcp-range=192.0.2.100,192.0.2.200 --user=root"
NETWORKD = "/lib/systemd/systemd-networkd"
# Where each has its files; they are the host's own there, and nothing of this machine's.
PLACES = {
    "ifupdown": "etc/network",
    "NetworkManager": "etc/NetworkManager/system-connections",
    "netplan": "etc/netplan",
    "systemd-networkd": "etc/systemd/network",
}
# /etc is a fresh one. /sys is read-only, by which networkd and NetworkManager see that there is no udev to wait for;
# NetworkManager writes bridges' settings below /sys/devices. $1: the unpacked packages, $2: the host's configuration.
SETUP = """
set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/etc /mnt/var
cp -a /etc/passwd /etc/group /etc/nsswitch.conf /etc/alternatives /etc/ld.so.cache /mnt/etc/
mount -t tmpfs tmpfs /var/log
mount -t tmpfs tmpfs /var/cache
echo 0123456789abcdef0123456789abcdef > /mnt/etc/machine-id
cp -a "$1"/etc/. /mnt/etc/
mkdir -p "/mnt/$3" "$2/$3"
cp -a "/mnt/$3/." "$2/$3/"
mount --bind "$2/$3" "/mnt/$3"
mount --rbind /mnt/etc /etc
mount -t overlay -o ro,lowerdir="$1/usr:/usr" overlay /usr
mount -t tmpfs tmpfs /var/lib
mkdir -p /var/lib/NetworkManager /run/network /run/NetworkManager /run/systemd/network /run/systemd/netif/links \
    /run/systemd/netif/leases /run/systemd/netif/lldp
chown -R systemd-network: /run/systemd/netif
mkdir -p /mnt/sys
mount -t sysfs sysfs /mnt/sys
mount -o remount,bind,ro /sys
mount --bind /mnt/sys/devices /sys/devices
echo ready
exec sleep infinity
"""


def unpacked(kind: str) -> Path:
    """The packages of one of `PACKAGES`, unpacked below the lab's cache; skips where they cannot be had."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{kind}-tools"
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        if shutil.which("apt-get") is None:
            pytest.skip(f"no apt: {kind} is taken from Debian packages")
        apt = Apt(cache / "apt")
        try:
            if not apt.has_lists:
                apt.update()
            files = apt.download(apt.show(PACKAGES[kind]).values())
        except (HostError, NotFound) as error:
            pytest.skip(f"{kind} cannot be had: {error}")
        temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".new-"))
        temporary.chmod(0o755)
        for name in ("etc", "usr"):
            (temporary / name).mkdir()
        for file in files:
            for member in deb_members(file.read_bytes()):
                top = member.path.partition("/")[0]  # /bin, /lib and /sbin are links into /usr
                place = temporary / (f"usr/{member.path}" if top in ("bin", "lib", "sbin") else member.path)
                place.parent.mkdir(parents=True, exist_ok=True)
                if member.link:
                    place.symlink_to(member.link)
                else:
                    place.write_bytes(member.data)
                    place.chmod(member.mode)
        temporary.rename(target)
        for file in files:
            file.unlink()
    return target


class RealTools:
    """One of them for one host. `kind`: a key of `PACKAGES`."""

    def __init__(self, host: Host, kind: str) -> None:
        self.host, self.kind = host, kind
        place = PLACES[kind]
        words = ["unshare", "--mount", "sh", "-c", SETUP, "sh", str(unpacked(kind)), str(host.root), place]
        self.holder = subprocess.Popen(host.inside(*words), stdout=subprocess.PIPE)
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"ready\n"
        self.service: subprocess.Popen[bytes] | None = None
        self.others: list[subprocess.Popen[bytes]] = []

    def run(self, line: str) -> str:
        done = subprocess.run(self._inside(*shlex.split(line)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def _inside(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.holder.pid), "-m", "-n", *command]

    def boot(self, waited: str) -> None:
        """Bring up what the configuration says; back when interface `waited` is."""
        if self.kind == "ifupdown":
            self.run("ifup -a --force")  # lo is up already
            return
        if self.kind == "NetworkManager":
            self.run("NetworkManager --configure-and-quit=initrd --no-daemon")
            return
        if self.kind == "netplan":
            self.run("/usr/libexec/netplan/generate")
        log = (self.host.root / "networkd.log").open("ab")
        with log:
            self.service = subprocess.Popen(self._inside(NETWORKD), stderr=log)
        links = Path(f"/proc/{self.holder.pid}/root/run/systemd/netif/links")

        def configured() -> bool:
            assert self.service is not None
            assert self.service.poll() is None, self.messages()
            if not self.host.exists(waited):
                return False
            index = self.host.run(f"cat /sys/class/net/{waited}/ifindex").strip()
            state = links / index
            return state.exists() and "ADMIN_STATE=configured" in state.read_text()

        until(configured, f"networkd has configured {waited}")

    def serve(self) -> Connection:
        """A DHCP server on the LAN, a bus, the service, and a daemon of ours, for which / is the host's root."""
        bus, socket = self.host.root / "bus.conf", self.host.root / "real"
        bus.write_text(BUS)
        self.run("sh -c 'mkdir -p /run/dbus /etc/NetworkManager/conf.d'")
        self.run("sh -c 'echo \"[main]\nauth-polkit=root-only\" > /etc/NetworkManager/conf.d/test.conf'")
        self._start("ip netns exec lan " + DHCP + " --dhcp-option=3,192.0.2.1 --no-ping --dhcp-leasefile=/run/leases")
        self._start(f"dbus-daemon --config-file={bus} --nofork --nopidfile")
        until(lambda: "system_bus" in self.run("ls /run/dbus"), "the bus is there")
        self._start("NetworkManager --no-daemon" if self.kind == "NetworkManager" else NETWORKD)
        self._start(f"{sys.executable} -m kvik.daemon --system --driver test --default-network off --socket {socket}")
        until(socket.exists, "kvikd is there")
        return connect(f"qemu+unix:///system?socket={socket}")

    def _start(self, line: str) -> None:
        with (self.host.root / "services.log").open("ab") as log:
            command = self._inside(*shlex.split(line))
            self.others.append(subprocess.Popen(command, env=self.host.environ, stdout=log, stderr=log))

    def messages(self) -> str:
        files = (self.host.root / name for name in ("networkd.log", "services.log"))
        return "".join(file.read_text() for file in files if file.exists())

    def end_service(self) -> None:
        if self.service is not None:
            self.service.send_signal(signal.SIGTERM)
            self.service.wait()
            self.service = None

    def shut_down(self, *bridges: str) -> None:
        """All that was configured is gone, as after a power cut."""
        self.end_service()
        for bridge in bridges:
            if self.host.exists(bridge):
                self.host.run(f"ip link del {bridge}")
        # The mode first: where it changes the kernel makes a link-local address at once, also of a link that is down.
        self.run("sh -c 'echo 0 > /proc/sys/net/ipv6/conf/eth0/addr_gen_mode'")
        self.run("ip link set eth0 mtu 1500 down")
        self.run("ip addr flush dev eth0")
        self.run("sh -c 'rm -rf /run/network/* /run/systemd/network/* /run/NetworkManager/*'")

    def close(self) -> None:
        self.end_service()
        for process in reversed(self.others):
            process.terminate()  # NetworkManager has a dnsmasq that it ends
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.holder.kill()
        self.holder.wait()
        if self.holder.stdout is not None:
            self.holder.stdout.close()
