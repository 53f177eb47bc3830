"""The 16550 and the character backends it sits on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.backends.char import MAX_PENDING, Chardev
from kvik.vmm.bus import Bus
from kvik.vmm.devices.serial import DATA, IER, IIR_FCR, INPUT_ROOM, LCR, LSR, MCR, MSR, SCR, Serial
from kvik.vmm.interrupts import Interrupts
from kvik.vmm.loop import EventLoop


class Board:
    """What a serial line needs of a machine."""

    def __init__(self) -> None:
        self.ports = Bus("port", 0x10000)
        self.interrupts = Interrupts(None)
        self.loop = EventLoop()

    def turn(self) -> None:
        for _ in range(4):
            self.loop.run_once(0)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.loop.close()


@pytest.fixture
def wire(board: Board) -> Iterator[tuple[Serial, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    serial = Serial("com", Chardev(f"fd={theirs.detach()}", "com"))
    serial.attach(board)
    yield serial, ours
    serial.close()
    ours.close()


def put(board: Board, register: int, value: int) -> None:
    board.ports.write(0x3F8 + register, 1, value)


def get(board: Board, register: int) -> int:
    return board.ports.read(0x3F8 + register, 1)


def test_bytes_go_out_and_come_in(board: Board, wire: tuple[Serial, socket.socket]) -> None:
    _, other = wire
    for byte in b"hello":
        put(board, DATA, byte)
    assert other.recv(10) == b"hello"
    other.send(b"xyz")
    board.turn()
    assert get(board, LSR) & 1
    assert bytes(get(board, DATA) for _ in range(3)) == b"xyz"
    assert get(board, LSR) == 0x60


def test_interrupts_come_for_input_and_an_empty_transmitter(board: Board, wire: tuple[Serial, socket.socket]) -> None:
    _, other = wire
    assert get(board, IIR_FCR) & 0xF == 1 and not board.interrupts.level(4)
    put(board, IER, 2)
    assert board.interrupts.level(4) and get(board, IIR_FCR) & 0xF == 2
    assert not board.interrupts.level(4)  # reading said that it was seen
    put(board, DATA, 65)
    assert board.interrupts.level(4)
    put(board, IER, 1)
    assert not board.interrupts.level(4)
    other.send(b"a")
    board.turn()
    assert board.interrupts.level(4) and get(board, IIR_FCR) & 0xF == 4
    get(board, DATA)
    assert not board.interrupts.level(4)


def test_the_registers_that_a_driver_probes_with(board: Board, wire: tuple[Serial, socket.socket]) -> None:
    put(board, SCR, 0x5A)
    assert get(board, SCR) == 0x5A
    put(board, LCR, 0x83)
    put(board, DATA, 0x01)
    put(board, IER, 0x00)
    assert (get(board, DATA), get(board, IER)) == (1, 0)
    put(board, LCR, 0x03)
    put(board, IIR_FCR, 0xC1)
    assert get(board, IIR_FCR) & 0xC0 == 0xC0  # the mark of a 16550A
    put(board, MCR, 0x10 | 0x0A)  # loopback: outputs come back as inputs
    assert get(board, MSR) & 0xF0 == 0x90
    put(board, DATA, 0x77)
    assert get(board, DATA) == 0x77
    put(board, MCR, 0)
    assert get(board, MSR) & 0xF0 == 0xB0


def test_a_guest_that_does_not_read_stops_the_host_s_side(board: Board, wire: tuple[Serial, socket.socket]) -> None:
    serial, other = wire
    other.send(bytes(5000))
    board.turn()
    assert INPUT_ROOM <= len(serial.input) <= INPUT_ROOM + 4096
    other.send(bytes(100))
    board.turn()
    held = len(serial.input)
    for _ in range(held - INPUT_ROOM // 2):
        get(board, DATA)
    board.turn()
    assert len(serial.input) > INPUT_ROOM // 2  # it goes on


def test_a_host_that_does_not_read_makes_the_guest_wait(board: Board, wire: tuple[Serial, socket.socket]) -> None:
    serial, other = wire
    serial.chardev._pending += bytes(MAX_PENDING)
    put(board, DATA, 1)
    assert serial.full and not get(board, LSR) & 0x20
    serial.chardev._wait_writable()
    for _ in range(40):
        board.turn()
        try:
            while other.recv(65536):
                pass
        except BlockingIOError:
            pass
    assert not serial.full and get(board, LSR) & 0x20


def test_state_comes_back(board: Board, wire: tuple[Serial, socket.socket]) -> None:
    serial, other = wire
    put(board, SCR, 9)
    put(board, IER, 1)
    other.send(b"in flight")
    board.turn()
    state = serial.state()
    serial.reset()
    assert not board.interrupts.level(4)
    serial.restore(state)
    assert board.interrupts.level(4) and get(board, SCR) == 9 and get(board, DATA) == ord("i")


def test_a_driver_that_waits_for_the_host_is_told_where_it_is_restored(
    board: Board, wire: tuple[Serial, socket.socket]
) -> None:
    serial, _ = wire
    serial.chardev._pending += bytes(MAX_PENDING)
    put(board, IER, 2)
    put(board, DATA, 1)
    assert serial.full and not board.interrupts.level(4)
    state = serial.state()
    serial.reset()
    serial.restore(state)
    assert board.interrupts.level(4) and get(board, IIR_FCR) & 0xF == 2 and get(board, LSR) & 0x20


@pytest.mark.parametrize(
    "backend", ["", "tty", "file:", "unix:", "fd=x", "fd=99999999999999999999", "stdio:1", "null:x", "pty:2"]
)
def test_a_backend_that_is_none_is_refused(backend: str) -> None:
    with pytest.raises(InvalidArgument):
        Chardev(backend, "com")


def test_a_descriptor_that_is_not_open_is_refused() -> None:
    with pytest.raises(HostError, match="cannot use descriptor 9999"):
        Chardev("fd=9999", "com")


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for text in (b"one\n", b"two\n"):
        chardev = Chardev(f"file:{path}", "com")
        assert chardev.write(text) == 4
        chardev.close()
    assert path.read_bytes() == b"one\ntwo\n" and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(HostError, match="cannot open"):
        Chardev(f"file:{tmp_path}/none/log", "com")


def test_a_listening_socket_serves_one_client_after_the_other(board: Board, tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    seen: list[bytes] = []
    opened: list[bool] = []
    chardev = Chardev(f"unix:{path}", "com")
    chardev.open(board.loop, seen.append, opened.append)
    for text in (b"first", b"second"):
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        board.turn()
        client.send(text)
        board.turn()
        chardev.write(text.upper())
        assert client.recv(10) == text.upper()
        client.close()
        board.turn()
    assert seen == [b"first", b"second"] and opened == [True, False, True, False]
    chardev.close()
    assert not os.path.exists(path)


def test_a_socket_that_nobody_listens_on_is_replaced_and_one_that_is_used_is_not(board: Board, tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    chardev = Chardev(f"unix:{path}", "com")
    with pytest.raises(HostError, match="cannot listen"):
        Chardev(f"unix:{path}", "other")
    chardev.close()


def test_a_pseudo_terminal_has_a_name(board: Board) -> None:
    seen: list[bytes] = []
    chardev = Chardev("pty", "com")
    chardev.open(board.loop, seen.append)
    fd = os.open(chardev.filename.removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
    os.write(fd, b"typed")
    for _ in range(100):  # the kernel passes it on from a work queue
        board.loop.run_once(0.05)
        if seen:
            break
    chardev.write(b"shown\n")
    assert seen == [b"typed"] and os.read(fd, 10) == b"shown\n"
    os.close(fd)
    chardev.close()
