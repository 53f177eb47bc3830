"""What the distribution must provide: told, installed by root, or refused with the command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvik.errors import HostError, MissingPackages
from kvik.guest import packages
from kvik.guest.packages import QEMU, Need, ensure, missing
from kvik.host import process


class Host:
    """A host without QEMU, until apt-get install ran."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, root: bool = True, lists: bool = True
    ) -> None:
        self.present = {"apt-get"}
        self.commands: list[list[str]] = []
        self.said: list[str] = []
        self.fail = 0
        directory = tmp_path / "lists"
        directory.mkdir()
        if lists:
            (directory / "x_Packages").touch()
        monkeypatch.setattr(process, "find_program", lambda name: f"/usr/bin/{name}" if name in self.present else None)
        monkeypatch.setattr(packages, "SYSTEM_LISTS", directory)
        monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)

    def run(self, argv: list[str], directory: Path) -> str:
        self.commands.append(argv)
        if "install" in argv:
            if self.fail:
                self.fail -= 1
                raise HostError("404")
            self.present.add("qemu-system-x86_64")
        return ""

    def verbs(self) -> list[str]:
        return ["install" if "install" in command else "update" for command in self.commands]


def test_nothing_is_done_when_all_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = Host(monkeypatch, tmp_path)
    host.present.add("qemu-system-x86_64")
    ensure([QEMU], say=host.said.append, run=host.run)
    assert missing([QEMU]) == [] and host.said == [] and host.commands == []


def test_root_gets_it_installed_after_being_told_the_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = Host(monkeypatch, tmp_path)
    ensure([QEMU], say=host.said.append, run=host.run)
    assert "qemu-system-x86" in host.said[0]
    assert host.verbs() == ["install"]
    assert {"--no-install-recommends", "-y", "DEBIAN_FRONTEND=noninteractive"} <= set(host.commands[0])


def test_a_system_without_lists_gets_them_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = Host(monkeypatch, tmp_path, lists=False)
    ensure([QEMU], say=host.said.append, run=host.run)
    assert host.verbs() == ["update", "install"]


def test_old_lists_are_renewed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = Host(monkeypatch, tmp_path)
    host.fail = 1
    ensure([QEMU], say=host.said.append, run=host.run)
    assert host.verbs() == ["install", "update", "install"]


def test_others_get_the_exact_command_and_a_code_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = Host(monkeypatch, tmp_path, root=False)
    with pytest.raises(MissingPackages) as caught:
        ensure([QEMU], say=host.said.append, run=host.run)
    assert caught.value.exit_code == 77
    assert caught.value.packages == ("qemu-system-x86",)
    assert "sudo apt-get update && sudo apt-get install" in str(caught.value)
    assert host.commands == []


def test_no_is_taken_for_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = Host(monkeypatch, tmp_path)
    with pytest.raises(MissingPackages):
        ensure([QEMU], say=host.said.append, ask=lambda question: False, run=host.run)
    assert host.commands == []


def test_another_distribution_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = Host(monkeypatch, tmp_path)
    host.present.clear()
    with pytest.raises(MissingPackages, match="no Debian system"):
        ensure([QEMU], say=host.said.append, run=host.run)


def test_any_of_several_files_meets_a_need(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    assert Need("x", "p", files=(str(tmp_path / "a"), str(tmp_path / "b"))).met
    assert not Need("x", "p", files=(str(tmp_path / "a"),)).met
