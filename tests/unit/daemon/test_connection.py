"""What one client can do, and what it cannot do to others."""

from __future__ import annotations

import asyncio
import logging
import os
import socket

import pytest
from daemon_harness import Client, running
from fake_manager import FakeManager

from kvik.daemon.server import Limits
from kvik.errors import InvalidArgument, KvikError, NoDomain
from kvik.rpc import message as m
from kvik.rpc.program import KEEPALIVE_NUMBER, qemu, remote

REMOTE = remote().number


async def machine(client: Client, name: str = "m0") -> tuple[str, bytes, int]:
    return (await client.call("DOMAIN_LOOKUP_BY_NAME", name))[0]


# --- opening ----------------------------------------------------------------------------------------------------------


async def test_the_order_that_libvirts_client_opens_in() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client(opened=False)
        assert (await client.call("AUTH_LIST"))[0] == [0]
        assert (await client.call("CONNECT_SUPPORTS_FEATURE", 10))[0] == 1
        await client.call("CONNECT_OPEN", "qemu:///system", 0)
        assert (await client.call("CONNECT_SUPPORTS_FEATURE", 14))[0] == 1
        assert (await client.call("CONNECT_SUPPORTS_FEATURE", 15))[0] == 1
        await client.call("CONNECT_REGISTER_CLOSE_CALLBACK")
        assert (await client.call("CONNECT_GET_TYPE"))[0] == "QEMU"
        assert (await client.call("CONNECT_GET_URI"))[0] == "qemu:///system"
        await client.call("CONNECT_UNREGISTER_CLOSE_CALLBACK")
        await client.call("CONNECT_CLOSE")


async def test_without_a_uri_the_daemons_own_is_meant() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client(opened=False)
        await client.open(None)
        assert (await client.call("CONNECT_GET_URI"))[0] == "qemu:///system"


@pytest.mark.parametrize(
    "uri", ["xen:///system", "qemu:///nowhere", "http://[bad", "esx://h/", "qemu:///" + "x" * 5000]
)
async def test_a_uri_that_is_not_served_is_refused(uri: str) -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client(opened=False)
        with pytest.raises(KvikError) as caught:
            await client.open(uri)
        assert caught.value.code in (5, 8)


async def test_nothing_is_answered_before_opening() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client(opened=False)
        with pytest.raises(KvikError, match="not opened"):
            await client.call("CONNECT_LIST_ALL_DOMAINS", 1, 0)


async def test_opening_twice_is_refused() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        with pytest.raises(KvikError) as caught:
            await client.open("qemu:///system")
        assert caught.value.code == 55


# --- what is unknown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [9999, 0, 0x7FFFFFFF])
async def test_an_unknown_procedure_gets_the_answer_that_clients_fall_back_on(number: int) -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        error = (await client.raw(REMOTE, number)).error()
        assert (error.code, error.domain) == (39, 7)
        assert str(error).startswith(f"unknown procedure: {number}")


async def test_an_unknown_program_or_version_is_an_error_not_an_end() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        assert (await client.raw(0x12345678, 1)).error().code == 39
        assert (await client.raw(REMOTE, 3, version=9)).error().code == 39
        assert (await client.call("CONNECT_GET_TYPE"))[0] == "QEMU"


async def test_a_body_that_does_not_decode_is_an_error_not_an_end() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        for payload in (b"", b"\xff" * 8, b"\0\0\0\4abcd" + b"\0" * 64):
            answer = await client.raw(REMOTE, remote()["DOMAIN_LOOKUP_BY_NAME"].number, payload)
            assert isinstance(answer, m.ErrorReply)
        assert (await client.call("CONNECT_GET_TYPE"))[0] == "QEMU"


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"\0" * 28,
        b"\xff" * 64,
        m.frame((REMOTE, 1, 0), m.REPLY, m.OK),
        m.frame((REMOTE, 1, 0), 9, m.OK),
    ],
)
async def test_bytes_that_are_no_protocol_end_the_connection_and_only_that(garbage: bytes) -> None:
    async with running(FakeManager()) as daemon:
        good = await daemon.client()
        bad = await daemon.client()
        bad.send(garbage)
        async with asyncio.timeout(5):
            await bad.ended.wait()
        assert (await good.call("CONNECT_GET_TYPE"))[0] == "QEMU"
        await daemon.settled(connections=1)


