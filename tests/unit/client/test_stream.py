"""Streams: a console that goes both ways, a screenshot, and every way to end."""

from __future__ import annotations

import os
import pty
from collections.abc import Callable

import pytest
from fake_daemon import DOM, FakeDaemon, stream_answer

from kvik.client.domain import Domain
from kvik.client.stream import raw_terminal, write_all
from kvik.errors import KvikError, NoDomain, OperationFailed, OperationTimeout
from kvik.rpc import message as m

Make = Callable[..., FakeDaemon]


def received(fake: FakeDaemon) -> bytes:
    return b"".join(one.payload for one in fake.received if isinstance(one, m.StreamData))


def test_a_screenshot_is_read_to_its_end(daemon: Make) -> None:
    fake = daemon(DOMAIN_SCREENSHOT=stream_answer(b"P6 ", b"pixels", result=("image/x-portable-pixmap",)))
    with fake.connect() as connection:
        assert Domain(connection, *DOM).screenshot() == ("image/x-portable-pixmap", b"P6 pixels")
        assert connection.link.streams == {}
        assert connection.link.wire.streams == []
    assert any(isinstance(one, m.StreamFinish) for one in fake.received)


def test_a_stream_that_the_daemon_refuses_leaves_nothing(daemon: Make) -> None:
    with daemon(DOMAIN_OPEN_CONSOLE=NoDomain("gone")).connect() as connection:
        with pytest.raises(NoDomain):
            Domain(connection, *DOM).console()
        assert connection.link.streams == {}
        assert connection.link.wire.streams == []


def test_more_than_the_limit_is_refused(daemon: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvik.client.domain.SCREENSHOT_MAX", 10)
    fake = daemon(DOMAIN_SCREENSHOT=stream_answer(b"x" * 11, result=(None,)), CONNECT_GET_TYPE=("QEMU",))
    with fake.connect() as connection:
        with pytest.raises(KvikError, match="more than 10 bytes"):
            Domain(connection, *DOM).screenshot()
        assert connection.type() == "QEMU"


def test_a_console_goes_both_ways_and_calls_work_beside_it(daemon: Make) -> None:
    fake = daemon(DOMAIN_OPEN_CONSOLE=stream_answer(b"login: ", end=False), CONNECT_GET_TYPE=("QEMU",))
    with fake.connect() as connection:
        with Domain(connection, *DOM).console("serial0") as stream:
            assert connection.type() == "QEMU"
            assert stream.recv(5) == b"login: "
            with pytest.raises(OperationTimeout):
                stream.recv(0.02)
            stream.send(b"r" * 300_000)
            fake.wait_for(lambda: len(received(fake)) == 300_000)
        assert any(isinstance(one, m.StreamAbort) for one in fake.received)
        assert connection.type() == "QEMU"
    assert max(len(one.payload) for one in fake.received) == m.STREAM_DATA_MAX
    assert fake.args("DOMAIN_OPEN_CONSOLE") == [(DOM, "serial0", 0)]


def test_the_daemon_s_abort_says_why(daemon: Make) -> None:
    def answer(fake: FakeDaemon, call: m.Call) -> None:
        fake.wire.open_stream(call.key)
        fake.send(m.reply(call) + fake.wire.abort_stream(call.key, OperationFailed("the machine ended")))

    ended = pytest.raises(OperationFailed, match="the machine ended")
    with (
        daemon(DOMAIN_OPEN_CONSOLE=answer).connect() as connection,
        ended,
        Domain(connection, *DOM).console() as stream,
    ):
        stream.recv(5)


def test_holes_are_zeros(daemon: Make) -> None:
    def answer(fake: FakeDaemon, call: m.Call) -> None:
        fake.wire.open_stream(call.key)
        data = m.stream_data(call.key, b"a") + m.stream_hole(call.key, (2 << 20) + 5) + m.stream_data(call.key, b"b")
        fake.send(m.reply(call, (None,)) + data + m.stream_end(call.key))

    with daemon(DOMAIN_SCREENSHOT=answer).connect() as connection:
        _, data = Domain(connection, *DOM).screenshot()
    assert data == b"a" + bytes((2 << 20) + 5) + b"b"


@pytest.mark.parametrize(("typed", "sent"), [(b"ls\n\x1dnot this", b"ls\n"), (b"\x1d", b"")])
def test_pump_leaves_at_the_escape_character(daemon: Make, typed: bytes, sent: bytes) -> None:
    fake = daemon(DOMAIN_OPEN_CONSOLE=stream_answer(b"hello ", b"there", end=False))
    stdin, typing = os.pipe()
    screen, stdout = os.pipe()
    try:
        with fake.connect() as connection, Domain(connection, *DOM).console() as stream:
            # Output that is there comes first, so it is on the screen whatever was typed.
            assert stream.recv(5) == b"hello "
            os.write(typing, typed)
            assert stream.pump(stdin, stdout) == "escape"
            fake.wait_for(lambda: received(fake) == sent)
        assert os.read(screen, 100) == b"there"
    finally:
        for fd in (stdin, typing, screen, stdout):
            os.close(fd)


def test_pump_ends_with_the_stream(daemon: Make) -> None:
    fake = daemon(DOMAIN_OPEN_CONSOLE=stream_answer(b"Power down.\n"))
    stdin, typing = os.pipe()
    screen, stdout = os.pipe()
    try:
        with fake.connect() as connection, Domain(connection, *DOM).console() as stream:
            assert stream.pump(stdin, stdout) == "end"
        assert os.read(screen, 100) == b"Power down.\n"
        assert any(isinstance(one, m.StreamFinish) for one in fake.received)
    finally:
        for fd in (stdin, typing, screen, stdout):
            os.close(fd)


def test_pump_ends_with_the_input(daemon: Make) -> None:
    fake = daemon(DOMAIN_OPEN_CONSOLE=stream_answer(end=False))
    stdin, typing = os.pipe()
    os.write(typing, b"halt\n")
    os.close(typing)
    with fake.connect() as connection, Domain(connection, *DOM).console() as stream:
        assert stream.pump(stdin, 2, escape=b"") == "eof"
        fake.wait_for(lambda: received(fake) == b"halt\n")
    os.close(stdin)


def test_a_terminal_gets_its_mode_back() -> None:
    import termios

    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        with pytest.raises(ValueError, match="on purpose"), raw_terminal(slave):
            assert not termios.tcgetattr(slave)[3] & termios.ICANON
            raise ValueError("on purpose")
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)
    reader, writer = os.pipe()
    with raw_terminal(reader):
        pass
    os.close(reader)
    os.close(writer)


def test_writing_to_a_full_pipe_waits() -> None:
    import threading

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    data = os.urandom(300_000)
    parts: list[bytes] = []

    def drain() -> None:
        while sum(map(len, parts)) < len(data):
            parts.append(os.read(reader, 65536))

    thread = threading.Thread(target=drain)
    thread.start()
    write_all(writer, data)
    thread.join(5)
    assert b"".join(parts) == data
    os.close(reader)
    os.close(writer)
