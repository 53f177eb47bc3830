"""The console: a terminal is needed, the escape character leaves, the machine goes on."""

from __future__ import annotations

import os
import pty
import select
from typing import Any

import pytest

from kvik.cli.console import attach, escape_byte
from kvik.cli.context import Context
from kvik.cli.options import UsageError


class FakeStream:
    def __init__(self) -> None:
        self.escape = b""

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def pump(self, stdin: int, stdout: int, escape: bytes) -> str:
        self.escape = escape
        return "escape"


@pytest.mark.parametrize(
    ("text", "byte"), [("^]", b"\x1d"), ("^A", b"\x01"), ("^a", b"\x01"), ("q", b"q"), ("^?", b"\x7f")]
)
def test_escape_characters(text: str, byte: bytes) -> None:
    assert escape_byte(text) == byte


def test_a_wrong_escape() -> None:
    with pytest.raises(UsageError):
        escape_byte("^]]")


def test_without_a_terminal_there_is_another_way(kvik: Any) -> None:
    assert kvik("console", "tiny-1", "--devname", "serial0", "--force", "--safe") == 1
    assert "Cannot run interactive console without a controlling TTY" in kvik.err
    assert "kvik exec tiny-1" in kvik.err


@pytest.mark.parametrize("line", [["start", "web", "--console"], ["create", "-", "--console"]])
def test_start_and_create_attach_it(kvik: Any, line: list[str]) -> None:
    assert kvik(*line, stdin="<domain/>") == 1
    assert "without a controlling TTY" in kvik.err
    assert kvik.connection.made(line[0])


def test_a_machine_that_is_off_has_none(kvik: Any) -> None:
    assert kvik("console", "web") == 1
    assert "kvik start --console web" in kvik.err


def test_the_terminal_becomes_the_machines(kvik: Any) -> None:
    stream = FakeStream()
    kvik.connection.replies["console"] = stream
    main, other = pty.openpty()
    try:
        with open(other, "w", closefd=False) as out, open(other, closefd=False) as stdin:
            context = Context(
                connector=lambda uri, readonly: kvik.connection,
                stdin=stdin,
                stdout=out,
                stderr=out,
                colour=False,
                escape="^A",
            )
            assert attach(context, context.domain("tiny-1"), "serial0", 3) == 0
        shown = ""
        while "(Ctrl + A)" not in shown and select.select([main], [], [], 5.0)[0]:  # a pty hands over line by line
            shown += os.read(main, 4096).decode()
    finally:
        os.close(main)
        os.close(other)
    assert "Connected to domain 'tiny-1'" in shown
    assert "Escape character is ^A (Ctrl + A)" in shown
    assert stream.escape == b"\x01"
    assert kvik.connection.made("console") == [("console", "tiny-1", "serial0", 3)]
