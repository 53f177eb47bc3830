"""A command: its name, the type of its arguments, of its reply, and the function that does it.

A handler runs on the main loop and gets a `Context` and the checked arguments. It returns the reply at once, or is a
generator: each `yield` lets the loop do other things, and what it returns at the end is the reply. Later commands of
the same session wait for it, as with QEMU; out-of-band commands, other sessions and events do not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping

from kvik.named import NamedTuple
from kvik.vmm.monitor.errors import QmpError
from kvik.vmm.monitor.schema import ANYTHING, NOTHING, Struct, Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from kvik.vmm.device import Device
    from kvik.vmm.machine import Machine
    from kvik.vmm.monitor.fds import FdSets
    from kvik.vmm.monitor.server import MonitorServer, Session

Arguments = dict[str, "Any"]
Steps = Generator[None, None, "Any"]
Handler = Callable[["Context", Arguments], "Any"]

if TYPE_CHECKING:

    class Hotplug(Protocol):
        """What device_add and device_del need of whoever builds machines. All return at once, or raise KvikError."""

        def plug(self, settings: object) -> Device:
            """Make the device that a settings object of `vmm.config` describes, and plug it."""

        def unplug(self, name: str) -> None:
            """Ask the guest to let a device go; DEVICE_DELETED is emitted when it did."""

        def plug_vcpu(self, number: int, name: str) -> None: ...
        def unplug_vcpu(self, number: int) -> None: ...


class Context(NamedTuple):
    """What a handler works on."""

    machine: Machine
    session: Session
    server: MonitorServer

    def devices(self, *kinds: str) -> Iterator[Any]:
        """Devices of these kinds, or all: the virtio device where one sits behind PCI."""
        for name in list(self.machine.devices):
            device = self.machine.find(name)
            if not kinds or device.kind in kinds:
                yield device

    @property
    def fdsets(self) -> FdSets:
        return self.server.fdsets


class Command(NamedTuple):
    name: str
    handler: Handler
    arguments: Struct = NOTHING
    returns: Type = ANYTHING
    out_of_band: bool = False
    summary: str = ""


def check(
    commands: Mapping[str, Command], name: str, arguments: Any, *, out_of_band: bool
) -> tuple[Command, Arguments]:
    """The command and its checked arguments. Raises `QmpError` in QEMU's words."""
    command = commands.get(name)
    if command is None:
        raise QmpError(f"The command {name[:80]} has not been found", "CommandNotFound")
    if out_of_band and not command.out_of_band:
        raise QmpError(f"The command {name} does not support OOB")
    return command, command.arguments.check(arguments)
