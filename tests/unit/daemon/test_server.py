"""The daemon's own life: who may come in, how many, when it ends."""

from __future__ import annotations

import asyncio
import errno
import socket
import stat
from pathlib import Path

import pytest
from daemon_harness import running
from fake_manager import FakeManager

from kvik.daemon.server import Identity, Limits, Server
from kvik.errors import KvikError, ResourceBusy
from kvik.manager.node import Node
from kvik.paths import Paths


async def test_half_open_connections_do_not_keep_anybody_out() -> None:
    """libvirtd stops answering at 300 of them."""
    async with running(FakeManager(), limits=Limits(half_open=32)) as daemon:
        idle = []
        for _ in range(400):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, str(daemon.server.socket_path))
            idle.append(sock)
        await asyncio.sleep(0.05)
        client = await daemon.client()
        assert (await client.call("CONNECT_GET_TYPE"))[0] == "QEMU"
        assert len(daemon.server.connections) <= 33
        for sock in idle:
            sock.close()


async def test_the_process_with_most_half_open_connections_loses_first() -> None:
    async with running(FakeManager(), limits=Limits(half_open=4)) as daemon:
        first = await daemon.client(opened=False)
        await asyncio.sleep(0.02)
        (connection,) = daemon.server.connections
        connection.identity = Identity(pid=1, uid=0, gid=0)  # as if of another process
        flood = [await daemon.client(opened=False) for _ in range(10)]
        await asyncio.sleep(0.05)
        assert not first.ended.is_set()
        assert flood[0].ended.is_set()


async def test_a_connection_that_is_never_opened_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvik.daemon.server.TICK", 0.02)
    async with running(FakeManager(), limits=Limits(open_deadline=0.1)) as daemon:
        idle = await daemon.client(opened=False)
        good = await daemon.client()
        async with asyncio.timeout(5):
            await idle.ended.wait()
        await asyncio.sleep(0.1)
        assert not good.ended.is_set()


@pytest.mark.parametrize("limits", [Limits(connections=3), Limits(per_user=3)])
async def test_connections_are_limited(limits: Limits) -> None:
    async with running(FakeManager(), limits=limits) as daemon:
        for _ in range(3):
            await daemon.client()
        late = await daemon.client(opened=False)
        async with asyncio.timeout(5):
            await late.ended.wait()
        await daemon.clients[0].close()
        await daemon.settled(connections=2)
        assert (await (await daemon.client()).call("CONNECT_GET_TYPE"))[0] == "QEMU"


async def test_out_of_descriptors_the_daemon_goes_on() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        server = daemon.server

        class Exhausted:
            def __init__(self, listener: socket.socket) -> None:
                self.listener = listener
                self.failures = 3

            def accept(self) -> tuple[socket.socket, object]:
                if self.failures:
                    self.failures -= 1
                    raise OSError(errno.EMFILE, "Too many open files")
                return self.listener.accept()

            def __getattr__(self, name: str) -> object:
                return getattr(self.listener, name)

        server._listener = Exhausted(server._listener)
        late = await daemon.client()
        assert (await late.call("CONNECT_GET_TYPE"))[0] == "QEMU"
        assert (await client.call("CONNECT_GET_TYPE"))[0] == "QEMU"


async def test_a_strangers_connection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(FakeManager()) as daemon:
        monkeypatch.setattr("kvik.daemon.server.UCRED", Stranger())
        stranger = await daemon.client(opened=False)
        async with asyncio.timeout(5):
            await stranger.ended.wait()
        monkeypatch.undo()
        await daemon.client()


class Stranger:
    """Credentials of a user that is neither root nor the daemon's."""

    size = 12

    def unpack(self, data: bytes) -> tuple[int, int, int]:
        return (4321, 54321, 54321)


async def test_the_socket_is_private_and_gone_afterwards() -> None:
    async with running(FakeManager()) as daemon:
        path = daemon.server.socket_path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


async def test_an_idle_daemon_ends_and_a_used_one_does_not() -> None:
    manager = FakeManager()
    async with running(manager, idle_timeout=0.15) as daemon:
        client = await daemon.client()
        await asyncio.sleep(0.3)
        assert not daemon.server.stopping
        manager.define_delay = 0.3
        client.start("DOMAIN_DEFINE_XML", "late")
        await asyncio.sleep(0.02)
        await client.close()
        await asyncio.sleep(0.2)
        assert not daemon.server.stopping  # something is still being done
        async with asyncio.timeout(5):
            await daemon.server._stopping.wait()
        assert manager.all[-1].name == "late"


async def test_an_idle_daemon_stays_for_a_machine_that_needs_it() -> None:
    manager = FakeManager()
    manager.needed_by = "m0"  # its document says on_poweroff=restart, say
    async with running(manager, idle_timeout=0.05) as daemon:
        await asyncio.sleep(0.3)
        assert not daemon.server.stopping
        manager.needed_by = ""
        async with asyncio.timeout(2):
            while not daemon.server.stopping:
                await asyncio.sleep(0.01)


async def test_a_daemon_nobody_ever_connects_to_ends_too() -> None:
    async with running(FakeManager(), idle_timeout=0.05) as daemon:
        async with asyncio.timeout(5):
            await daemon.server._stopping.wait()


async def test_ending_waits_for_changes_under_way(tmp_path: Path) -> None:
    manager = FakeManager()
    manager.define_delay = 0.2
    async with running(manager) as daemon:
        client = await daemon.client()
        future = client.start("DOMAIN_DEFINE_XML", "kept")
        await asyncio.sleep(0.02)
        daemon.server.stop("test")
        assert (await future).decode()[0][0] == "kept"


async def test_ending_does_not_wait_for_ever() -> None:
    manager = FakeManager()
    manager.define_delay = 60
    async with running(manager, limits=Limits(grace=0.1)) as daemon:
        client = await daemon.client()
        future = client.start("DOMAIN_DEFINE_XML", "stuck")
        await asyncio.sleep(0.02)
        daemon.server.stop("test")
        async with asyncio.timeout(3):
            assert "cancelled" in str((await future).error())
    assert not manager.is_open


async def test_a_second_daemon_on_the_same_state_does_not_start() -> None:
    async with running(FakeManager()) as daemon:
        manager = FakeManager()
        second = Server(manager, daemon.server.paths, node=Node(manager))
        with pytest.raises(ResourceBusy):
            await second.run()
        assert not manager.is_open
        await daemon.client()  # the first one's socket is untouched


async def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    manager = FakeManager()
    paths = Paths.system(tmp_path, {})
    server = Server(manager, paths, node=Node(manager), socket_path=tmp_path / ("x" * 200))
    with pytest.raises(KvikError):
        await server.run()
    assert not manager.is_open
    again = Server(manager, paths, node=Node(manager))
    again.stop("at once")
    await again.run()  # the lock is free


async def test_our_own_call_ends_the_daemon() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        await client.call("DAEMON_SHUTDOWN", program="kvik")
        async with asyncio.timeout(5):
            await daemon.server._stopping.wait()
