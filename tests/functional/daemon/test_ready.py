"""Readiness on real machines: what is reached, and where and why a boot stalls."""

from __future__ import annotations

import re
import time
from typing import Any

from .conftest import AGENT, CONSOLE, DEADLINE, NIC

START_PAUSED = 1  # virDomainCreateFlags
DONE, STALLED, SKIPPED, FAILED = 1, 2, 3, 4


def states(found: Any) -> dict[str, int]:
    return {stage.name: stage.state for stage in found.stages}


def stalled(found: Any) -> tuple[str, str]:
    (stage,) = [stage for stage in found.stages if stage.state in (STALLED, FAILED)]
    return stage.name, stage.detail


def stalled_with(domain: Any, name: str, hint: str) -> str:
    """Ask until a stage of this name stalls with this hint, both patterns; the whole hint."""
    deadline = time.monotonic() + DEADLINE
    while True:
        found = stalled(domain.wait_ready(0.5))
        if re.fullmatch(name, found[0]) and re.search(hint, found[1]):
            return found[1]
        assert time.monotonic() < deadline, found


def test_with_a_network_the_address_is_known_and_shown(make: Any, kvikd: Any) -> None:
    domain = make.ready("net", CONSOLE + AGENT + NIC)
    assert set(states(domain.wait_ready(1)).values()) == {DONE}
    (row,) = [row for row in kvikd.connection.overview(1) if row.name == "net"]
    assert (row.ready, row.address, row.accelerator) == (True, "10.0.2.15", "tcg")
    assert 0 < row.uptime < DEADLINE
    shown = kvikd.kvik("ps").stdout
    assert " ready " in shown and "10.0.2.15" in shown and shown.rstrip().endswith("s")


def test_without_a_network_no_address_is_waited_for(make: Any, kvikd: Any) -> None:
    domain = make.ready("alone")
    assert states(domain.wait_ready(1))["address"] == SKIPPED
    (row,) = [row for row in kvikd.connection.overview(1) if row.name == "alone"]
    assert (row.ready, row.address) == (True, None)


def test_without_the_agents_channel_output_is_all_there_is(make: Any) -> None:
    domain = make("mute", CONSOLE + NIC, arguments="loglevel=7")
    domain.start()
    found = domain.wait_ready(DEADLINE)
    assert found.ready
    assert states(found) | {"agent": SKIPPED, "address": SKIPPED} == states(found)


def test_a_panic_is_quoted(make: Any) -> None:
    domain = make("panics", arguments="rdinit=/nowhere root=/dev/none panic=0")
    domain.start()
    hint = stalled_with(domain, "agent", "kernel panicked")
    assert "kernel panicked: Kernel panic - not syncing: VFS: Unable to mount root fs" in hint


def test_a_paused_machine_says_so(make: Any) -> None:
    domain = make("paused")
    domain.start(START_PAUSED)
    name, hint = stalled(domain.wait_ready(0.3))
    assert name == "guest running" and "paused" in hint
    domain.resume()
    assert domain.wait_ready(DEADLINE).ready
    domain.suspend()
    assert domain.wait_ready(1).ready  # it was; that it rests now is its state


def test_nothing_to_boot_from(make: Any) -> None:
    domain = make("empty", kernel=False)
    domain.start()
    stalled_with(domain, "first output|agent", "nothing to boot|No bootable device")
