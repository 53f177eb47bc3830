"""Whatever comes in, the daemon goes on and others are served."""

from __future__ import annotations

import asyncio
import contextlib
import random

from daemon_harness import running
from fake_manager import FakeManager

from kvik.daemon.dispatch import table
from kvik.rpc import message as m

ROUNDS = 300


async def test_random_bytes_on_every_procedure() -> None:
    source = random.Random(20)
    manager = FakeManager()
    async with running(manager) as daemon:
        good = await daemon.client()
        client = await daemon.client()
        for program, procedures in table().items():
            for number, entry in procedures.items():
                if entry.name in ("DAEMON_SHUTDOWN", "CONNECT_CLOSE"):
                    continue
                for payload in (b"", source.randbytes(4), source.randbytes(64), b"\0" * 256, b"\xff" * 64):
                    try:
                        await client.raw(program, number, payload)
                    except (ConnectionError, OSError):
                        client = await daemon.client()
        assert (await good.call("CONNECT_GET_TYPE"))[0] == "QEMU"
        assert not daemon.server.stopping


async def test_damaged_messages() -> None:
    source = random.Random(21)
    async with running(FakeManager()) as daemon:
        good = await daemon.client()
        for _ in range(ROUNDS):
            client = await daemon.client()
            packet = bytearray(
                m.frame((0x20008086, source.choice((1, 23, 201, 273)), 1), m.CALL, m.OK, b"\0\0\0\2m0\0\0")
            )
            for _ in range(source.randint(1, 6)):
                packet[source.randrange(len(packet))] = source.randrange(256)
            with contextlib.suppress(OSError):
                client.send(bytes(packet) + source.randbytes(source.randint(0, 40)))
            await asyncio.sleep(0)
            client.task.cancel()
            await client.close()
            daemon.clients.remove(client)
        assert (await good.call("CONNECT_GET_TYPE"))[0] == "QEMU"
        await daemon.settled(connections=1)
