"""Images, their locks, and the two engines of host I/O."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import ImageError, InvalidArgument, NotFound, OperationUnsupported, ResourceBusy
from kvik.image.lock import lock_image
from kvik.vmm.backends.block import BlockImage
from kvik.vmm.backends.io_uring import Uring
from kvik.vmm.backends.pool import ThreadPool
from kvik.vmm.backends.request import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, Request
from kvik.vmm.loop import EventLoop

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(MIB))
    return path


def engines() -> list[Any]:
    made: list[Any] = [ThreadPool]
    try:
        Uring().close()
        made.append(Uring)
    except OSError:
        pass
    return made


@pytest.mark.parametrize("make", engines(), ids=lambda make: make.__name__)
def test_many_requests_at_once_complete_each_once(make: Any, raw: Path) -> None:
    engine, fd = make(), os.open(raw, os.O_RDWR)
    content, done = raw.read_bytes(), []
    buffers = [bytearray(4096) for _ in range(700)]  # more than the ring has entries
    for index, buffer in enumerate(buffers):
        request = Request(
            READ, index % 256 * 4096, 4096, [memoryview(buffer)[:100], memoryview(buffer)[100:]], done.append
        )
        request.fd = fd
        engine.submit(request)
    engine.flush()
    while engine.in_flight:
        assert engine.wait(10)
    assert len(done) == len({id(request) for request in done}) == 700
    assert all(request.result == 0 for request in done)
    assert all(bytes(buffer) == content[i % 256 * 4096 :][:4096] for i, buffer in enumerate(buffers))
    engine.close()
    engine.close()
    os.close(fd)


@pytest.mark.parametrize("make", engines(), ids=lambda make: make.__name__)
def test_a_transfer_beyond_the_end_is_an_error_and_zeros_within_the_last_sector(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 700)
    fd, engine = os.open(path, os.O_RDWR), make()
    results = []
    for end in (700, 5000):  # 5000: what the file had before somebody truncated it
        buffer = bytearray(b"y" * 1024)
        request = Request(READ, 0, 1024, [memoryview(buffer)], None)
        request.fd, request.end = fd, end
        engine.submit(request)
        engine.flush()
        while engine.in_flight:
            assert engine.wait(10)
        results.append((request.result, bytes(buffer)))
    assert results[0] == (0, b"x" * 700 + bytes(324))
    assert results[1][0] == -errno.EIO
    engine.close()
    os.close(fd)


def served(image: BlockImage) -> EventLoop:
    loop = EventLoop()
    image.start(loop, private=True)
    return loop


def do(image: BlockImage, op: int, offset: int = 0, data: bytearray | None = None, **more: Any) -> int:
    buffers = [memoryview(data)] if data is not None else []
    length = more.pop("length", len(data) if data is not None else 0)
    done: list[Request] = []
    if op in (READ, WRITE) and image.now(op, buffers, offset, length):
        return 0
    request = Request(op, offset, length, buffers, done.append, **more)
    if not image.submit(request):
        image.flush()
        assert image.drain(10)
        assert done == [request]
    return request.result


@pytest.mark.parametrize("aio", ["threads", "auto"])
@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough", "directsync", "unsafe"])
def test_every_cache_mode_reads_back_what_it_wrote(raw: Path, cache: str, aio: str) -> None:
    image = BlockImage(str(raw), cache=cache, aio=aio)
    served(image)
    old = raw.read_bytes()
    # The odd ones are what O_DIRECT refuses: offset, length and address not aligned
    for offset, length in ((0, 4096), (512, 512), (4096, 65536), (1000, 24)):
        data = bytearray(os.urandom(length + 1))
        part = memoryview(data)[1:]
        done: list[Request] = []
        request = Request(WRITE, offset, length, [part], done.append)
        if not image.submit(request):
            image.flush()
            assert image.drain(10)
        assert request.result == 0
        back = bytearray(length)
        assert do(image, READ, offset, back) == 0
        assert back == part
        old = old[:offset] + bytes(part) + old[offset + length :]
    assert do(image, FLUSH) == 0
    assert raw.read_bytes() == old
    image.close()


def test_discard_and_zeroes_free_or_clear_the_range(raw: Path) -> None:
    image = BlockImage(str(raw))
    served(image)
    before = raw.read_bytes()
    assert do(image, DISCARD, 65536, length=65536) == 0
    assert do(image, WRITE_ZEROES, 200 << 10, length=4096, unmap=False) == 0
    assert do(image, WRITE_ZEROES, 300 << 10, length=8192, unmap=True) == 0
    after = raw.read_bytes()
    for start, size in ((200 << 10, 4096), (300 << 10, 8192)):
        assert after[start : start + size] == bytes(size)
    assert after[:65536] == before[:65536]
    assert len(after) == MIB
    image.close()


def test_an_image_that_is_cut_short_gives_errors_not_zeros(raw: Path) -> None:
    image = BlockImage(str(raw))
    served(image)
    os.truncate(raw, 4096)
    assert do(image, READ, 512 << 10, bytearray(4096)) == -errno.EIO
    assert do(image, READ, 0, bytearray(4096)) == 0
    image.close()


def test_resize_and_a_size_that_is_no_multiple_of_a_sector(raw: Path) -> None:
    image = BlockImage(str(raw))
    image.resize(2 * MIB)
    assert image.size == 2 * MIB == raw.stat().st_size
    with pytest.raises(InvalidArgument):
        image.resize(1000)
    os.truncate(raw, 1000)
    assert image.refresh_size()
    assert image.size == 1024
    image.close()


def test_what_is_no_raw_image_is_refused_with_the_way_out(tmp_path: Path) -> None:
    qcow2 = tmp_path / "disk.qcow2"
    qcow2.write_bytes(b"QFI\xfb" + bytes(1020))
    with pytest.raises(OperationUnsupported, match="qemu-storage-daemon"):
        BlockImage(str(qcow2))
    with pytest.raises(OperationUnsupported):
        BlockImage(str(qcow2), image_format="qcow2")
    BlockImage(str(qcow2), image_format="raw").close()  # said, not guessed
    with pytest.raises(NotFound):
        BlockImage(str(tmp_path / "none"))
    with pytest.raises(ImageError):
        BlockImage("/dev/null")


def test_a_descriptor_must_allow_what_the_disk_needs(raw: Path) -> None:
    fd = os.open(raw, os.O_RDONLY)
    with pytest.raises(InvalidArgument, match="writing"):
        BlockImage(fd)
    image = BlockImage(fd, read_only=True)
    assert image.size == MIB
    image.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_two_writers_exclude_each_other_and_readers_do_not(raw: Path) -> None:
    first = BlockImage(str(raw))
    with pytest.raises(ResourceBusy):
        BlockImage(str(raw))
    with pytest.raises(ResourceBusy):
        BlockImage(str(raw), read_only=True)
    BlockImage(str(raw), locking=False).close()
    first.close()
    readers = [BlockImage(str(raw), read_only=True) for _ in range(3)]
    with pytest.raises(ResourceBusy):
        BlockImage(str(raw))
    for reader in readers:
        reader.close()
    BlockImage(str(raw)).close()


def test_qemu_respects_the_locks_and_is_respected(raw: Path) -> None:
    from shutil import which

    if not which("qemu-io"):
        pytest.skip("needs qemu-io (qemu-utils)")
    image = BlockImage(str(raw))
    try_write = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(raw)]
    refused = subprocess.run(try_write, capture_output=True, text=True, check=False)
    assert refused.returncode
    assert "lock" in refused.stderr
    image.close()
    assert subprocess.run(try_write, capture_output=True, check=False).returncode == 0
    qemu = subprocess.Popen(["qemu-io", "-f", "raw", str(raw)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert qemu.stdin is not None
    assert qemu.stdout is not None
    try:
        qemu.stdin.write(b"length\n")
        qemu.stdin.flush()
        while b"MiB" not in qemu.stdout.readline():
            pass
        with pytest.raises(ResourceBusy):
            BlockImage(str(raw))
    finally:
        qemu.communicate(b"quit\n")
    BlockImage(str(raw)).close()


def test_another_process_that_shares_write_is_let_in(raw: Path) -> None:
    first = BlockImage(str(raw), share_write=True)
    second = BlockImage(str(raw), share_write=True)
    code = "import os, sys; from kvik.image.lock import lock_image; "
    code += f"lock_image(os.open({str(raw)!r}, os.O_RDWR), 'x', write=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ResourceBusy" in done.stderr
    first.close()
    second.close()
    fd = os.open(raw, os.O_RDWR)
    lock_image(fd, "x", write=True)
    os.close(fd)


def test_what_needs_no_waiting_is_done_at_once_and_nothing_else(raw: Path) -> None:
    image = BlockImage(str(raw))
    served(image)
    content = raw.read_bytes()
    buffers = [memoryview(bytearray(1000)), memoryview(bytearray(3096))]
    assert image.now(READ, buffers, 4096, 4096)  # the file was just written: it is cached
    assert b"".join(buffers) == content[4096:8192]
    assert image.now(WRITE, buffers, 0, 4096)
    assert raw.read_bytes()[:4096] == content[4096:8192]
    assert not image.now(WRITE, buffers, 0, 4096, write_through=True)
    assert not image.now(READ, [memoryview(bytearray(1))] * 1025, 0, 1025)  # more than IOV_MAX
    assert image.now(READ, buffers, 0, 4096)
    os.truncate(raw, 1000)
    assert not image.now(READ, buffers, 0, 4096)
    image.close()


def test_a_loop_that_serves_others_too_is_not_held_up_by_writes(raw: Path) -> None:
    image = BlockImage(str(raw))
    loop = EventLoop()
    image.start(loop, private=False)
    assert not image.now(WRITE, [memoryview(bytearray(512))], 0, 512)
    image.close()
    loop.close()
