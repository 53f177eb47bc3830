"""The life of one machine, on the in-memory driver."""

from __future__ import annotations

import asyncio

import pytest
from manager_bench import Bench, document, until

from kvik.conf.enums import (
    DomainCrashedReason,
    DomainEventType,
    DomainPausedReason,
    DomainRunningReason,
    DomainShutoffReason,
    DomainState,
)
from kvik.errors import (
    AgentError,
    ConfigError,
    HypervisorError,
    OperationFailed,
    OperationInvalid,
    OperationTimeout,
    OperationUnsupported,
)
from kvik.hypervisor.driver import EventKind, Feature
from kvik.hypervisor.test.driver import Behaviour
from kvik.manager.states import RESTART_LIMIT

OFF, ON, PAUSED = DomainState.SHUTOFF, DomainState.RUNNING, DomainState.PAUSED
E = DomainEventType


async def test_a_life_from_definition_to_its_end(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    assert (domain.state, domain.reason, domain.id) == (ON, DomainRunningReason.BOOTED, 1)
    await domain.suspend()
    assert (domain.state, domain.reason) == (PAUSED, DomainPausedReason.USER)
    await domain.resume()
    assert (domain.state, domain.reason) == (ON, DomainRunningReason.UNPAUSED)
    await domain.shutdown()
    await until(lambda: domain.state == OFF)
    assert (domain.reason, domain.id) == (DomainShutoffReason.SHUTDOWN, -1)
    await domain.undefine()
    assert bench.lifecycle() == [
        (E.DEFINED, 0), (E.STARTED, 0), (E.SUSPENDED, 0), (E.RESUMED, 0), (E.SHUTDOWN, 1), (E.STOPPED, 0),
        (E.UNDEFINED, 0),
    ]  # fmt: skip
    assert bench.manager.domains() == []


async def test_started_paused_it_waits_and_tells_both_events(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start(paused=True)
    assert domain.state == PAUSED
    assert bench.lifecycle()[1:] == [(E.STARTED, 0), (E.SUSPENDED, 0)]
    assert [stage.name for stage in domain.stages if stage.state == "done"] == ["defined", "vmm started"]
    await domain.resume()
    await until(lambda: domain.ready)


async def test_destroy_is_told_apart_from_shutdown(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await domain.destroy()
    assert (domain.state, domain.reason) == (OFF, DomainShutoffReason.DESTROYED)
    assert bench.lifecycle()[-1] == (E.STOPPED, 1)
    with pytest.raises(OperationInvalid):
        await domain.destroy()


async def test_a_vmm_that_dies_leaves_its_reason_in_state_and_log(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    bench.driver.machines["a"].die("terminated by signal 11 (Segmentation fault)")
    assert (domain.state, domain.reason) == (OFF, DomainShutoffReason.CRASHED)
    assert "Segmentation fault" in domain.reason_text
    assert bench.lifecycle()[-1] == (E.STOPPED, 5)
    await until(lambda: "Segmentation fault" in domain.log.tail())
    await domain.start()
    assert domain.reason_text == ""


async def test_a_start_that_fails_says_why_and_leaves_nothing(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(fail_start="could not open /dev/null.img")
    domain = await bench.manager.define(document())
    with pytest.raises(HypervisorError, match=r"/dev/null\.img"):
        await domain.start()
    assert (domain.state, domain.reason, domain.id) == (OFF, DomainShutoffReason.FAILED, -1)
    assert "/dev/null.img" in domain.reason_text
    assert list(bench.paths.status.iterdir()) == []
    assert "/dev/null.img" in domain.log.tail()
    assert bench.manager.running == 0


async def test_a_machine_that_dies_within_its_start_is_off(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(dies_after=0.0)
    domain = await bench.manager.define(document())
    await domain.start()
    await until(lambda: domain.state == OFF)
    assert domain.reason == DomainShutoffReason.CRASHED
    await until(lambda: not list(bench.paths.status.iterdir()))


async def test_destroy_interrupts_a_start(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(start_delay=30)
    domain = await bench.manager.define(document())
    starting = asyncio.create_task(domain.start())
    await until(lambda: domain.starting)
    await domain.destroy()
    with pytest.raises(OperationFailed, match="while it was starting"):
        await starting
    assert domain.state == OFF
    assert list(bench.paths.status.iterdir()) == []


async def test_a_caller_that_goes_away_leaves_no_half_started_machine(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(start_delay=30)
    domain = await bench.manager.define(document())
    starting = asyncio.create_task(domain.start())
    await until(lambda: domain.starting)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await until(lambda: not list(bench.paths.status.iterdir()))
    assert (domain.state, bench.driver.machines) == (OFF, {})


async def test_of_two_starts_at_once_one_wins(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(start_delay=0.02)
    domain = await bench.manager.define(document())
    results = await asyncio.gather(domain.start(), domain.start(), return_exceptions=True)
    assert sorted(type(result) for result in results if result is not None) == [OperationInvalid]
    assert bench.driver.starts["a"] == 1


async def test_a_guest_that_ignores_acpi_goes_on(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(ignores_acpi=True, has_agent=False)
    domain = await bench.manager.define(document())
    await domain.start()
    await domain.shutdown()
    await asyncio.sleep(0.02)
    assert domain.state == ON


async def test_shutdown_prefers_a_connected_agent_and_modes_choose(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(ignores_acpi=True)
    domain = await bench.manager.define(document())
    await domain.start()
    machine = bench.driver.machines["a"]
    await until(lambda: domain.ready)
    await domain.shutdown(1)  # ACPI
    assert "powerdown" in machine.commands and "agent:guest-shutdown" not in machine.commands
    await domain.shutdown()
    await until(lambda: domain.state == OFF)
    with pytest.raises(OperationInvalid):
        await domain.shutdown()


async def test_shutdown_by_an_absent_agent_is_an_error_unless_acpi_is_allowed(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(has_agent=False)
    domain = await bench.manager.define(document())
    await domain.start()
    with pytest.raises(AgentError):
        await domain.shutdown(2)
    with pytest.raises(OperationUnsupported):
        await domain.shutdown(4)
    await domain.shutdown(1 | 2)
    await until(lambda: domain.state == OFF)


async def test_reboot_by_acpi_boots_again_in_place(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    machine = bench.driver.machines["a"]
    await domain.reboot(1)
    await until(lambda: "reset" in machine.commands and domain.state == ON)
    assert bench.driver.starts["a"] == 1
    assert "reboot" in bench.kinds()
    await until(lambda: domain.ready)


async def test_reset_tells_the_reboot_event(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    await domain.reset()
    assert "reboot" in bench.kinds()


@pytest.mark.parametrize("in_place", [True, False])
async def test_on_poweroff_restart_boots_again(bench: Bench, in_place: bool) -> None:
    if not in_place:
        bench.driver.without.add(Feature.REBOOT_IN_PLACE)
    domain = await bench.manager.define(document(extra="<on_poweroff>restart</on_poweroff>"))
    await domain.start()
    bench.driver.machines["a"].guest_poweroff()
    assert domain.state == DomainState.SHUTDOWN
    await until(lambda: domain.state == ON)
    assert bench.driver.starts["a"] == (1 if in_place else 2)


async def test_on_poweroff_preserve_keeps_the_vmm_until_destroyed(bench: Bench) -> None:
    domain = await bench.manager.define(document(extra="<on_poweroff>preserve</on_poweroff>"))
    await domain.start()
    bench.driver.machines["a"].guest_poweroff()
    await asyncio.sleep(0.02)
    assert domain.state == DomainState.SHUTDOWN and domain.is_active
    await domain.destroy()
    assert domain.reason == DomainShutoffReason.DESTROYED


async def test_on_reboot_destroy_ends_it(bench: Bench) -> None:
    domain = await bench.manager.define(document(extra="<on_reboot>destroy</on_reboot>"))
    await domain.start()
    bench.driver.machines["a"].guest_reboot()
    await until(lambda: domain.state == OFF)
    assert domain.reason == DomainShutoffReason.SHUTDOWN


async def test_a_panic_ends_it_as_crashed_by_default(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    bench.driver.machines["a"].panic("attempted to kill init")
    assert (domain.state, domain.reason) == (DomainState.CRASHED, DomainCrashedReason.PANICKED)
    await until(lambda: domain.state == OFF)
    assert domain.reason == DomainShutoffReason.CRASHED
    assert "attempted to kill init" in domain.reason_text
    assert bench.lifecycle()[-2:] == [(E.CRASHED, 0), (E.STOPPED, 2)]


async def test_on_crash_preserve_keeps_it_to_be_looked_at(bench: Bench) -> None:
    domain = await bench.manager.define(document(extra="<on_crash>preserve</on_crash>"))
    await domain.start()
    bench.driver.machines["a"].panic()
    await asyncio.sleep(0.02)
    assert domain.state == DomainState.CRASHED
    await domain.reset()
    assert (domain.state, domain.reason) == (ON, DomainRunningReason.CRASHED)


async def test_a_guest_that_panics_again_and_again_is_given_up(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(panics_after=0.0)
    domain = await bench.manager.define(document(extra="<on_crash>restart</on_crash>"))
    await domain.start()
    await until(lambda: domain.state == OFF)
    assert domain.reason == DomainShutoffReason.CRASHED
    assert "not restarted again" in domain.reason_text
    crashes = [event for event in bench.lifecycle() if event[0] == E.CRASHED]
    assert len(crashes) == RESTART_LIMIT + 1


@pytest.mark.parametrize(
    "action",
    [
        "<on_crash>coredump-destroy</on_crash>",
        "<on_crash>rename-restart</on_crash>",
        "<on_reboot>preserve</on_reboot>",
        "<on_poweroff>restart</on_poweroff><on_reboot>destroy</on_reboot>",
    ],
)
async def test_an_action_that_would_not_be_carried_out_is_refused(bench: Bench, action: str) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        await bench.manager.define(document(extra=action))
    assert bench.manager.domains() == []


async def test_an_io_error_pauses_with_its_reason(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    bench.driver.machines["a"].io_error("virtio-disk0")
    assert (domain.state, domain.reason) == (PAUSED, DomainPausedReason.IOERROR)
    assert bench.kinds()[-3:] == ["io-error", "io-error-reason", "lifecycle"]
    assert bench.lifecycle()[-1] == (E.SUSPENDED, 2)
    await domain.resume()
    assert domain.state == ON


async def test_a_watchdog_that_pauses_is_the_reason_of_a_bare_pause(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    machine = bench.driver.machines["a"]
    machine.tell(EventKind.WATCHDOG, "pause")
    machine.tell(EventKind.PAUSED)
    assert (domain.state, domain.reason) == (PAUSED, DomainPausedReason.WATCHDOG)


async def test_an_ended_machine_hears_nothing_more_of_its_old_vmm(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    old = bench.driver.machines["a"]
    await domain.destroy()
    await domain.start()
    old.tell(EventKind.CRASHED, "late")
    old.tell(EventKind.ENDED, "late")
    assert domain.state == ON


async def test_who_waits_for_a_busy_machine_is_told_who_holds_it(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    bench.driver.machines["a"].hang()
    busy = asyncio.create_task(domain.suspend())
    await until(lambda: domain.jobs.current)
    with pytest.raises(OperationTimeout, match=r"held by suspend for 0\.\d s \(since \d\d:\d\d:\d\d\)"):
        async with domain.jobs.hold("resume", wait=0.02):
            pass
    assert domain.job_info()["name"] == "suspend"
    await domain.destroy()  # needs no job
    with pytest.raises((HypervisorError, OperationTimeout)):
        await busy
    assert domain.state == OFF


async def test_a_job_past_its_limit_is_cancelled_and_the_next_gets_the_machine(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    with pytest.raises(OperationTimeout, match="did not finish"):
        async with domain.jobs.hold("slow", limit=0.02):
            await asyncio.sleep(10)
    async with domain.jobs.hold("next", wait=0.1):
        assert domain.job_info()["name"] == "next"


async def test_a_transient_machine_is_forgotten_when_it_ends(bench: Bench) -> None:
    domain = await bench.manager.create_xml(document())
    assert not domain.persistent
    with pytest.raises(OperationInvalid):
        await domain.undefine()
    await domain.destroy()
    assert bench.manager.domains() == []
    assert list(bench.paths.domains.glob("*.xml")) == []


async def test_a_transient_machine_becomes_persistent_by_definition_and_back(bench: Bench) -> None:
    domain = await bench.manager.create_xml(document())
    assert await bench.manager.define(document(memory=300000)) is domain
    assert domain.persistent and domain.updated
    assert domain.info().max_mem_kib == 262144
    await domain.undefine()
    assert domain.is_active and not domain.persistent
    await domain.destroy()
    assert bench.manager.domains() == []


async def test_a_transient_machine_that_restarts_is_not_forgotten_in_between(bench: Bench) -> None:
    bench.driver.without.add(Feature.REBOOT_IN_PLACE)
    domain = await bench.manager.create_xml(document(extra="<on_poweroff>restart</on_poweroff>"))
    bench.driver.machines["a"].guest_poweroff()
    await until(lambda: bench.driver.starts["a"] == 2 and domain.state == ON)
    assert not domain.persistent
    assert bench.manager.lookup_name("a") is domain
    await domain.destroy()
    assert bench.manager.domains() == []


async def test_a_transient_machine_that_cannot_start_is_forgotten(bench: Bench) -> None:
    bench.driver.behaviours["a"] = Behaviour(fail_start="no")
    with pytest.raises(HypervisorError):
        await bench.manager.create_xml(document())
    assert bench.manager.domains() == []


async def test_machines_of_a_client_that_is_gone_are_ended(bench: Bench) -> None:
    await bench.manager.create_xml(document("a"), autodestroy="client 1")
    other = await bench.manager.create_xml(document("b"), autodestroy="client 2")
    await bench.manager.client_gone("client 1")
    assert bench.manager.domains() == [other]


# who is there when the guest ends


@pytest.mark.parametrize(
    ("policy", "needed"),
    [
        ("", False),
        ("<on_poweroff>preserve</on_poweroff>", False),  # the VMM pauses by itself
        ("<on_poweroff>restart</on_poweroff>", True),
        ("<on_reboot>destroy</on_reboot>", False),  # the VMM ends by itself
        ("<on_poweroff>preserve</on_poweroff><on_reboot>destroy</on_reboot>", True),
        ("<on_crash>preserve</on_crash>", False),
        ("<on_crash>restart</on_crash>", True),
    ],
)
async def test_a_daemon_is_needed_only_for_what_the_vmm_cannot_do_itself(
    bench: Bench, policy: str, needed: bool
) -> None:
    domain = await bench.manager.define(document(extra=policy))
    assert bench.manager.needed_by == ""
    await domain.start()
    assert bench.manager.needed_by == ("a" if needed else "")
    await domain.destroy()
    assert bench.manager.needed_by == ""


async def test_a_reboot_by_the_power_button_keeps_the_vmm(bench: Bench) -> None:
    domain = await bench.manager.define(document())
    await domain.start()
    machine = bench.driver.machines["a"]
    await domain.reboot(1)
    assert machine.actions == {"poweroff": "pause"}
    await until(lambda: machine.actions == {"poweroff": "exit"} and domain.state == DomainState.RUNNING)
    await domain.shutdown(1)
    await until(lambda: domain.state == DomainState.SHUTOFF)
