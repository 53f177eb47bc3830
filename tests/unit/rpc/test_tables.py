"""The generated tables: up to date, complete, and right where the numbers are well known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvik.errors import NoSupport
from kvik.rpc.program import admin, kvik, lxc, program, qemu, remote

ROOT = Path(__file__).resolve().parents[3]


def test_generated_files_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/generate-protocol", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1, "CONNECT_OPEN"),
        (16, "DOMAIN_GET_INFO"),
        (23, "DOMAIN_LOOKUP_BY_NAME"),
        (66, "AUTH_LIST"),
        (201, "DOMAIN_OPEN_CONSOLE"),
        (273, "CONNECT_LIST_ALL_DOMAINS"),
        (318, "DOMAIN_EVENT_CALLBACK_LIFECYCLE"),
        (344, "CONNECT_GET_ALL_DOMAIN_STATS"),
    ],
)
def test_well_known_procedures(number: int, name: str) -> None:
    assert remote()[number].name == name
    assert remote()[name] is remote()[number]


def test_programs_are_found_by_number() -> None:
    assert program(0x20008086) is remote()
    assert program(0x20008087) is qemu()
    assert program(0x00068000) is lxc()
    assert program(0x06900690) is admin()
    assert program(0x6B76696B) is kvik()
    assert kvik().number == int.from_bytes(b"kvik")


def test_unknown_ones_say_so_in_the_words_that_clients_look_for() -> None:
    with pytest.raises(NoSupport, match=r"^unknown procedure: 9999"):
        remote()[9999]
    with pytest.raises(NoSupport, match=r"^unknown procedure: NO_SUCH"):
        remote()["NO_SUCH"]
    with pytest.raises(NoSupport, match=r"^unknown program"):
        program(0x12345678)
    assert 1 in remote()
    assert 9999 not in remote()


def test_flags() -> None:
    assert remote()["DOMAIN_OPEN_CONSOLE"].stream == "read"
    assert remote()["STORAGE_VOL_UPLOAD"].stream == "write"
    assert remote()["DOMAIN_IS_ACTIVE"].high_priority
    assert not remote()["DOMAIN_CREATE"].high_priority
    assert remote()["DOMAIN_EVENT_CALLBACK_REBOOT"].event
    assert sum(one.event for one in remote()) == 53


def test_limits_are_libvirts() -> None:
    assert "domain<16384>" in remote()["CONNECT_LIST_ALL_DOMAINS"].result._text
    assert remote()["DOMAIN_SEND_KEY"].args._text.split()[3] == "keycodes:uint<16>"
    assert remote()["NODE_GET_INFO"].result._text.startswith("model:char[32] memory:uhyper")
