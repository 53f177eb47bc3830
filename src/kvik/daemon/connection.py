"""One client: its messages in, answers, events and streams out.

Quick calls are answered where they are read, without a task (a task costs several times the call itself); calls that
wait get a task, and replies leave in whatever order they are done, matched by serial.

What a client can make the daemon hold is bounded by not reading on: while too many of its calls run, while it does not
take its answers, while a guest does not take its console input. Messages already read wait in `_held`.

Access is checked by the procedure's number, before anything of the body is decoded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvik.daemon.dispatch import Access, Entry, Files, table
from kvik.daemon.errors import OperationDenied, UnknownProcedure, client_error
from kvik.daemon.transport import Transport
from kvik.errors import KvikError, RpcError
from kvik.rpc import message as m
from kvik.rpc.connection import Connection as Wire
from kvik.rpc.connection import Role
from kvik.rpc.message import Call, Key, Message

if TYPE_CHECKING:
    from kvik.daemon.server import Identity, Server
    from kvik.daemon.streams import Stream
    from kvik.manager.domain import DomainObject
    from kvik.manager.networks import NetworkObject
    from kvik.manager.storage import PoolObject

__all__ = ["Connection"]

log = logging.getLogger("kvik.daemon")

HALF_OPEN_MESSAGE_MAX = 65536  # bytes of one message before the connection is opened
STREAMS_MAX = 256  # open streams of one connection
HEADER = m.HEADER
HEADER_SIZE = m.HEADER_SIZE


class Connection:
    """A client of the daemon, from accept to hang-up. `access` grows with CONNECT_OPEN."""

    def __init__(self, server: Server, sock: socket.socket, identity: Identity, number: int) -> None:
        self.server = server
        self.manager = server.manager
        self.identity = identity
        self.number = number
        self.access = Access.ANYONE
        self.uri = ""
        self.calls = 0
        self.created = server.loop.time()
        self.closed = False
        self.wants_close_callback = False
        self.owns_machines = False  # some machine ends with this connection
        self.associated: dict[tuple[bytes, str], tuple[int, ...]] = {}  # (uuid, name) -> descriptors for its start
        self.streams: dict[Key, Stream] = {}
        self.silent_callbacks: set[int] = set()  # subscriptions to events of things that do not exist yet
        self._wire = Wire(Role.SERVER, max_message=HALF_OPEN_MESSAGE_MAX)
        self._table = table()
        self._held: deque[Message] = deque()
        self._running: dict[asyncio.Task[Any], int] = {}  # task of a call -> size of its body
        self._running_bytes = 0
        self._abandonable: set[asyncio.Task[Any]] = set()
        self._stalled_streams = 0
        self._keepalive = False
        self._heard = False
        self._pings = 0
        self._next_ping = 0.0
        self._level = logging.DEBUG
        self.transport = Transport(server.loop, sock, self._received, self._drained, self._transport_closed)

    def __repr__(self) -> str:
        return f"<connection {self.number} of pid {self.identity.pid}, user {self.identity.uid}>"

    # what handlers use

    def domain(self, reference: Sequence[Any]) -> DomainObject:
        """The machine that a wire reference (name, uuid, id) means: by UUID, as libvirt does."""
        return self.manager.lookup_uuid(reference[1])

    def network(self, reference: Sequence[Any]) -> NetworkObject:
        """The network that a wire reference (name, uuid) means: by UUID, as libvirt does."""
        return self.manager.networks.lookup_uuid(reference[1])

    def pool(self, reference: Sequence[Any]) -> PoolObject:
        """The storage pool that a wire reference (name, uuid) means: by UUID, as libvirt does."""
        return self.manager.pools.lookup_uuid(reference[1])

    def open(self, uri: str, access: Access) -> None:
        """CONNECT_OPEN succeeded."""
        self.uri = uri
        self.access = access
        self._wire.max_message = m.LENGTH_MAX
        self.server.opened(self)

    def start_keepalive(self) -> None:
        """The client answers pings: from now on silence means it is gone."""
        self._keepalive = True
        self._next_ping = self.server.loop.time() + self.server.limits.keepalive_interval

    def add_stream(self, call: Call, stream: Stream) -> None:
        """`call`'s answer is followed by `stream`, which starts once the answer is written."""
        if len(self.streams) >= STREAMS_MAX:
            raise KvikError(f"too many open streams on one connection (at most {STREAMS_MAX})")
        self._wire.open_stream(call.key)
        self.streams[call.key] = stream
        self.server.loop.call_soon(stream.start)

    # receiving

    def _received(self, data: bytes, files: Sequence[int]) -> None:
        self._heard = True
        try:
            messages = self._wire.feed(data, files)
        except RpcError as error:
            self.close(f"protocol violation: {error}", logging.WARNING)
            return
        if self._held:
            self._held.extend(messages)
        else:
            self._process(messages)

    def _process(self, messages: Sequence[Message]) -> None:
        """Handle `messages` in order, as far as the bounds allow; the rest is held."""
        transport = self.transport
        for position, message in enumerate(messages, 1):
            if message.__class__ is Call:
                self._call(message)
            else:
                self._other(message)
            if transport.closed:
                for late in list(messages)[position:]:
                    _close_files(late.fds)
                return
            if (transport.congested or self._running or self._stalled_streams) and self._blocked():
                self._held.extend(list(messages)[position:])
                transport.pause_reading()
                return

    def _blocked(self) -> bool:
        limits = self.server.limits
        return (
            self.transport.congested
            or len(self._running) >= limits.calls
            or self._running_bytes > limits.call_bytes
            or self._stalled_streams > 0
        )

    def unblock(self) -> None:
        """A bound may have been left: go on with what was held, then with reading."""
        if self.transport.closed or self.transport.reading or self._blocked():
            return
        if self._held:
            held, self._held = self._held, deque()
            self._process(held)
        if not self._held and not self.transport.closed and not self._blocked():
            self.transport.resume_reading()

    def _drained(self) -> None:
        for stream in list(self.streams.values()):
            stream.drained()
        self.unblock()

    def stream_stalled(self, stalled: bool) -> None:
        """A guest stopped (or went on) taking what this client sends on a stream."""
        self._stalled_streams += 1 if stalled else -1
        if not stalled:
            self.unblock()

    # calls

    def _call(self, call: Any) -> None:
        self.calls += 1
        program, version, number, _, serial, _, data, start, end, files = call
        procedures = self._table.get(program)
        if procedures is None or version != 1:
            self._refuse(call, RpcError(f"Cannot find program {program} version {version}"))
            return
        entry = procedures.get(number)
        if entry is None:
            self._refuse(call, UnknownProcedure(number))
            return
        if entry.access > self.access:
            self._refuse(call, self._denial(entry))
            return
        if not entry.quick:
            self._start(entry, call)
            return
        try:
            args = entry.args.decode(data, start, end)
            values = entry.handler(self, args, call) if entry.with_call else entry.handler(self, args)
            payload = entry.result.encode(values)
        except Exception as error:
            self._refuse(call, client_error(error, entry.name))
            return
        if files:
            _close_files(files)
        length = HEADER_SIZE + len(payload)
        if length > m.LENGTH_MAX:
            self._refuse(call, RpcError(f"the answer of {entry.name} exceeds the protocol's limit ({length} bytes)"))
            return
        self.transport.write(HEADER.pack(length, program, 1, number, m.REPLY, serial, m.OK) + payload)

    def _denial(self, entry: Entry) -> KvikError:
        if self.access is Access.ANYONE:
            return KvikError(f"{entry.name}: the connection was not opened")
        return OperationDenied(
            f"operation {entry.name} forbidden for read only access", remedy="connect without -r (--readonly)"
        )

    def _refuse(self, call: Message, error: KvikError) -> None:
        _close_files(call.fds)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%r: %r: %s", self, call, error)
        self.transport.write(m.reply_error(call, error))

    def _start(self, entry: Entry, call: Any) -> None:
        try:
            args = entry.args.decode(call[6], call[7], call[8])
        except RpcError as error:
            self._refuse(call, error)
            return
        size = call[8] - call[7]
        task = self.server.spawn(self._answer(entry, call, args), entry.name)
        self._running[task] = size
        self._running_bytes += size
        if entry.abandonable:
            self._abandonable.add(task)
        task.add_done_callback(self._call_done)

    async def _answer(self, entry: Entry, call: Any, args: Any) -> None:
        """Run a call that waits, and write its answer. The call's descriptors are closed when it is done."""
        files: Sequence[int] = ()
        try:
            values = await (entry.handler(self, args, call) if entry.with_call else entry.handler(self, args))
            if values.__class__ is Files:
                values, files = values
            reply = m.reply_payload(call, entry.result.encode(values), len(files))
        except asyncio.CancelledError as error:
            self.transport.write(m.reply_error(call, client_error(error, entry.name)))
            raise
        except Exception as error:
            _close_files(files)
            known = client_error(error, entry.name)
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%r: %s: %s", self, entry.name, known)
            self.transport.write(m.reply_error(call, known))
        else:
            if files:
                self.transport.write_files(reply, files)
            else:
                self.transport.write(reply)
        finally:
            _close_files(call[9])

    def _call_done(self, task: asyncio.Task[Any]) -> None:
        self._running_bytes -= self._running.pop(task, 0)
        self._abandonable.discard(task)
        if not self.transport.reading:
            self.unblock()

    # everything else that arrives

    def _other(self, message: Message) -> None:
        match message:
            case m.Ping():
                self.transport.write(m.PONG_BYTES)
            case m.Pong():
                pass  # hearing it was all that mattered
            case _:
                stream = self.streams.get(message.key)
                if stream is None:
                    return
                try:
                    match message:
                        case m.StreamData():
                            stream.received(message.payload)
                        case m.StreamHole():
                            stream.hole(message.length)
                        case m.StreamEnd():
                            stream.ended()
                        case m.StreamFinish() if stream.finish():
                            pass  # it confirms when it is done
                        case _:  # finished or aborted by the client: either is confirmed
                            self.drop_stream(message.key)
                            self.transport.write(m.stream_finish(message.key))
                except Exception as error:
                    self.abort_stream(message.key, client_error(error, "stream"))

    # streams

    def drop_stream(self, key: Key) -> None:
        stream = self.streams.pop(key, None)
        if stream is not None:
            stream.close()

    def finish_stream(self, key: Key) -> None:
        """Confirm to the client that all it sent was taken, and forget the stream."""
        if key in self.streams:
            self.drop_stream(key)
            self.transport.write(m.stream_finish(key))

    def abort_stream(self, key: Key, error: BaseException) -> None:
        """Tell the client that the stream failed and forget it."""
        if key in self.streams:
            self.transport.write(self._wire.abort_stream(key, error))
            self.drop_stream(key)

    # events and time

    def send_event(self, data: bytes) -> None:
        """Send an event. A client that takes none is cut: events cannot wait, and must not pile up."""
        self.transport.write(data)
        if self.transport.buffered > self.server.limits.output:
            self.close(f"does not take its events ({self.transport.buffered} bytes unsent)", logging.WARNING)

    def tick(self, now: float) -> None:
        """Called every second or so: keepalive, and streams that stall."""
        for stream in list(self.streams.values()):
            stream.tick(now)
        if not self._keepalive:
            return
        limits = self.server.limits
        if self._heard:
            self._heard = False
            self._pings = 0
            self._next_ping = now + limits.keepalive_interval
        elif now >= self._next_ping and self.transport.reading:  # who is not listened to cannot be heard
            if self._pings >= limits.keepalive_count:
                self.close(f"no answer to {self._pings} keepalive messages", logging.INFO)
                return
            self._pings += 1
            self._next_ping = now + limits.keepalive_interval
            self.transport.write(m.PING_BYTES)

    # the end

    def close(self, reason: str, level: int = logging.DEBUG) -> None:
        """Hang up. Idempotent."""
        if not self.transport.closed:
            self._level = level
            self.transport.close(reason)

    def _transport_closed(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        log.log(self._level, "%r ended%s", self, f": {reason}" if reason else "")
        for key in list(self.streams):
            self.drop_stream(key)
        for message in self._held:
            _close_files(message.fds)
        self._held.clear()
        _close_files(self._wire.take_fds())
        for files in self.associated.values():
            _close_files(files)
        self.associated.clear()
        self.server.events.drop(self)
        self.server.network_events.drop(self)
        self.server.pool_events.drop(self)
        self.server.secret_events.drop(self)
        # Whoever asked is gone: calls that only look or wait are given up, those that change something finish.
        for task in list(self._abandonable):
            task.cancel()
        if self.owns_machines:
            self.server.spawn(self.manager.client_gone(self), "autodestroy")
        self.server.closed(self)


def _close_files(files: Sequence[int]) -> None:
    for fd in files:
        os.close(fd)
