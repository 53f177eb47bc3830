"""An exit that reaches user space, beside the same loop in C: the guest writes a byte to a port, without end.

The guest is two instructions of 16-bit code, so this runs on any KVM. The peer is compiled here, with gcc.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import subprocess
import tempfile
import time
from pathlib import Path

from report import Report

from kvik.kvm import ExitReason, System, Vcpu
from kvik.kvm.structs import Regs

CODE = bytes.fromhex("e610 ebfc")  # 1: out %al,$0x10; jmp 1b
START = 0x1000

PEER = r"""
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

int main(int count, char **arguments)
{
    long exits = atol(arguments[1]), seen = 0;
    int system = open("/dev/kvm", O_RDWR), vm = ioctl(system, KVM_CREATE_VM, 0);
    unsigned char *memory = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(memory, "\xe6\x10\xeb\xfc", 4);
    __u64 map = 0xfffbc000;
    ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &map);
    ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000ul);
    struct kvm_userspace_memory_region region = {0, 0, 0x1000, 4096, (__u64)memory};
    ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region);
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    int size = ioctl(system, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *run = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    struct kvm_sregs sregs;
    ioctl(vcpu, KVM_GET_SREGS, &sregs);
    sregs.cs.base = sregs.cs.selector = 0;
    ioctl(vcpu, KVM_SET_SREGS, &sregs);
    struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
    ioctl(vcpu, KVM_SET_REGS, &regs);
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (long i = 0; i < exits; i++) {
        if (ioctl(vcpu, KVM_RUN, 0) || run->exit_reason != KVM_EXIT_IO)
            return 1;
        seen += run->io.port == 0x10 && *((unsigned char *)run + run->io.data_offset) == 0;
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("%f\n", ((end.tv_sec - begin.tv_sec) * 1e9 + (end.tv_nsec - begin.tv_nsec)) / exits / 1e3);
    return seen != exits;
}
"""


def compiled(directory: Path) -> Path:
    source, program = directory / "peer.c", directory / "peer"
    source.write_text(PEER)
    subprocess.run(["gcc", "-O2", "-o", program, source], check=True)
    return program


def round_trips(vcpu: Vcpu, exits: int) -> float:
    """Microseconds an exit: `enter` and what a port's handler needs to know."""
    enter, io, page, wanted = vcpu.enter, vcpu.io, vcpu.page, ExitReason.IO
    seen = 0
    begun = time.perf_counter()
    for _ in range(exits):
        if enter() != wanted:
            raise RuntimeError(f"the guest ended: {vcpu.exit()}")
        _, _, port, _, offset = io()
        seen += port == 0x10 and page[offset] == 0
    spent = time.perf_counter() - begun
    if seen != exits:
        raise RuntimeError(f"{exits - seen} exits were not the guest's")
    return 1e6 * spent / exits


def typed_round_trips(vcpu: Vcpu, exits: int) -> float:
    """Microseconds an exit as a typed value."""
    begun = time.perf_counter()
    for _ in range(exits):
        vcpu.run()
    return 1e6 * (time.perf_counter() - begun) / exits


def measure(rounds: int, exits: int) -> Report:
    report = Report("exits to user space (KVM_EXIT_IO), microseconds each, beside a C loop")
    memory = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[: len(CODE)] = CODE
    cheap: list[float] = []
    typed: list[float] = []
    peer: list[float] = []
    with tempfile.TemporaryDirectory() as directory, System() as system, system.create_vm() as vm:
        program = compiled(Path(directory))
        vm.set_identity_map_addr(0xFFFBC000)
        vm.set_tss_addr(0xFFFBD000)
        vm.set_user_memory_region(0, START, 4096, ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.sregs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            vcpu.set_regs(Regs(rip=START, rflags=2))
            for _ in range(rounds):
                cheap.append(round_trips(vcpu, exits))
                done = subprocess.run([program, str(exits)], check=True, capture_output=True, text=True)
                peer.append(float(done.stdout))
                typed.append(typed_round_trips(vcpu, exits))
    report.within("enter() and io()", cheap, peer, "us", 2)
    report.within("run(): a typed exit", typed, peer, "us", 2)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--exits", type=int, default=20_000)
    options = parser.parse_args()
    measure(options.rounds, options.exits).show()


if __name__ == "__main__":
    main()
