"""The asyncio shell against peers that are good, silent, stopped, or talk garbage."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvik.errors import HypervisorError, MonitorError, OperationTimeout
from kvik.qmp.aio import QmpConnection, connect_unix, short_unix_path
from kvik.qmp.protocol import Event
from kvik.qmp.server import Server


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except OSError:  # the fixture closed it
        return b""


def serve(sock: socket.socket, handle: Callable[[Server, str, int], bytes]) -> threading.Thread:
    def run() -> None:
        server = Server((7, 2, 0))
        sock.sendall(server.greeting())
        while data := _received(sock):
            commands, answer = server.receive(data)
            sock.sendall(answer + b"".join(handle(server, command.name, command.id) for command in commands))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def good(server: Server, name: str, identity: int) -> bytes:
    if name == "fail":
        return server.failure(identity, "GenericError", "it failed")
    if name == "silent":
        return b""
    if name == "event":
        return server.event("STOP") + server.reply(identity, {})
    if name == "garbage":
        return b"\x00garbage\n"
    return server.reply(identity, {"did": name})


async def test_commands_errors_and_events(pair: tuple[socket.socket, socket.socket]) -> None:
    serve(pair[1], good)
    events: list[Event] = []
    connection = await QmpConnection.open(pair[0], name="m", on_event=events.append)
    assert connection.greeting.version == (7, 2, 0)
    assert await connection.execute("query-x") == {"did": "query-x"}
    with pytest.raises(MonitorError, match="it failed"):
        await connection.execute("fail")
    await connection.execute("event")
    assert [event.name for event in events] == ["STOP"]
    assert await asyncio.gather(*(connection.execute(f"c{n}") for n in range(50))) == [
        {"did": f"c{n}"} for n in range(50)
    ]
    connection.close()
    with pytest.raises(HypervisorError, match="gone"):
        await connection.execute("x")


async def test_a_silent_command_times_out_and_the_next_one_works(pair: tuple[socket.socket, socket.socket]) -> None:
    serve(pair[1], good)
    connection = await QmpConnection.open(pair[0], name="m")
    with pytest.raises(OperationTimeout, match="silent"):
        await connection.execute("silent", deadline=0.05)
    assert await connection.execute("y") == {"did": "y"}
    connection.close()


async def test_a_silent_peer_fails_the_handshake_by_its_deadline(pair: tuple[socket.socket, socket.socket]) -> None:
    began = time.monotonic()
    with pytest.raises(OperationTimeout):
        await QmpConnection.open(pair[0], name="m", deadline=0.1)
    assert time.monotonic() - began < 1
    assert pair[0].fileno() == -1


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad\r\n", b"x" * 9_000_000, b"{}\n", b""])
async def test_a_peer_that_is_no_monitor_fails_the_handshake(
    pair: tuple[socket.socket, socket.socket], greeting: bytes
) -> None:
    def send() -> None:
        try:
            pair[1].sendall(greeting)
            pair[1].shutdown(socket.SHUT_WR)
        except OSError:
            pass

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(HypervisorError):
        await QmpConnection.open(pair[0], name="m", deadline=2)
    thread.join()


async def test_garbage_ends_every_waiting_command_and_tells_the_owner(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    serve(pair[1], good)
    ends: list[HypervisorError | None] = []
    connection = await QmpConnection.open(pair[0], name="m", on_disconnect=ends.append)
    results = await asyncio.gather(connection.execute("silent"), connection.execute("garbage"), return_exceptions=True)
    assert all(isinstance(result, HypervisorError) for result in results)
    assert len(ends) == 1
    assert "nonsense" in str(ends[0])


async def test_the_peers_end_tells_the_owner_without_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    serve(pair[1], good)
    ended = asyncio.Event()
    connection = await QmpConnection.open(pair[0], name="m", on_disconnect=lambda error: ended.set())
    pair[1].shutdown(socket.SHUT_RDWR)
    await asyncio.wait_for(ended.wait(), 2)
    assert connection.closed


async def test_a_peer_that_does_not_read_blocks_only_its_own_commands(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server = Server()
    pair[1].sendall(server.greeting())

    async def negotiate() -> None:
        loop = asyncio.get_running_loop()
        pair[1].setblocking(False)
        _, answer = server.receive(await loop.sock_recv(pair[1], 1000))
        pair[1].send(answer)

    connection, _ = await asyncio.gather(QmpConnection.open(pair[0], name="m"), negotiate())
    began = time.monotonic()
    results = await asyncio.gather(
        *(connection.execute("big", {"x": "y" * 1_000_000}, deadline=0.2) for _ in range(20)), return_exceptions=True
    )
    assert all(
        isinstance(result, HypervisorError | OperationTimeout) or "not read" in str(result) for result in results
    )
    assert time.monotonic() - began < 2
    connection.close()


async def test_an_answer_that_came_before_the_peer_went_is_heard_though_the_next_command_finds_nobody(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server = Server((7, 2, 0))
    pair[1].sendall(server.greeting())
    opening = asyncio.ensure_future(QmpConnection.open(pair[0], name="m"))
    pair[1].sendall(server.receive(await asyncio.to_thread(pair[1].recv, 65536))[1])
    connection = await opening
    first = asyncio.ensure_future(connection.execute("last"))
    (command,) = server.receive(await asyncio.to_thread(pair[1].recv, 65536))[0]
    second = asyncio.ensure_future(connection.execute("quit"))  # begins before the loop looks at the socket
    pair[1].sendall(server.reply(command.id, {"did": "last"}))
    pair[1].close()
    assert await first == {"did": "last"}
    with pytest.raises(HypervisorError):
        await second


async def test_descriptors_travel_with_their_command(pair: tuple[socket.socket, socket.socket]) -> None:
    received: list[int] = []

    def run() -> None:
        server = Server()
        pair[1].sendall(server.greeting())
        while True:
            data, ancillary, _, _ = pair[1].recvmsg(65536, 1000)
            if not data:
                return
            for _, _, payload in ancillary:
                received.extend(array.array("i", payload))
            commands, answer = server.receive(data)
            pair[1].sendall(answer + b"".join(server.reply(command.id, {}) for command in commands))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    connection = await QmpConnection.open(pair[0], name="m")
    reader, writer = os.pipe()
    await connection.execute("getfd", {"fdname": "a"}, fds=[writer])
    os.close(writer)
    assert len(received) == 1
    os.write(received[0], b"hello")
    assert os.read(reader, 10) == b"hello"
    os.close(received[0])
    os.close(reader)
    connection.close()
    await asyncio.to_thread(thread.join, 10)  # it reads the end before the fixture takes its socket away
    connection.close()


async def test_connecting_to_a_listener_whose_owner_sleeps_ends_by_the_deadline(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen(0)
    first = await connect_unix(tmp_path / "s")
    with pytest.raises(OperationTimeout):
        await connect_unix(tmp_path / "s", deadline=0.1)
    first.close()
    listener.close()
    with pytest.raises(HypervisorError, match="refused"):
        await connect_unix(tmp_path / "s", deadline=0.1)


async def test_long_socket_paths_are_reached(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    with short_unix_path(directory / "s") as name:
        listener.bind(name)
    listener.listen(1)
    (await connect_unix(directory / "s")).close()
    listener.close()
