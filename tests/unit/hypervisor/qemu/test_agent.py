"""The guest agent's owner against agents that are good, absent, slow or hostile."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvik.errors import AgentError
from kvik.hypervisor.agent import GuestAgent, check_reply


class FakeAgent:
    """A thread that answers like a guest's agent; `answer` gives the bytes for a command, None: silence."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commands: list[str] = []
        self.answer: Callable[[str], bytes | None] = lambda command: b'{"return": {}}\n'
        self.before_sync = b""
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line.lstrip(b"\xff"))
                    self.commands.append(message["execute"])
                    if message["execute"] == "guest-sync-delimited":
                        number = json.dumps({"return": message["arguments"]["id"]}).encode()
                        connection.sendall(self.before_sync + b"\xff" + number + b"\n")
                        continue
                    answer = self.answer(message["execute"])
                    if answer == b"":
                        break
                    if answer is not None:
                        connection.sendall(answer)


@pytest.fixture
def fake() -> Iterator[FakeAgent]:
    with tempfile.TemporaryDirectory() as directory:
        agent = FakeAgent(Path(directory) / "a")
        yield agent
        agent.listener.close()


async def test_commands_are_answered_after_one_synchronisation(fake: FakeAgent) -> None:
    fake.before_sync = b'{"return": "stale"}\n{"return": "half'
    agent = GuestAgent(fake.path, "m")
    assert await agent.execute("guest-ping", None, 2) == {}
    assert await agent.execute("guest-ping", None, 2) == {}
    assert fake.commands == ["guest-sync-delimited", "guest-ping", "guest-ping"]
    agent.close()


async def test_callers_queue_up(fake: FakeAgent) -> None:
    agent = GuestAgent(fake.path, "m")
    fake.answer = lambda command: json.dumps({"return": command}).encode() + b"\n"
    names = [f"guest-{number}" for number in range(20)]
    assert await asyncio.gather(*(agent.execute(name, None, 5) for name in names)) == names
    agent.close()


async def test_after_silence_the_session_is_synchronised_anew(fake: FakeAgent) -> None:
    agent = GuestAgent(fake.path, "m")
    fake.answer = lambda command: None
    with pytest.raises(AgentError, match=r"did not answer guest-slow within 0\.1 s"):
        await agent.execute("guest-slow", None, 0.1)
    fake.answer = lambda command: b'{"return": 2}\n'
    fake.before_sync = b'{"return": "the late answer"}\n'
    assert await agent.execute("guest-ping", None, 2) == 2
    assert fake.commands.count("guest-sync-delimited") == 2
    agent.close()


@pytest.mark.parametrize("answer", [b"garbage\n", b"[]\n", b'{"error": {"desc": "refused"}}\n', b""])
async def test_bad_answers_are_agent_errors_and_the_next_command_works(fake: FakeAgent, answer: bytes) -> None:
    agent = GuestAgent(fake.path, "m")
    fake.answer = lambda command: answer
    with pytest.raises(AgentError):
        await agent.execute("guest-bad", None, 2)
    fake.answer = lambda command: b'{"return": 1}\n'
    assert await agent.execute("guest-ping", None, 2) == 1
    agent.close()


async def test_an_agent_that_is_not_there_fails_at_once(fake: FakeAgent) -> None:
    agent = GuestAgent(fake.path, "m")
    agent.set_connected(False)
    with pytest.raises(AgentError, match=r"not connected.*qemu-guest-agent"):
        await agent.execute("guest-ping", None, 60)
    assert fake.commands == []
    agent = GuestAgent(fake.path.with_name("nothing"), "m")
    with pytest.raises(AgentError, match="cannot be reached"):
        await agent.execute("guest-ping", None, 1)


async def test_shutdown_needs_no_answer(fake: FakeAgent) -> None:
    agent = GuestAgent(fake.path, "m")
    fake.answer = lambda command: b""
    assert await agent.execute("guest-shutdown", None, 5) is None
    fake.answer = lambda command: b'{"error": {"class": "GenericError", "desc": "no"}}\n'
    with pytest.raises(AgentError, match="no"):
        await agent.execute("guest-shutdown", None, 5)


def test_replies_are_checked_by_type() -> None:
    assert check_reply({"pid": 1}, dict, "guest-exec") == {"pid": 1}
    for value in (None, [], 5, True):
        with pytest.raises(AgentError, match="not of type dict"):
            check_reply(value, dict, "guest-exec")
