"""Defining, finding and forgetting machines."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from manager_bench import UUIDS, Bench, document, until

from kvik.conf.enums import DomainEventType
from kvik.errors import AlreadyExists, ConfigError, ConfigUnsupported, KvikError, NoDomain, OperationInvalid
from kvik.manager.manager import Manager

E = DomainEventType


async def test_a_machine_is_found_by_name_uuid_and_id(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    manager = bench.manager
    assert manager.lookup_name("a") is manager.lookup_uuid(uuid.UUID(UUIDS["a"]).bytes) is manager.lookup_id(1)
    await domain.destroy()
    for look in (
        lambda: manager.lookup_id(1),
        lambda: manager.lookup_name("b"),
        lambda: manager.lookup_uuid(b"x" * 16),
    ):
        with pytest.raises(NoDomain):
            look()


async def test_redefining_keeps_the_object_and_tells_an_update(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    assert await bench.manager.define(document(memory=524288)) is domain
    assert bench.lifecycle() == [(E.DEFINED, 0), (E.DEFINED, 1)]
    assert domain.info().max_mem_kib == 524288


async def test_a_document_without_uuid_never_replaces_a_machine(bench: Bench) -> None:
    first = await bench.manager.define(document("new", uuid=None))
    with pytest.raises(AlreadyExists, match=f"must say <uuid>{first.uuid_text}"):
        await bench.manager.define(document("new", uuid=None, memory=524288))
    assert first.info().max_mem_kib != 524288


async def test_a_name_or_uuid_of_another_machine_is_refused_as_libvirt_does(bench: Bench) -> None:
    await bench.manager.define(document("a"))
    with pytest.raises(AlreadyExists, match="'a' is already defined with UUID"):
        await bench.manager.define(document("b", uuid=UUIDS["a"]))
    with pytest.raises(AlreadyExists, match="already exists with UUID"):
        await bench.manager.define(document("a", uuid=UUIDS["b"]))
    with pytest.raises(AlreadyExists):
        await bench.manager.create_xml(document("b", uuid=UUIDS["a"]))
    assert AlreadyExists.code == 9


async def test_many_definitions_of_one_name_at_once_leave_one_whole(bench: Bench) -> None:
    results = await asyncio.gather(
        *(bench.manager.define(document("a", uuid=str(uuid.uuid4()))) for _ in range(10)), return_exceptions=True
    )
    assert sum(not isinstance(result, Exception) for result in results) == 1
    assert sum(isinstance(result, AlreadyExists) for result in results) == 9
    assert (await bench.reopen()).lookup_name("a")


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<domain",
        "<network/>",
        "<!DOCTYPE domain [<!ENTITY x SYSTEM 'file:///etc/shadow'>]><domain type='test'>&x;</domain>",
        "<domain type='test'>" + "<a>" * 1000 + "</a>" * 1000 + "</domain>",
        document("a/b", uuid=None),
        document("-rf", uuid=None),
        document("x" * 256, uuid=None),
        document(memory=2**64),
        document(vcpus=2**31),
        document(vcpus=0),
    ],
)
async def test_a_bad_document_is_refused_and_leaves_nothing(bench: Bench, xml: str) -> None:
    with pytest.raises(ConfigError):
        await bench.manager.define(xml)
    assert bench.manager.domains() == []
    assert list(bench.paths.domains.glob("*.xml")) == []


async def test_strict_validation_refuses_what_is_not_understood(bench: Bench) -> None:
    xml = document(extra="<frobnicate level='9'/>")
    assert await bench.manager.define(xml)
    with pytest.raises(ConfigUnsupported, match="frobnicate"):
        await bench.manager.define(xml, validate=True)


async def test_a_defined_machine_is_the_same_after_the_daemon_was_away(bench: Bench) -> None:
    domain = await bench.manager.define(document(devices="<interface type='user'/>"))
    text = domain.xml()
    manager = await bench.reopen()
    assert manager.lookup_name("a").xml() == text
    assert (await manager.define(text)).xml() == text, "redefining what was dumped changes nothing"


async def test_a_password_is_shown_to_those_who_may_see_it_only(bench: Bench) -> None:
    domain = await bench.manager.define(document(devices="<graphics type='vnc' passwd='s3cret'/>"))
    await domain.start()
    for flags in (0, 2):
        assert "s3cret" not in domain.xml(flags)
        assert "s3cret" in domain.xml(flags | 1)


async def test_rename_moves_everything_and_tells_both_events(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.set_autostart(True)
    await domain.rename("new")
    assert bench.lifecycle()[1:] == [(E.UNDEFINED, 1), (E.DEFINED, 2)]
    assert domain.definition.name == "new"
    manager = await bench.reopen()
    assert [(domain.name, domain.autostart) for domain in manager.domains()] == [("new", True)]


async def test_a_rename_onto_another_or_of_a_running_machine_is_refused(bench: Bench) -> None:
    domain = await bench.manager.define(document("a"))
    await bench.manager.define(document("b"))
    for name in ("a", "b"):
        with pytest.raises(AlreadyExists):
            await domain.rename(name)
    await domain.start()
    with pytest.raises(OperationInvalid):
        await domain.rename("c")
    assert bench.manager.lookup_name("a") is domain


async def test_a_document_changed_while_running_waits_for_the_next_start(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await bench.manager.define(document(memory=524288))
    assert domain.updated
    assert domain.info().max_mem_kib == 262144 and "524288" in domain.xml(2)
    await domain.destroy()
    assert not domain.updated
    await domain.start()
    assert domain.info().max_mem_kib == 524288


async def test_events_reach_all_subscribers_even_if_one_fails(bench: Bench) -> None:
    def broken(event: object) -> None:
        raise RuntimeError

    got: list[object] = []
    bench.manager.events.subscribe(broken)
    stop = bench.manager.events.subscribe(got.append)
    await bench.manager.define(document("a"))
    stop()
    stop()
    await bench.manager.define(document("b"))
    assert len(got) == 1


async def test_undefine_refuses_to_lose_firmware_variables_unasked(bench: Bench, tmp_path) -> None:
    nvram = tmp_path / "vars.fd"
    nvram.write_bytes(b"vars")
    code = tmp_path / "code.fd"
    code.write_bytes(b"code")
    xml = document().replace(
        "</os>", f"<loader readonly='yes' type='pflash'>{code}</loader><nvram>{nvram}</nvram></os>"
    )
    domain = await bench.manager.define(xml)
    with pytest.raises(OperationInvalid, match=r"vars\.fd"):
        await domain.undefine()
    await domain.undefine(8)
    assert nvram.exists()
    domain = await bench.manager.define(xml)
    await domain.undefine(4)
    assert not nvram.exists()


async def test_a_thousand_definitions_come_back(bench: Bench) -> None:
    for number in range(1000):
        (bench.paths.domains / f"m{number}.xml").write_text(
            (await _completed(bench))
            .replace("<name>a</name>", f"<name>m{number}</name>")
            .replace(UUIDS["a"], str(uuid.UUID(int=number + 1000, version=4)))
        )
    await bench.kill()
    manager = await bench.open()
    assert len(manager.domains()) == 1001
    assert len(await manager.all_stats(manager.domains())) == 1001


async def _completed(bench: Bench) -> str:
    try:
        return bench.manager.lookup_name("a").xml()
    except KvikError:
        return (await bench.manager.define(document("a"))).xml()


async def test_closing_leaves_machines_running(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await bench.manager.close()
    bench.driver.abandon()
    assert "a" in bench.driver.machines
    manager: Manager = await bench.open()
    await until(lambda: manager.lookup_name("a").ready)


@pytest.mark.parametrize(("flags", "keep"), [(0, None), (32, False), (0x40, True)])
async def test_undefine_says_what_becomes_of_the_tpm(bench: Bench, flags: int, keep: bool | None) -> None:
    domain = await bench.manager.define(document())
    await domain.undefine(flags)
    assert bench.driver.forgotten == [("a", keep)]


async def test_the_tpm_of_a_machine_that_runs_is_kept_until_it_ends(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    with pytest.raises(OperationInvalid, match="TPM"):
        await domain.undefine(32 | 0x40)
    await domain.undefine(0x40)
    assert bench.driver.forgotten == []
    await domain.destroy()
    await until(lambda: bench.driver.forgotten)
    assert bench.driver.forgotten == [("a", True)]
