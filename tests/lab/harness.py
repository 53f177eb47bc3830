"""The lab: a Linux with a true /dev/kvm, in software emulation, with this host's own tree as its root.

    with Lab(LabOptions(memory_mib=2048)) as lab:
        done = lab.run(["uname", "-r"])

QEMU emulates a CPU with SVM and boots Debian's generic kernel; the host's tree comes over 9p, read-only, under a tmpfs:
what the lab writes is gone with it, except below `share`. `docs/internals/lab.md` has the drawing and the options.
"""

from __future__ import annotations

import compileall
import contextlib
import ctypes
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from kvik.guest.tiny import kernel_arguments
from kvik.image.cpio import CpioWriter
from lab.kernel import Kernel, LabUnavailable, ensure_kernel

__all__ = ["Completed", "Lab", "LabError", "LabOptions", "LabTimeout", "LabUnavailable", "Running"]

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
QEMU = "qemu-system-x86_64"
SHARE = "/run/lab"  # the writable share, as the lab sees it
BOOT_DEADLINE = 90.0  # seconds; 6 is usual, two busy cores may need many times that
RUN_TIMEOUT = 60.0
BEAT = 1.0  # seconds
GRACE = 30.0  # seconds beyond a command's own timeout until the lab itself is given up
MAX_FRAME = 256 << 20

BOOT_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
MODULES = ("virtio_rng", "kvm-amd")
FRESH = ("/etc/kvik", "/var/lib/kvik", "/var/cache/kvik", "/var/log/kvik", "/root/.cache/kvik")
FILES = ("/var/lib/kvik/network/default-made",)  # empty; this one: the network `default`, seconds of work, is not made
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/lab-bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "TERM": "dumb",
    "PYTHONPATH": f"{REPOSITORY / 'src'}",
}


class LabError(Exception):
    """The lab itself failed: it did not boot, died, or its server broke. The message ends with its last words."""


class LabTimeout(LabError):
    """A command did not finish in time; it was killed."""


@dataclass(frozen=True)
class LabOptions:
    """What one lab is made of. Two labs with equal options are interchangeable (`lab_factory` relies on it)."""

    memory_mib: int = 3072
    vcpus: int = 1  # two stand still now and then (docs/internals/lab.md)
    cpu: str = "max,+svm,-vgif"
    kernel_arguments: tuple[str, ...] = ()  # after our own, so they win
    modules: tuple[str, ...] = ()  # loaded after `MODULES`, with what they need
    disks: tuple[Path, ...] = ()  # raw images, writable, virtio-blk: /dev/vda, /dev/vdb, ...
    nics: tuple[str, ...] = ()  # QEMU -netdev values without the id: "user", "socket,listen=:1234", "tap,fd=5"
    fresh: tuple[str, ...] = ()  # further directories that shall be empty in the lab
    pass_fds: tuple[int, ...] = ()  # descriptors that `nics` or `arguments` name
    arguments: tuple[str, ...] = ()  # more for QEMU


@dataclass(frozen=True)
class Completed:
    """A command that ended in the lab. `code` is its exit status, or minus the signal that ended it."""

    argv: tuple[str, ...]
    code: int
    stdout: str
    stderr: str
    seconds: float

    def __iter__(self) -> Any:
        return iter((self.code, self.stdout, self.stderr))

    def check(self) -> Completed:
        """Itself, or an AssertionError with all that it said."""
        assert self.code == 0, f"{' '.join(self.argv)}: code {self.code}\n{self.stdout}\n{self.stderr}"
        return self


class Running:
    """A command that still runs in the lab."""

    def __init__(self, lab: Lab, argv: tuple[str, ...], number: int, timeout: float) -> None:
        self._lab, self._argv, self._number, self._timeout = lab, argv, number, timeout
        self._started = time.monotonic()

    def wait(self) -> Completed:
        """Until it ended; raises `LabTimeout` when its timeout is over (it is killed then)."""
        left = self._started + self._timeout + GRACE - time.monotonic()
        header, body = self._lab._result(self._number, max(left, 1.0), " ".join(self._argv))
        out, err = body[: header["out"]].decode(errors="replace"), body[header["out"] :].decode(errors="replace")
        if header["timed_out"]:
            raise LabTimeout(f"{' '.join(self._argv)}: not finished after {self._timeout:g} s\n{out}\n{err}")
        return Completed(self._argv, header["code"], out, err, time.monotonic() - self._started)

    def signal(self, number: int = signal.SIGTERM) -> None:
        """To it and what it started in its session."""
        self._lab._call({"op": "kill", "target": self._number, "signal": int(number)})


