"""Post-copy between two machines on this host's KVM, with a guest that writes more than the connection carries."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from state_guest import BIG_WRITER, ERRORS, PATTERN, Guest, awaiting, booted
from test_state_migration import children, until

from kvik.errors import KvikError, OperationInvalid
from kvik.vmm.layout import MIB
from kvik.vmm.state.migration import migration_of
from kvik.vmm.state.outgoing import Outgoing
from kvik.vmm.state.postcopy import Ability

pytestmark = pytest.mark.functional

SLOW = 8 * MIB  # bytes a second: the guest writes 16 MiB again and again in a fraction of one


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    ability = Ability()
    if ability.uffd is None:
        pytest.skip(str(ability._error))
    ability.close()


def status(guest: Guest) -> str:
    return str(migration_of(guest.machine).report().get("status"))


def checks_out(guest: Guest) -> None:
    """It goes on, finds all it wrote, and is still checked by what it writes now."""
    before = guest.counter()
    until(lambda: guest.counter() > before + 3, guest)
    assert guest.machine.memory.u32(ERRORS) == 0
    assert guest.machine.memory.read(PATTERN, 6 * MIB) == random.Random(7).randbytes(6 * MIB)


def begin(source: Guest, there: Guest, uri: str, channels: int = 1, **parameters: int) -> Outgoing:
    """Pre-copy goes on and would not end."""
    source.machine.memory.write(PATTERN, random.Random(7).randbytes(6 * MIB))
    until(lambda: source.counter() > 3, source)
    migration = migration_of(source.machine)
    for guest in (source, there):
        migration_of(guest.machine).set_capability("postcopy-ram", True)
    migration.set_capability("multifd", channels > 1)
    values = {"max-bandwidth": SLOW, "downtime-limit": 1, "multifd-channels": channels}
    migration.set_parameters(values | {name.replace("_", "-"): value for name, value in parameters.items()})
    outgoing = migration.start(uri)
    until(lambda: migration.report()["ram"]["transferred"] > MIB, source, there)
    return outgoing


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_a_guest_that_writes_more_than_the_connection_carries_moves_at_once(
    tmp_path: Path, channels: int, shared: bool
) -> None:
    before = children()
    uri = f"unix:{tmp_path}/there"
    with (
        booted(tmp_path, code=BIG_WRITER) as source,
        awaiting(tmp_path, uri, code=BIG_WRITER, shared=shared) as there,
    ):
        begin(source, there, uri, channels)
        migration_of(source.machine).start_postcopy()
        until(lambda: status(source) == "completed" and status(there) == "completed", source, there)
        report = migration_of(source.machine).report()
        assert source.machine.status == "postmigrate" and there.machine.status == "running"
        checks_out(there)
        ram = report["ram"]
        assert ram["postcopy-requests"] > 0  # it ran before its memory was there
        assert ram["postcopy-bytes"] >= 4 * MIB and ram["remaining"] == 0
        assert report["total-time"] > report["downtime"] >= 0
        assert there.machine.memory.arrival is None
        assert not (tmp_path / "there").exists()
        with pytest.raises(OperationInvalid, match="it runs at the destination"):
            source.machine.resume()
    assert children() <= before


def slowly(source: Guest, there: Guest, uri: str, channels: int = 1) -> Outgoing:
    """In post-copy, and long not through: little is sent but what is asked for."""
    outgoing = begin(source, there, uri, channels, max_postcopy_bandwidth=64 * 1024)
    migration_of(source.machine).start_postcopy()
    until(lambda: status(source) == "postcopy-active" and status(there) == "postcopy-active", source, there)
    return outgoing


def cut(kind: str, outgoing: Outgoing, there: Guest) -> None:
    postcopy = there.machine.migration.incoming.postcopy  # type: ignore[union-attr]
    assert postcopy is not None and postcopy._pager is not None
    if kind == "sender":
        os.kill(outgoing._senders[0][0], signal.SIGKILL)
    elif kind == "pager":
        os.kill(postcopy._pager[0], signal.SIGKILL)
    else:
        migration_of(outgoing.machine).pause_postcopy()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["sender", "pager", "request"])
def test_a_connection_that_is_lost_pauses_the_guest_and_can_be_made_anew(
    tmp_path: Path, kind: str, channels: int
) -> None:
    before = children()
    uri = f"unix:{tmp_path}/there"
    with booted(tmp_path, code=BIG_WRITER) as source, awaiting(tmp_path, uri, code=BIG_WRITER) as there:
        outgoing = slowly(source, there, uri, channels)
        cut(kind, outgoing, there)
        until(lambda: status(source) == status(there) == "postcopy-paused", source, there)
        report = migration_of(there.machine).report()
        assert report["error-desc"] and report["ram"]["remaining"] > 0
        assert there.machine.status == "paused" and source.machine.status == "postmigrate"
        for guest, why in ((source, "runs at the destination"), (there, "still at the source")):
            with pytest.raises(OperationInvalid, match=why):
                guest.machine.resume()
        with pytest.raises(OperationInvalid, match="cannot be cancelled"):
            migration_of(source.machine).cancel()
        with pytest.raises(KvikError, match="still arriving"):
            there.machine.save(str(tmp_path / "saved"))
        migration_of(source.machine).set_parameters({"max-postcopy-bandwidth": 0})
        migration_of(source.machine).resume(uri)
        until(lambda: status(source) == status(there) == "completed", source, there)
        assert there.machine.status == "running" and "error-desc" not in migration_of(there.machine).report()
        checks_out(there)
    assert children() <= before
