"""Golden bytes of well-known messages, and what errors look like on the wire."""

from __future__ import annotations

import pytest

from kvik import errors
from kvik.errors import (
    ConfigError,
    HostError,
    KvikError,
    NoDomain,
    NoSupport,
    OperationInvalid,
    RpcError,
)
from kvik.rpc import message as m
from kvik.rpc.connection import Connection, Role
from kvik.rpc.program import remote
from kvik.rpc.remote_error import CODEC, decode_error, encode_error


def packed(*words: int) -> bytes:
    return b"".join(word.to_bytes(4) for word in words)


def received(role: str, data: bytes) -> m.Message:
    (message,) = Connection(role).feed(data)
    return message


def test_connect_open() -> None:
    name = b"qemu:///system\0\0"
    assert m.call(remote()["CONNECT_OPEN"], 3, ("qemu:///system", 1)) == (
        packed(56, 0x20008086, 1, 1, 0, 3, 0) + packed(1, 14) + name + packed(1)
    )
    assert m.call(remote()["CONNECT_OPEN"], 0, (None, 0)) == packed(36, 0x20008086, 1, 1, 0, 0, 0, 0, 0)


def test_lookup_by_name_and_its_answer() -> None:
    call = m.call(remote()["DOMAIN_LOOKUP_BY_NAME"], 7, ("vm",))
    assert call == packed(36, 0x20008086, 1, 23, 0, 7, 0, 2) + b"vm\0\0"
    request = received(Role.SERVER, call)
    assert isinstance(request, m.Call)
    assert request.decode().name == "vm"
    answer = m.reply(request, (("vm", b"0123456789abcdef", -1),))
    assert answer == (packed(56, 0x20008086, 1, 23, 1, 7, 0, 2) + b"vm\0\0" + b"0123456789abcdef" + packed(0xFFFFFFFF))
    assert m.reply_payload(request, answer[28:]) == answer
    reply = received(Role.CLIENT, answer)
    assert isinstance(reply, m.Reply)
    assert reply.decode() == (("vm", b"0123456789abcdef", -1),)


def test_lifecycle_event() -> None:
    event = m.event(remote()["DOMAIN_EVENT_CALLBACK_LIFECYCLE"], (5, (("vm", bytes(16), 1), 2, 0)))
    assert event == packed(68, 0x20008086, 1, 318, 2, 1, 0, 5, 2) + b"vm\0\0" + bytes(16) + packed(1, 2, 0)


def test_keepalive() -> None:
    assert packed(28, 0x6B656570, 1, 1, 2, 0, 0) == m.PING_BYTES
    assert packed(28, 0x6B656570, 1, 2, 2, 0, 0) == m.PONG_BYTES


def test_stream_packets() -> None:
    key = (0x20008086, 201, 9)
    assert m.stream_data(key, b"hello") == packed(33, 0x20008086, 1, 201, 3, 9, 2) + b"hello"
    assert m.stream_end(key) == packed(28, 0x20008086, 1, 201, 3, 9, 2)
    assert m.stream_finish(key) == packed(28, 0x20008086, 1, 201, 3, 9, 0)
    assert m.stream_abort(key) == packed(28, 0x20008086, 1, 201, 3, 9, 1)
    assert m.stream_hole(key, 2**33) == packed(40, 0x20008086, 1, 201, 6, 9, 2, 2, 0, 0)
    with pytest.raises(RpcError):
        m.stream_data(key, bytes(m.STREAM_DATA_MAX + 1))


def test_unknown_procedure_is_answered_as_libvirt_does() -> None:
    request = received(Role.SERVER, packed(28, 0x20008086, 1, 9999, 0, 4, 0))
    with pytest.raises(NoSupport) as caught:
        request.lookup()
    answer = m.reply_error(request, caught.value)
    assert answer[4:28] == packed(0x20008086, 1, 9999, 1, 4, 1)
    fields = CODEC.decode(answer, 28, len(answer))
    assert (fields.code, fields.domain, fields.level) == (39, 7, 2)
    assert fields.message.startswith("unknown procedure")
    assert isinstance(decode_error(answer[28:]), NoSupport)


