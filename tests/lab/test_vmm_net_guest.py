"""A stock Debian kernel with kvik-vmm's network card on a tap of the lab: ping, TCP both ways with checksums."""

from __future__ import annotations

import hashlib
import re
import sys

import pytest

from lab.harness import SHARE, Lab
from lab.vmm_guest import BEGIN, END, vmm

pytestmark = pytest.mark.lab(deadline=280)

SIZE = 8 << 20
# Sends SIZE bytes to who connects to port 7001, and prints the digest of what arrives at port 7002.
PEER = """
import hashlib, socket, sys
data = open(sys.argv[1], "rb").read()
out, into = socket.create_server(("10.77.0.1", 7001)), socket.create_server(("10.77.0.1", 7002))
print("ready", flush=True)
peer, _ = out.accept(); peer.sendall(data); peer.close()
peer, _ = into.accept()
digest = hashlib.md5()
while block := peer.recv(1 << 16):
    digest.update(block)
print("digest", digest.hexdigest(), flush=True)
"""
SCRIPT = """
ip link set eth0 up
ip addr add 10.77.0.2/24 dev eth0
cd /sys/class/net/eth0; echo mtu $(cat mtu) mac $(cat address) carrier $(cat carrier)
ping -c 5 -i 0.2 -W 5 10.77.0.1 | grep received
nc 10.77.0.1 7001 </dev/null >/tmp/data
echo got $(md5sum </tmp/data)
nc 10.77.0.1 7002 </tmp/data
ip -s link show eth0
"""


@pytest.mark.parametrize(
    ("options", "vhost", "restored"),
    [
        ("vhost=on", True, True),
        ("vhost=off,packed=on", False, True),
        ("vhost=off,queues=2", False, False),
    ],
)
def test_ping_and_tcp(lab: Lab, options: str, vhost: bool, restored: bool) -> None:
    """Two of them on restored machines; plain cards test_vmm_net_live.py boots."""
    lab.load("tun", *(("vhost_net",) if vhost else ()))
    data = hashlib.shake_128(b"kvik").digest(SIZE)
    (lab.share / "data").write_bytes(data)
    (lab.share / "peer.py").write_text(PEER)
    many = "multi_queue" if "queues" in options else ""
    lab.sh(
        f"""
        ip link set lo up
        ip tuntap add kt0 mode tap vnet_hdr {many}
        ip addr add 10.77.0.1/24 dev kt0
        ip link set kt0 up mtu 4000
        """
    )
    peer = lab.spawn([sys.executable, f"{SHARE}/peer.py", f"{SHARE}/data"], timeout=240)
    try:
        card = f"tap,ifname=kt0,mac=52:54:00:77:00:02,mtu=4000,{options}"
        words = ("--memory", "512M", "--cpus", "2", "--net", card)
        done = vmm(
            lab, lab.kernel.image, SCRIPT, *words, modules=("virtio_pci", "virtio_net"), restored=restored
        ).check()
        said = done.stdout.partition(BEGIN)[2].partition(END)[0]
        assert "mtu 4000 mac 52:54:00:77:00:02 carrier 1" in said, done.stdout[-3000:] + done.stderr
        assert "5 packets received" in said, said
        digest = hashlib.md5(data).hexdigest()
        assert re.search(rf"got {digest}", said), said
        assert f"digest {digest}" in peer.wait().stdout
        assert "vhost-net is not used" not in done.stderr if vhost else True
        assert "needs a reset" not in done.stderr, done.stderr
    finally:
        peer.signal()
        lab.sh(f"ip tuntap del kt0 mode tap {many} || true")
