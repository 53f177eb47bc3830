"""Volumes that are no files of this host: images of a Ceph cluster, units of an iSCSI target.

What reads or writes one here does it through a file: qemu-storage-daemon, whose client of that server is the same as a
machine's, shows the volume as one (FUSE), as long as it is open. So streams, copies and wiping are the same for all
types. That process has a root directory and namespaces of its own (`vmm/sandbox/own_root.py`), in which alone the file
has a name; it ends with the descriptor, and with us should we be killed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from kvik.conf.storage_volume import Encryption, StorageVolume
from kvik.errors import HostError, MissingPackages, OperationTimeout, OperationUnsupported
from kvik.host.files import host_error
from kvik.host.process import ProcessHandle, find_program, spawn
from kvik.host.secret_file import lent
from kvik.image.base import Image
from kvik.image.convert import convert
from kvik.image.raw import RawImage
from kvik.named import NamedTuple
from kvik.storage import sparse
from kvik.storage.backend import Backend
from kvik.storage.tool import PACKAGES
from kvik.storage.wiping import overwrite

__all__ = ["Node", "ServedBackend", "served"]

SERVER = "qemu-storage-daemon"
DEADLINE = 60.0  # seconds until the server of the volume has answered
GRACE = 30.0  # seconds to write what is left
NOTE_MAX = 4096  # bytes of the process's own words
_LAUNCHER = Path(__file__).parent.parent / "vmm/sandbox/launch.py"


class Node(NamedTuple):
    """How QEMU is told of a volume: `options` of its block driver, and the one of them that names a secret."""

    options: dict[str, Any]
    secret_option: str = ""
    secret: bytes = b""


class ServedBackend(Backend):
    """A type says how QEMU is told of a volume."""

    formats: ClassVar[tuple[str, ...]] = ("raw",)

    def node(self, volume: StorageVolume) -> Node:
        raise NotImplementedError  # each type's own

    @contextmanager
    def opened(self, volume: StorageVolume, *, writable: bool = False) -> Iterator[int]:
        try:
            with served(self.node(volume), writable=writable) as fd:
                yield fd
        except HostError as error:
            what = f"volume '{volume.name}' of pool '{self.name}' cannot be opened here: {error.message}"
            raise HostError(what, errno=error.errno, remedy=error.remedy) from error

    def copy_volume(self, document: StorageVolume, source: int, *, reflink: bool = False) -> StorageVolume:
        """A new one reads as zeros: holes are left out."""
        if reflink:
            self.refuse("copies that share their blocks")
        with self._made(document) as target:
            sparse.copy_data(source, target, min(sparse.size_of(source), sparse.size_of(target)))
        return self.look_at(document)

    def convert_volume(
        self,
        document: StorageVolume,
        source: Image,
        locked: Encryption | None = None,
        *,
        preallocate_metadata: bool = False,
    ) -> StorageVolume:
        with self._made(document) as target, RawImage(os.dup(target), document.name, writable=True) as image:
            convert(source, image, zeroed=True)
            image.flush()
        return self.look_at(document)

    @contextmanager
    def _made(self, document: StorageVolume) -> Iterator[int]:
        """A descriptor of a new volume, which goes if the block does not end well."""
        made = self.create_volume(document)
        try:
            with self.opened(made, writable=True) as fd:
                yield fd
                os.fsync(fd)
        except OSError as error:
            self.delete_volume(made)
            raise host_error("copy to", made.path, error) from error
        except BaseException:
            self.delete_volume(made)
            raise

    def wipe_volume(self, volume: StorageVolume, passes: Sequence[bytes]) -> None:
        with self.opened(volume, writable=True) as fd:
            if passes:
                overwrite(fd, sparse.size_of(fd), passes)
            else:
                sparse.punch(fd, 0, sparse.size_of(fd), growing=False)
                os.fsync(fd)


@contextmanager
def served(node: Node, *, writable: bool = False, deadline: float = DEADLINE) -> Iterator[int]:
    """A descriptor of what QEMU's block driver opens. HostError in its words, OperationTimeout, MissingPackages."""
    program = find_program(SERVER)
    if program is None:
        package = PACKAGES[SERVER]
        raise MissingPackages(
            f"{SERVER} is not on this host, which shows such a volume as a file",
            packages=(package,),
            command=f"apt-get install --no-install-recommends {package}",
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise OperationUnsupported("volumes on the network are read and written through FUSE: there is no /dev/fuse")
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="kvik-volume-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        root, said = directory / "root", directory / "said"
        root.mkdir()
        here, there = socket.socketpair()
        stack.enter_context(here)
        keys = [stack.enter_context(lent(node.secret))] if node.secret_option else []
        with there, said.open("wb") as log:
            fds = [there.fileno(), *keys]
            launched = [sys.executable, "-I", "-S", str(_LAUNCHER), f"--life={there.fileno()}", f"--root={root}"]
            launched += [f"--key={fd}" for fd in keys]
            command = [*launched, "--", program, *_words(node, writable)]
            process = spawn(command, stderr=log.fileno(), pass_fds=fds)
        stack.enter_context(process)
        stack.callback(process.terminate, GRACE)
        fd = _open(process, said, writable, deadline)
        try:
            shutil.rmtree(directory, ignore_errors=True)  # now: nothing is left of it if we are killed
            yield fd
        finally:
            os.close(fd)


def _words(node: Node, writable: bool) -> list[str]:
    """Paths are those of its own root."""
    options, words = {**node.options, "node-name": "volume", "read-only": not writable}, []
    if node.secret_option:
        words += ["--object", "secret,id=key,file=/key"]
        options[node.secret_option] = "key"
    options["discard"] = "unmap"
    export = {
        "type": "fuse",
        "id": "export",
        "node-name": "volume",
        "mountpoint": "/volume",
        "writable": writable,
        "allow-other": "off",  # that would be others of its namespace, which we are not in
    }
    return [*words, "--blockdev", json.dumps(options), "--export", json.dumps(export)]


def _open(process: ProcessHandle, said: Path, writable: bool, deadline: float) -> int:
    """The file once it is there; only through its process can it be found."""
    root = f"/proc/{process.pid}/root"
    end = time.monotonic() + deadline
    pause = 0.005
    while not _is_there(root):
        if not process.alive:
            raise HostError(_why(said))
        if time.monotonic() > end:
            raise OperationTimeout(f"its server did not answer within {deadline:g} s: {_why(said)}")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    try:
        return os.open(f"{root}/volume", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise host_error("open", f"{root}/volume", error) from error


def _is_there(root: str) -> bool:
    """It has left our root, and something is mounted on the file in its own."""
    try:
        devices = {os.stat(path).st_dev for path in ("/", f"{root}/", f"{root}/volume")}  # noqa: PTH116
    except OSError:
        return False
    return len(devices) == 3


def _why(said: Path) -> str:
    with said.open("rb") as file:
        words = file.read(NOTE_MAX).decode("utf-8", "replace")
    lines = [line.removeprefix(f"{SERVER}: ").strip() for line in words.splitlines() if line.strip()]
    return "; ".join(lines[-4:]) or f"{SERVER} ended without a word"
