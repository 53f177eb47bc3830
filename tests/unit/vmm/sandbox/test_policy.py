"""The filters of both roles, run by an interpreter of classic BPF: what each verdict is, without a kernel."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from kvik.vmm.sandbox import policy, seccomp
from kvik.vmm.sandbox.seccomp import ALLOW, AUDIT_ARCH_X86_64, ERRNO, KILL_PROCESS, LOG, Arg, assemble

PID = 4242
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


def verdict(code, number, *arguments, arch=AUDIT_ARCH_X86_64):
    """What the program answers to a call."""
    data = struct.pack("=iIQ6Q", number, arch, 0, *(*arguments, *[0] * (6 - len(arguments))))
    at = accumulator = 0
    while True:
        assert at < len(code), "ran off the end"
        i = code[at]
        at += 1
        if i.code == seccomp.LD_ABS:
            accumulator = struct.unpack_from("=I", data, i.k)[0]
        elif i.code == seccomp.AND_K:
            accumulator &= i.k
        elif i.code == seccomp.JEQ_K:
            at += i.jt if accumulator == i.k else i.jf
        elif i.code == seccomp.JGE_K:
            at += i.jt if accumulator >= i.k else i.jf
        else:
            assert i.code == seccomp.RET_K
            return i.k


@pytest.fixture(params=["vcpu", "main"])
def role(request):
    return request.param


def call(code, name, *arguments):
    return verdict(code, policy.NR[name], *arguments)


def test_numbers_are_the_kernels():
    if not HEADER.exists():
        pytest.skip(f"no {HEADER}")
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text()))
    assert {name: int(numbers[name]) for name in policy.NR if name in numbers} == {
        name: number for name, number in policy.NR.items() if name in numbers
    }
    assert len(set(policy.NR.values())) == len(policy.NR)


def test_another_architecture_and_x32_are_killed(role):
    code = policy.program(role, PID, LOG)
    assert verdict(code, policy.NR["read"], arch=0x40000003) == KILL_PROCESS  # i386
    assert verdict(code, policy.NR["read"] | 0x4000_0000) == KILL_PROCESS


@pytest.mark.parametrize(("name", "otherwise"), list(seccomp.ACTIONS.items()))
def test_what_is_not_listed_meets_the_action(role, name, otherwise):
    code = policy.program(role, PID, otherwise)
    for forbidden in (59, 322, 2, 257, 41, 42, 49, 62, 101, 105, 165, 310, 311, 425):
        # execve, execveat, open, openat, socket, connect, bind, kill, ptrace, setuid, mount, process_vm_*,
        # io_uring_setup
        assert verdict(code, forbidden) == otherwise, (name, forbidden)


def test_what_a_thread_needs_is_allowed(role):
    code = policy.program(role, PID, KILL_PROCESS)
    for name in ("read", "write", "futex", "madvise", "rt_sigreturn", "exit", "clock_nanosleep", "eventfd2"):
        assert call(code, name) == ALLOW, name


def test_memory_is_never_executable(role):
    code = policy.program(role, PID, KILL_PROCESS)
    for name in ("mmap", "mprotect"):
        assert call(code, name, 0, 4096, 3) == ALLOW
        assert call(code, name, 0, 4096, 5) == KILL_PROCESS
        assert call(code, name, 0, 4096, 7) == KILL_PROCESS


def test_signals_reach_this_process_only(role):
    code = policy.program(role, PID, KILL_PROCESS)
    assert call(code, "tgkill", PID, 1, 10) == ALLOW
    assert call(code, "tgkill", PID + 1, 1, 10) == KILL_PROCESS


def test_ioctls_of_a_vcpu_thread():
    code = policy.program("vcpu", PID, KILL_PROCESS)
    assert call(code, "ioctl", 5, policy.KVM_RUN) == ALLOW
    assert call(code, "ioctl", 5, policy.KVM_RUN | 7 << 32) == ALLOW  # the kernel ignores the high half
    assert call(code, "ioctl", 5, 0xAE01) == KILL_PROCESS  # KVM_CREATE_VM
    assert call(code, "ioctl", 5, 0xAE41) == KILL_PROCESS  # KVM_CREATE_VCPU
    assert call(code, "ioctl", 0, 0x5412) == KILL_PROCESS  # TIOCSTI


def test_ioctls_of_the_main_thread():
    code = policy.program("main", PID, KILL_PROCESS)
    assert call(code, "ioctl", 5, 0xAE41) == ALLOW  # CPU hot-plug
    assert call(code, "ioctl", 5, 0x4008AF00) == ALLOW  # VHOST_SET_FEATURES
    assert call(code, "ioctl", 0, 0x5413) == ALLOW  # TIOCGWINSZ
    assert call(code, "ioctl", 0, 0x5412) == KILL_PROCESS  # TIOCSTI
    assert call(code, "ioctl", 5, 0x400454CA) == KILL_PROCESS  # TUNSETIFF


def test_the_main_thread_makes_threads_but_no_processes():
    code = policy.program("main", PID, KILL_PROCESS)
    assert call(code, "clone", 0x3D0F00) == ALLOW
    assert call(code, "clone", 17) == KILL_PROCESS
    assert call(code, "clone3") == ERRNO | 38
    vcpu = policy.program("vcpu", PID, KILL_PROCESS)
    assert call(vcpu, "clone", 0x3D0F00) == KILL_PROCESS


def test_exceptions_are_asked_for():
    code = policy.program("main", PID, KILL_PROCESS, paths=True, unix_connect=True)
    assert call(code, "openat") == call(code, "connect") == call(code, "socket", 1) == ALLOW
    assert call(code, "socket", 2) == call(code, "socket", 16) == KILL_PROCESS  # AF_INET, AF_NETLINK
    # A vCPU thread gets none of them.
    vcpu = policy.program("vcpu", PID, KILL_PROCESS, paths=True, unix_connect=True)
    assert call(vcpu, "openat") == call(vcpu, "connect") == call(vcpu, "socket", 1) == KILL_PROCESS


def test_conditions_compare_all_64_bits_when_asked():
    code = assemble({9: [[Arg(3, 0x1_0000_0002)], [Arg(0, 1), Arg(1, 2)]]}, KILL_PROCESS)
    assert verdict(code, 9, 0, 0, 0, 0x1_0000_0002) == ALLOW
    assert verdict(code, 9, 0, 0, 0, 2) == KILL_PROCESS
    assert verdict(code, 9, 1, 2) == ALLOW
    assert verdict(code, 9, 1, 3) == verdict(code, 9, 0, 2) == KILL_PROCESS


def test_a_program_that_cannot_be_encoded_is_refused():
    with pytest.raises(ValueError, match="conditions"):
        assemble({1: [[Arg(0, n)] for n in range(100)]}, LOG)
    with pytest.raises(ValueError, match="instructions"):
        assemble(dict.fromkeys(range(3000), ()), LOG)