async def test_a_large_message_is_refused_until_the_connection_is_opened() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client(opened=False)
        client.send(m.frame((REMOTE, 1, 0), m.CALL, m.OK, b"x" * 100_000))
        async with asyncio.timeout(5):
            await client.ended.wait()


# --- errors -----------------------------------------------------------------------------------------------------------


async def test_a_deliberate_error_keeps_its_code() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        with pytest.raises(NoDomain) as caught:
            await client.call("DOMAIN_LOOKUP_BY_NAME", "nobody")
        assert caught.value.code == 42


async def test_an_unexpected_exception_is_an_internal_error_with_an_id(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests of the commands' own logging options, run before in this process, leave their mark on the logger.
    monkeypatch.setattr(logging.getLogger("kvik"), "propagate", True)
    caplog.set_level(logging.DEBUG, logger="kvik")
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        for name, argument in (("DOMAIN_LOOKUP_BY_NAME", "m0"), ("DOMAIN_DEFINE_XML", "<domain/>")):
            manager.failure = ZeroDivisionError("oops")
            with pytest.raises(KvikError) as caught:
                await client.call(name, argument)
            manager.failure = None
            assert caught.value.code == 1
            mark = str(caught.value).split()[2]
            assert mark in caplog.text
            assert "oops" not in str(caught.value)  # what failed inside is for the log
        assert "ZeroDivisionError: oops" in caplog.text
        assert (await client.call("CONNECT_GET_TYPE"))[0] == "QEMU"


async def test_a_full_disk_is_named() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        manager.failure = OSError(28, "No space left on device", "/etc/kvik/qemu/m.xml")
        with pytest.raises(KvikError, match=r"'/etc/kvik/qemu/m.xml': No space left") as caught:
            await client.call("DOMAIN_DEFINE_XML", "<domain/>")
        assert caught.value.code == 38
        manager.failure = None


async def test_unknown_flags_are_refused() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        with pytest.raises(InvalidArgument):
            await client.call("CONNECT_LIST_ALL_DOMAINS", 1, 1 << 30)
        with pytest.raises(InvalidArgument):
            await client.call("DOMAIN_CREATE_WITH_FLAGS", await machine(client), 1 << 20)


# --- read-only --------------------------------------------------------------------------------------------------------


async def test_a_read_only_connection_looks_but_does_not_touch() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client(flags=1)
        domain = await machine(client)
        assert (await client.call("DOMAIN_IS_ACTIVE", domain))[0] == 0
        for name, *values in (
            ("DOMAIN_CREATE", domain),
            ("DOMAIN_DEFINE_XML", "<domain/>"),
            ("DOMAIN_OPEN_CONSOLE", domain, None, 0),
            ("DOMAIN_GET_XML_DESC", domain, 1),
            ("DOMAIN_GET_TIME", domain, 0),
        ):
            with pytest.raises(KvikError) as caught:
                await client.call(name, *values)
            assert caught.value.code == 29
        with pytest.raises(KvikError) as caught:
            await client.call("DOMAIN_MONITOR_COMMAND", domain, "quit", 0, program="qemu")
        assert caught.value.code == 29
        with pytest.raises(KvikError) as caught:
            await client.call("DAEMON_SHUTDOWN", program="kvik")
        assert caught.value.code == 29
        assert manager.all[0].started == 0


async def test_access_is_refused_before_the_body_is_read() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client(flags=1)
        answer = await client.raw(qemu().number, 1, b"\xff" * 40)
        assert answer.error().code == 29


# --- calls ------------------------------------------------------------------------------------------------------------


async def test_quick_calls_overtake_one_that_waits() -> None:
    manager = FakeManager()
    manager.define_delay = 0.3
    async with running(manager) as daemon:
        client = await daemon.client()
        slow = client.start("DOMAIN_DEFINE_XML", "slow")
        assert (await client.call("CONNECT_GET_TYPE"))[0] == "QEMU"
        assert not slow.done()
        assert (await slow).decode()[0][0] == "slow"


async def test_thousands_of_calls_in_one_write_are_all_answered() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        domain = await machine(client)
        futures = []
        data = bytearray()
        for _ in range(5000):
            serial, packet = client.wire.call(remote()["DOMAIN_GET_STATE"], (domain, 0))
            futures.append(client.replies.setdefault(serial, asyncio.get_running_loop().create_future()))
            data += packet
        await asyncio.to_thread(client.send, data)  # the daemon runs in this thread
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*futures)
        assert all(answer.decode() == (5, 0) for answer in answers)


