"""on_poweroff, on_reboot and on_crash, carried out for a real guest that powers off, reboots and panics."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from kvik.client import connect
from kvik.client.events import lifecycle_text
from kvik.errors import KvikError

from .conftest import AGENT, CONSOLE, DEADLINE, until
from .processes import qemu_of

RUNNING, PAUSED, SHUTDOWN, SHUTOFF, CRASHED = 1, 3, 4, 5, 6
ACPI = 1  # virDomainShutdownFlags, virDomainRebootFlags


class Watch:
    """The life-cycle and reboot events of all machines, as virsh would print them."""

    def __init__(self, uri: str) -> None:
        self.connection = connect(uri)
        self.connection.register("lifecycle")
        self.connection.register("reboot")
        self.seen: list[str] = []

    def until(self, last: str, start: int = 0) -> list[str]:
        deadline = time.monotonic() + DEADLINE
        while last not in self.seen[start:]:
            event = self.connection.next_event(deadline - time.monotonic())
            assert event is not None, self.seen
            if event.kind == "lifecycle":
                name, detail = lifecycle_text(event.fields["event"], event.fields["detail"])
                if name not in ("Defined", "Undefined"):
                    self.seen.append(f"{name} {detail}")
            else:
                self.seen.append(event.kind)
        return self.seen[start:]


@pytest.fixture
def watch(kvikd: Any) -> Any:
    watch = Watch(kvikd.uri)
    yield watch
    watch.connection.close()


def policy(poweroff: str = "destroy", reboot: str = "restart", crash: str = "destroy") -> str:
    return f"<on_poweroff>{poweroff}</on_poweroff><on_reboot>{reboot}</on_reboot><on_crash>{crash}</on_crash>"


def guest(domain: Any, command: str) -> None:
    """Runs it a moment after the agent has answered: the guest may be gone before it could."""
    domain.exec(["/bin/sh", "-c", f"(sleep 0.3; {command}) >/dev/null 2>&1 &"])


GUEST_OFF = "Shutdown Finished after guest request"


def test_poweroff_destroys_by_default(make: Any, watch: Watch) -> None:
    domain = make.ready("off")
    guest(domain, "poweroff -f")
    assert watch.until("Stopped Shutdown") == ["Started Booted", GUEST_OFF, "Stopped Shutdown"]
    assert domain.state()[0] == SHUTOFF


def test_poweroff_can_restart_in_place(make: Any, watch: Watch) -> None:
    domain = make.ready("again", extra=policy(poweroff="restart"))
    number = domain.id
    guest(domain, "poweroff -f")
    assert watch.until("Resumed Unpaused") in (
        ["Started Booted", GUEST_OFF, "reboot", "Resumed Unpaused"],
        ["Started Booted", GUEST_OFF, "Resumed Unpaused"],  # the reset may be told a moment later
    )
    assert domain.wait_ready(DEADLINE).ready
    assert domain.state()[0] == RUNNING and domain.id == number
    guest(domain, "poweroff -f")  # and once more
    watch.until("Resumed Unpaused", len(watch.seen))
    assert domain.wait_ready(DEADLINE).ready


def test_poweroff_can_preserve(make: Any, watch: Watch) -> None:
    domain = make.ready("kept", extra=policy(poweroff="preserve"))
    guest(domain, "poweroff -f")
    assert watch.until(GUEST_OFF) == ["Started Booted", GUEST_OFF]
    until(lambda: domain.state()[0] == SHUTDOWN)
    with pytest.raises(KvikError):
        domain.resume()
    domain.reset()
    assert domain.wait_ready(DEADLINE).ready
    assert domain.state()[0] == RUNNING


def test_reboot_stays_in_place_by_default(make: Any, watch: Watch) -> None:
    domain = make.ready("anew")
    guest(domain, "reboot -f")
    assert watch.until("reboot") == ["Started Booted", "reboot"]
    assert domain.wait_ready(DEADLINE).ready
    assert domain.exec(["/bin/sh", "-c", "cut -d. -f1 /proc/uptime"]).exitcode == 0


def test_reboot_can_destroy(make: Any, watch: Watch) -> None:
    domain = make.ready("once", extra=policy(reboot="destroy"))
    domain.reset()  # the host's reset is no reboot of the guest's
    watch.until("reboot")
    assert domain.wait_ready(DEADLINE).ready
    before = len(watch.seen)
    guest(domain, "reboot -f")
    assert watch.until("Stopped Shutdown", before) == [GUEST_OFF, "Stopped Shutdown"]
    assert domain.state()[0] == SHUTOFF


def test_reboot_destroys_also_where_poweroff_preserves(make: Any, watch: Watch) -> None:
    domain = make.ready("mixed", extra=policy(poweroff="preserve", reboot="destroy"))
    guest(domain, "reboot -f")
    assert watch.until("Stopped Shutdown") == ["Started Booted", GUEST_OFF, "Stopped Shutdown"]


def test_a_reboot_by_the_power_button_boots_again(make: Any, watch: Watch) -> None:
    domain = make.ready("button")
    until(lambda: b"acpid" in domain.exec(["/bin/ps"]).stdout)
    domain.reboot(ACPI)
    watch.until("Resumed Unpaused")
    assert domain.wait_ready(DEADLINE).ready
    until(lambda: b"acpid" in domain.exec(["/bin/ps"]).stdout)
    domain.shutdown(ACPI)  # and now for good
    watch.until("Stopped Shutdown")
    assert domain.state()[0] == SHUTOFF


# What the driver of a kernel that panics writes into the panic device; Debian's cloud kernel has none for it.
PANIC = "o/b 0x505 1"


@pytest.mark.parametrize(
    ("crash", "last", "state"),
    [
        ("destroy", "Stopped Crashed", SHUTOFF),
        ("preserve", "Crashed Panicked", CRASHED),
        ("restart", "Resumed Unpaused", RUNNING),
    ],
)
def test_a_panic(make: Any, watch: Watch, crash: str, last: str, state: int) -> None:
    domain = make.ready(f"crash-{crash}", CONSOLE + AGENT + "<panic model='isa'/>", extra=policy(crash=crash))
    domain.monitor_command(PANIC, hmp=True)
    seen = watch.until(last)
    assert seen[:2] == ["Started Booted", "Crashed Panicked"]
    assert seen[-1] == last
    assert domain.state()[0] == state


def test_killed_qemu_is_told_as_failed(make: Any, watch: Watch, kvikd: Any) -> None:
    domain = make.ready("shot")
    os.kill(qemu_of(domain), signal.SIGKILL)
    assert watch.until("Stopped Failed") == ["Started Booted", "Stopped Failed"]
    assert domain.state()[0] == SHUTOFF
