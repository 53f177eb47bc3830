"""Whether the machine runs, and what happens when its guest ends: status, stop, cont, reset, powerdown, quit, actions.

Reference: QEMU's qapi/run-state.json, qapi/machine.json, qapi/misc.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvik.vmm.monitor.errors import QmpError, refused
from kvik.vmm.monitor.schema import ANYTHING, NOTHING, TEXT, Bool, Enum, Int, List, Struct
from kvik.vmm.monitor.table import Arguments, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# States out of which only a reset leads (QEMU's runstate_needs_reset).
NEEDS_RESET = frozenset({"guest-panicked", "internal-error", "shutdown"})


def query_status(context: Context, arguments: Arguments) -> dict[str, Any]:
    status = context.machine.status
    return {"status": status, "running": status == "running", "singlestep": False}


def stop(context: Context, arguments: Arguments) -> None:
    context.machine.pause()


def cont(context: Context, arguments: Arguments) -> None:
    machine = context.machine
    if machine.status in NEEDS_RESET:
        raise QmpError("Resetting the Virtual Machine is required")
    if machine.status == "inmigrate":
        raise QmpError("the machine waits for an incoming migration", "GenericError")
    if machine.status != "running":
        machine.resume()


def system_reset(context: Context, arguments: Arguments) -> None:
    context.machine.reset()


def system_powerdown(context: Context, arguments: Arguments) -> None:
    context.machine.powerdown()


def quit_(context: Context, arguments: Arguments) -> None:
    # The loop ends when this round is done: by then the reply is in the socket.
    context.machine.quit()


# set-action's member -> (the field of MachineConfig, the words that are both QEMU's and ours)
_ACTIONS = {
    "reboot": ("on_reboot", ("reset", "shutdown")),
    "shutdown": ("on_poweroff", ("poweroff", "pause")),
    "panic": ("on_panic", ("pause", "shutdown", "exit-failure", "none")),
}
_WATCHDOG = ("reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi")


def set_action(context: Context, arguments: Arguments) -> None:
    config = context.machine.config
    for member, (field, _) in _ACTIONS.items():
        if member in arguments:
            word = arguments[member]
            setattr(config, field, "shutdown" if word == "poweroff" else word)
    if "watchdog" in arguments:
        for settings in config.watchdog:
            settings.action = arguments["watchdog"]
        for device in context.devices():
            if hasattr(device, "action"):
                device.action = arguments["watchdog"]


def inject_nmi(context: Context, arguments: Arguments) -> None:
    machine = context.machine
    with machine.paused():  # KVM_NMI waits for a vCPU that runs
        for thread in machine.vcpus:
            thread.vcpu.nmi()


def query_version(context: Context, arguments: Arguments) -> dict[str, Any]:
    from kvik.vmm.monitor.server import VERSION

    numbers = dict(zip(("major", "minor", "micro"), VERSION, strict=True))
    return {"qemu": numbers, "package": context.server.package}


def query_name(context: Context, arguments: Arguments) -> dict[str, str]:
    name = context.machine.config.name
    return {"name": name} if name else {}


def query_uuid(context: Context, arguments: Arguments) -> dict[str, str]:
    return {"UUID": context.machine.config.uuid or "00000000-0000-0000-0000-000000000000"}


def query_kvm(context: Context, arguments: Arguments) -> dict[str, bool]:
    return {"enabled": True, "present": True}


def query_target(context: Context, arguments: Arguments) -> dict[str, str]:
    return {"arch": "x86_64"}


def rtc_reset_reinjection(context: Context, arguments: Arguments) -> None:
    """Nothing to do: kvik-vmm never queues up missed ticks of its RTC, so there are none to forget."""


def system_wakeup(context: Context, arguments: Arguments) -> None:
    raise QmpError("Unable to wake up: guest is not in suspended state")


def _no_keyboard(context: Context, arguments: Arguments) -> None:
    raise refused("has no keyboard", "use the serial line, or the virtio console")


def _no_screen(context: Context, arguments: Arguments) -> None:
    raise QmpError("There is no console to take a screendump from")


COMMANDS: Sequence[Command] = (
    Command(
        "query-status",
        query_status,
        returns=Struct({"status": TEXT, "running": Bool(), "singlestep": Bool()}),
        summary="the run state, in QEMU's words",
    ),
    Command("stop", stop, returns=NOTHING, summary="park all vCPUs, hold device I/O"),
    Command("cont", cont, returns=NOTHING, summary="go on"),
    Command("system_reset", system_reset, returns=NOTHING, summary="press the reset button"),
    Command("system_powerdown", system_powerdown, returns=NOTHING, summary="press the power button"),
    Command("system_wakeup", system_wakeup, returns=NOTHING, summary="refused: there is no suspended state"),
    Command("quit", quit_, returns=NOTHING, summary="end the process"),
    Command(
        "set-action",
        set_action,
        Struct(
            {f"*{member}": Enum(*words) for member, (_, words) in _ACTIONS.items()} | {"*watchdog": Enum(*_WATCHDOG)}
        ),
        NOTHING,
        summary="what a reboot, a power-off, a panic and the watchdog lead to",
    ),
    Command("inject-nmi", inject_nmi, returns=NOTHING, summary="an NMI for every vCPU"),
    Command("query-version", query_version, returns=Struct({"qemu": ANYTHING, "package": TEXT})),
    Command("query-name", query_name, returns=Struct({"*name": TEXT})),
    Command("query-uuid", query_uuid, returns=Struct({"UUID": TEXT})),
    Command("query-kvm", query_kvm, returns=Struct({"enabled": Bool(), "present": Bool()})),
    Command("query-target", query_target, returns=Struct({"arch": TEXT})),
    Command("rtc-reset-reinjection", rtc_reset_reinjection, returns=NOTHING, summary="nothing is queued, ever"),
    Command(
        "send-key",
        _no_keyboard,
        Struct({"keys": List(ANYTHING), "*hold-time": Int()}),
        NOTHING,
        summary="refused: there is no keyboard",
    ),
    Command(
        "screendump",
        _no_screen,
        Struct({"filename": TEXT, "*device": TEXT, "*head": Int(), "*format": Enum("ppm", "png")}),
        NOTHING,
        summary="refused: there is no screen",
    ),
)
