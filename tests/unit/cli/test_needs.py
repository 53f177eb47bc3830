"""start and create on a host without QEMU: the package is named, root gets it, the verb goes on."""

from __future__ import annotations

from typing import Any

import pytest

from kvik.errors import HypervisorError, MissingPackages


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A host without QEMU; what `ensure` was asked for."""
    asked: list[str] = []

    def ensure(needs: Any, **how: Any) -> None:
        asked.extend(need.package for need in needs)

    monkeypatch.setattr("kvik.guest.packages.missing", lambda needs: [] if asked else list(needs))
    monkeypatch.setattr("kvik.guest.packages.ensure", ensure)
    return asked


@pytest.mark.parametrize("line", [["start", "web"], ["create", "-"]])
def test_once_installed_it_goes_on(kvik: Any, bare: list[str], line: list[str]) -> None:
    made = kvik.connection.running

    def act(*values: Any) -> Any:
        if not bare:
            raise HypervisorError("no QEMU for x86_64 is installed")
        return made

    kvik.connection.replies[line[0]] = act
    assert kvik(*line, stdin="<domain/>") == 0
    assert bare == ["qemu-system-x86"]
    assert len(kvik.connection.made(line[0])) == 2


@pytest.mark.parametrize("line", [["start", "web"], ["create", "-"]])
def test_who_may_not_install_gets_the_command_and_77(
    kvik: Any, bare: list[str], monkeypatch: pytest.MonkeyPatch, line: list[str]
) -> None:
    def ensure(needs: Any, **how: Any) -> None:
        raise MissingPackages("QEMU is missing", packages=("qemu-system-x86",), command="sudo apt-get install x")

    monkeypatch.setattr("kvik.guest.packages.ensure", ensure)
    kvik.connection.replies[line[0]] = HypervisorError("no QEMU for x86_64 is installed")
    assert kvik(*line, stdin="<domain/>") == 77
    assert "sudo apt-get install x" in kvik.err


def test_other_failures_install_nothing(kvik: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvik.guest.packages.missing", lambda needs: [])
    monkeypatch.setattr("kvik.guest.packages.ensure", lambda *args, **how: pytest.fail("installed"))
    kvik.connection.replies["start"] = HypervisorError("the disk is in use")
    assert kvik("start", "web") == 1
    assert "the disk is in use" in kvik.err
