"""A host of its own for one test: a directory, a daemon, its machines, and the checks that nothing is left of them.

Everything below `Host.root`; every process below one nursery (see there). Processes are ended by pid, and only those
that were started here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import kvik
from kvik.client import Connection, connect
from kvik.errors import ConnectError, NoDomain
from kvik.paths import Paths

SOURCE = Path(kvik.__file__).parent.parent
NURSERY = Path(__file__).with_name("nursery.py")
PATIENCE = 30.0  # seconds; for what usually takes milliseconds, on a host that is busy with other things
CLI = (sys.executable, "-P", "-m", "kvik.cli.main")


def machine_xml(
    name: str,
    devices: str = "",
    *,
    memory: int = 16,
    uuid: str = "",
    emulator: str = "",
    before: str = "",
    after: str = "",
    kernel: str = "",
) -> str:
    """A machine that starts in a moment and does nothing. `memory` in MiB."""
    return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  {f"<uuid>{uuid}</uuid>" if uuid else ""}
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>{f"<kernel>{kernel}</kernel>" if kernel else ""}</os>
  {before}
  <devices>
    {f"<emulator>{emulator}</emulator>" if emulator else ""}
    <memballoon model='none'/>
    {devices}
  </devices>
  {after}
</domain>
"""


def disk_xml(path: Path | str, target: str = "vda", extra: str = "", format: str = "raw") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/>{extra}</disk>"
    )


