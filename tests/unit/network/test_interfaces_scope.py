"""Whose interfaces they are, without touching any."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvik.errors import InvalidArgument, NoInterface, OperationInvalid, OperationUnsupported
from kvik.network.interfaces.interfaces import Interfaces
from kvik.network.interfaces.pending import Pending
from kvik.paths import Paths

DOCUMENT = "<interface type='ethernet' name='kvik-none0'><start mode='onboot'/></interface>"


def test_a_session_looks_but_does_not_configure(tmp_path: Path) -> None:
    session = Interfaces(Paths.session({"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}))
    assert "lo" in [row.name for row in session.rows()]
    with pytest.raises(OperationUnsupported, match="the system's"):
        session.define(DOCUMENT)
    session.close()


def test_a_host_without_any_known_configuration_is_told_which_are_known(tmp_path: Path) -> None:
    system = Interfaces(Paths.system(tmp_path))
    with pytest.raises(OperationUnsupported, match="none of the places") as caught:
        system.define(DOCUMENT)
    assert "netplan" in caught.value.remedy
    system.close()


def test_what_is_only_defined_is_listed_shown_and_undefined(tmp_path: Path) -> None:
    config = tmp_path / "etc/network/interfaces"
    config.parent.mkdir(parents=True)
    config.write_text("# mine\n")
    system = Interfaces(Paths.system(tmp_path))
    row = system.define(DOCUMENT)
    assert (row.name, row.mac, row.active) == ("kvik-none0", "", False)
    assert "name='kvik-none0'" in system.xml("kvik-none0", True)
    with pytest.raises(OperationInvalid, match="no interface kvik-none0"):
        system.create("kvik-none0")
    system.undefine("kvik-none0")
    assert config.read_text().startswith("# mine\n")
    with pytest.raises(NoInterface):
        system.xml("kvik-none0", True)
    system.close()


@pytest.mark.parametrize("delay", [-1, 31, float("nan"), float("inf")])
def test_a_delay_out_of_range_is_refused(tmp_path: Path, delay: float) -> None:
    system = Interfaces(Paths.system(tmp_path))
    with pytest.raises(InvalidArgument, match="delay"):
        system.wanted("br0", False, delay)
    system.close()


@pytest.mark.parametrize("seconds", [-1, 3601, 1 << 40])
def test_a_time_out_of_range_is_refused(tmp_path: Path, seconds: int) -> None:
    with pytest.raises(OperationInvalid, match="between 0 and 3600"):
        Pending(tmp_path).begin(seconds)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_said_and_not_believed(tmp_path: Path) -> None:
    from kvik.errors import HostError

    (tmp_path / "pending.json").write_bytes(b'{"id": 7}')
    with pytest.raises(HostError, match="cannot be read"):
        Pending(tmp_path).open()
