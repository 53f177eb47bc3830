"""The calls about network filters: what a client gets to hear of them, and what it may do."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemon_harness import running
from fake_manager import FakeManager

from kvik.errors import ConfigError, InvalidArgument, KvikError, NoFilter, NoFilterBinding, OperationInvalid
from kvik.network.filters.filters import Filters
from kvik.paths import Paths

XML = "<filter name='mail'><rule action='drop' direction='out'><tcp dstportstart='25'/></rule></filter>"


class Manager(FakeManager):
    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.filters = Filters(Paths.system(directory))
        self.filters.open()


async def test_the_built_in_ones_are_listed_and_found(tmp_path: Path) -> None:
    async with running(Manager(tmp_path)) as daemon:
        client = await daemon.client()
        (count,) = await client.call("CONNECT_NUM_OF_NWFILTERS")
        names = (await client.call("CONNECT_LIST_NWFILTERS", 100))[0]
        listed, number = await client.call("CONNECT_LIST_ALL_NWFILTERS", 1, 0)
        assert len(names) == len(listed) == count == number >= 24
        assert {"clean-traffic", "no-mac-spoofing", "no-ip-spoofing", "no-arp-spoofing", "allow-dhcp"} <= set(names)
        assert tuple(await client.call("CONNECT_LIST_ALL_NWFILTERS", 0, 0)) == ([], count)
        (clean,) = await client.call("NWFILTER_LOOKUP_BY_NAME", "clean-traffic")
        assert (await client.call("NWFILTER_LOOKUP_BY_UUID", clean[1]))[0] == clean
        assert "<filterref filter='no-mac-spoofing'/>" in (await client.call("NWFILTER_GET_XML_DESC", clean, 0))[0]
        with pytest.raises(OperationInvalid, match="built in"):
            await client.call("NWFILTER_UNDEFINE", clean)


async def test_one_is_defined_replaced_and_undefined(tmp_path: Path) -> None:
    async with running(Manager(tmp_path)) as daemon:
        client = await daemon.client()
        (made,) = await client.call("NWFILTER_DEFINE_XML", XML)
        (again,) = await client.call("NWFILTER_DEFINE_XML_FLAGS", XML.replace("25", "26"), 1)
        assert again == made, "without a UUID the document means the filter of its name"
        assert "dstportstart='26'" in (await client.call("NWFILTER_GET_XML_DESC", made, 0))[0]
        other = XML.replace("<rule", "<uuid>12345678-1234-4234-8234-123456789abc</uuid><rule")
        with pytest.raises(KvikError, match="already exists with uuid"):
            await client.call("NWFILTER_DEFINE_XML", other)
        with pytest.raises(ConfigError, match="loop: mail -> mail"):
            await client.call("NWFILTER_DEFINE_XML", "<filter name='mail'><filterref filter='mail'/></filter>")
        reopened = Filters(Paths.system(tmp_path))
        reopened.open()
        assert reopened.lookup_name("mail").uuid == str(daemon.server.manager.filters.lookup_name("mail").uuid)
        await client.call("NWFILTER_UNDEFINE", made)
        with pytest.raises(NoFilter) as raised:
            await client.call("NWFILTER_LOOKUP_BY_NAME", "mail")
        assert (raised.value.code, raised.value.domain) == (62, 33)
        assert not list((tmp_path / "etc/kvik/nwfilter").iterdir())


async def test_a_built_in_one_can_be_replaced_and_comes_back(tmp_path: Path) -> None:
    async with running(Manager(tmp_path)) as daemon:
        client = await daemon.client()
        (clean,) = await client.call("NWFILTER_LOOKUP_BY_NAME", "clean-traffic")
        (own,) = await client.call("NWFILTER_DEFINE_XML", XML.replace("mail", "clean-traffic"))
        assert own == clean
        assert "dstportstart" in (await client.call("NWFILTER_GET_XML_DESC", clean, 0))[0]
        await client.call("NWFILTER_UNDEFINE", clean)
        assert "dstportstart" not in (await client.call("NWFILTER_GET_XML_DESC", clean, 0))[0]


async def test_bindings_that_are_not_there_are_said_to_be_so(tmp_path: Path) -> None:
    async with running(Manager(tmp_path)) as daemon:
        client = await daemon.client()
        assert tuple(await client.call("CONNECT_LIST_ALL_NWFILTER_BINDINGS", 1, 0)) == ([], 0)
        for call, args in (
            ("NWFILTER_BINDING_LOOKUP_BY_PORT_DEV", ("vnet9",)),
            ("NWFILTER_BINDING_GET_XML_DESC", (("vnet9", "mail"), 0)),
            ("NWFILTER_BINDING_DELETE", (("vnet9", "mail"),)),
        ):
            with pytest.raises(NoFilterBinding) as raised:
                await client.call(call, *args)
            assert (raised.value.code, raised.value.domain) == (101, 33)


async def test_unknown_flags_are_refused_and_readers_only_look(tmp_path: Path) -> None:
    async with running(Manager(tmp_path)) as daemon:
        client = await daemon.client()
        (made,) = await client.call("NWFILTER_DEFINE_XML", XML)
        for call, args in (
            ("CONNECT_LIST_ALL_NWFILTERS", (1, 8)),
            ("CONNECT_LIST_ALL_NWFILTER_BINDINGS", (1, 8)),
            ("NWFILTER_DEFINE_XML_FLAGS", (XML, 8)),
            ("NWFILTER_GET_XML_DESC", (made, 8)),
            ("NWFILTER_BINDING_CREATE_XML", ("<filterbinding/>", 8)),
            ("CONNECT_LIST_NWFILTERS", (-1,)),
        ):
            with pytest.raises(InvalidArgument):
                await client.call(call, *args)
        reader = await daemon.client(flags=1)
        await reader.call("NWFILTER_GET_XML_DESC", made, 0)
        for call, args in (
            ("NWFILTER_DEFINE_XML", (XML,)),
            ("NWFILTER_UNDEFINE", (made,)),
            ("NWFILTER_BINDING_CREATE_XML", ("<filterbinding/>", 0)),
            ("NWFILTER_BINDING_DELETE", (("vnet9", "mail"),)),
        ):
            with pytest.raises(KvikError) as raised:
                await reader.call(call, *args)
            assert raised.value.code == 29