def eventually(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> Any:
    deadline = time.monotonic() + patience
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not in {patience:g} s: {what}"
        time.sleep(0.01)
    return result


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def children(pid: int) -> list[int]:
    """Of all threads, and theirs in turn."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *children(child)]
    return found


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:300]
    return ""


class Host:
    """`private_mounts` gives the daemon a mount namespace of its own, for `mount` (needs root)."""

    def __init__(self, *, private_mounts: bool = False, session: bool = False) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="kf", dir="/tmp"))
        self.session = session
        if session:
            self.environ = {"HOME": str(self.root), "XDG_RUNTIME_DIR": str(self.root / "run")}
            (self.root / "run").mkdir(0o700)
            self.paths = Paths.session(self.environ)
        else:
            self.environ = {"KVIK_ROOT": str(self.root), "HOME": str(self.root)}
            self.paths = Paths.system(self.root, {})
        self.environ |= {"PYTHONPATH": str(SOURCE), "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        self.output = self.root / "kvikd.out"
        prefix = ["unshare", "-m", "--propagation", "private"] if private_mounts else []
        self._nursery = subprocess.Popen(
            [*prefix, sys.executable, str(NURSERY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask({"codes": True})  # it has its own mounts from here on: `enter` must not come before
        self.daemon = 0
        self._connection: Connection | None = None
        self.daemon_fds = 0
        self.expected_messages: list[str] = []  # of the daemon, that would otherwise fail the test

    # processes

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._nursery.stdin and self._nursery.stdout
        self._nursery.stdin.write(json.dumps(request) + "\n")
        self._nursery.stdin.flush()
        return json.loads(self._nursery.stdout.readline())

    def spawn(self, *argv: str, output: Path | None = None, environ: dict[str, str] | None = None) -> int:
        environ = {**self.environ, **(environ or {})}
        return self._ask({"spawn": list(argv), "env": environ, "output": str(output or self.output)})["pid"]

    def exit_code(self, pid: int) -> int:
        """As subprocess gives it; waits."""
        codes = eventually(lambda: (c := self._ask({"codes": True})).get(str(pid)) is not None and c, f"end of {pid}")
        return os.waitstatus_to_exitcode(codes[str(pid)])

    def processes(self) -> list[int]:
        return [pid for pid in children(self._nursery.pid) if alive(pid)]

    def mount(self, directory: Path, size: str) -> None:
        """A small tmpfs that only the daemon and its machines see."""
        directory.mkdir(0o700, parents=True, exist_ok=True)
        self.enter("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(directory))

    def enter(self, *command: str) -> str:
        """Run a command among the daemon's mounts."""
        whole = ["nsenter", "-t", str(self._nursery.pid), "-m", *command]
        result = subprocess.run(whole, check=False, capture_output=True, text=True, timeout=PATIENCE)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout

    def inside(self, path: Path) -> Path:
        """A path as the daemon sees it."""
        return Path(f"/proc/{self._nursery.pid}/root{path}")

    # the daemon

    @property
    def uri(self) -> str:
        return f"kvik+unix:///{self.paths.scope}?socket={self.paths.socket}"

    def daemon_command(
        self, *options: str, start_deadline: float = 0, program: Sequence[str] = ("-m", "kvik.daemon.main")
    ) -> list[str]:
        scope = ["--session"] if self.session else ["--system", "--root", str(self.root)]
        if start_deadline:
            lines = (
                "from kvik.daemon.main import main",
                "from kvik.hypervisor import launch",
                f"launch.START_DEADLINE = {start_deadline}",
                "raise SystemExit(main())",
            )
            program = ("-c", "\n".join(lines))
        return [sys.executable, "-P", *program, *scope, *options]

    def start(
        self,
        *options: str,
        wrapper: tuple[str, ...] = (),
        environ: dict[str, str] | None = None,
        start_deadline: float = 0,
        program: Sequence[str] = ("-m", "kvik.daemon.main"),
    ) -> Connection:
        """Start the daemon and wait until it answers. `start_deadline`: seconds a VMM has for it, if not the usual;
        `program`: what Python is to run in the daemon's place."""
        self.close_connection()
        command = self.daemon_command(*options, start_deadline=start_deadline, program=program)
        self.daemon = self.spawn(*wrapper, *command, environ=environ)
        connection = self.connected()
        self.daemon_fds = self.fd_count()
        return connection

    def connected(self) -> Connection:
        """Connect as soon as it answers."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._connection = connect(self.uri)
                return self._connection
            except ConnectError:
                assert alive(self.daemon), f"kvikd ended: {self.messages()}"
                assert time.monotonic() < deadline, self.messages()
                time.sleep(0.01)

    @property
    def connection(self) -> Connection:
        if self._connection is None:
            return self.connected()
        return self._connection

    def close_connection(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None

    def kill_daemon(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.daemon, number)
        eventually(lambda: not alive(self.daemon), "end of the daemon")

    def restart(self, number: int = signal.SIGKILL) -> Connection:
        self.kill_daemon(number)
        return self.start()

    def messages(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def fd_count(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon}/fd"))

    # machines

    def state(self, name: str) -> str:
        """As `kvik domstate` prints it."""
        return self.kvik("domstate", name).strip()

    def reason(self, name: str) -> str:
        return self.kvik("domstate", "--reason", name).strip()

    def status(self, name: str) -> ElementTree.Element:
        return ElementTree.fromstring(self.inside(self.paths.status / f"{name}.xml").read_bytes())

    def pid(self, name: str) -> int:
        return int(self.status(name).attrib["pid"])

    def log(self, name: str) -> str:
        return self.inside(self.paths.domain_logs / f"{name}.log").read_text(errors="replace")

    def kvik(self, *arguments: str, fails: str = "", code: int | None = None, stdin: str = "") -> str:
        """Run the CLI. `fails`: a pattern that its error must match; otherwise it must succeed."""
        result = subprocess.run(
            [*CLI, "-c", self.uri, *arguments],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
            input=stdin,
        )
        output = result.stdout + result.stderr
        assert "Traceback" not in output, output
        if fails:
            assert result.returncode == (code or 1), (result.returncode, output)
            assert re.search(fails, output, re.DOTALL), f"{fails!r} is not in {output!r}"
        else:
            assert result.returncode == 0, (result.returncode, output)
        return output

    def document(self, name: str, text: str) -> str:
        """A file with this document; its path."""
        path = self.root / f"{name}.doc"
        path.write_text(text)
        return str(path)

    def define(self, name: str, devices: str = "", **more: Any) -> str:
        self.connection.define(machine_xml(name, devices, **more))
        return name

    def image(self, name: str, size: int = 1 << 20) -> Path:
        path = self.root / name
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def files(self) -> dict[str, str]:
        """What the daemon keeps: paths below its state directories -> what they are or link to."""
        found: dict[str, str] = {}
        for base in (self.paths.domains, self.paths.status):
            base_inside = self.inside(base)
            for path in sorted(base_inside.rglob("*")):
                kind = os.readlink(path) if path.is_symlink() else "directory" if path.is_dir() else "file"
                found[str(base / path.relative_to(base_inside))] = kind
        return found

    def end_machines(self) -> None:
        for domain in self.connection.domains():
            with contextlib.suppress(NoDomain):
                if domain.is_active():
                    domain.destroy()

    # the checks

    def check_consistent(self) -> None:
        """Files and processes are those of the machines that the daemon knows, and nothing else."""
        domains = self.connection.domains()
        running = {domain.name for domain in domains if domain.is_active()}
        pids = {self.pid(name) for name in running}
        extra = set(self.processes()) - pids - {self.daemon}
        assert not extra, f"processes nobody owns: {[command_of(pid) for pid in extra]}"
        assert all(alive(pid) for pid in pids)
        known = {f"{self.paths.domains}/autostart", f"{self.paths.networks}", f"{self.paths.networks}/autostart"}
        if self.session:  # its network is made at the first start
            known |= {f"{self.paths.networks}/{place}default.xml" for place in ("", "autostart/")}
        known |= {f"{self.paths.domains}/{domain.name}.xml" for domain in domains if domain.is_persistent()}
        known |= {
            f"{self.paths.domains}/autostart/{d.name}.xml" for d in domains if d.is_persistent() and d.autostart()
        }
        own: set[str] = set()
        for name in running:
            known.add(f"{self.paths.status}/{name}.xml")
            own.add(self.status(name).attrib["directory"])
        for path in self.files():
            if path not in known and path not in own and os.path.dirname(path) not in own:
                raise AssertionError(f"left behind: {path}")
        for path in known:
            assert path in self.files(), f"missing: {path}"

    def trouble(self) -> str:
        """What `check_consistent` complains of, now; "" if nothing."""
        try:
            self.check_consistent()
        except AssertionError as error:
            return str(error) or "inconsistent"
        return ""

    def check_log(self) -> None:
        messages = self.messages()
        assert "Traceback" not in messages, messages
        assert "failed unexpectedly" not in messages, messages

    def end(self) -> None:
        """End the machines, then the daemon; nothing may be left."""
        try:
            if alive(self.daemon):
                self.end_machines()
                eventually(lambda: self.processes() == [self.daemon], "only the daemon is left")
                eventually(lambda: not self.trouble(), "files are in order", 5)
                self.check_consistent()
                count = eventually(lambda: (n := self.fd_count()) <= self.daemon_fds + 2 and n, "descriptors closed")
                assert count
                self.close_connection()
                os.kill(self.daemon, signal.SIGTERM)
                assert self.exit_code(self.daemon) == 0, self.messages()
                assert not self.paths.socket.exists()
            self.check_log()
        finally:
            self.close_connection()
            left = self.processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert self._nursery.stdin and self._nursery.stdout
            self._nursery.stdin.close()
            self._nursery.wait(PATIENCE)
            self._nursery.stdout.close()
            shutil.rmtree(self.root, ignore_errors=True)
        assert not left, "processes were left behind"


@contextlib.contextmanager
def host(**options: Any) -> Iterator[Host]:
    """A host, ended and checked; after a failure only ended."""
    it = Host(**options)
    try:
        yield it
    except BaseException:
        with contextlib.suppress(BaseException):
            it.end()
        raise
    it.end()
