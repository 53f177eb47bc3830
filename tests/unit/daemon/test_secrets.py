"""The calls about secrets: who may ask for a value, what is listed, and events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from daemon_harness import running
from fake_manager import FakeManager

from kvik.daemon.errors import OperationDenied
from kvik.errors import InvalidArgument, InvalidSecret, KvikError, NoSecret

UUID = bytes.fromhex("55806c7d8e93456f829b607d8c198367")
XML = "<secret {0}><uuid>55806c7d-8e93-456f-829b-607d8c198367</uuid><usage type='ceph'><name>n</name></usage></secret>"
REFERENCE = (UUID, 2, "n")


@contextlib.asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[tuple[Any, Any]]:
    manager = FakeManager(root=tmp_path)
    await manager.secrets.open()
    async with running(manager) as daemon:
        yield daemon, await daemon.client()


async def test_a_value_goes_only_to_those_who_may_change_things_and_no_private_one(tmp_path: Path) -> None:
    async with serving(tmp_path) as (daemon, client):
        assert tuple((await client.call("SECRET_DEFINE_XML", XML.format(""), 0))[0]) == REFERENCE
        await client.call("SECRET_SET_VALUE", REFERENCE, b"sesame", 0)
        assert (await client.call("SECRET_GET_VALUE", REFERENCE, 0))[0] == b"sesame"
        reader = await daemon.client(flags=1)
        assert tuple((await reader.call("SECRET_LOOKUP_BY_UUID", UUID))[0]) == REFERENCE
        assert tuple((await reader.call("SECRET_LOOKUP_BY_USAGE", 2, "n"))[0]) == REFERENCE
        assert "sesame" not in (await reader.call("SECRET_GET_XML_DESC", REFERENCE, 0))[0]
        for procedure, *values in (
            ("SECRET_GET_VALUE", REFERENCE, 0),
            ("SECRET_SET_VALUE", REFERENCE, b"x", 0),
            ("SECRET_DEFINE_XML", XML.format(""), 0),
            ("SECRET_UNDEFINE", REFERENCE),
        ):
            with pytest.raises(KvikError) as denied:
                await reader.call(procedure, *values)
            assert denied.value.code == OperationDenied.code
        await client.call("SECRET_DEFINE_XML", XML.format("private='yes'"), 0)
        with pytest.raises(InvalidSecret, match="secret is private"):
            await client.call("SECRET_GET_VALUE", REFERENCE, 0)


async def test_secrets_are_listed_as_asked(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        await client.call("SECRET_DEFINE_XML", XML.format("private='yes'"), 0)
        await client.call("SECRET_DEFINE_XML", "<secret ephemeral='yes'/>", 0)
        assert (await client.call("CONNECT_NUM_OF_SECRETS"))[0] == 2
        assert len((await client.call("CONNECT_LIST_SECRETS", 1))[0]) == 1
        assert (await client.call("CONNECT_LIST_ALL_SECRETS", 0, 0)) == ([], 2)
        for flags, count in ((1, 1), (2, 1), (3, 2), (4, 1), (8, 1), (5, 0), (6, 1), (15, 2)):
            assert (await client.call("CONNECT_LIST_ALL_SECRETS", 1, flags))[1] == count, flags
        for procedure, *values in (
            ("CONNECT_LIST_ALL_SECRETS", 1, 16),
            ("CONNECT_LIST_SECRETS", -1),
            ("SECRET_GET_VALUE", REFERENCE, 1),
            ("SECRET_LOOKUP_BY_USAGE", 77, "n"),
        ):
            with pytest.raises(InvalidArgument):
                await client.call(procedure, *values)
        with pytest.raises(NoSecret):
            await client.call("SECRET_LOOKUP_BY_UUID", bytes(16))


async def test_events_of_one_secret_or_of_all(tmp_path: Path) -> None:
    async with serving(tmp_path) as (daemon, client):
        (callback,) = await client.call("CONNECT_SECRET_EVENT_REGISTER_ANY", 0, None)
        await client.call("SECRET_DEFINE_XML", XML.format(""), 0)
        body = (await client.event()).decode()
        assert (body.callbackID, tuple(body.secret), body.event, body.detail) == (callback, REFERENCE, 0, 0)
        (value,) = await client.call("CONNECT_SECRET_EVENT_REGISTER_ANY", 1, REFERENCE)
        await client.call("SECRET_DEFINE_XML", "<secret><uuid>" + str(UUID.hex()[:-1]) + "0</uuid></secret>", 0)
        other = (UUID[:-1] + b"\x60", 0, "")
        assert tuple((await client.event()).decode().secret) == other
        await client.call("SECRET_SET_VALUE", other, b"x", 0)
        await client.call("SECRET_SET_VALUE", REFERENCE, b"x", 0)
        body = (await client.event()).decode()
        assert (body.callbackID, tuple(body.secret)) == (value, REFERENCE)
        await client.call("SECRET_UNDEFINE", REFERENCE)
        assert (await client.event()).decode().event == 1
        await client.call("CONNECT_SECRET_EVENT_DEREGISTER_ANY", callback)
        with pytest.raises(InvalidArgument):
            await client.call("CONNECT_SECRET_EVENT_DEREGISTER_ANY", callback)
        with pytest.raises(InvalidArgument):
            await client.call("CONNECT_SECRET_EVENT_REGISTER_ANY", 2, None)
        await client.close()
        assert daemon.server.secret_events.count == 0
