"""The switch in user space beside QEMU's user network, on one way: a guest and its host, by the user's own sockets.

    PYTHONPATH=src python benchmarks/switch.py [--rounds 5] [--seconds 1.5]

TCP from the guest to a server of the host and back, in large and in small packets, and UDP round trips: by the switch
and passt, and by QEMU's own user network, in turns. Then two guests on the switch, for which QEMU's user network has no
counterpart, and the switch alone, between two sockets. Needs root (for a network namespace), QEMU, passt and gcc. The
guests run under software emulation, which bounds both.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "src")]

import network_guests as guests  # noqa: E402
from report import Report  # noqa: E402

from functional.network.guests import Guest, SwitchSession  # noqa: E402
from kvik.host.namespace import run_in_namespace  # noqa: E402
from kvik.network.switch.control import Switch  # noqa: E402
from kvik.network.switch.mtu import LONG  # noqa: E402
from kvik.network.switch.uplink import start_uplink  # noqa: E402

SETTINGS = {
    "name": "bench", "mac": "52:54:00:00:00:01", "ip": "192.168.122.1", "prefix": 24,
    "ranges": [["192.168.122.2", "192.168.122.254"]], "router": True,
}  # fmt: skip
MACHINES = [
    {"name": "left", "mac": "52:54:00:aa:00:01", "mtu": LONG},  # as a session's daemon says it of virtio's cards
    {"name": "right", "mac": "52:54:00:aa:00:02", "mtu": LONG},
    {"name": "slirp", "mac": "52:54:00:aa:00:03", "netdev": "user,id=net"},
]
HOST = "203.0.113.1"
RESULT = re.compile(r"RESULT (\w+) ([\d.]+)")
LOADS = {
    "guest to host, TCP": ("tx", "MB/s", 1e-6),
    "host to guest, TCP": ("rx", "MB/s", 1e-6),
    "guest to host, TCP, 64-byte packets": ("small", "k/s", 1e-3 / 64),
    "guest and host, UDP round trips": ("rr", "/s", 1.0),
}


def rate(guest: Guest, what: str, target: str, seconds: float) -> float:
    mode, _, scale = LOADS[what]
    said = guest.shell(f"/load {mode} {target} {seconds}")
    found = RESULT.search(said)
    if found is None:
        raise RuntimeError(f"{what} to {target}: {said}")
    return float(found[2]) * scale


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


@contextlib.contextmanager
def way_out(session: SwitchSession, space: str, machine: str) -> Iterator[None]:
    """A passt for a machine, as the daemon gives it one."""
    switch = Switch.attach(session.run / "switch")
    assert switch is not None
    port = next(port for port in switch.ports() if port["name"] == machine)
    log = session.directory / f"{machine}.passt.log"
    with open(f"/run/netns/{space}") as namespace:  # noqa: PTH123 - a descriptor is wanted
        ours, passt = run_in_namespace(namespace.fileno(), lambda: start_uplink(SETTINGS, port["ip"], [], log))
    with ours:
        switch.call("uplink", (ours.fileno(),), port=port["port"])
    try:
        yield
    finally:
        passt.terminate(1.0)
        passt.close()
        switch.close()


def of_guests(rounds: int, seconds: float) -> list[Report]:
    beside = Report(
        f"the switch and passt beside QEMU's user network, {rounds} interleaved rounds of {seconds:g} s each"
    )
    between = Report("two guests on the switch; the peer has no such thing: its guest and its host")
    load = guests.load_program()
    with ExitStack() as close:
        close.callback(shutil.rmtree, load.parent, ignore_errors=True)
        directory = Path(tempfile.mkdtemp(prefix="kv-bench-"))
        directory.chmod(0o755)
        close.callback(shutil.rmtree, directory, ignore_errors=True)
        (directory / "image").mkdir()
        initrd = guests.Image(directory / "image", load).initrd
        name = f"kv-bench-{directory.name[-8:]}"
        subprocess.run(["ip", "netns", "add", name], check=True)
        close.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
        for command in (
            "link set lo up",
            "link add cable0 type veth peer name cable1",
            "link set cable1 up",
            f"addr add {HOST}/24 dev cable0",
            "link set cable0 up",
            "route add default via 203.0.113.2",  # passt wants a way out to take its address from
        ):
            subprocess.run(["ip", "-n", name, *command.split()], check=True)
        session = SwitchSession(directory, SETTINGS, MACHINES, within=name, initrd=initrd)
        close.callback(session.close)
        close.enter_context(way_out(session, name, "left"))
        close.enter_context(guests.serving(["ip", "netns", "exec", name], load))
        left, right, slirp = (session.guest(str(machine["name"])) for machine in MACHINES)
        for guest, address in ((left, "192.168.122."), (right, "192.168.122."), (slirp, "10.0.2.15")):
            guest.eventually("ip -4 addr show eth0", address)
        right.shell("/load serve >/dev/null 2>&1 </dev/null &")
        address = re.findall(r"inet (192[\d.]+)", right.shell("ip -4 addr show eth0"))[0]
        samples: dict[str, dict[str, list[float]]] = {}
        for number in range(rounds):
            for what in LOADS:
                sides: list[tuple[str, Guest, str]] = [
                    ("switch", left, HOST),
                    ("slirp", slirp, HOST),
                    ("between", left, address),
                ]
                for side, guest, target in sides if number % 2 else reversed(sides):
                    samples.setdefault(what, {}).setdefault(side, []).append(rate(guest, what, target, seconds))
    for what, (_, unit, _) in LOADS.items():
        beside.more(what, samples[what]["switch"], samples[what]["slirp"], unit, 1)
        other = what.replace("guest and host", "guest and guest").replace("host", "another")
        between.told(other, samples[what]["between"], samples[what]["slirp"], unit)
    return [beside, between]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    options = parser.parse_args()
    guests.need_root()
    for report in of_guests(options.rounds, options.seconds):
        report.show()
    print()
    for size in (1514, 64):
        figures = [alone(1.0, size) for _ in range(3)]
        speed, frames = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"  the switch alone, {size:4}-byte frames {speed:8.0f} MB/s {frames:8.0f} k frames/s")


if __name__ == "__main__":
    main()
