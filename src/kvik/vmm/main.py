"""The command kvik-vmm: one machine, in the foreground, until it ends.

Exit codes: 0 the guest powered off or somebody ended the machine, 1 it could not start, 2 the guest crashed.
"""

from __future__ import annotations

import gc
import sys

from kvik.errors import KvikError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from types import FrameType

    from kvik.vmm.config import MachineConfig
    from kvik.vmm.machine import Machine
else:
    import _signal  # what is behind `signal`, which is slow to import

__all__ = ["main", "run"]

# How long a thread that wants the interpreter waits for one that computes. The usual 5 ms would be added to every
# interrupt and every exit while any thread is busy.
SWITCH_INTERVAL = 1e-4


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run."""
    words = sys.argv[1:] if arguments is None else arguments
    if "--help" in words or "-h" in words:
        from kvik.vmm.options import help_text

        sys.stdout.write(help_text())
        return 0
    if "--version" in words:
        import kvik

        print(f"kvik-vmm {kvik.__version__}")
        return 0
    from kvik.vmm.options import parse

    try:
        return run(parse(words))
    except KvikError as error:
        print(f"kvik-vmm: {error}", file=sys.stderr)
        return 1


def run(config: MachineConfig) -> int:
    """Build the machine and run it to its end."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.disable()  # what is made until the guest runs stays: looking for garbage among it is lost time
    from kvik.vmm.build import build

    machine = build(config)
    try:
        for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP):
            _signal.signal(number, _quit_on_signal(machine))
        machine.start(config.paused)
        # From here on the guest runs, and nobody waits for what is imported.
        _open_control(machine)
        gc.freeze()
        gc.enable()
        machine.run()
    finally:
        machine.close()
    _report(machine)
    return machine.exit_code


def _open_control(machine: Machine) -> None:
    """Monitors, a debugger's port, metrics."""
    config = machine.config
    if config.qmp:
        from kvik.vmm.monitor.server import MonitorServer

        server = MonitorServer(machine)
        machine.on_close.append(server.close)
        for place in config.qmp:
            if place.startswith("fd="):
                server.adopt(int(place[3:]))
            else:
                server.listen(place.removeprefix("unix:"))
    if config.gdb:
        from kvik.vmm.gdb import GdbServer

        machine.on_close.append(GdbServer(machine, config.gdb).close)
    if config.metrics:
        from kvik.vmm.metrics import MetricsServer

        machine.on_close.append(MetricsServer(machine, config.metrics).close)


def _quit_on_signal(machine: Machine) -> Callable[[int, FrameType | None], None]:
    def quit(number: int, frame: FrameType | None) -> None:
        machine.loop.call_soon(lambda: machine.quit("host-signal"))

    return quit


def _report(machine: Machine) -> None:
    trace, path = machine.trace, machine.config.trace
    if trace is None:
        return
    sys.stderr.write(trace.summary())
    if path != "-":
        trace.write(path)


if __name__ == "__main__":
    sys.exit(main())
