"""What one asks of a machine that runs: to stand still, to go on, to reset, to shut down, to boot again. Each holds the
machine's job."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kvik.conf.enums import DomainShutdownFlags, DomainState
from kvik.errors import (
    AgentError,
    HypervisorError,
    OperationInvalid,
    OperationTimeout,
    OperationUnsupported,
)
from kvik.hypervisor.driver import Machine
from kvik.manager import lifecycle
from kvik.manager.states import (
    Trigger,
    state_text,
)

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject

AGENT_ACCEPT = 2.0  # guest-shutdown is not answered when it succeeds: silence for this long is consent


async def suspend(domain: DomainObject) -> None:
    async with domain.jobs.hold("suspend"):
        machine = domain.require_machine()
        if domain.state == DomainState.PAUSED:
            return  # as libvirt: it is what was asked for
        domain.require_running()
        await machine.pause()
        lifecycle.apply(domain, Trigger.PAUSED_BY_USER)
        await domain.save_quietly()


async def resume(domain: DomainObject) -> None:
    async with domain.jobs.hold("resume"):
        machine = domain.require_machine()
        if domain.state == DomainState.RUNNING:
            raise OperationInvalid(f"machine {domain.name!r} is already running")
        if domain.state != DomainState.PAUSED:
            raise OperationInvalid(f"machine {domain.name!r} is {state_text(domain.state)}: it cannot be resumed")
        await machine.resume()
        lifecycle.reached(domain, "guest running")
        lifecycle.apply(domain, Trigger.RESUMED)
        await domain.save_quietly()


async def reset(domain: DomainObject) -> None:
    async with domain.jobs.hold("reset"):
        machine = domain.require_machine()
        await machine.reset()
        if domain.state in (DomainState.CRASHED, DomainState.SHUTDOWN):
            await machine.resume()
            lifecycle.apply(domain, Trigger.RESTARTED)
            await domain.save_quietly()


async def shutdown(domain: DomainObject, mode: int) -> None:
    async with domain.jobs.hold("shutdown"):
        await _ask(domain, mode, "powerdown")


async def reboot(domain: DomainObject, mode: int) -> None:
    async with domain.jobs.hold("reboot"):
        await _ask(domain, mode, "reboot")


async def _ask(domain: DomainObject, mode: int, what: str) -> None:
    """By agent or by power button; flags are the same for shutdown and reboot."""
    if mode & ~(DomainShutdownFlags.ACPI_POWER_BTN | DomainShutdownFlags.GUEST_AGENT):
        raise OperationUnsupported("a machine can be shut down by its agent or by ACPI only")
    machine = domain.require_machine()
    run = domain.run
    assert run is not None
    if domain.state not in (DomainState.RUNNING, DomainState.PAUSED, DomainState.PMSUSPENDED):
        raise OperationInvalid(f"machine {domain.name!r} is {state_text(domain.state)}")
    agent_wanted = mode & DomainShutdownFlags.GUEST_AGENT if mode else run.stages.has("agent")
    acpi_wanted = not mode or mode & DomainShutdownFlags.ACPI_POWER_BTN
    if agent_wanted:
        try:
            await _by_agent(domain, machine, what)
            return
        except (AgentError, OperationTimeout):
            if not acpi_wanted:
                raise
    # A reboot by the power button is a power-off that we answer: the VMM must still be there then.
    before, run.reboot_wanted = run.reboot_wanted, what == "reboot"
    if run.reboot_wanted != before and not lifecycle.pauses(run):
        await machine.set_action("poweroff", "pause" if run.reboot_wanted else "exit")
    await machine.powerdown()


async def _by_agent(domain: DomainObject, machine: Machine, what: str) -> None:
    run = domain.run
    if domain.state != DomainState.RUNNING:
        raise AgentError(f"machine {domain.name!r} is {state_text(domain.state)}: its agent cannot answer")
    asked = asyncio.get_running_loop().create_task(
        machine.agent("guest-shutdown", {"mode": what}, timeout=AGENT_ACCEPT + 1)
    )
    ended = asyncio.get_running_loop().create_task(run.ended.wait() if run else asyncio.sleep(0))
    try:
        await asyncio.wait({asked, ended}, timeout=AGENT_ACCEPT, return_when=asyncio.FIRST_COMPLETED)
        if asked.done() and not ended.done():
            try:
                asked.result()
            except HypervisorError:
                if domain.run is run and domain.state == DomainState.RUNNING:
                    raise
    finally:
        for task in (asked, ended):
            task.cancel()
        await asyncio.gather(asked, ended, return_exceptions=True)
