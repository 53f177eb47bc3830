"""QMP without I/O: both roles wired back to back, and a client against every kind of bad peer."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvik.errors import HypervisorError
from kvik.qmp.protocol import Client, Event, Failure, Greeting, Ready, Reply
from kvik.qmp.server import Command, Server
from kvik.qmp.state import State


def connected() -> tuple[Client, Server]:
    client, server = Client(), Server((7, 2, 3), "test", capabilities=["oob"])
    assert client.receive(server.greeting()) == [Greeting((7, 2, 3), "test", ("oob",))]
    commands, answer = server.receive(client.negotiate())
    assert commands == []
    assert client.receive(answer) == [Ready()]
    assert client.state is State.READY
    assert server.state is State.READY
    return client, server


def test_a_command_travels_there_and_its_reply_back() -> None:
    client, server = connected()
    number, data = client.execute("query-status", {"a": [1, "é\n,"]})
    commands, answer = server.receive(data)
    assert commands == [Command("query-status", {"a": [1, "é\n,"]}, number)]
    assert answer == b""
    assert client.receive(server.reply(number, {"status": "running"})) == [Reply(number, {"status": "running"})]


def test_an_error_reply_becomes_a_failure_with_its_class() -> None:
    client, server = connected()
    number, _ = client.execute("x")
    (failure,) = client.receive(server.failure(number, "CommandNotFound", "no x"))
    assert isinstance(failure, Failure)
    error = failure.error("x")
    assert error.qmp_class == "CommandNotFound"
    assert "no x" in str(error)


def test_events_arrive_with_data_and_time() -> None:
    client, server = connected()
    assert client.receive(server.event("STOP", {"why": 1}, timestamp=12.5)) == [Event("STOP", {"why": 1}, 12.5)]


def test_a_server_sends_no_event_before_negotiation() -> None:
    assert Server().event("STOP") == b""


@given(st.lists(st.integers(1, 40), max_size=40))
def test_messages_survive_any_fragmentation(cuts: list[int]) -> None:
    client, server = connected()
    numbers = [client.execute("c", {"n": n})[0] for n in range(5)]
    stream = b"".join(server.reply(number, {"x": "y" * number}) for number in numbers)
    received: list[object] = []
    for cut in cuts:
        received += client.receive(stream[:cut]) if stream else []
        stream = stream[cut:]
    if stream:
        received += client.receive(stream)
    assert [message.id for message in received if isinstance(message, Reply)] == numbers


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"\xff\xfe\x00\n",
        b"[]\n",
        b"42\n",
        b'{"neither": 1}\n',
        b'{"return": {}}\n',
        b'{"return": {}, "id": 99}\n',
        b'{"return": {}, "id": "1"}\n',
        b'{"return": {}, "id": true}\n',
        b'{"return": {}, "id": -1}\n',
        b'{"error": 5, "id": 1}\n',
        b'{"error": {"class": 1, "desc": "x"}, "id": 1}\n',
        b'{"event": 7}\n',
        b'{"event": "X", "data": []}\n',
        b'{"event": "X", "timestamp": {"seconds": "soon"}, "data": 1}\n',
        b"[" * 100_000 + b"\n",
        b'{"a":' * 50_000 + b"\n",
    ],
)
def test_nonsense_fails_the_connection_with_our_error_and_nothing_else(line: bytes) -> None:
    client, _ = connected()
    with pytest.raises(HypervisorError):
        client.receive(line)
    assert client.state is State.FAILED
    assert client.receive(b'{"event": "X"}\n') == []


@given(st.binary(max_size=300))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    for prepared in (Client(), connected()[0]):
        try:
            prepared.receive(data)
        except HypervisorError:
            assert prepared.state is State.FAILED


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # a loaded machine is no fault
@given(
    st.dictionaries(
        st.sampled_from(["return", "id", "event", "data", "timestamp", "error", "class", "QMP", "version"]), json_values
    )
)
def test_random_objects_never_raise_anything_else(message: dict[str, object]) -> None:
    for prepared in (Client(), connected()[0]):
        try:
            prepared.receive(json.dumps(message).encode() + b"\n")
        except HypervisorError:
            pass


def test_an_endless_line_is_cut_off_before_it_fills_memory() -> None:
    client = Client(max_line=1000)
    client.receive(b"x" * 1000)
    with pytest.raises(HypervisorError, match="limit"):
        client.receive(b"x" * 100)
    client = Client(max_line=1000)
    with pytest.raises(HypervisorError, match="limit"):
        client.receive(b"x" * 2000 + b"\n")


def test_a_reply_after_its_deadline_is_dropped_and_the_next_one_counts() -> None:
    client, server = connected()
    late, _ = client.execute("slow")
    client.forget(late)
    number, _ = client.execute("quick")
    assert client.receive(server.reply(late, 1) + server.reply(number, 2)) == [Reply(number, 2)]


def test_commands_cannot_be_sent_before_negotiation_or_after_the_end() -> None:
    client = Client()
    with pytest.raises(HypervisorError, match="greeting"):
        client.execute("x")
    client.receive(b"")
    assert client.state is State.CLOSED
    with pytest.raises(HypervisorError, match="closed"):
        client.execute("x")


def test_arguments_that_are_not_json_are_refused() -> None:
    client, _ = connected()
    with pytest.raises(HypervisorError, match="not JSON"):
        client.execute("x", {"a": object()})


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"junk\n", "JSON parse error"),
        (b"[1]\n", "QMP input must be a JSON object"),
        (b'{"id": 1}\n', "lacks member 'execute'"),
        (b'{"execute": "a", "exec": 1}\n', "member 'exec' is unexpected"),
        (b'{"exec-oob": "a"}\n', "member 'exec-oob' is unexpected"),
        (b'{"execute": 3}\n', "member 'execute' must be a string"),
        (b'{"execute": "a", "arguments": 3}\n', "arguments"),
    ],
)
def test_a_server_refuses_bad_lines_and_goes_on(line: bytes, text: str) -> None:
    _, server = connected()
    commands, answer = server.receive(line + b'{"execute": "ok"}\n')
    assert [command.name for command in commands] == ["ok"]
    assert text in json.loads(answer)["error"]["desc"]


def test_a_server_runs_nothing_before_negotiation() -> None:
    server = Server()
    commands, answer = server.receive(b'{"execute": "quit", "id": "a"}\n')
    assert commands == []
    assert json.loads(answer)["error"]["class"] == "CommandNotFound"
    assert json.loads(answer)["id"] == "a"
    _, answer = server.receive(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}\n')
    assert "error" in json.loads(answer)
    _, answer = server.receive(b'{"execute": "qmp_capabilities"}\n')
    assert json.loads(answer) == {"return": {}}


def test_refused_capabilities_fail_the_client() -> None:
    client, server = Client(), Server()
    client.receive(server.greeting())
    client.negotiate()
    with pytest.raises(HypervisorError, match="refused"):
        client.receive(server.failure(1, "GenericError", "no"))


COMMANDS = [
    b'{"execute": "a", "id": "}{\\\\\\"]["}',
    b'{"execute":\n "b",\n "arguments": {"x": [{}, "\\\\"]}}',
    b"junk\n",
    b'{"execute": "c}\n',  # a string that does not end
    b'{"execute": "d"}',
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("between", [b"", b"\n", b" \r\n"])
def test_commands_need_no_line_ends(size: int, between: bytes) -> None:
    """As with QEMU, whose own client (qemu.qmp) sends none; however the bytes are cut."""
    _, server = connected()
    data = between.join(COMMANDS)
    names, answers = [], b""
    for start in range(0, len(data), size):
        commands, answer = server.receive(data[start : start + size])
        names += [command.name for command in commands]
        answers += answer
    assert names == ["a", "b", "d"]
    assert answers.count(b"JSON parse error") == 2


def test_what_is_nested_too_deeply_is_refused_at_the_end_of_its_line() -> None:
    _, server = connected()
    commands, answer = server.receive(b'{"execute": ' + b"[" * 5000 + b"\n" + b'{"execute": "ok"}')
    assert [command.name for command in commands] == ["ok"] and b"JSON parse error" in answer