@dataclass
class _Waiting:
    done: threading.Event = field(default_factory=threading.Event)
    header: dict[str, Any] = field(default_factory=dict)
    body: bytes = b""


class Lab:
    """One running lab. `start` boots it, `close` ends its QEMU (by handle) and removes its directory."""

    def __init__(self, options: LabOptions | None = None) -> None:
        self.options = options or LabOptions()
        self.kernel: Kernel
        self.boot_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self._socket: socket.socket | None = None
        self._sending = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._table = threading.Lock()
        self._number = 0
        self._ended = False
        self._over = threading.Event()  # no more beats

    # Life --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Lab:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Boot it; back when it takes commands. Raises `LabUnavailable` if this host cannot have one."""
        if shutil.which(QEMU) is None:
            raise LabUnavailable(f"{QEMU} is not installed (Debian: apt-get install qemu-system-x86)")
        self.kernel = ensure_kernel()
        started = time.monotonic()
        self._directory = Path(tempfile.mkdtemp(prefix="kvik-lab-"))
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._socket = ours
                self._waiting[0] = _Waiting()
                self.share.mkdir()
                # Where the environment forbids bytecode every command in the lab would compile all that it imports.
                compileall.compile_dir(REPOSITORY / "src", quiet=2)
                self._write_server()
                self._write_initramfs()
                self._process = subprocess.Popen(
                    self._command(theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=(self._directory / "qemu.log").open("wb"),
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs.fileno(), *self.options.pass_fds),
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            threading.Thread(target=self._listen, args=(ours,), name="lab", daemon=True).start()
            self._result(0, BOOT_DEADLINE, "boot")
            threading.Thread(target=self._beat, name="lab beat", daemon=True).start()
        except BaseException:
            self.close()
            raise
        self.boot_seconds = time.monotonic() - started

    def close(self) -> None:
        self._over.set()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None and not self._ended

    @property
    def pid(self) -> int:
        """Of its QEMU."""
        assert self._process is not None
        return self._process.pid

    @property
    def share(self) -> Path:
        """The directory that both sides can write; `/run/lab` inside."""
        assert self._directory is not None, "the lab is not started"
        return self._directory / "share"

    def console(self, limit: int = 8192) -> str:
        """The end of the serial console (kernel messages), and what QEMU said."""
        text = ""
        for name in ("console.log", "qemu.log"):
            if self._directory is not None and (self._directory / name).exists():
                text += (self._directory / name).read_bytes()[-limit:].decode(errors="replace")
        return text

    # Commands ----------------------------------------------------------------------------------------------------

    def run(
        self,
        argv: Sequence[str | Path],
        timeout: float = RUN_TIMEOUT,
        env: Mapping[str, str] | None = None,
        *,
        stdin: bytes = b"",
        user: str = "",
        cwd: str = "/",
    ) -> Completed:
        """Run a command to its end, as root unless `user` is named. Its own failure is its `code`; the lab's raises."""
        return self.spawn(argv, timeout, env, stdin=stdin, user=user, cwd=cwd).wait()

    def spawn(
        self,
        argv: Sequence[str | Path],
        timeout: float = RUN_TIMEOUT,
        env: Mapping[str, str] | None = None,
        *,
        stdin: bytes = b"",
        user: str = "",
        cwd: str = "/",
    ) -> Running:
        """The same, without waiting: several may run at once."""
        words = tuple(map(str, argv))
        request = {"op": "run", "argv": words, "env": dict(env or {}), "cwd": cwd, "user": user, "timeout": timeout}
        return Running(self, words, self._send(request, stdin), timeout)

    def sh(self, script: str, timeout: float = RUN_TIMEOUT, *, user: str = "") -> str:
        """A shell script's stdout; an AssertionError if it fails."""
        return self.run(["/bin/sh", "-ec", script], timeout, user=user).check().stdout

    def python(self, *arguments: str | Path, timeout: float = RUN_TIMEOUT, user: str = "", **env: str) -> Completed:
        """This interpreter, with the repository's source."""
        return self.run([sys.executable, *arguments], timeout, env, user=user)

    def kvik(self, *arguments: str, timeout: float = RUN_TIMEOUT, user: str = "", **env: str) -> Completed:
        return self.python("-m", "kvik.cli.main", *arguments, timeout=timeout, user=user, **env)

    def load(self, *modules: str) -> None:
        """Load kernel modules with what they need; those that are loaded already stay."""
        paths = [str(self.kernel.modules / path) for path in self.kernel.load_order(modules)]
        self._call({"op": "load", "modules": paths})

    # The channel -------------------------------------------------------------------------------------------------

    def _send(self, request: dict[str, Any], body: bytes = b"") -> int:
        assert self._socket is not None, "the lab is not started"
        with self._sending:
            self._number += 1
            number = self._number
            with self._table:
                self._waiting[number] = _Waiting()
            text = json.dumps(request | {"id": number}).encode()
            try:
                self._socket.sendall(struct.pack(">II", len(text), len(body)) + text + body)
            except OSError as error:
                raise self._failure(f"the lab is gone ({error})") from error
        return number

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._result(self._send(request), RUN_TIMEOUT, str(request["op"]))[0]

    def _result(self, number: int, timeout: float, what: str) -> tuple[dict[str, Any], bytes]:
        with self._table:
            waiting = self._waiting[number]
            if self._ended:
                waiting.done.set()
        came = waiting.done.wait(timeout)
        with self._table:
            del self._waiting[number]
        if not came:
            raise self._failure(f"{what}: the lab does not answer after {timeout:.0f} s\n{self._processors()}")
        if not waiting.header:
            raise self._failure(f"{what}: the lab ended")
        if "error" in waiting.header:
            raise LabError(f"{what}: {waiting.header['error']}")
        return waiting.header, waiting.body

    def _failure(self, text: str) -> LabError:
        return LabError(f"{text}\n--- console\n{self.console()}")

    def _processors(self) -> str:
        """What the lab's CPUs are at, twice, as QEMU's monitor tells it: of one that stands still."""
        said = b""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(2)
            monitor.connect(f"{self._directory}/monitor")
            for _ in range(2):
                monitor.sendall(b"info registers -a\ninfo lapic\n")
                end = time.monotonic() + 2
                with contextlib.suppress(TimeoutError):
                    while time.monotonic() < end and (data := monitor.recv(1 << 16)):
                        said += data
        kept = (line.rstrip() for line in said.decode(errors="replace").splitlines())
        wanted = re.compile(r"CPU#|RIP=|RFL=|ICR|ISR|IRR|TPR|PPR|CR3|timer|R[A-D]X")
        return "\n".join(line for line in kept if wanted.search(line))

    def _beat(self) -> None:
        """Interrupts the lab now and then, for QEMU may lose an interrupt that comes while the emulated CPU leaves a
        machine of the lab's: do_vmexit clears a bit of `interrupt_request` without its lock (svm_helper.c; cured in
        later versions). The CPU then halts with the interrupt pending, and so for ever: its timer is not set again
        before it was served. Any other one makes QEMU look again."""
        text = json.dumps({"op": "beat"}).encode()
        frame = struct.pack(">II", len(text), 0) + text
        while not self._over.wait(BEAT):
            assert self._socket is not None
            with self._sending:
                try:
                    self._socket.sendall(frame)
                except OSError:
                    return

    def _listen(self, connection: socket.socket) -> None:
        """The reader's thread: hands every reply to whom it is for, until the end."""
        with connection, connection.makefile("rb") as stream, contextlib.suppress(OSError, ValueError):
            while len(prefix := stream.read(8)) == 8:
                sizes = struct.unpack(">II", prefix)
                if sum(sizes) > MAX_FRAME:
                    break
                header = json.loads(stream.read(sizes[0]))
                body = stream.read(sizes[1])
                with self._table:
                    if waiting := self._waiting.get(header["id"]):
                        waiting.header, waiting.body = header, body
                        waiting.done.set()
        self._over.set()
        with self._table:
            self._ended = True
            for waiting in self._waiting.values():
                waiting.done.set()

    # What it boots -----------------------------------------------------------------------------------------------

    def _write_server(self) -> None:
        modules = self.kernel.load_order([*MODULES, *self._device_modules(), *self.options.modules])
        config = {
            "env": ENVIRONMENT,
            "keep": sorted(_hidden_paths(self.kernel)),
            "reachable": [str(path) for path in (REPOSITORY, Path(sys.prefix), Path(sys.base_prefix))],
            "fresh": [*FRESH, *self.options.fresh],
            "files": list(FILES),
            "modules": str(self.kernel.modules),
            "busybox": str(self.kernel.busybox),
            "load": [str(self.kernel.modules / path) for path in modules],
        }
        directory = self.share / ".server"
        directory.mkdir()
        (directory / "lab.json").write_text(json.dumps(config))
        shutil.copy(HERE / "guest_server.py", directory)

    def _device_modules(self) -> list[str]:
        return [*(["virtio_blk"] if self.options.disks else []), *(["virtio_net"] if self.options.nics else [])]

    def _write_initramfs(self) -> None:
        order = self.kernel.load_order(BOOT_MODULES)
        stream = io.BytesIO()
        with CpioWriter(stream) as archive:
            archive.directories(["dev", "proc", "sys", "lower", "upper", "root", "bin", "modules"])
            archive.device("dev/console", stat.S_IFCHR, 5, 1)
            archive.file("bin/busybox", self.kernel.busybox.read_bytes(), 0o755)
            archive.file("init", (HERE / "init").read_bytes(), 0o755)
            archive.file("modules/order", "".join(f"{Path(path).name}\n" for path in order).encode())
            for path in order:
                archive.file(f"modules/{Path(path).name}", (self.kernel.modules / path).read_bytes())
        assert self._directory is not None
        (self._directory / "initramfs").write_bytes(stream.getvalue())

    def _command(self, channel: int) -> list[str]:
        options, directory = self.options, self._directory
        words = [kernel_arguments("tcg"), "loglevel=5", f"lab.python={os.path.realpath(sys.executable)}"]
        command = [
            *(QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-bios", "qboot.rom"),
            *("-M", "q35", "-accel", "tcg,thread=multi", "-cpu", options.cpu),
            *("-m", str(options.memory_mib), "-smp", str(options.vcpus)),
            *("-kernel", str(self.kernel.image), "-initrd", f"{directory}/initramfs"),
            *("-append", " ".join([*words, *options.kernel_arguments])),
            *("-serial", f"file:{directory}/console.log", "-device", "virtio-rng-pci"),
            *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
            *("-fsdev", f"local,id=share,path={directory}/share,security_model=none,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=share,mount_tag=share"),
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=lab,fd={channel}"),
            *("-device", "virtserialport,chardev=lab,name=kvik.lab"),
            *("-monitor", f"unix:{directory}/monitor,server=on,wait=off"),
        ]
        for number, disk in enumerate(options.disks):
            command += ("-drive", f"file={disk},format=raw,if=none,id=disk{number},cache=unsafe")
            command += ("-device", f"virtio-blk-pci,drive=disk{number},serial=lab{number}")
        for number, nic in enumerate(options.nics):
            command += ("-netdev", f"{nic},id=net{number}")
            command += ("-device", f"virtio-net-pci,netdev=net{number},romfile=,mac=52:54:00:1a:b0:{number:02x}")
        return [*command, *options.arguments]


def _hidden_paths(kernel: Kernel) -> set[str]:
    """What the lab needs of the host and its own mounts on /tmp and so on would hide."""
    needed = {REPOSITORY, Path(sys.prefix), Path(sys.base_prefix), kernel.directory}
    covered = ("/tmp/", *(f"{path}/" for path in FRESH))
    return {str(path) for path in map(Path.resolve, needed) if str(path).startswith(covered)}


def _die_with_parent() -> None:
    """prctl(PR_SET_PDEATHSIG, SIGKILL): a test run that is killed leaves no QEMU behind."""
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
