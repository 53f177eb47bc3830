"""A tiny daemon on a socket pair, made of rpc's server role: answers from a table, one thread."""

from __future__ import annotations

import os
import socket
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from kvik.client.connection import Connection
from kvik.client.link import Link
from kvik.client.transport import Transport
from kvik.errors import KvikError, NoSupport
from kvik.rpc import message as m
from kvik.rpc.connection import Connection as Wire
from kvik.rpc.connection import Role
from kvik.rpc.program import remote

UUID = bytes.fromhex("c7a5fdbdcdaf9455926ad65c16db1809")
DOM = ("tiny-1", UUID, 1)
OFF = ("other", bytes(16), -1)

Answer = Sequence[Any] | KvikError | Callable[["FakeDaemon", m.Call], None]


class FakeDaemon:
    """`answers[name]` is a result, an error to raise, or a function that does as it likes with the call."""

    def __init__(self, **answers: Answer) -> None:
        self.answers: dict[str, Answer] = {"AUTH_LIST": ([0],), "CONNECT_OPEN": (), "CONNECT_CLOSE": (), **answers}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.received: list[m.Message] = []  # everything that is no call
        self.fds: list[int] = []
        self.changed = threading.Condition()
        self.wire = Wire(Role.SERVER)
        self.socket, self.theirs = socket.socketpair()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def connect(self) -> Connection:
        connection = Connection(Link(Transport(self.theirs)))
        connection.open("kvik:///session")
        connection.timeout = 10.0
        return connection

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def event(self, name: str, *values: Any) -> None:
        self.send(m.event(remote()[name], values))

    def args(self, name: str) -> list[tuple[Any, ...]]:
        return [values for called, values in self.calls if called == name]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 5.0)

    def _serve(self) -> None:
        try:
            while True:
                data, ancillary, _, _ = self.socket.recvmsg(65536, 4096)
                fds = array("i")
                for _, _, payload in ancillary:
                    fds.frombytes(payload)
                self.fds += fds
                if not data:
                    return
                for message in self.wire.feed(data, fds):
                    self._handle(message)
        except OSError:
            pass
        finally:
            self.socket.close()

    def _handle(self, message: m.Message) -> None:
        if not isinstance(message, m.Call):
            with self.changed:
                self.received.append(message)
                self.changed.notify_all()
            if isinstance(message, m.StreamFinish):
                self.send(m.stream_finish(message.key))
            elif isinstance(message, m.StreamAbort):
                self.send(m.reply_error(message, KvikError("stream aborted at client request")))
            return
        try:
            name = message.lookup().name
            with self.changed:
                self.calls.append((name, tuple(message.decode())))
                self.changed.notify_all()
            answer = self.answers.get(name)
            if answer is None:
                raise NoSupport(f"unknown procedure: {name}")
            if isinstance(answer, KvikError):
                raise answer
            if callable(answer):
                answer(self, message)
            else:
                self.send(m.reply(message, answer))
        except KvikError as error:
            self.send(m.reply_error(message, error))

    def close(self) -> None:
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.thread.join(5.0)
        self.theirs.close()
        for fd in self.fds:
            try:
                os.close(fd)
            except OSError:
                pass


def stream_answer(
    *packets: bytes, result: Sequence[Any] = (), end: bool = True
) -> Callable[[FakeDaemon, m.Call], None]:
    """An answer that opens a stream and sends packets on it, in one go."""

    def answer(daemon: FakeDaemon, call: m.Call) -> None:
        daemon.wire.open_stream(call.key)
        data = m.reply(call, result) + b"".join(m.stream_data(call.key, packet) for packet in packets)
        daemon.send(data + (m.stream_end(call.key) if end else b""))

    return answer
