"""A qcow2 disk over vhost-user: kvik-blk beside qemu-storage-daemon, both with one client, the same image and depth.

The client is a guest's driver of few instructions in this process: indirect tables that are made once, EVENT_IDX, a
kick when it is wanted. Rates are of the wall clock; "cpu" is the server's processor time for one request.

    PYTHONPATH=src python benchmarks/vmm_blk_process.py [--seconds 2] [--rounds 3] [--size 1024] [--cache MODE]
"""

from __future__ import annotations

import argparse
import os
import random
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import Report

import kvik
from kvik.vmm.memory import GuestMemory, HostMemory
from kvik.vmm.vhost_user import VhostUser
from kvik.vmm.virtio.queue import EVENT_IDX, INDIRECT_DESC, VERSION_1

MIB = 1 << 20
T_IN, T_OUT, T_FLUSH = 0, 1, 4
KVIK_BLK = Path(kvik.__file__).parent / "vmm" / "blk" / "__main__.py"
SLOTS, RING = 32, 256
DESC, AVAIL, USED, TABLES, DATA = 0x10000, 0x12000, 0x14000, 0x20000, 0x400000


class Server:
    """One of the two, and a connection to it."""

    def __init__(self, program: str, image: Path, cache: str) -> None:
        name = str(image.with_suffix(f".{program}.sock"))
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(name)
        listening.listen()
        if program == "kvik-blk":
            fd = os.open(image, os.O_RDWR)
            argv = [sys.executable, "-I", "-S", str(KVIK_BLK), f"--image={fd},qcow2"]
            argv += [f"--socket={listening.fileno()}", f"--cache={cache}"]
            fds = (fd, listening.fileno())
        else:
            direct = "on" if cache == "none" else "off"
            options = f"cache.direct={direct},discard=unmap"
            aio = ",aio=native" if cache == "none" else ""
            argv = [program, "--blockdev", f"driver=file,node-name=f,filename={image},{options}{aio}"]
            argv += ["--blockdev", f"driver=qcow2,node-name=q,file=f,{options}"]
            export = f"addr.type=fd,addr.str={listening.fileno()}"
            argv += ["--export", f"type=vhost-user-blk,id=e,node-name=q,writable=on,{export}"]
            fds = (listening.fileno(),)
        self.process = subprocess.Popen(argv, pass_fds=fds)
        for number in fds:
            os.close(number)
        listening.detach()
        sock = socket.socket(socket.AF_UNIX)
        while True:
            try:
                sock.connect(name)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        self.front = VhostUser(sock.detach())
        self.memory = GuestMemory.allocate(64 * MIB, HostMemory(shared=True))
        self.front.set_memory(self.memory)
        self.front.set_features(VERSION_1 | EVENT_IDX | INDIRECT_DESC | 1 << 9)
        self.kick, self.call = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
        addresses = [self.memory.host_address(place, 16) for place in (DESC, USED, AVAIL)]
        self.front.start_queue(0, RING, 0, (addresses[0], addresses[1], addresses[2]), kick=self.kick, call=self.call)
        self.ram = self.memory.regions[0].view
        self.avail = self.ram[AVAIL : AVAIL + 6 + 2 * RING].cast("H")
        self.used = self.ram[USED : USED + 6 + 8 * RING].cast("H")
        self.heads = self.ram[USED + 4 : USED + 4 + 8 * RING].cast("I")
        self.put = self.taken = self.kicked = 0

    def prepare(self, kind: int, size: int, pieces: int) -> None:
        """A request for each slot: header, `size` bytes in so many pieces, status."""
        write = 2 if kind == T_IN else 0
        step = size // pieces
        for slot in range(SLOTS):
            header, data = TABLES + 0x8000 * slot + 0x4000, DATA + slot * MIB
            struct.pack_into("<IIQ", self.ram, header, kind, 0, 0)
            rows = [(header, 16, 1)]
            rows += [(data + number * step, step, 1 | write) for number in range(pieces if size else 0)]
            rows.append((header + 16, 1, 2))
            for number, (address, length, flags) in enumerate(rows):
                place = TABLES + 0x8000 * slot + 16 * number
                struct.pack_into("<QIHH", self.ram, place, address, length, flags, number + 1)
            struct.pack_into("<QIHH", self.ram, DESC + 16 * slot, TABLES + 0x8000 * slot, 16 * len(rows), 4, 0)

    def run(self, sectors: list[int], depth: int, seconds: float) -> tuple[int, float, float]:
        """Requests for the sectors, over and over: how many, the seconds, the server's seconds of processor time."""
        avail, used, heads, ram = self.avail, self.used, self.heads, self.ram
        pack = struct.Struct("<Q").pack_into
        free = list(range(depth))
        done = number = 0
        count = len(sectors)
        cpu, start = self._cpu(), time.perf_counter()
        end = start + seconds
        going = True
        while going or len(free) < depth:
            put = self.put
            while free and going:
                slot = free.pop()
                pack(ram, TABLES + 0x8000 * slot + 0x4008, sectors[number % count])
                number += 1
                avail[2 + put % RING] = slot
                put += 1
            self.put = put
            avail[1] = put & 0xFFFF
            avail[2 + RING] = self.taken & 0xFFFF  # used_event: tell of the next
            event = used[2 + 4 * RING]
            if (put - event - 1) & 0xFFFF < (put - self.kicked) & 0xFFFF:
                os.eventfd_write(self.kick, 1)
            self.kicked = put
            if used[1] == self.taken & 0xFFFF:
                select.select([self.call], [], [], 5)
                try:
                    os.eventfd_read(self.call)
                except BlockingIOError:
                    pass
            while used[1] != self.taken & 0xFFFF:
                slot = heads[2 * (self.taken % RING)]
                assert ram[TABLES + 0x8000 * slot + 0x4010] == 0
                free.append(slot)
                self.taken += 1
                done += 1
            going = going and time.perf_counter() < end
        return done, time.perf_counter() - start, self._cpu() - cpu

    def _cpu(self) -> float:
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def close(self) -> None:
        self.front.close()
        self.process.terminate()
        self.process.wait()


