"""The switch in user space beside QEMU's user network: a guest's TCP stream to another guest, and to its host.

    PYTHONPATH=src python benchmarks/switch.py [--runs 3] [--megabytes 16]

Needs root (for a network namespace) and QEMU. The guests run under software emulation, which bounds both; the last
line is the switch alone, between two sockets.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "src")]

from functional.network.guests import Guest, SwitchSession  # noqa: E402
from kvik.network.switch.control import Switch  # noqa: E402

SETTINGS = {
    "name": "bench", "mac": "52:54:00:00:00:01", "ip": "192.168.122.1", "prefix": 24,
    "ranges": [["192.168.122.2", "192.168.122.254"]], "router": False,
}  # fmt: skip
MACHINES = [
    {"name": "left", "mac": "52:54:00:aa:00:01"},
    {"name": "right", "mac": "52:54:00:aa:00:02"},
    {"name": "peer", "mac": "52:54:00:aa:00:03", "netdev": "user,id=net"},
]
SINK = """
import socket
server = socket.create_server(("0.0.0.0", 5000))
print("ready", flush=True)
while True:
    connection = server.accept()[0]
    while connection.recv(1 << 20):
        pass
    connection.close()
"""


def stream(guest: Guest, target: str, megabytes: int) -> float:
    """MB/s."""
    began = time.monotonic()
    said = guest.shell(f"dd if=/dev/zero bs=64k count={megabytes * 16} 2>/dev/null | nc {target} 5000 && echo done")
    assert "done" in said, said
    return megabytes / (time.monotonic() - began)


def alone(seconds: float, size: int) -> tuple[float, float]:
    """MB/s and thousands of frames a second between two cards, no guest."""
    directory = Path(tempfile.mkdtemp(prefix="kv-bench-"))
    switch = Switch.start(directory / "switch", SETTINGS)
    try:
        ends = []
        for number in (1, 2):
            ours, theirs = socket.socketpair()
            with theirs:
                switch.add_port(f"m{number}", f"52:54:00:bb:00:0{number}", theirs.fileno())
            ends.append(ours)
        header = bytes.fromhex("525400bb0002525400bb000188b5")
        batch = (struct.pack(">I", size) + header + bytes(size - 14)) * (65536 // size)
        stop = threading.Event()

        def send() -> None:
            while not stop.is_set():
                ends[0].sendall(batch)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        got, began = 0, time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            got += len(ends[1].recv(1 << 20))
        stop.set()
        for end in ends:
            end.close()
        thread.join(1)
        return got / (now - began) / 1e6, got / (size + 4) / (now - began) / 1e3
    finally:
        switch.stop()
        shutil.rmtree(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=16)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="kv-bench-"))
    directory.chmod(0o755)
    session = SwitchSession(directory, SETTINGS, MACHINES)
    inside = ["nsenter", f"--net=/proc/{session.process.pid}/ns/net"]
    subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True)
    sink = subprocess.Popen([*inside, sys.executable, "-c", SINK], stdout=subprocess.PIPE)
    try:
        assert sink.stdout is not None
        sink.stdout.readline()
        left, right, peer = (session.guest(machine["name"]) for machine in MACHINES)
        left.eventually("ping -c 1 -W 1 right", "1 packets received")
        # A nc whose own input has ended would end: the fifo's other end is held open.
        serve = "while true; do nc -l -p 5000 </tmp/open >/dev/null; done"
        right.shell(f"mkfifo /tmp/open; (sleep 10000 >/tmp/open & {serve}) >/dev/null 2>&1 </dev/null &")
        peer.eventually("ip -4 addr show eth0", "10.0.2.15")
        ours, theirs = [], []
        for _ in range(options.runs):
            time.sleep(1)  # the listener is there again
            theirs.append(stream(peer, "10.0.2.2", options.megabytes))
            ours.append(stream(left, "right", options.megabytes))
    finally:
        sink.kill()
        sink.wait()
        session.close()
        shutil.rmtree(directory, ignore_errors=True)
    us, them = statistics.median(ours), statistics.median(theirs)
    print(f"guest to guest by the switch   {us:8.1f} MB/s   ({', '.join(f'{one:.1f}' for one in ours)})")
    print(f"guest to host by QEMU's user   {them:8.1f} MB/s   ({', '.join(f'{one:.1f}' for one in theirs)})")
    print(f"ratio                          {us / them:8.2f}")
    for size in (1514, 64):
        rate, frames = alone(1.0, size)
        print(f"the switch alone, {size:4}-byte frames {rate:8.0f} MB/s {frames:8.0f} k frames/s")


if __name__ == "__main__":
    main()
