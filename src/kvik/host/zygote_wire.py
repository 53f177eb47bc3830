"""What is said between a zygote and who keeps it, over a Unix socket of packets (SOCK_SEQPACKET).

    zygote   -> {"zygote": PROTOCOL, "renames": true}                     once, when it can fork
    keeper   -> {"argv": [...], "env": {...}, "fds": [...], "cwd": "/"}   and the descriptors (SCM_RIGHTS)
    the fork -> {"pid": 4711}                                             and its pidfd
    zygote or fork -> {"error": "why not"}                                in place of that

`renames`: a fork gets the command line and environment of its own in /proc, by which a later daemon knows it.
"""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["MAX_ANSWER", "MAX_DESCRIPTORS", "MAX_NUMBER", "MAX_REQUEST", "PROTOCOL", "Request", "answer", "read_answer"]

PROTOCOL = 1  # another one is another language: the keeper may be older than the code on disk
MAX_REQUEST = 128 << 10  # bytes
MAX_ANSWER = 4096  # bytes
MAX_DESCRIPTORS = 253  # SCM_MAX_FD, unix(7)
MAX_NUMBER = 1 << 16


class Request:
    """`argv` with the program's name first; `numbers[i]` is the number that descriptor i of the message is to have."""

    __slots__ = ("argv", "directory", "environment", "numbers")

    def __init__(self, argv: list[str], environment: dict[str, str], numbers: list[int], directory: str = "/") -> None:
        self.argv, self.environment, self.numbers, self.directory = argv, environment, numbers, directory

    def encode(self) -> bytes:
        """Raises ValueError if it is more than a message holds, or names a descriptor that no zygote would place."""
        fields = {"argv": self.argv, "env": self.environment, "fds": self.numbers, "cwd": self.directory}
        data = json.dumps(fields).encode("ascii")
        if len(data) > MAX_REQUEST or len(self.numbers) > MAX_DESCRIPTORS or max(self.numbers, default=0) >= MAX_NUMBER:
            raise ValueError("the request is too long for a zygote")
        return data

    @classmethod
    def decode(cls, data: bytes, descriptors: int) -> Request:
        """Raises ValueError for anything that `encode` does not make of a request with so many descriptors."""
        try:
            fields = json.loads(data)
        except RecursionError:
            raise ValueError("the request is nested too deeply") from None
        if not isinstance(fields, dict) or fields.keys() != {"argv", "env", "fds", "cwd"}:
            raise ValueError("the request has not the fields of one")
        argv, environment, numbers, directory = fields["argv"], fields["env"], fields["fds"], fields["cwd"]
        if not _texts(argv) or not argv:
            raise ValueError("its argv is no list of words")
        if not isinstance(environment, dict) or not _texts([*environment, *environment.values()]):
            raise ValueError("its environment is none")
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < MAX_NUMBER for n in numbers):
            raise ValueError("its descriptors' numbers are none")
        if len(numbers) != descriptors or len(set(numbers)) != descriptors:
            raise ValueError(f"{len(numbers)} numbers do not name {descriptors} descriptors")
        if not _texts([directory]) or not directory.startswith("/"):
            raise ValueError("its directory is no absolute path")
        return cls(argv, environment, numbers, directory)


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and "\0" not in value for value in values)


def answer(**fields: object) -> bytes:
    return json.dumps(fields).encode("ascii")


def read_answer(data: bytes) -> dict[str, Any]:
    """Raises ValueError for what is none."""
    try:
        fields = json.loads(data)
    except RecursionError:
        raise ValueError("an answer is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError("an answer is no object")
    return fields
