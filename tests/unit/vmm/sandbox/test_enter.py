"""A child process enters the sandbox and tries what a hostile machine would; the kernel's answers are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

import kvik
from kvik.vmm.sandbox import Policy, enter, landlock

PRELUDE = """
import ctypes, errno, os, socket, sys, _thread, time, mmap, fcntl, select
from kvik.vmm import sandbox
from kvik.vmm.sandbox import landlock
def refused(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except OSError as error:
        assert error.errno in (errno.EPERM, errno.EACCES), error
        return
    raise AssertionError(f"{call} went through")
"""


def child(body, *arguments, code=0, pass_fds=()):
    environment = {"PYTHONPATH": os.path.dirname(os.path.dirname(kvik.__file__)), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body), *map(str, arguments)],
        capture_output=True, text=True, timeout=60, env=environment, check=False, pass_fds=pass_fds,
    )  # fmt: skip
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == code, done.stderr
    return done.stdout


def test_no_path_no_socket_no_program_no_process(tmp_path):
    (tmp_path / "secret").write_text("x")
    out = child(
        """
        kept = os.open(sys.argv[1] + "/secret", os.O_RDWR)
        made = sandbox.enter("main", sandbox.Policy("errno"))
        assert os.pread(kept, 1, 0) == b"x" and os.pwrite(kept, b"y", 0) == 1
        refused(open, sys.argv[1] + "/secret")
        refused(open, "/etc/passwd")
        refused(os.open, sys.argv[1] + "/new", os.O_CREAT | os.O_WRONLY)
        for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK):
            refused(socket.socket, family, socket.SOCK_STREAM)
        refused(os.execv, "/bin/true", ["true"])
        refused(os.fork)
        refused(os.kill, os.getppid(), 0)
        refused(os.setuid, 1000)
        refused(os.chroot, "/")
        refused(mmap.mmap, -1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)
        assert mmap.mmap(-1, 4096)[0] == 0
        print(made["landlock"])
        """,
        tmp_path,
    )
    assert int(out) == landlock.abi()
    assert (tmp_path / "secret").read_text() == "y"
    assert not (tmp_path / "new").exists()


def test_privileges_are_gone():
    child(
        """
        status = os.open("/proc/thread-self/status", os.O_RDONLY)
        import resource
        sandbox.enter("main", sandbox.Policy())
        fields = dict(line.split(":\\t", 1) for line in os.pread(status, 8192, 0).decode().splitlines())
        assert {fields[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}, fields
        assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2", fields
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
        """
    )


def test_kill_ends_the_whole_process():
    child("sandbox.enter('main', sandbox.Policy('kill')); open('/etc/passwd')", code=-signal.SIGSYS)


def test_log_lets_all_pass():
    child(
        """
        assert sandbox.enter("main", sandbox.Policy("log"))["landlock"] == 0
        open("/etc/passwd").close()
        os.getppid()
        """
    )


def test_threads_eventfds_and_the_event_loop_go_on():
    child(
        """
        sandbox.enter("main", sandbox.Policy("kill"))
        bell, poll = os.eventfd(0), select.epoll()
        poll.register(bell, select.EPOLLIN)
        _thread.start_new_thread(os.eventfd_write, (bell, 7))
        assert poll.poll(10) == [(bell, select.EPOLLIN)] and os.eventfd_read(bell) == 7
        assert len(bytearray(64 << 20)) == 64 << 20
        time.sleep(0.001)
        sys.stderr.write("")
        os.memfd_create("x")
        """
    )


def test_a_vcpu_thread_is_confined_more_than_the_rest():
    child(
        """
        pair = socket.socketpair()
        done, errors = os.eventfd(0), []
        def vcpu():
            try:
                sandbox.enter("vcpu", sandbox.Policy("errno"))
                refused(pair[0].send, b"x")
                refused(os.memfd_create, "x")
                refused(open, "/etc/passwd")
                refused(fcntl.ioctl, 0, 0xAE01, 0)
            except BaseException as error:
                errors.append(error)
            os.eventfd_write(done, 1)
        _thread.start_new_thread(vcpu, ())
        os.eventfd_read(done)
        assert not errors, errors
        pair[0].send(b"x")       # the main thread is not confined yet ...
        open("/etc/passwd").close()
        sandbox.enter("main", sandbox.Policy("errno"))
        pair[0].send(b"x")       # ... and then by its own list
        refused(open, "/etc/passwd")
        """
    )


def test_listed_directories_stay_open(tmp_path):
    if not landlock.abi():
        pytest.skip("this kernel has no Landlock")
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in/file").write_text("x")
    child(
        """
        top = sys.argv[1]
        sandbox.enter("main", sandbox.Policy("errno", readable=(top + "/in",), writable=(top + "/out",)))
        assert open(top + "/in/file").read() == "x"
        refused(open, top + "/in/file", "w")
        with open(top + "/out/new", "w") as file:
            file.write("y")
        os.rename(top + "/out/new", top + "/out/renamed")
        os.unlink(top + "/out/renamed")
        refused(open, "/etc/passwd")
        refused(open, top + "/out/../in/new", "w")
        """,
        tmp_path,
    )


def test_stray_descriptors_are_closed(tmp_path):
    with open(tmp_path / "a", "w") as kept, open(tmp_path / "b", "w") as stray:
        child(
            """
            kept, stray = int(sys.argv[1]), int(sys.argv[2])
            sandbox.close_stray([kept, 0])
            os.fstat(kept), os.fstat(2)
            try:
                os.fstat(stray)
            except OSError as error:
                assert error.errno == errno.EBADF
            else:
                raise AssertionError("still open")
            """,
            kept.fileno(), stray.fileno(), pass_fds=(kept.fileno(), stray.fileno()),
        )  # fmt: skip


def test_a_guest_runs_inside():
    child(
        """
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            print("no usable /dev/kvm", file=sys.stderr)
            os._exit(3)
        from kvik.kvm.device import System
        with System() as system, system.create_vm() as vm:
            memory = mmap.mmap(-1, 0x10000)
            memory[0:6] = bytes([0xE6, 0x42, 0xFE, 0xC0, 0xEB, 0xFA])  # again: out 0x42, al; inc al; jmp again
            vm.set_user_memory_region(0, 0, 0x10000, ctypes.addressof(ctypes.c_char.from_buffer(memory)))
            vcpu = vm.create_vcpu(0)
            sregs, regs = vcpu.sregs(), vcpu.regs()
            sregs.cs.base = sregs.cs.selector = 0
            regs.rip, regs.rflags, regs.rax = 0, 2, 0
            vcpu.set_sregs(sregs), vcpu.set_regs(regs)
            vcpu.run()  # the first exit outside: every lazy import is done
            done, outs, errors = os.eventfd(0), [], []
            def thread():
                try:
                    sandbox.enter("vcpu", sandbox.Policy("kill"))
                    for _ in range(50):
                        exit = vcpu.run()
                        outs.append(type(exit).__name__)
                except BaseException as error:
                    errors.append(error)
                os.eventfd_write(done, 1)
            _thread.start_new_thread(thread, ())
            sandbox.enter("main", sandbox.Policy("kill"))
            os.eventfd_read(done)
            assert not errors and outs == ["IoExit"] * 50, (errors, outs)
            sys.stdout.write("ran\\n"), sys.stdout.flush()
            os._exit(0)
        """
    )


@pytest.mark.parametrize("version", range(1, 9))
def test_each_abi_asks_only_for_what_it_knows(version):
    files, net, scope = landlock.handled(version)
    assert files.bit_length() == {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    assert bool(net) == (version >= 4)
    assert bool(scope) == (version >= 6)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="action"):
        Policy("ignore")
    with pytest.raises(ValueError, match="role"):
        enter("guest", Policy())