WORK = (
    # name, kind, bytes, pieces, depth, random
    ("sequential read 1 MiB, depth 4", T_IN, MIB, 64, 4, False),
    ("sequential write 1 MiB, depth 4", T_OUT, MIB, 64, 4, False),
    ("random read 4 KiB, depth 1", T_IN, 4096, 1, 1, True),
    ("random read 4 KiB, depth 32", T_IN, 4096, 1, 32, True),
    ("random write 4 KiB, depth 1", T_OUT, 4096, 1, 1, True),
    ("random write 4 KiB, depth 32", T_OUT, 4096, 1, 32, True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024, help="of the disk, in MiB")
    parser.add_argument("--cache", default="writeback", choices=["writeback", "none"])
    parser.add_argument("--only", default="", help="only lines with this text")
    parser.add_argument("--directory", default=None)
    args = parser.parse_args()
    report = Report(f"qcow2 over vhost-user, cache={args.cache}: kvik-blk beside qemu-storage-daemon")
    dice = random.Random(1)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        images = {}
        for program in ("kvik-blk", "qemu-storage-daemon"):
            images[program] = Path(directory) / f"{program}.qcow2"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", images[program], f"{args.size}M"], check=True)
        fill = ("allocating sequential write 1 MiB, depth 4", T_OUT, MIB, 64, 4, False)
        for name, kind, size, pieces, depth, scattered in (fill, *WORK):
            if args.only not in name and name != fill[0]:
                continue
            steps = args.size * MIB // size
            order = list(range(steps))
            if scattered:
                dice.shuffle(order)
            sectors = [step * (size // 512) for step in order[: 1 << 18]]
            rates: dict[str, list[float]] = {program: [] for program in images}
            costs: dict[str, list[float]] = {program: [] for program in images}
            for _ in range(1 if name == fill[0] else args.rounds):
                for program, image in images.items():
                    server = Server(program, image, args.cache)
                    try:
                        server.prepare(kind, size, pieces)
                        if name == fill[0]:
                            done, seconds, cpu = 0, 0.0, 0.0
                            for part in range(steps // depth):  # once over the whole disk
                                some = server.run(sectors[part * depth : (part + 1) * depth], depth, 0)
                                done, seconds, cpu = done + some[0], seconds + some[1], cpu + some[2]
                        else:
                            done, seconds, cpu = server.run(sectors, depth, args.seconds)
                    finally:
                        server.close()
                        image.with_suffix(f".{program}.sock").unlink(missing_ok=True)
                    rates[program].append(done / seconds * (size / MIB if size == MIB else 1e-3))
                    costs[program].append(cpu / done * 1e6)
            ours, peer = rates["kvik-blk"], rates["qemu-storage-daemon"]
            report.told(name, ours, peer, "MiB/s" if size == MIB else "thousand a second")
            report.told(f"  cpu of {name}", costs["kvik-blk"], costs["qemu-storage-daemon"], "us")
        report.show()
        for image in images.values():
            subprocess.run(["qemu-img", "check", "-q", image], check=True)


if __name__ == "__main__":
    main()