async def test_more_calls_than_may_run_wait_their_turn() -> None:
    manager = FakeManager()
    manager.define_delay = 0.05
    async with running(manager, limits=Limits(calls=4)) as daemon:
        client = await daemon.client()
        futures = [client.start("DOMAIN_DEFINE_XML", f"d{number}") for number in range(20)]
        await asyncio.sleep(0.02)
        (connection,) = daemon.server.connections
        assert len(connection._running) == 4
        async with asyncio.timeout(5):
            await asyncio.gather(*futures)
        assert len(manager.all) == 21
        assert connection.transport.reading


async def test_a_list_follows_ids_and_names() -> None:
    manager = FakeManager(2)
    async with running(manager) as daemon:
        client = await daemon.client()
        for domain in manager.domains():
            await client.call("CONNECT_LIST_ALL_DOMAINS", 1, 0)
            domain.id, domain.name = 7, f"{domain.name}-renamed"
            listed = (await client.call("CONNECT_LIST_ALL_DOMAINS", 1, 0))[0]
            assert {tuple(one) for one in listed} == {(one.name, one.uuid, one.id) for one in manager.domains()}


async def test_a_client_that_does_not_read_is_not_read_and_holds_little() -> None:
    manager = FakeManager(2000)
    async with running(manager) as daemon:
        good = await daemon.client()
        greedy = socket.socket(socket.AF_UNIX)
        greedy.connect(str(daemon.server.socket_path))
        greedy.setblocking(False)
        greedy.send(m.call(remote()["CONNECT_OPEN"], 0, (None, 0)))
        call = m.call(remote()["CONNECT_LIST_ALL_DOMAINS"], 1, (1, 0))
        sent = 0
        for _ in range(400):
            try:
                sent += greedy.send(call * 64)
            except BlockingIOError:
                await asyncio.sleep(0.002)
        others = [c for c in daemon.server.connections if c.transport.congested]
        assert len(others) == 1
        assert others[0].transport.buffered < 4 * 1024 * 1024
        assert not others[0].transport.reading
        assert (await good.call("CONNECT_GET_TYPE"))[0] == "QEMU"
        # It goes on where it stopped once it reads.
        greedy.setblocking(True)
        greedy.settimeout(5)
        received = await asyncio.to_thread(lambda: sum(len(greedy.recv(1 << 20)) for _ in range(64)))
        assert received > 4 * 1024 * 1024
        greedy.close()
        await daemon.settled(connections=1)


# --- leaving ----------------------------------------------------------------------------------------------------------


