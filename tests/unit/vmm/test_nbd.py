"""The NBD server of backups: what clients may say, what they may not, and that neither takes room or the loop."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import ImageError
from kvik.image.base import DATA, ZERO
from kvik.image.opening import open_image
from kvik.vmm.blk import nbd, nbd_server
from kvik.vmm.blk.nbd_export import Export
from kvik.vmm.blk.nbd_server import NbdServer
from kvik.vmm.loop import EventLoop

MIB = 1 << 20
SIZE = 64 * MIB
Option = tuple[int, int, bytes]


class Shown:
    """A backup, as far as an export asks: 64 KiB of data at each even MiB, each third of them changed."""

    bits_shift = 16

    def __init__(self, path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(SIZE)
            for at in range(0, SIZE, 2 * MIB):
                file.seek(at)
                file.write(bytes([at // MIB + 1]) * 65536)
        self.target = open_image(os.open(path, os.O_RDONLY), format="raw", path=str(path))
        self.bits = bytearray(SIZE >> 19)
        for at in range(0, SIZE, 3 * MIB):
            self.bits[at >> 19] |= 1
        self.fails = False

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int, Any, int]]:
        if self.fails:
            raise ImageError("the backup is over")
        for kind, at, size, image, host in self.target.pieces(offset, length):
            yield (DATA if kind == DATA else ZERO), at, size, image, host


class Client:
    def __init__(self, path: Path, flags: int = 3) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        assert self.take(18) == nbd.GREETING
        self.sock.sendall(struct.pack(">I", flags))

    def take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def option(self, option: int, data: bytes = b"") -> list[Option]:
        """All replies to it."""
        self.sock.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        found = []
        while not found or (found[-1][1] < 1 << 31 and found[-1][1] != nbd.R_ACK):
            magic, about, kind, length = struct.unpack(">QIII", self.take(20))
            assert magic == 0x3E889045565A9
            found.append((about, kind, self.take(length)))
        return found

    def go(self, name: str = "vda", *contexts: str, structured: bool = True) -> None:
        if structured:
            assert self.option(nbd.O_STRUCTURED)[-1][1] == nbd.R_ACK
        if contexts:
            queries = b"".join(text(context) for context in contexts)
            told = self.option(nbd.O_SET_META, text(name) + struct.pack(">I", len(contexts)) + queries)
            assert [data[4:].decode() for _, kind, data in told if kind == nbd.R_META] == list(contexts)
        assert self.option(nbd.O_GO, text(name) + bytes(2))[-1][1] == nbd.R_ACK

    def ask(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> None:
        self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, 77, offset, length) + payload)

    def chunks(self) -> list[tuple[int, bytes]]:
        found = []
        while True:
            magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.take(20))
            assert (magic, cookie) == (0x668E33EF, 77)
            found.append((kind, self.take(length)))
            if flags & nbd.DONE:
                return found

    def extents(self, offset: int, length: int, flags: int = 0) -> list[list[tuple[int, int]]]:
        self.ask(nbd.BLOCK_STATUS, offset, length, flags)
        told = self.chunks()
        assert [kind for kind, _ in told] == [nbd.T_STATUS] * len(told)
        return [list(struct.iter_unpack(">II", data[4:])) for _, data in told]

    def ended(self) -> bool:
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True


def text(words: str | bytes) -> bytes:
    data = words.encode() if isinstance(words, str) else words
    return struct.pack(">I", len(data)) + data


class Running:
    def __init__(self, root: Path) -> None:
        self.path, self.shown, self.said = root / "nbd", Shown(root / "image"), list[str]()
        self.loop = EventLoop()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        export = Export(self.shown, "changed", threading.RLock())  # type: ignore[arg-type]  # quacks like a backup
        self.server = NbdServer(
            self.loop, {"vda": export}, ["vda"], listening=listener.detach(), links={}, log=self.said.append
        )
        self.failed: list[BaseException] = []
        self.loop.on_error = self.failed.append
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def close(self) -> None:
        self.loop.call_soon(self.server.close)
        self.loop.stop()
        self.thread.join()
        self.loop.close()
        self.shown.target.release()
        assert not self.failed, self.failed


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    yield made
    made.close()


def test_reads_in_chunks_as_one_and_simply(running: Running) -> None:
    client = Client(running.path)
    client.go()
    client.ask(nbd.READ, 2 * MIB - 512, 65536 + 512)
    told = client.chunks()
    assert [kind for kind, _ in told] == [nbd.T_HOLE, nbd.T_DATA, nbd.T_NONE]
    assert struct.unpack(">QI", told[0][1]) == (2 * MIB - 512, 512)
    assert told[1][1] == struct.pack(">Q", 2 * MIB) + bytes([3]) * 65536
    client.ask(nbd.READ, 0, 32 * MIB, nbd.DF)
    ((kind, data),) = client.chunks()
    assert kind == nbd.T_DATA and len(data) == 8 + 32 * MIB and data[8 + 30 * MIB] == 31
    plain = Client(running.path)
    plain.go(structured=False)
    plain.ask(nbd.READ, 2 * MIB, 4096)
    assert plain.take(16) == struct.pack(">IIQ", 0x67446698, 0, 77) and plain.take(4096) == bytes([3]) * 4096
    plain.ask(nbd.FLUSH)
    assert plain.take(16)[4:8] == bytes(4)
    plain.ask(nbd.DISCONNECT)
    assert plain.ended()


def test_what_has_data_and_what_changed(running: Running) -> None:
    client = Client(running.path)
    client.go("vda", "base:allocation", "qemu:dirty-bitmap:changed")
    both = client.extents(0, 4 * MIB)
    assert both[0] == [(65536, 0), (2 * MIB - 65536, 3)] * 2
    assert both[1] == [(65536, 1), (3 * MIB - 65536, 0), (65536, 1), (MIB - 65536, 0)]
    assert client.extents(100, MIB, nbd.REQ_ONE) == [[(65436, 0)], [(65436, 1)]]
    other = Client(running.path)
    assert [data[4:] for _, kind, data in Client(running.path).option(nbd.O_LIST_META, text("vda") + bytes(4))] == [b""]
    other.option(nbd.O_STRUCTURED)
    for query, count in (("qemu:", 1), ("base:", 1), ("x:", 0), ("qemu:dirty-bitmap:other", 0)):
        told = other.option(nbd.O_LIST_META, text("vda") + struct.pack(">I", 1) + text(query))
        assert len(told) == count + 1, query
    assert len(other.option(nbd.O_LIST_META, text("vda") + bytes(4))) == 3
    other.go()
    other.ask(nbd.BLOCK_STATUS, 0, 4096)  # no context was chosen
    assert other.chunks()[0][0] == nbd.T_ERROR


def test_requests_that_cannot_be_are_answered_so(running: Running) -> None:
    client = Client(running.path)
    client.go("vda", "base:allocation")
    for kind, offset, length, number in (
        (nbd.READ, SIZE - 512, 1024, nbd.EINVAL),
        (nbd.READ, 1 << 63, 512, nbd.EINVAL),
        (nbd.READ, 0, 0, nbd.EINVAL),
        (nbd.READ, 0, 32 * MIB + 1, nbd.EOVERFLOW),
        (nbd.BLOCK_STATUS, SIZE, 1, nbd.EINVAL),
        (4, 0, 512, nbd.EPERM),
        (6, 0, 512, nbd.EPERM),
        (5, 0, 512, nbd.EINVAL),
        (99, 0, 512, nbd.EINVAL),
    ):
        client.ask(kind, offset, length)
        ((told, data),) = client.chunks()
        assert told == nbd.T_ERROR and struct.unpack_from(">I", data) == (number,), (kind, offset)
    client.ask(nbd.WRITE, 0, 3 * MIB, payload=b"w" * 3 * MIB)
    assert client.chunks()[0][1][:4] == struct.pack(">I", nbd.EPERM)
    client.ask(nbd.FLUSH)
    assert client.chunks() == [(nbd.T_NONE, b"")]
    running.shown.fails = True
    for kind in (nbd.READ, nbd.BLOCK_STATUS):
        client.ask(kind, 0, 4096)
        assert client.chunks()[0][1][:4] == struct.pack(">I", nbd.EIO)
    client.ask(nbd.WRITE, 0, 33 * MIB)
    assert client.ended()


def test_options_that_cannot_be(running: Running) -> None:
    client = Client(running.path)
    for option, data, kind in (
        (nbd.O_GO, text("vdb") + bytes(2), nbd.E_UNKNOWN),
        (nbd.O_INFO, text("vda"), nbd.E_INVALID),
        (nbd.O_INFO, b"\xff\xff\xff\xff", nbd.E_INVALID),
        (nbd.O_INFO, text("vda") + b"\xff\xff", nbd.E_INVALID),
        (nbd.O_LIST, b"x", nbd.E_INVALID),
        (nbd.O_SET_META, text("vda") + bytes(4), nbd.E_INVALID),  # before structured replies
        (nbd.O_SET_META, text("vda") + b"\xff\xff\xff\xff", nbd.E_TOO_BIG),
        (5, b"", nbd.E_UNSUP),  # TLS
        (12345, b"x" * 1000, nbd.E_UNSUP),
    ):
        assert client.option(option, data)[-1][1] == kind, (option, data)
    assert client.option(nbd.O_LIST) == [(nbd.O_LIST, nbd.R_SERVER, text("vda")), (nbd.O_LIST, nbd.R_ACK, b"")]
    assert client.option(nbd.O_INFO, text("vda") + struct.pack(">HH", 1, 3))[1][2] == struct.pack(
        ">HIII", 3, 1, 65536, 32 * MIB
    )
    assert client.option(nbd.O_ABORT)[-1][1] == nbd.R_ACK and client.ended()
    for flags in (0, 4, 7):
        assert Client(running.path, flags).ended()
    for data in (b"IHAVEOPT" + struct.pack(">II", 3, 1 << 20), b"x" * 16, option_name("vdb")):
        client = Client(running.path)
        client.sock.sendall(data)
        assert client.ended()
    old = Client(running.path, 1)
    old.sock.sendall(option_name("vda"))
    assert old.take(134) == struct.pack(">QH", SIZE, 1 | 2 | 256) + bytes(124)


def option_name(name: str) -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", 1, len(name)) + name.encode()


def test_who_chooses_nothing_or_too_many_are_sent_away(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_server, "CHOOSES", 0.2)
    assert Client(running.path).ended()
    assert "chose no export" in running.said[-1]
    monkeypatch.setattr(nbd_server, "MAX_CLIENTS", 2)
    clients = [Client(running.path) for _ in range(2)]
    for client in clients:
        client.go()
    with pytest.raises((EOFError, ConnectionResetError)):
        Client(running.path)
    clients[0].ask(nbd.FLUSH)
    clients[0].chunks()


def test_who_does_not_read_takes_no_room(running: Running) -> None:
    """A hundred answers of 32 MiB wait for one client; another one is served."""
    greedy = Client(running.path)
    greedy.go()
    greedy.sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, nbd.READ, 77, 0, 32 * MIB) * 100)
    other = Client(running.path)
    other.go()
    for _ in range(20):
        other.ask(nbd.READ, 0, MIB)
        other.chunks()
    assert 0 < max(len(client._out) for client in running.server._clients) <= MIB
    assert greedy.chunks()[-1][0] == nbd.T_NONE


def test_whatever_a_client_says_nothing_breaks() -> None:
    """Random options and requests, valid ones with bytes changed: a `ProtocolError` at worst."""
    dice = random.Random(11)
    offered: Any = type("Offered", (), {"size": SIZE, "contexts": ["base:allocation"]})()
    valid = [
        (nbd.O_STRUCTURED, b""),
        (nbd.O_LIST, b""),
        (nbd.O_GO, text("vda") + bytes(2)),
        (nbd.O_SET_META, text("vda") + struct.pack(">I", 1) + text("base:allocation")),
        (nbd.O_INFO, text("vdb") + struct.pack(">HH", 1, 3)),
        (nbd.O_EXPORT_NAME, b"vda"),
    ]
    chosen = elsewhere = refused = 0
    for _ in range(3000):
        data = bytearray(struct.pack(">I", dice.choice((1, 3, 3, 3))))
        for option, given in dice.choices(valid, k=dice.randrange(1, 6)):
            data += b"IHAVEOPT" + struct.pack(">II", option, len(given)) + given
        for _ in range(dice.randrange(3)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        shake = nbd.Handshake({"vda": offered}, ["vda", "vdb"])
        try:
            while data:
                count = dice.randrange(1, 40)
                shake.data += data[:count]
                del data[:count]
                while shake.step():
                    pass
        except nbd.ProtocolError:
            refused += 1
        chosen += bool(shake.chosen)
        elsewhere += bool(shake.elsewhere)
        assert len(shake.output) < 4096
    assert min(chosen, elsewhere, refused) > 100


def test_an_export_of_another_process_is_reached_with_what_was_said(tmp_path: Path) -> None:
    """Both on one loop: the front hands over, and gets back who asks for its own."""
    (tmp_path / "b").mkdir()
    loop = EventLoop()
    shown = {"vda": Shown(tmp_path / "image"), "vdb": Shown(tmp_path / "b/image")}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "nbd"))
    listener.listen()
    said: list[str] = []
    lock = threading.RLock()
    make: Callable[..., NbdServer] = lambda name, fd, links: NbdServer(  # noqa: E731
        loop,
        {name: Export(shown[name], f"changed-{name}", lock)},
        ["vda", "vdb"],
        listening=fd,
        links=links,
        log=said.append,
    )
    front = make("vda", listener.detach(), {"vdb": ours.detach()})
    other = make("vdb", -1, {"vda": theirs.detach()})
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        client = Client(tmp_path / "nbd")
        client.option(nbd.O_STRUCTURED)
        for name in ("vdb", "vda", "vdb"):
            told = client.option(nbd.O_LIST_META, text(name) + bytes(4))
            assert told[1][2][4:] == f"qemu:dirty-bitmap:changed-{name}".encode()
        assert client.option(nbd.O_GO, text("vdc") + bytes(2))[-1][1] == nbd.E_UNKNOWN
        client.go("vdb", "qemu:dirty-bitmap:changed-vdb", structured=False)
        assert client.extents(0, MIB) == [[(65536, 1), (MIB - 65536, 0)]]
        assert len(front._clients) == 0 and len(other._clients) == 1
        loop.call_soon(other.close)
        assert client.ended()
        client = Client(tmp_path / "nbd")
        client.sock.sendall(option_name("vdb"))  # whose process is gone
        assert client.ended()
    finally:
        loop.call_soon(front.close)
        loop.stop()
        thread.join()
        loop.close()
        for one in shown.values():
            one.target.release()
