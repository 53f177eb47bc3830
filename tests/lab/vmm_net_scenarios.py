"""What happens to a running guest's network, step by step. Each function runs inside the lab:

python -m lab.vmm_net_scenarios NAME KERNEL [ARGUMENT ...]
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from kvik.vmm.backends.tap import TapBackend
from lab.vmm_net_live import Guest, wait_for

HOST, PEER = "10.77.0.1", "10.77.0.2"


def sh(script: str) -> str:
    return subprocess.run(["sh", "-ec", script], check=True, capture_output=True, text=True).stdout


def carrier(guest: Guest, wanted: int, name: str = "eth0") -> None:
    command = f"cat /sys/class/net/{name}/carrier"
    wait_for(f"carrier {wanted}", lambda: guest.run(command, check=False) == str(wanted))


def ping(guest: Guest, address: str = HOST) -> None:
    wait_for(
        f"an answer from {address}", lambda: " 0% packet loss" in guest.run(f"ping -c 2 -W 5 {address} | grep loss")
    )


def link_and_end(kernel: str, options: str) -> None:
    """The cable is pulled and put in again; then the tap is deleted: the guest sees it, and lives on."""
    sh(f"ip tuntap add kl0 mode tap vnet_hdr; ip addr add {HOST}/24 dev kl0; ip link set kl0 up")
    try:
        with Guest("--net", f"tap,ifname=kl0,mtu=1400,{options}", "--cpus", "2", kernel=kernel) as guest:
            assert guest.run("cat /sys/class/net/eth0/mtu") == "1400"
            guest.run(f"ip link set eth0 up; ip addr add {PEER}/24 dev eth0")
            carrier(guest, 1)
            ping(guest)
            for _ in range(2):
                guest.qmp("set_link", name="net0", up=False)
                carrier(guest, 0)
                assert guest.run(f"ping -c 1 -W 1 {HOST} >/dev/null; echo $?") == "1"
                guest.qmp("set_link", name="net0", up=True)
                carrier(guest, 1)
                ping(guest)
            guest.run(f"ping -i 0.1 -c 9999 {HOST} >/dev/null 2>&1 &")  # traffic, while it happens
            sh("ip link del kl0")
            assert guest.event("NETDEV_GONE")["device"] == "net0"
            carrier(guest, 0)
            assert guest.qmp("query-status")["status"] == "running"
            assert guest.run("echo alive; kill $!").startswith("alive")
            assert guest.log().count("the link is down") == 1, guest.log()
    finally:
        sh("ip link del kl0 2>/dev/null || true")


def hot_plug(kernel: str, vhost: str) -> None:
    """A card comes over QMP on a descriptor of a tap, works, and goes; nothing of it stays open."""
    sh(f"ip tuntap add kh0 mode tap vnet_hdr; ip addr add {HOST}/24 dev kh0; ip link set kh0 up")
    try:
        with Guest(kernel=kernel) as guest:
            guest.qmp("query-status")
            place = f"/proc/{guest.process.pid}/fd"
            before = sorted(os.readlink(f"{place}/{name}") for name in os.listdir(place))
            for _ in range(2):
                tap = TapBackend.open("kh0")
                guest.qmp("getfd", fd=tap.fds[0], fdname="tap")
                tap.close()
                more: dict[str, str] = {}
                if vhost == "on":  # the sandbox opens nothing
                    kernel_side = os.open("/dev/vhost-net", os.O_RDWR)
                    guest.qmp("getfd", fd=kernel_side, fdname="vhost")
                    os.close(kernel_side)
                    more["vhostfds"] = "vhost"
                guest.qmp("netdev_add", type="tap", id="host1", fds="tap", vhost=vhost == "on", **more)
                guest.qmp("device_add", driver="virtio-net-pci", id="card1", netdev="host1", mac="52:54:00:77:00:09")
                wait_for("the card", lambda: "eth0" in guest.run("ls /sys/class/net"))
                assert guest.run("cat /sys/class/net/eth0/address") == "52:54:00:77:00:09"
                guest.run(f"ip link set eth0 up; ip addr add {PEER}/24 dev eth0")
                ping(guest)
                guest.qmp("device_del", id="card1")
                assert guest.event("DEVICE_DELETED")["device"] == "card1"
                assert "eth0" not in guest.run("ls /sys/class/net")
                guest.qmp("netdev_del", id="host1")
            after = sorted(os.readlink(f"{place}/{name}") for name in os.listdir(place))
            assert after == before, (before, after)
    finally:
        sh("ip link del kh0")


def echo(stream: socket.socket, data: bytes) -> None:
    """All of `data` must come back, however it is cut."""
    stream.settimeout(60)
    got = b""
    for start in range(0, len(data), 50_000):
        block = data[start : start + 50_000]
        stream.sendall(block)
        while len(got) < start + len(block):
            more = stream.recv(65536)
            assert more, f"ended after {len(got)} bytes"
            got += more
    assert got == data


def vsock(kernel: str, kind: str) -> None:
    """Programs of guest and host find each other both ways."""
    data = os.urandom(1_000_000)
    path = "/tmp/vsock"
    device = f"--vsock=7,uds={path}" if kind == "own" else "--vsock=7"
    if kind == "own":
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{path}_2000")
    else:
        server = socket.socket(socket.AF_VSOCK)
        server.bind((socket.VMADDR_CID_ANY, 2000))
    server.listen(1)
    server.settimeout(60)
    try:
        sandbox = ("--sandbox", "off") if kind == "own" else ()  # Landlock would refuse our path_2000
        with Guest(device, *sandbox, kernel=kernel) as guest:
            guest.run("/vsock listen 1024 & sleep 1")
            if kind == "own":
                client = socket.socket(socket.AF_UNIX)
                client.settimeout(60)
                client.connect(path)
                client.sendall(b"CONNECT 1024\n")
                assert client.recv(64).startswith(b"OK ")
            else:
                client = socket.socket(socket.AF_VSOCK)
                client.settimeout(60)
                client.connect((7, 1024))
            echo(client, data)
            client.close()
            guest.run("/vsock connect 2 2000 &")
            peer, _ = server.accept()
            echo(peer, data)
            peer.close()
    finally:
        server.close()


def saturated(kernel: str, trips: str) -> None:
    """UDP round trips through our own datapath while busy loops take the processors."""
    sh(f"ip tuntap add ks0 mode tap vnet_hdr; ip addr add {HOST}/24 dev ks0; ip link set ks0 up")
    sh("cp /run/lab/load /tmp/load; chmod 755 /tmp/load")
    peer = subprocess.Popen(["/tmp/load", "serve"], stdout=subprocess.DEVNULL)
    busy: list[subprocess.Popen[bytes]] = []
    try:
        with Guest("--net", "tap,ifname=ks0,vhost=off", "--cpus", "2", kernel=kernel) as guest:
            guest.run(f"ip link set eth0 up; ip addr add {PEER}/24 dev eth0")
            ping(guest)
            busy += [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(4)]
            guest.patience = 180.0
            told = guest.run(f"/load count {HOST} {trips}")
            print(told)
            assert told.startswith("RESULT rr ") and told.split()[-1] == "0", told
    finally:
        for process in (*busy, peer):
            process.kill()
            process.wait()
        sh("ip link del ks0")


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    globals()[name](*words)
    print(f"{name}: well")
