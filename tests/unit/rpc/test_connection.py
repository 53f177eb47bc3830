"""Both roles wired back to back in memory: fragmentation, descriptors, streams, keepalives, hostile input."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.errors import OperationFailed, RpcError
from kvik.rpc import message as m
from kvik.rpc.connection import ACCEPTS, Connection, Role
from kvik.rpc.program import qemu, remote

DOM = ("tiny-1", b"0123456789abcdef", 4)
CONSOLE = remote()["DOMAIN_OPEN_CONSOLE"]
FILES = qemu()["DOMAIN_MONITOR_COMMAND_WITH_FILES"]


def header(kind: int, status: int, *, length: int = 28, procedure: int = 16, program: int = 0x20008086) -> bytes:
    return struct.pack(">7I", length, program, 1, procedure, kind, 5, status)


def conversation() -> tuple[bytes, bytes]:
    """(what the client sends, what the server sends): one message of every kind that needs no descriptor."""
    client = Connection(Role.CLIENT)
    _, one = client.call(remote()["DOMAIN_GET_INFO"], (DOM,))
    serial, two = client.call(CONSOLE, (DOM, None, 0))
    key = (CONSOLE.program.number, CONSOLE.number, serial)
    (first, second) = Connection(Role.SERVER).feed(one + two)
    up = one + two + m.stream_data(key, b"typed") + m.PONG_BYTES + m.stream_hole(key, 4096)
    up += m.stream_finish(key)
    down = m.reply(first, (1, 1024, 1024, 2, 10**9)) + m.PING_BYTES + m.reply(second)
    down += m.event(remote()["DOMAIN_EVENT_CALLBACK_REBOOT"], (1, (DOM,)))
    down += m.stream_data(key, b"login: ") + m.stream_end(key) + m.stream_finish(key)
    down += m.reply_error(first, OperationFailed("late"))
    return up, down


UP, DOWN = conversation()
UP_KINDS = ["Call", "Call", "StreamData", "Pong", "StreamHole", "StreamFinish"]
DOWN_KINDS = ["Reply", "Ping", "Reply", "Event", "StreamData", "StreamEnd", "StreamFinish", "ErrorReply"]


def feed(role: str, pieces: Iterable[bytes]) -> list[m.Message]:
    connection = Connection(role)
    connection.open_stream((CONSOLE.program.number, CONSOLE.number, 1))
    messages = [message for piece in pieces for message in connection.feed(piece)]
    assert not connection._buffer
    assert connection.streams == []
    return messages


@pytest.mark.parametrize(("role", "data", "kinds"), [(Role.SERVER, UP, UP_KINDS), (Role.CLIENT, DOWN, DOWN_KINDS)])
def test_every_kind_of_message_arrives(role: str, data: bytes, kinds: list[str]) -> None:
    messages = feed(role, [data])
    assert [type(message).__name__ for message in messages] == kinds


@pytest.mark.parametrize(("role", "data"), [(Role.SERVER, UP), (Role.CLIENT, DOWN)])
def test_fragmentation_at_every_byte_changes_nothing(role: str, data: bytes) -> None:
    def digest(messages: list[m.Message]) -> list[object]:
        return [(type(message), message.key, message.payload) for message in messages]

    expected = digest(feed(role, [data]))
    for cut in range(len(data) + 1):
        assert digest(feed(role, [data[:cut], data[cut:]])) == expected
    assert digest(feed(role, (data[i : i + 1] for i in range(len(data))))) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40))
def test_any_fragmentation_changes_nothing(sizes: list[int]) -> None:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(DOWN[at : at + size])
        at += size
    assert [type(one).__name__ for one in feed(Role.CLIENT, [*pieces, DOWN[at:]])] == DOWN_KINDS


def test_a_thousand_small_calls_in_one_buffer_share_it() -> None:
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    data = b"".join(client.call(remote()["DOMAIN_IS_ACTIVE"], (DOM,))[1] for _ in range(1000))
    messages = server.feed(data)
    assert [message.serial for message in messages] == list(range(1000))
    assert all(message[6] is data for message in messages)


def test_serials_wrap_around() -> None:
    client = Connection(Role.CLIENT, first_serial=0xFFFFFFFF)
    assert [client.call(remote()["CONNECT_GET_TYPE"])[0] for _ in range(3)] == [0xFFFFFFFF, 0, 1]


def test_a_large_message_in_many_pieces() -> None:
    (request,) = Connection(Role.SERVER).feed(m.call(remote()["DOMAIN_GET_XML_DESC"], 0, (DOM, 0)))
    answer = m.reply(request, ("x" * 4_000_000,))
    client = Connection(Role.CLIENT)
    messages = [one for at in range(0, len(answer), 4096) for one in client.feed(answer[at : at + 4096])]
    (reply,) = messages
    assert isinstance(reply, m.Reply)
    assert len(reply.decode().xml) == 4_000_000


def test_other_buffer_types_are_taken() -> None:
    for kind in (bytearray, memoryview):
        (call,) = Connection(Role.SERVER).feed(kind(m.call(remote()["DOMAIN_GET_XML_DESC"], 0, (DOM, 0))))
        assert isinstance(call, m.Call)
        assert call.decode().dom.name == "tiny-1"


# --- hostile input ---


@pytest.mark.parametrize("length", [0, 1, 4, 27, m.LENGTH_MAX + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_hostile_lengths_are_refused_from_the_first_four_bytes(length: int) -> None:
    for role in (Role.CLIENT, Role.SERVER):
        with pytest.raises(RpcError, match="length"):
            Connection(role).feed(struct.pack(">I", length))
        with pytest.raises(RpcError, match="length"):
            Connection(role).feed(struct.pack(">I", length) + bytes(24))
        slow = Connection(role)
        with pytest.raises(RpcError, match="length"):
            for byte in struct.pack(">I", length) + bytes(24):
                slow.feed(bytes([byte]))


def test_a_lower_limit_holds_until_it_is_raised() -> None:
    call = m.call(remote()["DOMAIN_DEFINE_XML"], 0, ("x" * 5000,))
    server = Connection(Role.SERVER, max_message=4096)
    with pytest.raises(RpcError, match="4096"):
        server.feed(call)
    server = Connection(Role.SERVER, max_message=4096)
    server.max_message = m.LENGTH_MAX
    assert len(server.feed(call)) == 1


def test_what_is_not_in_the_role_s_table_is_refused() -> None:
    accepted = {role: set() for role in (Role.CLIENT, Role.SERVER)}
    for role in (Role.CLIENT, Role.SERVER):
        for kind in [*range(9), 0xFFFFFFFF]:
            for status in [*range(5), 0xFFFFFFFF]:
                length = 40 if kind == m.STREAM_HOLE else 32 if kind in (4, 5) else 28
                data = header(kind, status, length=length, program=0x6B656570 if kind == 2 else 0x20008086, procedure=1)
                try:
                    Connection(role).feed(data + bytes(length - 28))
                except RpcError:
                    continue
                accepted[role].add(kind << 32 | status)
        assert accepted[role] == set(ACCEPTS[role])


def test_a_server_takes_no_events() -> None:
    with pytest.raises(RpcError, match="events"):
        Connection(Role.SERVER).feed(header(m.MESSAGE, m.OK, procedure=318))


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300), st.sampled_from((Role.CLIENT, Role.SERVER)))
def test_noise_is_refused_or_waited_for(noise: bytes, role: str) -> None:
    try:
        Connection(role).feed(noise)
    except RpcError:
        pass


# --- descriptors ---


def test_a_message_waits_for_its_descriptors() -> None:
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    _, data = client.call(FILES, (DOM, "{}", 0), fds=2)
    _, after = client.call(remote()["CONNECT_GET_TYPE"])
    assert server.feed(data) == []
    assert server.feed(b"\0", [10]) == []
    call, following = server.feed(b"\0" + after, [11])
    assert call.fds == (10, 11)
    assert isinstance(call, m.Call)
    assert call.decode().cmd == "{}"
    assert following.fds == ()
    answer = m.reply(call, ("ok",), fds=1)
    (reply,) = client.feed(answer + b"\0", [7])
    assert isinstance(reply, m.Reply)
    assert (reply.fds, reply.decode().result) == ((7,), "ok")


def test_descriptors_at_every_fragmentation() -> None:
    _, data = Connection(Role.CLIENT).call(FILES, (DOM, "{}", 0), fds=2)
    whole = data + b"\0\0" + m.PING_BYTES
    for cut in range(len(whole)):
        server = Connection(Role.SERVER)
        messages = server.feed(whole[:cut], [10, 11]) + server.feed(whole[cut:])
        assert [(type(one), one.fds) for one in messages] == [(m.Call, (10, 11)), (m.Ping, ())]


def test_announced_descriptors_that_do_not_come_are_an_error() -> None:
    _, data = Connection(Role.CLIENT).call(FILES, (DOM, "{}", 0), fds=2)
    with pytest.raises(RpcError, match="2 descriptors announced, 1 received"):
        Connection(Role.SERVER).feed(data + b"\0\0", [10])


def test_too_many_descriptors_are_refused_but_can_be_closed() -> None:
    for hostile in (33, 0xFFFFFFFF):
        with pytest.raises(RpcError, match="descriptors"):
            Connection(Role.SERVER).feed(header(m.CALL_WITH_FDS, m.OK, length=32) + struct.pack(">I", hostile))
    with pytest.raises(RpcError, match="how many"):
        Connection(Role.SERVER).feed(header(m.CALL_WITH_FDS, m.OK))
    server = Connection(Role.SERVER)
    with pytest.raises(RpcError, match="ahead"):
        server.feed(b"", range(100, 133))
    assert server.take_fds() == list(range(100, 133))
    assert server.take_fds() == []


# --- streams ---


def opened(role: str) -> tuple[Connection, m.Key]:
    connection = Connection(role)
    key = (CONSOLE.program.number, CONSOLE.number, 3)
    connection.open_stream(key)
    return connection, key


def kinds(messages: list[m.Message]) -> list[str]:
    return [type(message).__name__ for message in messages]


def test_a_client_finishes_and_the_server_confirms() -> None:
    client, key = opened(Role.CLIENT)
    server, _ = opened(Role.SERVER)
    (finish,) = server.feed(client.finish_stream(key))
    assert isinstance(finish, m.StreamFinish)
    # Under way when the client asked: dropped, the confirmation is not.
    late = m.stream_data(key, b"late") + m.stream_end(key)
    assert kinds(client.feed(late + m.stream_finish(key))) == ["StreamFinish"]
    assert client.streams == server.streams == []


def test_a_client_aborts_and_the_server_confirms() -> None:
    client, key = opened(Role.CLIENT)
    server, _ = opened(Role.SERVER)
    (abort,) = server.feed(client.abort_stream(key))
    assert isinstance(abort, m.StreamAbort)
    assert "aborted" in str(abort.error())
    assert kinds(client.feed(m.reply_error(abort, OperationFailed("stream aborted")))) == ["StreamAbort"]
    assert client.streams == []


def test_a_server_aborts_with_its_reason() -> None:
    client, key = opened(Role.CLIENT)
    server, _ = opened(Role.SERVER)
    (abort,) = client.feed(server.abort_stream(key, OperationFailed("the machine ended")))
    assert isinstance(abort, m.StreamAbort)
    assert str(abort.error()) == "the machine ended"
    assert client.streams == server.streams == []


def test_packets_of_streams_that_nobody_opened_are_dropped() -> None:
    for role in (Role.CLIENT, Role.SERVER):
        connection, key = opened(role)
        other = (key[0], key[1], 4)
        packets = m.stream_data(other, b"x") + m.stream_end(other) + m.stream_finish(other) + m.stream_abort(other)
        assert connection.feed(packets + m.stream_hole(other, 1)) == []
        assert kinds(connection.feed(m.stream_data(key, b"x"))) == ["StreamData"]


def test_the_end_of_data_leaves_the_stream_open() -> None:
    server, key = opened(Role.SERVER)
    assert kinds(server.feed(m.stream_end(key))) == ["StreamEnd"]
    assert kinds(server.feed(m.stream_finish(key))) == ["StreamFinish"]


def test_a_stream_is_opened_once() -> None:
    server, key = opened(Role.SERVER)
    with pytest.raises(RpcError, match="open already"):
        server.open_stream(key)


@pytest.mark.parametrize("payload", [b"", bytes(11), struct.pack(">qI", -1, 0), struct.pack(">qI", 1, 1)])
def test_bad_holes_are_refused(payload: bytes) -> None:
    server, key = opened(Role.SERVER)
    with pytest.raises(RpcError, match="hole"):
        server.feed(m.frame(key, m.STREAM_HOLE, m.CONTINUE, payload))


def test_holes_have_a_length() -> None:
    server, key = opened(Role.SERVER)
    (hole,) = server.feed(m.stream_hole(key, 1 << 40))
    assert isinstance(hole, m.StreamHole)
    assert hole.length == 1 << 40


def test_messages_show_what_they_are() -> None:
    (call,) = Connection(Role.SERVER).feed(m.call(remote()["CONNECT_GET_TYPE"], 6))
    assert repr(call) == "<Call 0x20008086:3 serial 6 status 0, 0 bytes>"
