"""What controls a machine from outside, as its configuration asks: monitors, the debugger's port, metrics.

Imported when the vCPUs run already: nobody's guest waits for JSON. So `open_later` is what a start calls; a place that
cannot be had then ends the machine, with exit code 1.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.machine import Machine
    from kvik.vmm.monitor.server import MonitorServer

__all__ = ["open_control", "open_later"]


def open_control(machine: Machine) -> MonitorServer | None:
    """Raises `HostError`, `InvalidArgument`. What was opened is closed with the machine."""
    config = machine.config
    server = None
    if config.qmp:
        from kvik.vmm.monitor.server import MonitorServer

        server = MonitorServer(machine)
        machine.on_close.append(server.close)
        for place in config.qmp:
            if place.startswith("fd=") and place[3:].isdecimal():
                server.adopt(int(place[3:]))
            else:
                server.listen(place.removeprefix("unix:"))
    if config.gdb:
        from kvik.vmm.gdb import GdbServer

        GdbServer(machine, config.gdb)
    if config.metrics:
        from kvik.vmm.metrics import MetricsServer

        machine.on_close.append(MetricsServer(machine, config.metrics).close)
    return server


def open_later(machine: Machine) -> None:
    """In the loop's first round."""

    def open_now() -> None:
        from kvik.errors import KvikError

        try:
            open_control(machine)
        except KvikError as error:
            machine.log(str(error))
            machine.exit_code = 1
            machine.quit("host-error")

    if machine.config.qmp or machine.config.gdb or machine.config.metrics:
        machine.loop.call_soon(open_now)
