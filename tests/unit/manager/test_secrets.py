"""Secrets on disk and in memory: what is kept where, what a kill leaves, and who gets a value."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import AlreadyExists, ConfigError, InvalidArgument, InvalidSecret, KvikError, NoSecret
from kvik.host.secret_file import memory_file
from kvik.manager.certificates import lend_client
from kvik.manager.secrets import DEFINED, UNDEFINED, VALUE_CHANGED, VALUE_LIMIT, Secrets
from kvik.manager.store import Store
from kvik.paths import Paths

UUID = "55806c7d-8e93-456f-829b-607d8c198367"
OTHER = "55806c7d-8e93-456f-829b-607d8c198368"


def document(usage: str = "<usage type='volume'><volume>/v</volume></usage>", uuid: str = UUID, flags: str = "") -> str:
    return f"<secret {flags}><uuid>{uuid}</uuid>{usage}</secret>"


@contextlib.asynccontextmanager
async def opened(root: Path) -> AsyncIterator[Secrets]:
    paths = Paths.system(root)
    store = Store(paths)
    secrets = Secrets(paths, store)
    try:
        await secrets.open()
        yield secrets
    finally:
        store.close()


async def test_a_key_that_a_killed_daemon_had_lent_to_a_vmm_is_gone(tmp_path: Path) -> None:
    certificates, run = Paths.system(tmp_path).certificates, Paths.system(tmp_path).run
    certificates.mkdir(parents=True)
    run.mkdir(parents=True)
    for name in ("ca-cert.pem", "client-key.pem"):
        (certificates / name).write_text("PEM")
    lend_client(certificates, run, "vda", contextlib.ExitStack())
    (left,) = run.iterdir()
    assert (left / "client-key.pem").stat().st_mode & 0o77 == 0 and left.stat().st_mode & 0o77 == 0
    async with opened(tmp_path):
        assert not left.exists()


async def test_a_secret_and_its_value_outlive_the_daemon_in_private_files(tmp_path: Path) -> None:
    async with opened(tmp_path) as secrets:
        secret = await secrets.define(document(flags="private='yes'"))
        await secrets.set_value(secret, b"open sesame")
        places = sorted(secrets.directory.iterdir())
        assert [place.name for place in places] == [f"{UUID}.base64", f"{UUID}.xml"]
        assert {stat.S_IMODE(place.stat().st_mode) for place in places} == {0o600}
        assert stat.S_IMODE(secrets.directory.stat().st_mode) == 0o700
        assert b"sesame" not in places[1].read_bytes()
    async with opened(tmp_path) as secrets:
        assert secrets.value("volume", usage="/v") == secrets.value("volume", uuid=UUID) == b"open sesame"
        with pytest.raises(InvalidSecret, match="private"):
            secrets.shown_value(secrets.lookup_uuid(UUID))
        assert secrets.lookup_uuid(UUID.upper().replace("-", "")).uuid == UUID
        for nobody in (b"short", "nope", ""):
            with pytest.raises(NoSecret):
                secrets.lookup_uuid(nobody)
        await secrets.undefine(secrets.lookup_uuid(UUID))
        assert not list(secrets.directory.iterdir())
    async with opened(tmp_path) as secrets:
        assert secrets.list() == []


async def test_an_ephemeral_one_is_never_on_disk_and_ends_with_the_daemon(tmp_path: Path) -> None:
    async with opened(tmp_path) as secrets:
        secret = await secrets.define(document(flags="ephemeral='yes'"))
        await secrets.set_value(secret, b"x")
        assert secrets.value("volume", uuid=UUID) == b"x"
        assert not list(secrets.directory.iterdir())
        # Made lasting, its value is kept; made ephemeral again, nothing of it is left.
        lasting = await secrets.define(document())
        assert len(list(secrets.directory.iterdir())) == 2 and secrets.shown_value(lasting) == b"x"
        await secrets.define(document(flags="ephemeral='yes'"))
        assert not list(secrets.directory.iterdir())
        assert secrets.value("volume", uuid=UUID) == b"x"
    async with opened(tmp_path) as secrets:
        with pytest.raises(NoSecret):
            secrets.lookup_uuid(UUID)


async def test_a_secret_serves_only_what_it_is_for(tmp_path: Path) -> None:
    async with opened(tmp_path) as secrets:
        await secrets.set_value(await secrets.define(document()), b"v")
        await secrets.set_value(await secrets.define(document("", OTHER)), b"any")
        with pytest.raises(InvalidSecret, match="is of type 'volume', expected 'ceph'"):
            secrets.value("ceph", uuid=UUID)
        assert secrets.value("ceph", uuid=OTHER) == b"any"  # it is for nothing in particular
        with pytest.raises(NoSecret, match="no secret with matching usage '/v' of type iscsi"):
            secrets.value("iscsi", usage="/v")
        with pytest.raises(NoSecret, match="no secret with matching usage ''"):
            secrets.value("volume")
        await secrets.define(document("<usage type='tls'><name>n</name></usage>", OTHER[:-1] + "9"))
        with pytest.raises(NoSecret, match=r"does not have a value; kvik secret-set-value"):
            secrets.value("tls", usage="n")


async def test_what_cannot_be_defined_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as secrets:
        secret = await secrets.define(document(flags="private='yes'"))
        for xml, why in (
            (document(uuid=OTHER), f"a secret with UUID {UUID} already defined for use with /v"),
            (document("<usage type='ceph'><name>n</name></usage>"), "is already defined for use with /v"),
            (document(), "cannot change private flag"),
        ):
            with pytest.raises((AlreadyExists, InvalidArgument), match=why):
                await secrets.define(xml)
        assert [one.uuid for one in secrets.list()] == [UUID] and secrets.list()[0].private
        with pytest.raises(InvalidArgument, match="at most 65536 bytes"):
            await secrets.set_value(secret, bytes(VALUE_LIMIT + 1))
        await secrets.undefine(secret)
        for work in (secrets.undefine(secret), secrets.set_value(secret, b"x")):
            with pytest.raises(NoSecret):
                await work


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        ("<secrets/>", "expecting root element of 'secret', not 'secrets'"),
        ("<secret ephemeral='x'/>", "ephemeral"),
        ("<secret><usage type='bogus'/></secret>", "bogus"),
        ("<secret><usage type='volume'/></secret>", "usage 'volume' needs a <volume>"),
        ("<secret><usage type='iscsi'><name>n</name></usage></secret>", "usage 'iscsi' has no <name>"),
        ("<secret><usage/></secret>", "type"),
        ("<secret><uuid>zz</uuid></secret>", "zz"),
        (f"<secret><usage type='tls'><name>{'n' * 4097}</name></usage></secret>", "4096 bytes"),
        ("<secret><value>x</value></secret>", "value"),
    ],
)
async def test_a_bad_document_is_refused(tmp_path: Path, xml: str, why: str) -> None:
    async with opened(tmp_path) as secrets:
        with pytest.raises(ConfigError, match=why):
            await secrets.define(xml)
        assert secrets.list() == [] and not list(secrets.directory.iterdir())


async def test_damaged_files_are_set_aside_with_a_warning(tmp_path: Path) -> None:
    async with opened(tmp_path) as secrets:
        await secrets.set_value(await secrets.define(document()), b"x")
        (secrets.directory / f"{UUID}.base64").write_bytes(b"!!")
        (secrets.directory / f"{OTHER}.xml").write_text(document())
    async with opened(tmp_path) as secrets:
        assert len(secrets.warnings) == 2 and all("corrupt-0" in warning for warning in secrets.warnings)
        with pytest.raises(NoSecret, match="does not have a value"):
            secrets.value("volume", uuid=UUID)


async def test_events_tell_what_became_of_secrets(tmp_path: Path) -> None:
    told: list[int] = []
    async with opened(tmp_path) as secrets:
        stop = secrets.subscribe(lambda secret, event: told.append(event))
        secret = await secrets.define(document())
        await secrets.set_value(secret, b"x")
        await secrets.undefine(secret)
        stop()
        await secrets.define(document())
    assert told == [DEFINED, VALUE_CHANGED, UNDEFINED]


class Killed(BaseException):
    pass


async def test_killed_at_any_step_the_next_daemon_finds_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation on files in turn is the last one of a daemon."""
    step = 0
    while True:
        root, left, ended = tmp_path / str(step), step, True

        def counted(real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left, ended
                if left == 0:
                    ended = False
                    raise Killed
                left -= 1
                return real(*args, **kwargs)

            return call

        done = "nothing"
        async with opened(root) as secrets:
            with monkeypatch.context() as patch:
                for name in ("write", "fsync", "rename", "unlink"):
                    patch.setattr(os, name, counted(getattr(os, name)))
                with contextlib.suppress(Killed):
                    secret = await secrets.define(document())
                    done = "defined"
                    await secrets.set_value(secret, b"old")
                    done = "old"
                    await secrets.set_value(secret, b"new")
                    done = "new"
                    await secrets.undefine(secret)
                    done = "gone"
        async with opened(root) as after:
            assert after.warnings == []
            found = [one.uuid for one in after.list()]
            value = None
            with contextlib.suppress(KvikError):
                value = after.value("volume", uuid=UUID)
            assert (found, value) in {
                "nothing": [([], None), ([UUID], None)],
                "defined": [([UUID], None), ([UUID], b"old")],
                "old": [([UUID], b"old"), ([UUID], b"new")],
                "new": [([UUID], b"new"), ([UUID], None), ([], None)],
                "gone": [([], None)],
            }[done], (step, done)
        if ended:
            break
        step += 1
    assert step > 10


def test_a_value_is_handed_on_in_memory_only() -> None:
    fd = memory_file(b"open sesame")
    try:
        assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
        assert os.read(fd, 100) == b"open sesame"
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
