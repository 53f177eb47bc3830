"""What a zygote takes for a request."""

from __future__ import annotations

import json

import pytest

from kvik.host.zygote_wire import MAX_DESCRIPTORS, MAX_NUMBER, MAX_REQUEST, Request, answer, read_answer

GOOD = {"argv": ["kvik-vmm", "--name", "a"], "env": {"HOME": "/"}, "fds": [0, 1, 2, 20], "cwd": "/"}


def test_a_request_survives_its_message() -> None:
    request = Request(["kvik-vmm", "--name", "käse"], {"HOME": "/x"}, [0, 2, 17], "/x")
    again = Request.decode(request.encode(), 3)
    assert (again.argv, again.environment, again.numbers, again.directory) == (
        (request.argv, request.environment, request.numbers, request.directory)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"argv": []},
        {"argv": "kvik-vmm"},
        {"argv": ["a\0b"]},
        {"argv": [1]},
        {"env": []},
        {"env": {"A": 1}},
        {"fds": [0, 1, 2]},
        {"fds": [0, 1, 2, 2]},
        {"fds": [0, 1, 2, -1]},
        {"fds": [0, 1, 2, True]},
        {"fds": [0, 1, 2, 1 << 40]},
        {"cwd": "relative"},
        {"cwd": None},
        {"more": 1},
    ],
)
def test_a_malformed_request_is_refused(change: dict[str, object]) -> None:
    assert Request.decode(json.dumps(GOOD).encode(), 4)
    with pytest.raises(ValueError, match=r"\S"):
        Request.decode(json.dumps({**GOOD, **change}).encode(), 4)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"argv": ["a"]}'])
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        Request.decode(data, 0)


def test_a_request_is_bounded() -> None:
    with pytest.raises(ValueError, match="too long"):
        Request(["x" * MAX_REQUEST], {}, []).encode()
    with pytest.raises(ValueError, match="too long"):
        Request(["x"], {}, list(range(MAX_DESCRIPTORS + 1))).encode()


def test_a_number_that_no_zygote_would_place_is_not_sent() -> None:
    with pytest.raises(ValueError, match="too long"):
        Request(["x"], {}, [MAX_NUMBER]).encode()


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"[" * 100_000])
def test_what_is_no_answer_is_refused(data: bytes) -> None:
    assert read_answer(answer(pid=1)) == {"pid": 1}
    with pytest.raises(ValueError, match=r"\S"):
        read_answer(data)