async def test_nothing_is_left_of_a_client_that_went() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            client = await daemon.client()
            domain = await machine(client)
            manager.all[0].id = 1
            await client.call("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 0, None)
            await client.call("CONNECT_DOMAIN_EVENT_REGISTER_ANY", 1)
            await client.call("DOMAIN_OPEN_CONSOLE", domain, None, 1)
            manager.all[0].consoles.pop().close()
            client.start("DOMAIN_WAIT_READY", domain, 60000, program="kvik")
            await client.close()
        daemon.clients.clear()
        await daemon.settled()
        assert daemon.server.events.count == 0
        assert not daemon.server.consoles
        await asyncio.sleep(0.05)
        assert not daemon.server._tasks
        assert len(os.listdir("/proc/self/fd")) <= before


async def test_a_change_is_finished_though_its_client_left() -> None:
    manager = FakeManager()
    manager.define_delay = 0.1
    async with running(manager) as daemon:
        client = await daemon.client()
        client.start("DOMAIN_DEFINE_XML", "kept")
        await asyncio.sleep(0.03)
        await client.close()
        await asyncio.sleep(0.2)
        assert [domain.name for domain in manager.all] == ["m0", "kept"]


async def test_machines_started_with_autodestroy_end_with_their_client() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        await client.call("DOMAIN_CREATE_WITH_FLAGS", await machine(client), 2)
        other = await daemon.client()
        await other.close()
        await daemon.settled(connections=1)
        assert manager.gone == []
        await client.close()
        await daemon.settled()
        await asyncio.sleep(0.01)
        assert len(manager.gone) == 1


# --- descriptors ------------------------------------------------------------------------------------------------------


async def test_descriptors_reach_the_start_they_were_sent_for_and_are_closed() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        domain = await machine(client)
        before = len(os.listdir("/proc/self/fd"))
        read, write = os.pipe()
        await client.call("DOMAIN_CREATE_WITH_FILES", domain, 0, files=[read, write])
        assert manager.all[0].files == {"0": os.fstat(read).st_ino, "1": os.fstat(write).st_ino}
        os.close(read)
        os.close(write)
        assert len(os.listdir("/proc/self/fd")) == before


async def test_associated_descriptors_are_used_by_name_and_go_with_the_client() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        domain = await machine(client)
        before = len(os.listdir("/proc/self/fd"))
        read, write = os.pipe()
        await client.call("DOMAIN_FD_ASSOCIATE", domain, "disk", 0, files=[read])
        await client.call("DOMAIN_CREATE", domain)
        assert manager.all[0].files == {"disk": os.fstat(read).st_ino}
        os.close(read)
        os.close(write)
        await client.close()
        await daemon.settled()
        assert len(os.listdir("/proc/self/fd")) <= before


async def test_descriptors_sent_with_a_call_that_takes_none_are_closed() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        before = len(os.listdir("/proc/self/fd"))
        read, write = os.pipe()
        assert (await client.call("CONNECT_GET_TYPE", files=[read, write]))[0] == "QEMU"
        os.close(read)
        os.close(write)
        assert len(os.listdir("/proc/self/fd")) == before


# --- keepalive --------------------------------------------------------------------------------------------------------


async def test_a_ping_is_answered_at_once_even_before_opening() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client(opened=False)
        client.send(m.PING_BYTES)
        assert (await client.event()).program == KEEPALIVE_NUMBER


async def test_a_client_that_promised_keepalive_and_falls_silent_is_cut() -> None:
    limits = Limits(keepalive_interval=0.05, keepalive_count=2)
    async with running(FakeManager(), limits=limits) as daemon:
        daemon_tick(daemon)
        silent = await daemon.client()
        silent.answer_pings = False
        alive = await daemon.client()
        unpromised = await daemon.client()
        await silent.call("CONNECT_SUPPORTS_FEATURE", 10)
        await alive.call("CONNECT_SUPPORTS_FEATURE", 10)
        async with asyncio.timeout(5):
            await silent.ended.wait()
        assert silent.pings == 2
        assert alive.pings >= 1
        assert not alive.ended.is_set()
        assert unpromised.pings == 0


def daemon_tick(daemon: object) -> None:
    """Look at deadlines every 20 ms instead of every second."""
    import kvik.daemon.server as module

    module.TICK = 0.02


@pytest.fixture(autouse=True)
def slow_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvik.daemon.server as module

    monkeypatch.setattr(module, "TICK", module.TICK)