def test_unknown_version_of_a_program_is_refused() -> None:
    with pytest.raises(NoSupport, match="version 2"):
        received(Role.SERVER, packed(28, 0x20008086, 2, 1, 0, 4, 0)).lookup()


def test_error_without_any_detail_has_the_known_bytes() -> None:
    values = (42, 10, "gone", 2, None, None, None, None, 0, 0, None)
    assert CODEC.encode(values) == (packed(42, 10, 1, 4) + b"gone" + packed(2, 0, 0, 0, 0, 0, 0, 0))


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_of_ours_comes_back_as_itself(name: str) -> None:
    error = getattr(errors, name)("domain 'x' is wrong", remedy="make it right")
    back = decode_error(encode_error(error))
    assert type(back) is type(error)
    assert (back.message, back.remedy, str(back)) == (error.message, error.remedy, str(error))
    if name != "NoSupport":
        assert (back.code, back.domain) == (error.code, error.domain)


def test_details_of_documents_and_hosts_come_back() -> None:
    back = decode_error(encode_error(ConfigError("no such bus", line=12, path="/domain/devices/disk[2]")))
    assert isinstance(back, ConfigError)
    assert (back.line, back.path) == (12, "/domain/devices/disk[2]")
    assert str(back) == "line 12, at /domain/devices/disk[2]: no such bus"
    host = decode_error(encode_error(HostError("open failed", errno=13)))
    assert isinstance(host, HostError)
    assert host.errno == 13


def test_what_a_libvirt_client_shows_includes_the_remedy() -> None:
    fields = CODEC.decode(data := encode_error(NoDomain("no domain 'x'", remedy="see kvik list")), 0, len(data))
    assert fields.message == "no domain 'x'; see kvik list"
    assert fields.code == 42


@pytest.mark.parametrize(
    ("code", "cls"), [(42, NoDomain), (55, OperationInvalid), (38, HostError), (27, ConfigError), (777, KvikError)]
)
def test_errors_of_libvirts_daemon_are_told_apart_by_code(code: int, cls: type[KvikError]) -> None:
    data = CODEC.encode((code, 10, "Domain not found", 2, None, "Domain not found", "%s", "ignored", 9, 9, None))
    back = decode_error(data)
    assert type(back) is cls
    assert (back.message, back.remedy, back.code, str(back)) == ("Domain not found", "", code, "Domain not found")


@pytest.mark.parametrize("text", ["unknown procedure: 9", "Cannot find program 1802922347 version 1"])
def test_a_daemon_that_lacks_something_is_understood(text: str) -> None:
    assert type(decode_error(CODEC.encode((39, 7, text, 2, None, None, None, None, 0, 0, None)))) is NoSupport


def test_hostile_text_in_an_error_is_always_encodable() -> None:
    back = decode_error(encode_error(KvikError("nul \0 surrogate \udc80 " + "x" * 10_000_000)))
    assert back.message.startswith("nul \\0 surrogate \\udc80 xxx")
    assert len(back.message) < 70_000


def test_an_exception_that_nobody_planned_is_an_internal_error() -> None:
    back = decode_error(encode_error(ZeroDivisionError("division by zero")))
    assert (back.code, back.message) == (1, "internal error: ZeroDivisionError: division by zero")


def test_an_error_to_a_stream_packet_aborts_the_stream() -> None:
    server = Connection(Role.SERVER)
    server.open_stream((0x20008086, 201, 9))
    (packet,) = server.feed(m.stream_data((0x20008086, 201, 9), b"x"))
    answer = m.reply_error(packet, OperationInvalid("the console is gone"))
    assert answer[4:28] == packed(0x20008086, 1, 201, 3, 9, 1)


def test_too_long_messages_are_not_written() -> None:
    request = received(Role.SERVER, packed(28, 0x20008086, 1, 14, 0, 4, 0))
    with pytest.raises(RpcError):
        m.reply_payload(request, bytes(m.LENGTH_MAX))
    with pytest.raises(RpcError):
        m.frame((1, 1, 1), 0, 0, bytes(m.LENGTH_MAX))
    with pytest.raises(RpcError):
        m.reply_payload(request, b"", fds=33)
