"""Events reach those who asked, in the form they asked for, and nobody else."""

from __future__ import annotations

import asyncio

import pytest
from daemon_harness import running
from fake_manager import FakeManager

from kvik.daemon.eventing import KINDS
from kvik.errors import KvikError
from kvik.manager.events import KINDS as MANAGER_KINDS
from kvik.rpc.program import remote

# A value for each field that an event of the manager can have.
SAMPLES = {
    "event": 2,
    "detail": 0,
    "offset": 3600,
    "action": 1,
    "src_path": "/disk",
    "dev_alias": "virtio-disk0",
    "phase": 0,
    "local": (0, "127.0.0.1", "5900"),
    "remote": {"family": 0, "node": "127.0.0.1", "service": "1234"},
    "auth_scheme": "none",
    "subject": [],
    "reason": 1,
    "path": "/disk",
    "type": 1,
    "status": 0,
    "old_src_path": None,
    "new_src_path": "/new",
    "actual": 1024,
    "disk": "vda",
    "params": {"cputune.vcpupin0": "0-1"},
    "state": 1,
    "iteration": 3,
    "uri": "http://example",
    "dev": "vda",
    "threshold": 1,
    "excess": 2,
    "recipient": 0,
    "flags": 0,
    "alias": "dimm0",
    "size": 4096,
}
LIBVIRT = [name for name, (number, _) in MANAGER_KINDS.items() if 0 <= number < 100]


def sample(kind: str) -> dict[str, object]:
    fields = {name: SAMPLES[name] for name in MANAGER_KINDS[kind][1]}
    if kind == "io-error-reason":
        fields["reason"] = "enospc"
    return fields


@pytest.mark.parametrize("kind", LIBVIRT)
async def test_every_kind_reaches_a_callback(kind: str) -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        number = MANAGER_KINDS[kind][0]
        (callback,) = await client.call("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", number, None)
        manager.emit(manager.all[0], kind, **sample(kind))
        event = await client.event()
        assert remote()[event.procedure].name == KINDS[number].name
        body = event.decode()
        assert body.callbackID == callback
        assert "m0" in repr(body)
        await client.call("CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY", callback)
        manager.emit(manager.all[0], kind, **sample(kind))
        await client.call("CONNECT_GET_TYPE")
        assert client.events.empty()


@pytest.mark.parametrize("kind", [kind for kind in LIBVIRT if KINDS[MANAGER_KINDS[kind][0]].legacy])
async def test_older_clients_get_events_without_callback_ids(kind: str) -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        number = MANAGER_KINDS[kind][0]
        await client.call("CONNECT_DOMAIN_EVENT_REGISTER_ANY", number)
        manager.emit(manager.all[0], kind, **sample(kind))
        event = await client.event()
        assert remote()[event.procedure].name == KINDS[number].legacy
        assert event.decode().dom.name == "m0"
        await client.call("CONNECT_DOMAIN_EVENT_DEREGISTER_ANY", number)
        with pytest.raises(KvikError):
            await client.call("CONNECT_DOMAIN_EVENT_DEREGISTER_ANY", number)


async def test_the_oldest_registration_is_for_the_life_cycle() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        await client.call("CONNECT_DOMAIN_EVENT_REGISTER")
        manager.emit(manager.all[0], "lifecycle", event=2, detail=0)
        assert (await client.event()).decode()[1:] == (2, 0)
        await client.call("CONNECT_DOMAIN_EVENT_DEREGISTER")


async def test_a_callback_for_one_machine_hears_of_that_one_only() -> None:
    manager = FakeManager(2)
    async with running(manager) as daemon:
        client = await daemon.client()
        domain = (await client.call("DOMAIN_LOOKUP_BY_NAME", "m1"))[0]
        await client.call("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 1, domain)
        manager.emit(manager.all[0], "reboot")
        manager.emit(manager.all[1], "reboot")
        assert (await client.event()).decode().msg.dom.name == "m1"
        assert client.events.empty()


async def test_a_define_is_told_to_all_who_listen_before_its_own_answer() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        watchers = [await daemon.client() for _ in range(3)]
        for watcher in watchers:
            await watcher.call("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 0, None)
        await watchers[0].call("DOMAIN_DEFINE_XML", "new")
        assert not watchers[0].events.empty()
        for watcher in watchers:
            assert (await watcher.event()).decode().msg.dom.name == "new"


@pytest.mark.parametrize("number", [-1, 27, 99, 101])
async def test_an_unknown_event_is_refused(number: int) -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        for name, *values in (
            ("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", number, None),
            ("CONNECT_DOMAIN_EVENT_REGISTER_ANY", number),
            ("CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY", number),
        ):
            with pytest.raises(KvikError):
                await client.call(name, *values)


async def test_one_clients_callback_is_not_anothers() -> None:
    async with running(FakeManager()) as daemon:
        first, second = await daemon.client(), await daemon.client()
        (callback,) = await first.call("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 0, None)
        with pytest.raises(KvikError):
            await second.call("CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY", callback)


async def test_a_client_that_takes_no_events_is_cut_and_the_others_are_not() -> None:
    from kvik.daemon.server import Limits

    manager = FakeManager()
    async with running(manager, limits=Limits(output=1_000_000)) as daemon:
        good = await daemon.client()
        deaf = await daemon.client()
        await good.call("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 0, None)
        await deaf.call("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 1, None)
        connection = max(daemon.server.connections, key=lambda connection: connection.number)
        deaf.task.cancel()  # it reads no more
        await asyncio.sleep(0)
        for _ in range(30_000):
            manager.emit(manager.all[0], "reboot")
        assert connection.transport.closed
        manager.emit(manager.all[0], "lifecycle", event=2, detail=0)
        assert (await good.event()).decode().msg.event == 2


async def test_events_of_things_that_do_not_exist_can_be_asked_for() -> None:
    async with running(FakeManager()) as daemon:
        client = await daemon.client()
        for what in ("NETWORK", "STORAGE_POOL", "NODE_DEVICE", "SECRET"):
            (callback,) = await client.call(f"CONNECT_{what}_EVENT_REGISTER_ANY", 0, None)
            await client.call(f"CONNECT_{what}_EVENT_DEREGISTER_ANY", callback)
            with pytest.raises(KvikError):
                await client.call(f"CONNECT_{what}_EVENT_DEREGISTER_ANY", callback)


async def test_stages_reach_our_own_clients() -> None:
    manager = FakeManager()
    async with running(manager) as daemon:
        client = await daemon.client()
        await client.call("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 100, None)
        manager.emit(manager.all[0], "stage", stage="agent", seconds=1.5, state="done")
        body = (await client.event()).decode()
        assert tuple(body.stage) == ("agent", 1.5, 1, "")
