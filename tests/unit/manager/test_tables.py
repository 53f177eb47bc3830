"""Logs, key codes, and the tables of the life cycle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvik.conf.enums import DomainState
from kvik.errors import InvalidArgument, OperationInvalid, OperationUnsupported
from kvik.manager import keycodes
from kvik.manager.events import KINDS, DomainRef, EventHub
from kvik.manager.keycodes import to_linux
from kvik.manager.log import KEPT, MachineLog
from kvik.manager.states import TRANSITIONS, Trigger, advance


def test_a_log_is_rotated_under_a_vmm_that_keeps_its_descriptor(tmp_path: Path) -> None:
    log = MachineLog(tmp_path, "a", limit=1000)
    fd = log.open()
    for turn in range(KEPT + 3):
        os.write(fd, f"turn {turn}\n".encode() + b"x" * 1500)
        assert log.rotate()
    os.write(fd, b"after\n")
    os.close(fd)
    assert log.tail() == "after\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "a.log.1", "a.log.2", "a.log.3"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_a_small_log_is_left_alone_and_notes_never_fail(tmp_path: Path) -> None:
    log = MachineLog(tmp_path / "deep", "a")
    log.note("hello\ud800")
    assert not log.rotate() and "hello" in log.tail()
    (tmp_path / "file").write_text("")
    MachineLog(tmp_path / "file", "a").note("nowhere to go")


@pytest.mark.parametrize(
    ("codeset", "codes", "linux"),
    [
        (keycodes.LINUX, [29, 56, 111], [29, 56, 111]),  # Ctrl Alt Delete
        (keycodes.XT, [0x1D, 0x38, 0xE053], [29, 56, 111]),
        (keycodes.QNUM, [0x1D, 0x38, 0xD3], [29, 56, 111]),
        (keycodes.USB, [0xE0, 0xE2, 0x4C], [29, 56, 111]),
        (keycodes.WIN32, [0x11, 0x12, 0x2E], [29, 56, 111]),
        (keycodes.OSX, [0x3B, 0x3A, 0x75], [29, 56, 111]),
        (keycodes.ATSET2, [0x14, 0x11, 0xE071], [29, 56, 111]),
        (keycodes.USB, [0x04, 0x1D, 0x1E, 0x27, 0x28, 0x2C, 0x3A, 0x45], [30, 44, 2, 11, 28, 57, 59, 88]),
        (keycodes.OSX, [0x00, 0x06, 0x12, 0x24, 0x31, 0x7A, 0x7E], [30, 44, 2, 28, 57, 59, 103]),
        (keycodes.WIN32, [0x41, 0x5A, 0x30, 0x70, 0x60], [30, 44, 11, 59, 82]),
    ],
)
def test_key_codes_of_every_set_become_linux(codeset: int, codes: list[int], linux: list[int]) -> None:
    assert to_linux(codeset, codes) == linux


@pytest.mark.parametrize("codeset", [keycodes.XT, keycodes.QNUM, keycodes.USB, keycodes.ATSET2])
def test_a_set_has_every_key_of_a_pc_keyboard_exactly_once(codeset: int) -> None:
    table = keycodes._table(codeset)
    usual = {*range(1, 84), 86, 87, 88, 96, 97, 98, 100, *range(102, 109), 110, 111, 125, 126, 127}
    reachable = list(table.values())
    assert usual <= set(reachable)


@pytest.mark.parametrize(
    ("codeset", "codes"), [(0, [0]), (0, [0x300]), (1, [0xE0FF]), (0, []), (0, [1] * 17), (10, [1]), (-1, [1])]
)
def test_a_key_that_does_not_exist_is_refused(codeset: int, codes: list[int]) -> None:
    with pytest.raises(InvalidArgument):
        to_linux(codeset, codes)


def test_a_set_we_have_no_table_for_is_said_so() -> None:
    with pytest.raises(OperationUnsupported, match="xt_kbd"):
        to_linux(keycodes.XT_KBD, [1])


def test_every_trigger_leads_somewhere_and_the_end_is_always_reachable() -> None:
    assert {trigger for _, trigger in TRANSITIONS} == set(Trigger)
    active = {state for state, _ in TRANSITIONS if state != DomainState.SHUTOFF}
    for state in active:
        for trigger in (Trigger.DESTROYED, Trigger.VMM_DIED):
            assert TRANSITIONS[state, trigger].state == DomainState.SHUTOFF


def test_what_cannot_happen_is_refused_by_the_table() -> None:
    with pytest.raises(OperationInvalid, match="'a' is shut off"):
        advance(DomainState.SHUTOFF, Trigger.RESUMED, "a")


def test_event_numbers_are_libvirts_and_fields_are_checked() -> None:
    numbers = [number for number, _ in KINDS.values()]
    assert numbers[:27] == list(range(27))
    with pytest.raises(TypeError):
        EventHub().emit(DomainRef("a", b"", 1), "lifecycle", event=1)
