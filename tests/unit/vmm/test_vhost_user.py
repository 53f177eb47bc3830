"""Devices that another process serves: against the real back ends where they are installed, and against broken ones."""

from __future__ import annotations

import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import HostError, InvalidArgument, OperationFailed, OperationInvalid
from kvik.vmm.layout import MIB
from kvik.vmm.memory import HostMemory
from kvik.vmm.vhost_user import VhostUser
from kvik.vmm.virtio import blk
from kvik.vmm.virtio.fs import Fs
from kvik.vmm.virtio.vhost_user_blk import VhostUserBlk

from .blk_process import LAUNCHER, EventfdTransport
from .ring import Driver, FakeMachine

KVIK_BLK = str(LAUNCHER)
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"


class Served(Driver):
    transport_class = EventfdTransport
    transport: EventfdTransport

    def ask(self, kind: int, sector: int, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
        header = self.space(16, struct.pack("<IIQ", kind, 0, sector))
        status = self.space(1, b"\xee")
        parts = [(header, 16, False)]
        answer = self.space(max(room, len(data), 1), data)
        if data:
            parts.append((answer, len(data), False))
        if room:
            parts.append((answer, room, True))
        self.put(0, [*parts, (status, 1, True)])
        ring = self.device.queues[0]
        self.memory.put_u16(ring.avail + 4 + 2 * ring.size, self.used[0] & 0xFFFF)  # used_event: the next answer
        os.eventfd_write(self.transport.kicks[0], 1)
        for _ in range(100):
            if self.take(0):
                return self.memory.read(status, 1)[0], self.memory.read(answer, room)
            if select.select([self.transport.calls[0]], [], [], 0.1)[0]:
                os.eventfd_read(self.transport.calls[0])
        raise TimeoutError("the back end never answered")


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise TimeoutError(f"{path} never came")


def shared_machine() -> FakeMachine:
    return FakeMachine(32 * MIB, host=HostMemory(shared=True))


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    if not shutil.which("qemu-storage-daemon") or not shutil.which("qemu-img"):
        pytest.skip("needs qemu-storage-daemon and qemu-img (qemu-utils, qemu-system-common)")
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M"], check=True)
    return path


def back_end(program: str, image: Path, path: Path) -> subprocess.Popen[bytes]:
    """One that serves a qcow2 image at `path`."""
    if program == "kvik-blk":
        with socket.socket(socket.AF_UNIX) as listening, image.open("r+b") as file:
            listening.bind(str(path))
            listening.listen()
            fds = (file.fileno(), listening.fileno())
            return subprocess.Popen(
                [sys.executable, "-I", "-S", KVIK_BLK, f"--image={fds[0]},qcow2", f"--socket={fds[1]}"],
                pass_fds=fds,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
    process = subprocess.Popen(
        [
            *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={image}"),
            *("--blockdev", "driver=qcow2,node-name=q,file=f"),
            *("--export", f"type=vhost-user-blk,id=e,node-name=q,writable=on,addr.type=unix,addr.path={path}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for(path, process)
    return process


@pytest.fixture(params=["kvik-blk", "qemu-storage-daemon"])
def program(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def daemon(qcow2: Path, tmp_path: Path, program: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    process = back_end(program, qcow2, tmp_path / "sock")
    yield process, tmp_path / "sock"
    process.kill()
    process.communicate()


def test_a_qcow2_disk_through_a_back_end(daemon: Any, qcow2: Path) -> None:
    process, path = daemon
    driver = Served(VhostUserBlk("disk0", str(path)), machine=shared_machine())
    assert driver.device.config["capacity"] == 8 * MIB // 512
    data = os.urandom(8192)
    assert driver.ask(blk.T_OUT, 16, data) == (blk.S_OK, b"")
    assert driver.ask(blk.T_IN, 16, room=8192) == (blk.S_OK, data)
    assert driver.ask(blk.T_IN, 1 << 40, room=512)[0] == blk.S_IOERR
    # Paused, its queues are ours and its state is whole; afterwards it goes on where it was
    driver.device.pause()
    assert driver.transport.taken == set()
    assert driver.device.state()["queues"][0]["next_avail"] == 3
    driver.device.resume()
    assert driver.ask(blk.T_FLUSH, 0)[0] == blk.S_OK
    assert driver.ask(blk.T_IN, 16, room=8192) == (blk.S_OK, data)
    driver.close()
    process.terminate()
    process.wait(10)
    read = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "read -v 8192 16", str(qcow2)], capture_output=True, text=True, check=False
    )
    assert " ".join(f"{byte:02x}" for byte in data[:16]) in read.stdout


def test_what_the_back_end_writes_is_logged_while_somebody_asks(daemon: Any) -> None:
    _, path = daemon
    driver = Served(VhostUserBlk("disk0", str(path)), machine=shared_machine())
    written: set[int] = set()
    driver.memory.dirty_log = lambda address, size: written.update(
        range(address // 4096, (address + size - 1) // 4096 + 1)
    )
    device: Any = driver.device
    assert device.logs and not device.writes_unseen

    def pages_of_a_read() -> set[int]:
        written.clear()
        assert driver.ask(blk.T_IN, 0, room=8192)[0] == blk.S_OK
        written.clear()  # what the test's own driver put there
        device.take_log()
        return set(written)

    assert pages_of_a_read() == set()  # nobody asks
    device.start_log()
    for _ in range(3):  # both bitmaps, and one again
        used, data = driver.device.queues[0].used // 4096, pages_of_a_read()
        assert used in data and len(data) >= 3
    # It stays on over a pause, and a larger memory gets a larger log
    device.pause()
    device.resume()
    assert len(pages_of_a_read()) >= 3
    before = device.log
    device.log.size = 8
    device._table_changed()
    assert device.log is not before and len(pages_of_a_read()) >= 3
    device.stop_log()
    assert pages_of_a_read() == set()
    driver.close()


def test_requests_that_nobody_answers_keep_a_state_from_being_saved(daemon: Any, monkeypatch: Any) -> None:
    _, path = daemon
    monkeypatch.setattr("kvik.vmm.virtio.vhost_user.SETTLES", 0.01)
    driver = Served(VhostUserBlk("disk0", str(path)), machine=shared_machine())
    assert driver.ask(blk.T_IN, 0, room=512)[0] == blk.S_OK
    # As if the answer to one more request had not come yet
    device: Any = driver.device
    place = device.queues[0].used + 2
    driver.memory.put_u16(place, 0)
    device.pause()
    with pytest.raises(OperationInvalid, match="not answered"):
        device.state()
    driver.memory.put_u16(place, 1)
    device.resume()
    assert device.state()["active"]
    assert driver.ask(blk.T_IN, 0, room=512)[0] == blk.S_OK
    driver.close()


def test_a_killed_back_end_is_an_error_an_event_and_no_more(daemon: Any, qcow2: Path, program: str) -> None:
    process, path = daemon
    driver = Served(VhostUserBlk("disk0", str(path)), machine=shared_machine())
    assert driver.ask(blk.T_IN, 0, room=512)[0] == blk.S_OK
    process.kill()
    process.wait()
    for _ in range(100):
        driver.machine.loop.run_once(0.1)
        if driver.device.broken:
            break
    assert driver.device.broken
    assert driver.transport.resets == 1
    assert [name for name, _ in driver.machine.events] == ["VHOST_USER_DISCONNECTED"]
    assert driver.transport.taken == set()
    # A back end that is started again serves after the guest's reset of the device
    path.unlink()
    again = back_end(program, qcow2, path)
    try:
        driver.device.stop()
        driver.start()
        assert not driver.device.broken
        assert driver.ask(blk.T_IN, 0, room=512)[0] == blk.S_OK
    finally:
        driver.close()
        again.kill()
        again.communicate()


def test_a_driver_knows_of_the_write_cache(daemon: Any) -> None:
    """What the guest flushed must outlive the daemon. QEMU's says in `wce` that there is nothing to flush."""
    _, path = daemon
    device = VhostUserBlk("disk0", str(path))
    assert device.features & (blk.F_FLUSH | blk.CONFIG_WCE) == blk.F_FLUSH
    device.close()


def test_private_memory_is_refused_with_the_way_out(daemon: Any) -> None:
    _, path = daemon
    device = VhostUserBlk("disk0", str(path))
    with pytest.raises(InvalidArgument, match="shared"):
        Served(device)
    device.close()


@pytest.mark.skipif(not Path(VIRTIOFSD).exists(), reason="needs virtiofsd (qemu-system-common)")
@pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd makes namespaces: needs root")
def test_virtiofsd_answers_the_first_message_of_fuse(tmp_path: Path) -> None:
    path = tmp_path / "fs.sock"
    process = subprocess.Popen(
        [VIRTIOFSD, f"--socket-path={path}", "-o", f"source={tmp_path}", "-o", "sandbox=chroot"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(path, process)
        driver = Served(Fs("fs0", str(path), "shared"), machine=shared_machine())
        assert driver.device.config.raw("tag").rstrip(b"\0") == b"shared"
        assert driver.device.config["num_request_queues"] == 1
        # FUSE_INIT of protocol 7.31 (linux/fuse.h): header of 40 bytes, then major, minor, max_readahead, flags
        message = struct.pack("<IIQQIIII", 56, 26, 1, 0, 0, 0, 0, 0) + struct.pack("<IIII", 7, 31, 65536, 0)
        answer = driver.space(256)
        driver.put(1, [(driver.space(56, message), 56, False), (answer, 80, True)])
        os.eventfd_write(driver.transport.kicks[1], 1)
        for _ in range(50):
            if driver.take(1):
                break
            time.sleep(0.1)
        length, error, unique, major, minor = struct.unpack_from("<IiQII", driver.memory.read(answer, 24))
        assert (error, unique, major) == (0, 1, 7)
        assert length == 80
        assert minor >= 31
        driver.close()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", HostError),
        (struct.pack("=III", 1, 5, 0xFFFFFFFF), OperationFailed),
        (struct.pack("=III", 7, 5, 8) + bytes(8), OperationFailed),
        (struct.pack("=III", 1, 1, 8) + bytes(8), OperationFailed),
        (struct.pack("=III", 1, 5, 4) + bytes(4), OperationFailed),
        (struct.pack("=III", 1, 5, 8) + bytes(3), HostError),
    ],
    ids=["hangs up", "endless", "another request", "no reply", "short", "cut off"],
)
def test_a_back_end_that_answers_nonsense_is_an_error(answer: bytes, error: type[Exception]) -> None:
    ours, theirs = socket.socketpair()

    def speak() -> None:
        with theirs:
            theirs.recv(100)
            theirs.sendall(answer)

    thread = threading.Thread(target=speak)
    thread.start()
    with pytest.raises(error):
        VhostUser(ours.detach())
    thread.join()


def test_no_back_end_is_said_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"none\.sock"):
        VhostUser(str(tmp_path / "none.sock"))
