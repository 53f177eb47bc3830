"""QMP events become the manager's; keycodes become QEMU's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvik.errors import InvalidArgument
from kvik.hypervisor.driver import EventKind
from kvik.hypervisor.events import TABLE, translate
from kvik.hypervisor.qemu.keys import QCODES, qcodes
from kvik.qmp.protocol import Event


@pytest.mark.parametrize(
    ("name", "data", "kind", "detail", "meaning"),
    [
        ("SHUTDOWN", {"guest": True, "reason": "why"}, EventKind.SHUTDOWN, "guest", {"reason": "why"}),
        ("SHUTDOWN", {"guest": False}, EventKind.SHUTDOWN, "host", {"reason": ""}),
        ("STOP", {}, EventKind.PAUSED, "", {}),
        ("RESUME", {}, EventKind.RESUMED, "", {}),
        ("RESET", {"guest": True}, EventKind.RESET, "guest", {}),
        ("GUEST_PANICKED", {"action": "pause"}, EventKind.CRASHED, "pause", {}),
        ("DEVICE_DELETED", {"device": "net0", "path": "/machine/p/net0"}, EventKind.DEVICE_REMOVED, "net0", {}),
        ("DEVICE_UNPLUG_GUEST_ERROR", {"device": "net0"}, EventKind.DEVICE_REMOVAL_FAILED, "net0", {}),
        ("VSERPORT_CHANGE", {"id": "channel0", "open": True}, EventKind.CHANNEL, "channel0", {"open": True}),
        ("BALLOON_CHANGE", {"actual": 5}, EventKind.BALLOON_CHANGE, "", {"actual": 5}),
        ("RTC_CHANGE", {"offset": -3}, EventKind.RTC_CHANGE, "", {"offset": -3}),
        ("WATCHDOG", {"action": "reset"}, EventKind.WATCHDOG, "reset", {}),
        ("DEVICE_TRAY_MOVED", {"id": "sata0", "tray-open": True}, EventKind.TRAY_CHANGE, "sata0", {"open": True}),
        (
            "BLOCK_IO_ERROR",
            {"qom-path": "/machine/peripheral/virtio-disk0/x", "nospace": True, "action": "stop", "operation": "write"},
            EventKind.IO_ERROR,
            "virtio-disk0",
            {"reason": "enospc", "action": "stop", "operation": "write", "node": ""},
        ),
        (
            "BLOCK_IO_ERROR",
            {"device": "", "node-name": "n-1-format", "action": "report", "reason": "No space left on device"},
            EventKind.IO_ERROR,
            "",
            {"reason": "enospc", "action": "report", "operation": "", "node": "n-1-format"},
        ),
        ("VNC_CONNECTED", {"client": {"host": "::1"}}, EventKind.GRAPHICS, "connect", {"client": {"host": "::1"}}),
        ("SUSPEND", {}, EventKind.SUSPENDED, "memory", {}),
    ],
)  # fmt: skip
def test_known_events(name: str, data: dict[str, Any], kind: EventKind, detail: str, meaning: dict[str, Any]) -> None:
    first, raw = translate(Event(name, data, 7.0))
    assert (first.kind, first.detail, dict(first.data), first.timestamp) == (kind, detail, meaning, 7.0)
    assert (raw.kind, raw.detail) == (EventKind.MONITOR, name)


def test_unknown_events_are_passed_on_raw() -> None:
    (raw,) = translate(Event("NEWS", {"a": 1}, 0.0))
    assert (raw.kind, raw.detail, raw.data) == (EventKind.MONITOR, "NEWS", {"a": 1})


junk = st.none() | st.booleans() | st.integers() | st.text(max_size=30) | st.just("/machine/peripheral/")
keys = st.sampled_from(
    ["guest", "reason", "action", "info", "qom-path", "device", "id", "open", "client", "actual", "path"]
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a loaded machine is no fault
@given(st.sampled_from(sorted(TABLE)), st.dictionaries(keys, junk | st.lists(junk) | st.dictionaries(keys, junk)))
def test_no_payload_makes_a_translator_fail(name: str, data: dict[str, Any]) -> None:
    assert list(translate(Event(name, data, 0.0)))


def test_keys_of_a_secure_attention_sequence() -> None:
    assert [key["data"] for key in qcodes([29, 56, 111])] == ["ctrl", "alt", "delete"]


@pytest.mark.parametrize(
    ("code", "name"),
    [(1, "esc"), (28, "ret"), (57, "spc"), (69, "num_lock"), (87, "f11"), (103, "up"), (125, "meta_l"), (139, "menu")],
)
def test_known_keys(code: int, name: str) -> None:
    assert QCODES.get(code) == name


def test_a_key_nobody_has_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="700"):
        qcodes([700])
