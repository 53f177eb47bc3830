"""A lease of real machines: held through the daemon's death, gone with QEMU."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import ResourceBusy

from .conftest import Kvikd, until

LEASE = "<lease><lockspace>shop</lockspace><key>db</key><target path='{}'/></lease>"


def test_one_machine_has_it_until_its_qemu_ends(make: Any, kvikd: Kvikd, tmp_path: Path) -> None:
    wanted = LEASE.format(tmp_path / "leases")
    one, two = make("holder", wanted, kernel=False), make("waiting", wanted, kernel=False)
    one.start()
    with pytest.raises(ResourceBusy, match="lease 'db' of lockspace 'shop' is held by machine 'holder' on host"):
        two.start()
    assert kvikd.end(signal.SIGKILL) == -signal.SIGKILL
    kvikd.start()
    one, two = (kvikd.connection.lookup_name(name) for name in ("holder", "waiting"))
    assert one.is_active() and not two.is_active()
    with pytest.raises(ResourceBusy, match="held by machine 'holder'"):
        two.start()
    one.destroy()
    until(lambda: not one.is_active())
    two.start()
    assert two.is_active()
