"""The command kvik-vmm: one machine, in the foreground, until it ends.

Exit codes: 0 the guest powered off or somebody ended the machine, 1 it could not start, 2 the guest crashed.
"""

from __future__ import annotations

import errno
import gc
import os
import sys

from kvik.errors import HostError, KvikError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from types import FrameType

    from kvik.vmm.config import MachineConfig
    from kvik.vmm.confinement import Confinement
    from kvik.vmm.machine import Machine
else:
    import _signal  # what is behind `signal`, which is slow to import

__all__ = ["Prepared", "main", "open_control", "run"]

ENDS = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP)

# How long a thread that wants the interpreter waits for one that computes. The usual 5 ms would be added to every
# interrupt and every exit while any thread is busy.
SWITCH_INTERVAL = 1e-4
NAME = "kvik-vmm"
M_ARENA_MAX = -8  # malloc.h
_told: list[int] = []  # signals that came while the machine was built


class Prepared:
    """What a command line asks for, worked out: nothing is opened, no descriptor is touched. A zygote does this before
    it forks. Raises `KvikError`."""

    __slots__ = ("config", "confinement", "descriptors")

    def __init__(self, config: MachineConfig) -> None:
        self.config = config
        self.confinement: Confinement | None = None
        self.descriptors: set[int] = set()  # those that the configuration names
        if config.sandbox != "off":
            from kvik.vmm.confinement import Confinement, descriptors

            self.confinement, self.descriptors = Confinement(config), descriptors(config)

    @classmethod
    def parse(cls, words: list[str]) -> Prepared:
        from kvik.vmm.options import parse

        return cls(parse(words))


def main(arguments: list[str] | None = None, prepared: Prepared | None = None) -> int:
    """Parse, build, run. `prepared`: it is parsed already."""
    if arguments is None:
        gc.disable()  # what is made until the guest runs stays: looking for garbage among it is lost time
        _have_standard_streams()
    words = sys.argv[1:] if arguments is None else arguments
    if "--help" in words or "-h" in words:
        from kvik.vmm.options import help_text

        sys.stdout.write(help_text())
        return 0
    if "--version" in words:
        import kvik

        print(f"kvik-vmm {kvik.__version__}")
        return 0
    if "--cpu=help" in words or " --cpu help " in f" {' '.join(words)} ":
        sys.stdout.write(_cpu_models())
        return 0
    try:
        return _run(prepared or Prepared.parse(words), alone=arguments is None)
    except KvikError as error:
        print(f"kvik-vmm: {error}", file=sys.stderr)
    except MemoryError:
        print("kvik-vmm: the host has no memory left; give the machine less, or free some", file=sys.stderr)
    except OSError as error:
        hint = "; raise the limit of open files (ulimit -n)" if error.errno == errno.EMFILE else ""
        print(f"kvik-vmm: the host refuses something that a machine needs: {error}{hint}", file=sys.stderr)
    return 1


def _cpu_models() -> str:
    from kvik.kvm.system import System
    from kvik.vmm.cpu.listing import listing

    try:
        with System() as system:
            return listing(system.supported_cpuid())
    except OSError:
        return listing(None)


def _have_standard_streams() -> None:
    """Without them, the first three files that are opened (/dev/kvm, a disk) would get what is said and logged."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)  # the lowest number that is free: this one


def run(config: MachineConfig) -> int:
    """Build the machine and run it to its end; its exit code."""
    return _run(Prepared(config), alone=False)


def _run(prepared: Prepared, *, alone: bool) -> int:
    """`alone`: the process does nothing else, so that descriptors which the configuration does not name are the
    caller's oversight, and closed."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    if alone:
        _set_name(NAME)
        _share_heap()
    gc.disable()
    for number in ENDS:
        _signal.signal(number, _end_at_once)
    from kvik.vmm.build import build

    config, confinement = prepared.config, prepared.confinement
    if confinement is not None and alone:
        confinement.close_stray(prepared.descriptors)
    machine = build(config, confinement, boot=not config.incoming)
    trace = -1
    try:
        for number in ENDS:
            _signal.signal(number, _quit_on_signal(machine))
        if _told:
            raise SystemExit(0)
        if machine.trace is not None and config.trace != "-":
            trace = _open_trace(config.trace)
        if config.incoming:
            from kvik.vmm.state.migration import await_incoming

            await_incoming(machine, config.incoming)
        else:
            machine.start(machine.config.paused)
        # From here on the guest runs, and nobody waits for what is imported.
        open_control(machine)
        if confinement is not None:
            confinement.enter_main(machine)
        gc.freeze()
        gc.enable()
        machine.run()
    finally:
        machine.close()
    if machine.trace is not None:
        sys.stderr.write(machine.trace.summary())
        if trace >= 0:
            machine.trace.write(trace)
    return machine.exit_code


def _set_name(name: str) -> None:
    """What ps calls the process, whoever's interpreter runs it (proc(5), /proc/PID/comm): 15 bytes at most."""
    try:
        fd = os.open("/proc/self/comm", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, name.encode())
        finally:
            os.close(fd)
    except OSError:
        pass  # no /proc: a name is no need


def _share_heap() -> None:
    """One arena for all threads (mallopt(3)): the interpreter's lock lets one of them allocate at a time anyway, and
    another for each would cost it a mapping and pages of its own."""
    import ctypes

    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def _open_trace(path: str) -> int:
    """The file is opened before the sandbox is entered; it is written when the machine has ended."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise HostError(f"the trace cannot be written to {path}: {error.strerror}", errno=error.errno or 0) from error


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """A signal while the machine is built: what is open is closed on the way out."""
    _told.append(number)  # importing has callbacks whose exceptions are printed and forgotten: looked at again later
    raise SystemExit(0)


def open_control(machine: Machine) -> None:
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
        from kvik.vmm.gdb_server import GdbServer

        machine.on_close.append(GdbServer(machine, config.gdb).close)
    if config.metrics:
        from kvik.vmm.metrics import MetricsServer

        machine.on_close.append(MetricsServer(machine, config.metrics).close)


def _quit_on_signal(machine: Machine) -> Callable[[int, FrameType | None], None]:
    def quit(number: int, frame: FrameType | None) -> None:
        machine.loop.call_soon(lambda: machine.quit("host-signal"))

    return quit


if __name__ == "__main__":
    sys.exit(main())
