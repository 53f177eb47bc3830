"""A daemon of its own process with the real QEMU driver, and tiny machines to try it on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import kvik
from kvik.client import connect
from kvik.conf.enums import DomainUndefineFlags as Undefine
from kvik.errors import KvikError
from kvik.guest.tiny import TinyImage, kernel_arguments, tiny
from kvik.host.process import find_program
from kvik.paths import Paths
from lab.kernel import cache_directory

HERE = Path(__file__).parent
SOURCE = Path(kvik.__file__).parent.parent
DEADLINE = 60.0  # seconds; two to three is usual, a loaded host may need many times that
EVERYTHING = (
    Undefine.MANAGED_SAVE | Undefine.SNAPSHOTS_METADATA | Undefine.CHECKPOINTS_METADATA | Undefine.NVRAM | Undefine.TPM
)
AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
NIC = "<interface type='user'><mac address='52:54:00:00:00:01'/><model type='virtio'/></interface>"
CONSOLE = "<serial type='pty'/><console type='pty'/>"

needs_qemu = pytest.mark.skipif(
    find_program("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64 (apt install qemu-system-x86)"
)
needs_apt = pytest.mark.skipif(find_program("apt-get") is None, reason="needs apt: the guest is made of packages")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.functional)
            item.add_marker(needs_qemu)
            item.add_marker(needs_apt)


@pytest.fixture(scope="session")
def image() -> TinyImage:
    """Made once for all runs of the tests: its packages are the slow part."""
    return tiny(Paths.system(cache_directory() / "tiny"))


class Kvikd:
    """`kvikd --system --root DIR`, killed and started again at will."""

    def __init__(self, *prefix: str) -> None:
        """`prefix`: words before the daemon's own command, which must become it (exec)."""
        self.prefix = prefix
        self.root = Path(tempfile.mkdtemp(prefix="kd"))
        self.paths = Paths.system(self.root)
        self.socket = self.root / "s"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self.environ = {**os.environ, "PYTHONPATH": str(SOURCE)}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "kvik.daemon", "--system", "--root", str(self.root)]
        with (self.root / "log").open("ab") as log:
            command = [*self.prefix, *command, "--socket", str(self.socket)]
            self.process = subprocess.Popen(command, env=self.environ, stderr=log)
        until(lambda: self.process.poll() is not None or self._answers())
        assert self.process.poll() is None, self.messages()

    def _answers(self) -> bool:
        try:
            self.connection = connect(self.uri)
        except KvikError:
            return False
        return True

    def messages(self) -> str:
        return (self.root / "log").read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.connection.close()
        self.process.send_signal(number)
        return self.process.wait(15)

    def virsh(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = ["virsh", "-c", self.uri, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)

    def kvik(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvik.cli.main", "-c", self.uri, *words]
        env = {**self.environ, **environ}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=env, stdin=subprocess.DEVNULL
        )


@pytest.fixture(scope="module")
def kvikd() -> Iterator[Kvikd]:
    daemon = Kvikd()
    try:
        yield daemon
        assert "failed unexpectedly" not in daemon.messages(), daemon.messages()
    finally:
        try:
            for domain in daemon.connection.domains(1):
                domain.destroy()
        finally:
            assert daemon.end() == 0
            shutil.rmtree(daemon.root, ignore_errors=True)


def until(condition: Callable[[], object], seconds: float = DEADLINE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


class Make:
    """Defines machines; they are destroyed and forgotten at the end of the test."""

    def __init__(self, kvikd: Kvikd, image: TinyImage) -> None:
        self.kvikd = kvikd
        self.image = image
        self.names: list[str] = []

    def xml(
        self,
        name: str,
        devices: str = CONSOLE + AGENT,
        *,
        kernel: bool = True,
        arguments: str = "",
        extra: str = "",
        vcpus: str = "<vcpu>1</vcpu>",
        memory: int = 192,
    ) -> str:
        words = f"{kernel_arguments('tcg', hostname=name)} {arguments}"
        boot = (
            f"<kernel>{self.image.kernel}</kernel><initrd>{self.image.initrd}</initrd><cmdline>{words}</cmdline>"
            if kernel
            else ""
        )
        return (
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>{memory}</memory>{vcpus}"
            f"<os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os>"
            f"<features><acpi/><apic/></features><cpu mode='maximum'/>{extra}"
            f"<devices>{devices}<memballoon model='virtio'/></devices></domain>"
        )

    def __call__(self, name: str, devices: str = CONSOLE + AGENT, **options: Any) -> Any:
        domain = self.kvikd.connection.define(self.xml(name, devices, **options))
        self.names.append(name)
        return domain

    def ready(self, name: str, devices: str = CONSOLE + AGENT, **options: Any) -> Any:
        domain = self(name, devices, **options)
        domain.start()
        found = domain.wait_ready(DEADLINE)
        assert found.ready, found
        return domain

    def clean(self) -> None:
        for name in self.names:
            try:
                domain = self.kvikd.connection.lookup_name(name)
            except KvikError:
                continue
            for step in (domain.destroy, partial(domain.undefine, EVERYTHING)):
                try:
                    step()
                except KvikError:
                    pass


@pytest.fixture
def make(kvikd: Kvikd, image: TinyImage) -> Iterator[Make]:
    make = Make(kvikd, image)
    yield make
    make.clean()
