"""Consoles and downloads: both directions, back-pressure, every way to end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from daemon_harness import Client, running
from fake_manager import FakeManager

from kvik.errors import KvikError
from kvik.rpc import message as m


async def console(client: Client, flags: int = 0) -> Any:
    domain = (await client.call("DOMAIN_LOOKUP_BY_NAME", "m0"))[0]
    await client.call("DOMAIN_OPEN_CONSOLE", domain, None, flags)
    client.wire.open_stream(client.last_key)
    return client.last_key


def manager_with_machine() -> FakeManager:
    manager = FakeManager()
    manager.all[0].id = 1
    return manager


async def guest_receives(manager: FakeManager, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    async with asyncio.timeout(10):
        while len(data) < size:
            data += await loop.sock_recv(manager.all[0].console, 1 << 16)
    return data


async def test_a_console_goes_both_ways() -> None:
    manager = manager_with_machine()
    async with running(manager) as daemon:
        client = await daemon.client()
        key = await console(client)
        manager.all[0].console.send(b"login: ")
        assert (await client.packet()).payload == b"login: "
        client.send(m.stream_data(key, b"root\n"))
        assert await guest_receives(manager, 5) == b"root\n"


async def test_the_client_finishes_and_it_is_confirmed() -> None:
    manager = manager_with_machine()
    async with running(manager) as daemon:
        client = await daemon.client()
        key = await console(client)
        client.send(client.wire.finish_stream(key))
        assert isinstance(await client.packet(), m.StreamFinish)
        assert not daemon.server.consoles
        await console(client)  # free again


async def test_the_client_aborts_and_it_is_confirmed() -> None:
    manager = manager_with_machine()
    async with running(manager) as daemon:
        client = await daemon.client()
        key = await console(client)
        client.send(client.wire.abort_stream(key))
        assert isinstance(await client.packet(), m.StreamFinish)
        assert not daemon.server.consoles


async def test_the_guests_end_is_told() -> None:
    manager = manager_with_machine()
    async with running(manager) as daemon:
        client = await daemon.client()
        key = await console(client)
        manager.all[0].console.close()
        assert isinstance(await client.packet(), m.StreamEnd)
        client.send(client.wire.finish_stream(key))
        assert isinstance(await client.packet(), m.StreamFinish)


async def test_a_second_client_is_refused_unless_it_forces() -> None:
    manager = manager_with_machine()
    async with running(manager) as daemon:
        first, second = await daemon.client(), await daemon.client()
        await console(first)
        with pytest.raises(KvikError, match="in use"):
            await console(second)
        key = await console(second, 1)
        assert "another client" in str((await first.packet()).error())
        second.send(m.stream_data(key, b"mine"))
        assert await guest_receives(manager, 4) == b"mine"


async def test_a_machine_that_is_off_has_no_console() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        with pytest.raises(KvikError) as caught:
            await console(client)
        assert caught.value.code == 55


async def test_a_guest_that_floods_waits_for_a_client_that_does_not_read() -> None:
    manager = manager_with_machine()
    async with running(manager) as daemon:
        client = await daemon.client()
        await console(client)
        (connection,) = daemon.server.connections
        client.task.cancel()
        await asyncio.sleep(0)
        guest, block, sent = manager.all[0].console, b"x" * 65536, 0
        for _ in range(400):
            try:
                sent += guest.send(block)
            except BlockingIOError:
                await asyncio.sleep(0.002)
        assert connection.transport.congested
        assert connection.transport.buffered < 2_000_000
        assert sent < 6_000_000


async def test_input_waits_for_a_guest_that_does_not_take_it_and_is_then_whole() -> None:
    manager = manager_with_machine()
    async with running(manager) as daemon:
        client = await daemon.client()
        key = await console(client)
        (connection,) = daemon.server.connections
        block = bytes(range(256)) * 512
        sending = asyncio.create_task(  # noqa: RUF006  # awaited below
            asyncio.to_thread(lambda: [client.send(m.stream_data(key, block)) for _ in range(20)])
        )
        async with asyncio.timeout(5):
            while connection.transport.reading:
                await asyncio.sleep(0.005)
        assert len(connection.streams[key]._pending) < 1_000_000
        assert await guest_receives(manager, len(block) * 20) == block * 20
        await sending
        assert (await client.call("CONNECT_GET_TYPE"))[0] == "QEMU"


async def test_input_that_a_guest_never_takes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvik.daemon.streams.STALL_LIMIT", 0.1)
    monkeypatch.setattr("kvik.daemon.server.TICK", 0.02)
    manager = manager_with_machine()
    async with running(manager) as daemon:
        client = await daemon.client()
        key = await console(client)
        block = b"x" * 131072
        await asyncio.to_thread(lambda: [client.send(m.stream_data(key, block)) for _ in range(8)])
        assert "took no input" in str((await client.packet()).error())
        assert (await client.call("CONNECT_GET_TYPE"))[0] == "QEMU"


async def test_a_screenshot_is_downloaded_whole() -> None:
    manager = manager_with_machine()
    async with running(manager) as daemon:
        client = await daemon.client()
        domain = (await client.call("DOMAIN_LOOKUP_BY_NAME", "m0"))[0]
        future = client.start("DOMAIN_SCREENSHOT", domain, 0, 0)
        key = client.last_key
        client.wire.open_stream(key)
        assert (await future).decode().mime == "image/png"
        data = b""
        while isinstance(packet := await client.packet(), m.StreamData):
            assert len(packet.payload) <= m.STREAM_DATA_MAX
            data += packet.payload
        assert data == bytes(range(256)) * 4096
        client.send(client.wire.finish_stream(key))
        assert isinstance(await client.packet(), m.StreamFinish)


async def test_a_stream_that_takes_no_data_is_aborted_by_data() -> None:
    manager = manager_with_machine()
    async with running(manager) as daemon:
        client = await daemon.client()
        domain = (await client.call("DOMAIN_LOOKUP_BY_NAME", "m0"))[0]
        future = client.start("DOMAIN_SCREENSHOT", domain, 0, 0)
        client.wire.open_stream(client.last_key)
        await future
        client.send(m.stream_data(client.last_key, b"x"))
        while isinstance(packet := await client.packet(), m.StreamData | m.StreamEnd):
            pass
        assert isinstance(packet, m.StreamAbort)
