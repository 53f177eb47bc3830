"""Through the guest's agent: its addresses, any command, and whether the machine is ready. Answers are not trusted."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvik.errors import AgentError, InvalidArgument, KvikError, MonitorError
from kvik.manager.stages import AGENT_CHANNEL, Stage

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.run import Run

__all__ = ["AGENT_CHANNEL", "InterfaceAddress", "agent_command", "agent_is_up", "interface_addresses", "wait_ready"]

INTERFACES_MAX = 2048  # REMOTE_DOMAIN_INTERFACE_MAX
ADDRESSES_MAX = 2048  # REMOTE_DOMAIN_IP_ADDR_MAX, of one interface
FIRST_POLL, LAST_POLL = 0.05, 2.0  # seconds between questions for an address
CALL_TIMEOUT = 5.0
LONGEST = 24 * 3600.0  # "block" as a number
CONSOLE_TAIL = 8192  # bytes of the console's log that are looked at for a hint


class InterfaceAddress(NamedTuple):
    name: str
    hwaddr: str
    addresses: list[tuple[int, str, int]]  # (0 IPv4 | 1 IPv6, address, prefix)


async def agent_command(domain: DomainObject, text: str, timeout: float) -> str:
    machine = domain.require_running()
    name, arguments = _request(text, "agent")
    seconds = {-2.0: LONGEST, -1.0: CALL_TIMEOUT, 0.0: CALL_TIMEOUT}.get(float(timeout), float(timeout))
    if seconds < 0:
        raise InvalidArgument(f"{timeout:g} is no timeout")
    return json.dumps({"return": await machine.agent(name, arguments, timeout=seconds)})


async def monitor_command(domain: DomainObject, text: str, hmp: bool) -> str:
    machine = domain.require_machine()
    if hmp:
        return await machine.human_monitor(text)
    name, arguments = _request(text, "monitor")
    try:
        return json.dumps({"return": await machine.monitor(name, arguments)})
    except MonitorError as error:
        return json.dumps({"error": {"class": error.qmp_class, "desc": error.message}})


def _request(text: str, whose: str) -> tuple[str, dict[str, Any] | None]:
    try:
        request = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"the {whose} command is not JSON: {error}") from error
    if not isinstance(request, dict) or not isinstance(request.get("execute"), str):
        raise InvalidArgument(f'the {whose} command must be an object with "execute"')
    arguments = request.get("arguments")
    if arguments is not None and not isinstance(arguments, dict):
        raise InvalidArgument(f'"arguments" of the {whose} command must be an object')
    return request["execute"], arguments


# Addresses ------------------------------------------------------------------------------------------------------


async def interface_addresses(domain: DomainObject) -> list[InterfaceAddress]:
    """As the agent tells them; without loopback and link-local ones they are kept for `list` and `ps`."""
    machine = domain.require_running()
    answer = await machine.agent("guest-network-get-interfaces", None, timeout=CALL_TIMEOUT)
    found = decode_interfaces(answer)
    if domain.run and domain.run.machine is machine:
        domain.run.interfaces = _outside(found)
    return found


def decode_interfaces(answer: Any) -> list[InterfaceAddress]:
    """What the guest says, taken only where it has the right shape."""
    if not isinstance(answer, list):
        raise AgentError("the agent's answer to guest-network-get-interfaces is not a list")
    found = []
    for item in answer[:INTERFACES_MAX]:
        if not isinstance(item, dict):
            continue
        listed = item.get("ip-addresses")
        addresses = [
            decoded
            for entry in (listed[:ADDRESSES_MAX] if isinstance(listed, list) else ())
            if (decoded := _decode_address(entry)) is not None
        ]
        found.append(InterfaceAddress(_text(item, "name"), _text(item, "hardware-address"), addresses))
    return found


def _decode_address(entry: Any) -> tuple[int, str, int] | None:
    if not isinstance(entry, dict):
        return None
    try:
        address = ipaddress.ip_address(_text(entry, "ip-address").split("%")[0])
    except ValueError:
        return None
    prefix = entry.get("prefix")
    if not isinstance(prefix, int) or not 0 <= prefix <= address.max_prefixlen:
        prefix = 0
    return (0 if address.version == 4 else 1, str(address), prefix)


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    return value[:256] if isinstance(value, str) else ""


def _outside(found: list[InterfaceAddress]) -> list[InterfaceAddress]:
    """Without what only the guest itself can reach: loopback and link-local addresses."""
    kept = []
    for interface in found:
        addresses = [
            entry
            for entry in interface.addresses
            if not (address := ipaddress.ip_address(entry[1])).is_loopback and not address.is_link_local
        ]
        if addresses:
            kept.append(interface._replace(addresses=addresses))
    return kept


def agent_is_up(domain: DomainObject, run: Run) -> None:
    seconds = run.stages.reach("agent")
    if seconds is not None:
        domain.emit("stage", stage="agent", seconds=seconds, state="done")
    if run.live.devices.interfaces:
        domain.spawn(_learn_address(domain, run))


async def _learn_address(domain: DomainObject, run: Run) -> None:
    pause = FIRST_POLL
    while domain.run is run and run.stages.has("agent"):
        try:
            await interface_addresses(domain)
            run.agent_error = ""
        except KvikError as error:
            run.agent_error = error.message
        if run.interfaces:
            seconds = run.stages.reach("address")
            if seconds is not None:
                domain.emit("stage", stage="address", seconds=seconds, state="done")
            return
        await asyncio.sleep(pause)
        pause = min(pause * 2, LAST_POLL)


# Readiness ------------------------------------------------------------------------------------------------------


def console_tail(run: Run) -> str:
    """The end of what the guest wrote on its console, if it is kept in a file."""
    paths = [device.log.file for device in (*run.live.devices.serials, *run.live.devices.consoles) if device.log]
    for path in (*map(Path, paths), run.directory / "console.log"):
        try:
            with path.open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - CONSOLE_TAIL))
                return file.read(CONSOLE_TAIL).decode(errors="replace")
        except OSError:
            continue
    return run.machine.output_tail.decode(errors="replace") if run.machine else ""


async def wait_ready(domain: DomainObject, timeout: float) -> list[Stage]:
    domain.require_machine()
    run = domain.run
    assert run is not None
    deadline = time.monotonic() + max(0.0, timeout)
    while not run.stages.ready and not run.stages.ended:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            async with asyncio.timeout(left):
                await run.stages.changed()
        except TimeoutError:
            break
    if run.stages.ready:
        return run.stages.table()
    console = await domain.manager.store.run(console_tail, run)
    return run.stages.table(stalled=run.stages.hint(console, run.agent_error) or "not reached in time")
