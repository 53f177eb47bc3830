"""The guest agent's protocol: stale replies dropped, hostile replies bounded."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import AgentError
from kvik.qmp.agent import AgentClient, AgentState


def ready() -> AgentClient:
    client = AgentClient(max_reply=1000)
    client.sync(7)
    assert client.receive(b'\xff{"return": 7}\n') == [(True, None)]
    return client


def test_sync_sends_the_delimiter_and_the_number() -> None:
    data = AgentClient().sync(1234)
    assert data[0] == 0xFF
    assert json.loads(data[1:]) == {"execute": "guest-sync-delimited", "arguments": {"id": 1234}}


@pytest.mark.parametrize(
    "stale",
    [
        b"",
        b'{"return": {}}\n',
        b'{"return": {"half": ',
        b'\xff{"return": 3}\n',
        b"\xff\xff\xffjunk\n",
        b'\xff{"return": true}\n',
        b"x" * 100_000,
    ],
)
def test_everything_before_our_own_number_is_dropped(stale: bytes) -> None:
    client = AgentClient()
    client.sync(7)
    assert client.receive(stale) == []
    assert client.receive(b'\xff{"retu') == []
    assert client.receive(b'rn": 7}\n') == [(True, None)]
    assert client.state is AgentState.READY


def test_commands_run_one_at_a_time() -> None:
    client = ready()
    assert json.loads(client.execute("guest-ping", {"a": 1})) == {"execute": "guest-ping", "arguments": {"a": 1}}
    with pytest.raises(AgentError, match="busy"):
        client.execute("guest-ping")
    assert client.receive(b'{"return": ') == []
    assert client.receive(b'{"x": 1}}\n') == [(True, {"x": 1})]
    assert client.state is AgentState.READY


def test_the_agents_own_error_keeps_the_session() -> None:
    client = ready()
    client.execute("guest-foo")
    with pytest.raises(AgentError, match=r"no such .* block list"):
        client.receive(b'{"error": {"class": "CommandNotFound", "desc": "no such thing"}}\n')
    assert client.state is AgentState.READY


@pytest.mark.parametrize("line", [b"junk\n", b"[]\n", b"{}\n", b'{"error": 3}\n', b"x" * 2000, b"[" * 900 + b"\n"])
def test_nonsense_needs_a_new_sync(line: bytes) -> None:
    client = ready()
    client.execute("guest-ping")
    with pytest.raises(AgentError):
        client.receive(line)
    assert client.state is AgentState.UNSYNCED
    with pytest.raises(AgentError, match="unsynced"):
        client.execute("guest-ping")


def test_an_unasked_message_is_dropped() -> None:
    assert ready().receive(b'{"return": 1}\n') == []


def test_a_guest_that_never_synchronises_is_given_up() -> None:
    client = AgentClient()
    client.sync(7)
    with pytest.raises(AgentError, match="did not synchronise"):
        for _ in range(100):
            client.receive(b"y" * 1_000_000)


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    syncing, busy = AgentClient(), ready()
    syncing.sync(7)
    busy.execute("guest-ping")
    for client in (syncing, busy):
        try:
            client.receive(data)
        except AgentError:
            pass
