"""Memory of one instant, saved by another process while it is written to."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvik
from kvik.errors import HostError, OperationUnsupported
from kvik.vmm.layout import MIB, PAGE
from kvik.vmm.loop import EventLoop
from kvik.vmm.memory import GuestMemory, HostMemory
from kvik.vmm.state import stream
from kvik.vmm.state.protection import Protection

PROGRAM = Path(kvik.__file__).parent / "vmm/saver/__main__.py"
SIZE = 8 * MIB
HEAD, TAIL = b"head of it", b"and its end"


@pytest.fixture
def device() -> int:
    try:
        return os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"needs /dev/userfaultfd (Linux 6.1), opened: {error}")


class Saving:
    """A saver, and memory that it is told of."""

    def __init__(self, memory: GuestMemory, device: int) -> None:
        self.memory, self.loop, self.why = memory, EventLoop(), ["not yet"]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.out, writer = os.pipe()
        words = [f"--out={writer}", f"--vmm={theirs.fileno()}"]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(PROGRAM), *words],
            stdout=subprocess.PIPE,
            pass_fds=(writer, theirs.fileno()),
        )
        theirs.close()
        os.close(writer)
        assert self.process.stdout is not None and self.process.stdout.readline() == b"ready\n"
        self.channel = ours.detach()
        self.protection = Protection(memory, self.loop, self.channel, device, self._ended)

    def _ended(self, why: str) -> None:
        self.why = [why]

    def freeze(self, left: bytes = b"") -> None:
        fds = [os.open("/proc/self/mem", os.O_RDONLY)]
        for data in (HEAD + left, TAIL):
            fds.append(os.memfd_create("test"))
            os.write(fds[-1], data)
        files = [[region.start, region.fd_offset] for region in self.memory.regions if region.fd >= 0]
        fds += [region.fd for region in self.memory.regions if region.fd >= 0]
        self.protection.protect({"first": len(HEAD), "left": self.memory.mapped, "files": files}, fds)
        for fd in fds[:3]:
            os.close(fd)

    def turn(self) -> None:
        """What the loop would do, once."""
        if self.why == ["not yet"] and select.select([self.channel], [], [], 0.02)[0]:
            self.protection._heard()

    def pages(self) -> dict[int, bytes]:
        """All of the stream: what it says each page was."""
        data = b""
        while part := os.read(self.out, 1 << 20):
            data += part
            self.turn()
        while self.process.poll() is None:
            self.turn()
        assert self.process.returncode == 0 and self.why == [""] and self.memory.keeper is None
        assert data.startswith(HEAD) and data.endswith(TAIL)
        data, found, at = data[len(HEAD) : -len(TAIL)], {}, 0
        while at < len(data):
            kind, size, address = stream.parse(data[at : at + 16])
            assert kind == stream.PAGES
            at += 16
            for page in range(0, size, PAGE):
                assert address + page not in found
                found[address + page] = data[at + page : at + page + PAGE]
            at += size
        return found

    def close(self) -> None:
        self.protection.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        os.close(self.out)
        self.loop.close()


@pytest.fixture(params=[False, True], ids=["private", "shared"])
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    made = GuestMemory.allocate(SIZE, HostMemory(shared=request.param))
    for page in range(0, SIZE // 2, PAGE):
        made.write(page, b"before%d" % page)
    yield made
    made.close()


@pytest.fixture
def saving(memory: GuestMemory, device: int) -> Iterator[Saving]:
    made = Saving(memory, device)
    yield made
    made.close()


def was(page: int) -> bytes:
    return (b"before%d" % page if page < SIZE // 2 else b"").ljust(PAGE, b"\0")


def test_what_is_written_after_the_instant_is_not_in_it(saving: Saving) -> None:
    """Pages that were there and pages that were not; by the interpreter and, without its lock, by the kernel."""
    saving.freeze()
    reader, writer = os.pipe()

    def write() -> None:
        for page in range(SIZE - PAGE, -1, -PAGE):
            if page % (2 * PAGE):
                os.write(writer, b"behind")
                os.readv(reader, [saving.memory.view(page, 6)])
            else:
                saving.memory.write(page, b"behind")

    thread = threading.Thread(target=write)
    thread.start()
    found = saving.pages()
    thread.join()
    os.close(reader)
    os.close(writer)
    assert found == {page: was(page) for page in range(0, SIZE // 2, PAGE)}
    assert all(saving.memory.read(page, 6) == b"behind" for page in range(0, SIZE, PAGE))


def test_pages_that_a_file_lends_are_saved_by_whoever_is_told_to(
    memory: GuestMemory, device: int, tmp_path: Path
) -> None:
    """Those cannot be protected; all around them is, and is in the file once."""
    path = tmp_path / "file"
    path.write_bytes(b"lent".ljust(PAGE) * 3)
    with path.open("rb") as file:
        memory.map_file(MIB, file.fileno(), 0, 3 * PAGE)
    shared = memory.regions[0].fd >= 0
    assert memory.mapped == ([] if shared else [(MIB, 3 * PAGE)])
    saving = Saving(memory, device)
    try:
        lent = memory.read(MIB, 3 * PAGE)
        left = stream.frame(stream.PAGES, len(lent), MIB) + lent if not shared else b""
        saving.freeze(left)
        found = saving.pages()
    finally:
        saving.close()
    assert found == {
        page: b"lent".ljust(PAGE) if MIB <= page < MIB + 3 * PAGE else was(page) for page in range(0, SIZE // 2, PAGE)
    }


def test_pages_stay_until_it_is_over(saving: Saving) -> None:
    memory = saving.memory
    saving.freeze()
    with pytest.raises(HostError, match="being saved and cannot be given back"):
        memory.discard(0, PAGE)
    with pytest.raises(HostError, match="cannot be mapped by another"):
        memory.require_free("be mapped by another process")
    # A part that goes ends it: what came so far is not the whole.
    memory.remove(memory.regions[0])
    assert saving.why == ["it was given up"] and memory.keeper is None
    while os.read(saving.out, 1 << 20):
        pass
    assert saving.process.wait(20) == 1


@pytest.mark.parametrize("frozen", [False, True], ids=["ready", "frozen"])
def test_a_saver_that_is_killed_lets_everybody_write(saving: Saving, frozen: bool) -> None:
    if frozen:
        saving.freeze()
    saving.process.kill()
    for page in range(0, SIZE, PAGE):
        saving.memory.write(page, b"behind")
    while saving.why == ["not yet"]:
        saving.turn()
    assert saving.why == ["the process that saves its memory has ended"] and saving.memory.keeper is None
    saving.memory.discard(0, PAGE)


def test_nobody_waits_when_nobody_takes_what_is_saved(saving: Saving) -> None:
    saving.freeze()
    os.close(saving.out)
    saving.out = os.open("/dev/null", os.O_RDONLY)
    for page in range(0, SIZE, PAGE):
        saving.memory.write(page, b"behind")
    assert saving.process.wait(20) == 1


def test_one_attempt_at_a_time(saving: Saving) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, pytest.raises(OperationUnsupported, match="already"):
        device = os.open("/dev/userfaultfd", os.O_RDWR)
        Protection(saving.memory, saving.loop, ours.detach(), device, lambda why: None)
    assert saving.memory.keeper is not None
    saving.freeze()
    assert len(saving.pages()) == SIZE // 2 // PAGE


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"[]",
        b"{" * 5000,
        json.dumps({"regions": [[0, 4097, 0]], "first": 0, "left": [], "files": []}).encode(),
        json.dumps({"regions": [[0, 8192, 0], [4096, 4096, 0]], "first": 0, "left": [], "files": []}).encode(),
        json.dumps({"regions": [[0, 4096, 1 << 60]], "first": 0, "left": [], "files": []}).encode(),
        json.dumps({"regions": [[0, 4096, 4096]], "first": -1, "left": [], "files": []}).encode(),
        json.dumps({"regions": [[0, 4096, 4096]], "first": 0, "left": [], "files": [[0, 0]]}).encode(),
        json.dumps({"regions": [[0, 4096, 4096]], "first": 0, "left": [[1]], "files": []}).encode(),
        json.dumps({"regions": [[0, 4096, 4096]], "first": 0, "left": [], "files": []}).encode(),
    ],
)
def test_a_vmm_that_says_what_cannot_be_ends_the_saver(message: bytes) -> None:
    """With descriptors that are no memory at all."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    words = [f"--out={writer}", f"--vmm={theirs.fileno()}"]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(PROGRAM), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(writer, theirs.fileno()),
    )
    os.close(writer)
    theirs.close()
    with ours, open("/dev/null", "rb") as null:
        if message:
            socket.send_fds(ours, [message], [null.fileno()] * 4)
    out, errors = process.communicate(timeout=30)
    os.close(reader)
    assert process.returncode == 1 and out.startswith(b"ready\n") and len(out.splitlines()) == 2 and not errors
