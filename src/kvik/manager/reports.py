"""The VMM's events that do not change the life cycle, told on in libvirt's terms. Numbers are libvirt's enums."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvik.conf.enums import (
    ConnectDomainEventAgentLifecycleReason,
    ConnectDomainEventAgentLifecycleState,
    DomainEventGraphicsAddressType,
    DomainEventGraphicsPhase,
    DomainEventIOErrorAction,
    DomainEventTrayChangeReason,
    DomainEventWatchdogAction,
)
from kvik.hypervisor.driver import MachineEvent
from kvik.hypervisor.layers import layers
from kvik.manager import devices, guest, rx_filters

if TYPE_CHECKING:
    from kvik.manager.domain import DomainObject
    from kvik.manager.run import Run

_WATCHDOG = {
    "none": DomainEventWatchdogAction.NONE,
    "pause": DomainEventWatchdogAction.PAUSE,
    "reset": DomainEventWatchdogAction.RESET,
    "poweroff": DomainEventWatchdogAction.POWEROFF,
    "shutdown": DomainEventWatchdogAction.SHUTDOWN,
    "debug": DomainEventWatchdogAction.DEBUG,
    "inject-nmi": DomainEventWatchdogAction.INJECTNMI,
}
_IO_ERROR = {
    "stop": DomainEventIOErrorAction.PAUSE,
    "pause": DomainEventIOErrorAction.PAUSE,
    "report": DomainEventIOErrorAction.REPORT,
    "ignore": DomainEventIOErrorAction.NONE,
}
_GRAPHICS = {
    "connect": DomainEventGraphicsPhase.CONNECT,
    "initialize": DomainEventGraphicsPhase.INITIALIZE,
    "disconnect": DomainEventGraphicsPhase.DISCONNECT,
}
_FAMILY = {
    "ipv4": DomainEventGraphicsAddressType.IPV4,
    "ipv6": DomainEventGraphicsAddressType.IPV6,
    "unix": DomainEventGraphicsAddressType.UNIX,
}


def report(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    handler = _HANDLERS.get(event.kind.value)
    if handler is not None:
        handler(domain, run, event)


def _watchdog(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    if event.detail == "pause":
        run.pause_cause = "watchdog"
    domain.log.note(f"the watchdog fired: {event.detail}")
    domain.emit("watchdog", action=_WATCHDOG.get(event.detail, DomainEventWatchdogAction.NONE))


def _sidecar(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    domain.log.note(event.detail)


def _sidecar_again(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    domain.log.note(event.detail)
    domain.spawn(domain.save_quietly())  # the next daemon finds it by what is noted there


def _rx_filter(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    domain.spawn(rx_filters.follow(domain, run, event.detail))


def _io_error(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    action = _IO_ERROR.get(str(event.data.get("action", "report")), DomainEventIOErrorAction.REPORT)
    reason = str(event.data.get("reason") or "")
    if action == DomainEventIOErrorAction.PAUSE:
        run.pause_cause = "io-error"
    path = next(
        (
            disk.source.location or ""
            for disk in run.live.devices.disks
            if disk.alias and disk.alias.name == event.detail and disk.source
        ),
        "",
    )
    domain.log.note(f"I/O error on {event.detail} ({path}): {reason or 'unknown reason'}")
    domain.emit("io-error", src_path=path, dev_alias=event.detail, action=action)
    domain.emit("io-error-reason", src_path=path, dev_alias=event.detail, action=action, reason=reason)


def _rtc(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    offset = int(event.data.get("offset", 0))
    clock = run.live.clock
    if clock is not None and clock.offset == "variable":
        clock.adjustment = str(offset)
        domain.live_changed()
        domain.spawn(domain.save_quietly())
    domain.emit("rtc-change", offset=offset)


def _balloon(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    run.balloon_kib = int(event.data.get("actual", 0)) // 1024
    run.live.current_memory = run.balloon_kib
    domain.live_changed()
    domain.emit("balloon-change", actual=run.balloon_kib)


def _removed(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    devices.removed(domain, run, event.detail)


def _removal_failed(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    waiting = run.removals.get(event.detail)
    if waiting and not waiting.done():
        waiting.set_result(False)
    domain.emit("device-removal-failed", dev_alias=event.detail)


def _agent(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    up = event.detail == "connected"
    for channel in run.live.devices.channels:
        if channel.target and channel.target.name == guest.AGENT_CHANNEL:
            channel.target.state = "connected" if up else "disconnected"
    domain.live_changed()
    state = ConnectDomainEventAgentLifecycleState
    domain.emit(
        "agent-lifecycle",
        state=state.CONNECTED if up else state.DISCONNECTED,
        reason=ConnectDomainEventAgentLifecycleReason.CHANNEL,
    )
    if up:
        guest.agent_is_up(domain, run)
    else:
        run.stages.lose("agent", "address")
        run.interfaces = []


def _tray(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    is_open = bool(event.data.get("open"))
    for disk in run.live.devices.disks:
        if disk.alias and disk.alias.name == event.detail:
            disk.target.tray = "open" if is_open else None
            domain.live_changed()
    reason = DomainEventTrayChangeReason.OPEN if is_open else DomainEventTrayChangeReason.CLOSE
    domain.emit("tray-change", dev_alias=event.detail, reason=reason)


def _graphics(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    def end(side: str) -> dict[str, Any]:
        given = event.data.get(side) or {}
        return {
            "family": _FAMILY.get(given.get("family", ""), DomainEventGraphicsAddressType.IPV4),
            "node": given.get("host", ""),
            "service": given.get("service", ""),
        }

    server = event.data.get("server") or {}
    domain.emit(
        "graphics",
        phase=_GRAPHICS.get(event.detail, DomainEventGraphicsPhase.CONNECT),
        local=end("server"),
        remote=end("client"),
        auth_scheme=server.get("auth", ""),
        subject=[],
    )


def _threshold(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    """Told for the image by its number and, of the one that the guest writes to, for the disk, as libvirt does."""
    if run.machine is None:
        return
    jobs = run.machine.disk_jobs
    for disk in run.live.devices.disks:
        key = jobs.image_of(disk, event.detail)
        if key is None:
            continue
        layer = next((item for item in layers(disk) if item.key == key), None)
        path = layer.source.location if layer is not None else None
        names = [f"{disk.target.dev}[{key}]"]
        names += [disk.target.dev or ""] if layer is not None and layer.number == 0 else []
        for name in names:
            domain.emit(
                "block-threshold",
                dev=name,
                path=path,
                threshold=event.data["threshold"],
                excess=event.data["excess"],
            )


def _output(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    seconds = run.stages.reach("first output")
    if seconds is not None:
        domain.emit("stage", stage="first output", seconds=seconds, state="done")
        domain.spawn(domain.save_quietly())


def _monitor(domain: DomainObject, run: Run, event: MachineEvent) -> None:
    details = json.dumps(dict(event.data)) if event.data else None
    domain.emit("monitor", event=event.detail, details=details, timestamp=event.timestamp)


_HANDLERS: Mapping[str, Callable[[DomainObject, Run, MachineEvent], None]] = {
    "watchdog": _watchdog,
    "sidecar-ended": _sidecar,
    "sidecar-started": _sidecar_again,
    "io-error": _io_error,
    "rtc-change": _rtc,
    "balloon-change": _balloon,
    "device-removed": _removed,
    "device-removal-failed": _removal_failed,
    "agent": _agent,
    "tray-change": _tray,
    "graphics": _graphics,
    "write-threshold": _threshold,
    "guest-output": _output,
    "rx-filter": _rx_filter,
    "monitor": _monitor,
}
