"""A bus that is hostile: whatever it sends, the call ends with an error, and soon."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.errors import DBusError, HostError
from kvik.host.dbus import SystemBus


def message(body: bytes, signature: str, *, kind: int = 2, to: int = 1, order: str = "<", error: str = "") -> bytes:
    """A message as a bus would send it, in either byte order."""
    pack = lambda *values: struct.pack(f"{order}{'I' * len(values)}", *values)  # noqa: E731
    fields = b"\5\1u\0" + pack(to)
    if error:
        fields += bytes((4, 1)) + b"s\0" + pack(len(error)) + error.encode() + b"\0"
        fields += bytes(-len(fields) % 8)
    fields += bytes((8, 1)) + b"g\0" + bytes((len(signature),)) + signature.encode() + b"\0"
    head = (b"l" if order == "<" else b"B") + bytes((kind, 0, 1)) + pack(len(body), 7, len(fields)) + fields
    return head + bytes(-len(head) % 8) + body


def text(word: str, order: str = "<") -> bytes:
    return struct.pack(f"{order}I", len(word)) + word.encode() + b"\0"


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What it answers, one element a request: first the authentication, then Hello, then the call."""
    answers: list[bytes] = [b"OK 0123\r\n", message(text(":1.1"), "s")]
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s"))
    server.listen()
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path / 's'},guid=00")

    def serve() -> None:
        try:
            peer, _ = server.accept()
        except OSError:
            return
        with peer:
            for answer in answers:
                if not peer.recv(65536):
                    return
                peer.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield answers
    server.close()
    thread.join(5)


def ask() -> list[object]:
    with SystemBus(deadline=2) as made:
        return made.call("a.b", "/a", "a.b", "C", "one", "")


@pytest.mark.parametrize("order", ["<", ">"])
def test_strings_and_lists_are_read_in_either_byte_order(bus: list[bytes], order: str) -> None:
    strings = text("one", order) + text("two!", order)
    body = text("abc", order) + struct.pack(f"{order}I", len(strings)) + strings
    bus.append(message(b"", "s", kind=4) + message(body, "sas", to=2, order=order))  # a signal comes between
    assert ask() == ["abc", ["one", "two!"]]


def test_a_refusal_has_its_name_and_words(bus: list[bytes]) -> None:
    bus.append(message(text("no zone x"), "s", kind=3, to=2, error="org.example.Invalid"))
    with pytest.raises(DBusError, match=r"a.b refuses C: no zone x") as caught:
        ask()
    assert caught.value.name == "org.example.Invalid"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"x" * 16, "no message"),
        (message(b"", "")[:4] + struct.pack("<III", 1 << 30, 1, 8), "too long"),
        (message(b"", "")[:4] + struct.pack("<III", 0, 1, 1 << 30), "too long"),
        (message(struct.pack("<I", 0xFFFF) + b"abc", "s", to=2), "cut short"),
        (message(struct.pack("<I", 0xFFFFFF), "as", to=2), "cut short"),
        (message(b"", "s", to=2)[:20], "ended the connection"),
    ],
)
def test_what_makes_no_sense_is_an_error(bus: list[bytes], answer: bytes, words: str) -> None:
    bus.append(answer)
    with pytest.raises(HostError, match=words):
        ask()


def test_a_bus_that_lets_nobody_in_is_told(bus: list[bytes]) -> None:
    bus[0] = b"REJECTED EXTERNAL\r\n"
    with pytest.raises(HostError, match="does not let us in"):
        ask()


def test_no_bus_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path / 'none'}")
    with pytest.raises(HostError, match="cannot ask the system's D-Bus: No such file"):
        SystemBus()
