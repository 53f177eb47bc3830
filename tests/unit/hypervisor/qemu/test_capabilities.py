"""Capabilities come from the binary once, then from a cache that is never believed blindly."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import msgspec
import pytest

from kvik.errors import ConfigUnsupported, HypervisorError
from kvik.hypervisor.firmware import find_firmware, installed_firmware
from kvik.hypervisor.qemu import capabilities as module
from kvik.hypervisor.qemu.capabilities import QemuCapabilities, QemuProber, identity_of

sys.path.insert(0, str(Path(__file__).parent))
from golden import capabilities


@pytest.fixture
def binary(tmp_path: Path) -> str:
    path = tmp_path / "qemu-system-x86_64"
    path.write_text("#!/bin/sh\necho 'I am no QEMU' >&2\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    async def probe(name: str, identity: tuple[int, ...], home: Path) -> QemuCapabilities:
        asked.append(name)
        return msgspec.structs.replace(capabilities(), binary=name, identity=identity)

    monkeypatch.setattr(module, "probe", probe)
    return asked


async def test_a_binary_is_asked_once(binary: str, probes: list[str], tmp_path: Path) -> None:
    prober = QemuProber(tmp_path / "cache")
    first = await prober.capabilities(binary)
    assert await prober.capabilities(binary) is first
    again = await QemuProber(tmp_path / "cache").capabilities(binary)
    assert again == first
    assert probes == [binary]
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


async def test_many_callers_at_once_ask_one_qemu(
    binary: str, probes: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = module.probe

    async def slowly(name: str, identity: tuple[int, ...], home: Path) -> QemuCapabilities:
        await asyncio.sleep(0.01)
        return await answer(name, identity, home)

    monkeypatch.setattr(module, "probe", slowly)
    prober = QemuProber(tmp_path / "cache")
    await asyncio.gather(*(prober.capabilities(binary) for _ in range(20)))
    assert probes == [binary]


async def test_another_binary_under_the_same_path_is_asked_again(
    binary: str, probes: list[str], tmp_path: Path
) -> None:
    prober = QemuProber(tmp_path / "cache")
    await prober.capabilities(binary)
    os.utime(binary, ns=(1, 1))
    assert (await prober.capabilities(binary)).identity == identity_of(binary)
    assert probes == [binary, binary]


@pytest.mark.parametrize("damage", ["", "garbage", "{}", "null", "[1]"])
async def test_a_damaged_cache_is_probed_anew(binary: str, probes: list[str], tmp_path: Path, damage: str) -> None:
    await QemuProber(tmp_path / "cache").capabilities(binary)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(damage)
    await QemuProber(tmp_path / "cache").capabilities(binary)
    assert probes == [binary, binary]


async def test_a_cache_of_another_identity_or_type_is_not_believed(
    binary: str, probes: list[str], tmp_path: Path
) -> None:
    await QemuProber(tmp_path / "cache").capabilities(binary)
    (file,) = (tmp_path / "cache").iterdir()
    body = json.loads(file.read_text())
    for change in ({"identity": [1, 2, 3, 4]}, {"format": 0}, {"devices": 5}, {"binary": "/other"}):
        file.write_text(json.dumps(body | change))
        await QemuProber(tmp_path / "cache").capabilities(binary)
    assert len(probes) == 5


async def test_a_cache_that_cannot_be_written_costs_only_time(binary: str, probes: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    await QemuProber(tmp_path / "file" / "cache").capabilities(binary)
    assert probes == [binary]


async def test_an_old_qemu_is_refused(binary: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def probe(name: str, identity: tuple[int, ...], home: Path) -> QemuCapabilities:
        return msgspec.structs.replace(capabilities(), binary=name, identity=identity, version=5_001_000)

    monkeypatch.setattr(module, "probe", probe)
    with pytest.raises(HypervisorError, match=r"QEMU 5\.1\.0, which is too old; install QEMU 6\.2"):
        await QemuProber(tmp_path).capabilities(binary)


async def test_a_missing_binary_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="apt install qemu-system-x86"):
        await QemuProber(tmp_path).capabilities("/nonexistent/qemu-system-x86_64")


async def test_a_program_that_is_no_qemu_is_quoted(binary: str, tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="I am no QEMU"):
        await QemuProber(tmp_path).capabilities(binary)


def test_machine_types_are_found_by_name_and_alias() -> None:
    known = capabilities()
    q35 = known.machine("q35")
    assert q35 is not None
    assert known.machine(q35.name) == q35
    assert known.machine("nonsense") is None


def firmware(place: Path, name: str, **change: object) -> None:
    (place / "code.fd").write_bytes(b"")
    flash = {"filename": str(place / "code.fd"), "format": "raw"}
    body = {
        "interface-types": ["uefi"],
        "mapping": {"device": "flash", "executable": flash, "nvram-template": flash},
        "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
        "features": [],
    }
    (place / name).write_text(json.dumps(body | change))


def test_firmware_is_found_by_its_descriptors(tmp_path: Path) -> None:
    firmware(tmp_path, "50-secure.json", features=["secure-boot"])
    firmware(tmp_path, "60-plain.json")
    (tmp_path / "10-broken.json").write_text("{")
    (tmp_path / "11-odd.json").write_text('{"interface-types": 3}')
    assert len(installed_firmware([tmp_path])) == 2
    assert not find_firmware("x86_64", "pc-q35-7.2", secure=False, directories=[tmp_path]).features
    with pytest.raises(ConfigUnsupported, match="apt install ovmf"):
        find_firmware("x86_64", "microvm", secure=False, directories=[tmp_path])
