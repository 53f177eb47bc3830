"""The machine: its parts, how they come together, and what can be done to the whole.

    machine = Machine(MachineConfig(...))     # everything opened and in place, nothing runs
    machine.add(SomeDevice("mine"))
    outcome = machine.run()                   # the loop, until the guest powers off or somebody ends it

Threads: the one that calls `run` owns the machine. All methods here belong to it, except `log`, `emit`,
`request_reset`, `request_shutdown`, `request_stop` and `vcpu_failed`, which any thread may call.
"""

from __future__ import annotations

import sys
import time

from kvik.errors import AlreadyExists, HostError, NoDevice, OperationInvalid
from kvik.kvm.constants import Capability
from kvik.kvm.descriptor import KvmError
from kvik.kvm.system import System
from kvik.vmm import layout as at
from kvik.vmm.bus import Bus
from kvik.vmm.interrupts import Doorbells, Interrupts, mask_pics
from kvik.vmm.log import Log, LogLimit, ready
from kvik.vmm.loop import IoThread
from kvik.vmm.memory import GuestMemory, HostMemory, Region
from kvik.vmm.pci.bus import PciBus
from kvik.vmm.runstate import ENDED, RunState
from kvik.vmm.slots import MemorySlots
from kvik.vmm.vcpu import VcpuThread, prepare_signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from kvik.kvm.exits import Exit
    from kvik.vmm.config import MachineConfig
    from kvik.vmm.cpu.hotplug import VcpuHotplug
    from kvik.vmm.device import Device
    from kvik.vmm.state.background import Background
    from kvik.vmm.state.migration import Migration
    from kvik.vmm.state.rewind import Checkpoint
    from kvik.vmm.trace import Trace

__all__ = ["Machine"]


class Machine(RunState):
    """One machine on /dev/kvm. Closes what it opened in `close`, which `run` calls."""

    def __init__(self, config: MachineConfig) -> None:
        super().__init__()
        self.config = config
        self.firmware = bool(config.boot.firmware) or config.boot.firmware_fd >= 0
        self._log = LogLimit(Log(name=config.name, json=config.log == "json"))
        self.started = time.monotonic()
        self.made: dict[str, tuple[str, Any]] = {}  # by a device's name: list of MachineConfig and item it was made of
        self.vcpu_hotplug: VcpuHotplug | None = None  # where more of them may come
        self.io_threads: dict[str, IoThread] = {}  # by the name of the device that each serves
        self.on_thread_start: Callable[[], None] | None = None  # run first on each I/O thread made from now on
        self.self_memory = -1  # /proc/self/mem, where it cannot be opened when a migration wants it
        self.on_vcpu_start: Callable[[], None] | None = None  # and on each vCPU's
        self.outcome = ""
        self.exit_code = 0
        self._failure: HostError | None = None  # of a thread, that `run` shall raise
        self.trace: Trace | None = None
        self.power_button: Callable[[], None] | None = None  # set by the ACPI device
        self.loader: Callable[[], None] | None = None  # puts into memory and registers what runs at power-on
        self.on_close: list[Callable[[], None]] = []
        self.before_end: list[Callable[[], None]] = []  # lets go of what vCPUs may wait for in the kernel
        self._started = False
        self._power_on: Any = None
        self._devices_held = False  # devices of a restored machine wait for its start
        self._checkpoint: Checkpoint | None = None
        self.background: Background | None = None  # its memory is being saved while the guest runs
        self.migration: Migration | None = None  # parameters, and what came of them, once somebody asked
        prepare_signal()
        self.loop.on_error = self._callback_failed
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            self.system = System()
        except OSError as error:
            raise HostError(
                f"cannot open /dev/kvm: {error.strerror}",
                errno=error.errno or 0,
                remedy="see what `kvik doctor` says; without KVM, run the machine on QEMU",
            ) from error
        try:
            self.vm = self.system.create_vm()
            self.vm.set_identity_map_addr(at.KVM_IDENTITY_MAP)
            self.vm.set_tss_addr(at.KVM_TSS)
            readonly = bool(self.vm.check_extension(Capability.READONLY_MEM))
            limit = self.vm.check_extension(Capability.NR_MEMSLOTS) or 32
            self.slots = MemorySlots(self.vm, readonly=readonly, limit=limit)
        except KvmError as error:
            raise _incapable(error) from error
        memory = self.config.memory
        host = HostMemory(shared=memory.shared, hugepages=memory.hugepages, prealloc=memory.prealloc, huge_later=True)
        self.memory = GuestMemory.allocate(memory.size, host, memory.hotplug, firmware=self.firmware)
        for region in self.memory.regions:
            self.back(region)
        self.ports = Bus("port", 0x1_0000)
        self.mmio = Bus("memory", 1 << 52)
        self.interrupts = Interrupts(self.vm)
        self.doorbells = Doorbells(self.vm)
        self.pci = PciBus(legacy_ports=self.firmware, firmware=self.firmware)
        self.pci.attach(self)
        self.devices["pci"] = self.pci
        for bridge in self.pci.devices.values():
            self.devices[bridge.name] = bridge

    def back(self, region: Region, flags: int = 0) -> None:
        """Make a piece of RAM known to KVM, or change its flags."""
        if region.slot < 0:
            region.slot = self.slots.take()
            if region.slot < 0:
                raise HostError("KVM has no memory slot left", remedy="give the machine fewer devices")
        self.vm.set_user_memory_region(region.slot, region.start, region.size, region.address, flags)

    def unback(self, region: Region) -> None:
        """Take it away from the guest again."""
        if region.slot >= 0:
            self.vm.set_user_memory_region(region.slot, region.start, 0, region.address, 0)
            self.slots.give(region.slot)
            region.slot = -1

    # Parts -------------------------------------------------------------------------------------------------------

    def add(self, device: Device, slot: int = 0) -> Device:
        """Take a device in; a PCI or virtio device into PCI slot `slot` (0: the next free one), and if the machine
        runs already, by hot-plug. On an error nothing of it stays."""
        if device.name in self.devices:
            device.close()
            raise AlreadyExists(f"the machine has a device {device.name!r} already", remedy="choose another id")
        carrier = device
        try:
            if hasattr(device, "queue_sizes"):  # a virtio device
                from kvik.vmm.virtio.transport import VirtioPci

                carrier = VirtioPci(device)  # type: ignore[arg-type]  # said by the line above
            if hasattr(carrier, "bars"):  # a PCI device
                plug = self.pci.add if self.status == "prelaunch" else self.pci.plug
                plug(carrier, slot or None)  # type: ignore[arg-type]  # as above
            else:
                carrier.attach(self)
        except BaseException:
            carrier.close()
            device.close()
            raise
        self.devices[device.name] = carrier
        return device

    def remove(self, name: str) -> None:
        """Take a device away at once, whatever the guest thinks of it."""
        device = self.devices.pop(name, None)
        if device is None:
            raise NoDevice(f"the machine has no device {name!r}")
        device.close()
        if (thread := self.io_threads.pop(name, None)) is not None:
            thread.stop()

    def io_thread(self, name: str) -> IoThread:
        """A new thread with a loop, for the device of that name; it ends with the device."""
        thread = IoThread(name)
        thread.loop.on_error = self._callback_failed
        thread.on_start = self.on_thread_start
        thread.start()
        self.io_threads[name] = thread
        return thread

    def find(self, name: str) -> Device:
        """The device of that name: a virtio device, where one sits behind PCI."""
        if name not in self.devices:
            raise NoDevice(f"the machine has no device {name!r}")
        carrier = self.devices[name]
        inner: Device = getattr(carrier, "device", carrier)
        return inner

    def add_vcpu(self, apic_id: int, index: int = -1) -> VcpuThread:
        """A new vCPU, and with the first one the interrupt controllers: KVM wants them before any vCPU, but after
        everything else. Their routes are set by an RCU update, and for 4 to 8 ms from then on each change of a memory
        slot (RAM, and a few pages of each device) waits for its grace period. `index`: the next one unless said."""
        try:
            if not self.vcpus:
                self.vm.create_irqchip()
                mask_pics(self.vm)
            vcpu = self.vm.create_vcpu(apic_id)
        except KvmError as error:
            raise _incapable(error) from error
        thread = VcpuThread(self, len(self.vcpus) if index < 0 else index, vcpu, apic_id)
        thread.on_start = self.on_vcpu_start
        self.vcpus.append(thread)
        return thread

    # Life --------------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Put the loader's program into memory and the vCPUs to its start."""
        if self.loader is not None:
            self.loader()

    def start(self, paused: bool = False) -> None:
        """Start the threads, and with them the guest unless `paused`."""
        self._started = True
        self.memory.allow_huge_pages()
        if not paused:
            self.status = "running"
            self._going = True
            self.emit("RESUME")  # before the guest can cause an event of its own
        for thread in self.vcpus:
            if paused:
                thread.ask_to_park()
            thread.start()
        if not paused:
            if self._devices_held:
                for device in self.devices.values():
                    device.resume()
            if self.vcpus:
                self.vcpus[0].wait_begun()

    def run(self, paused: bool = False) -> str:
        """Start, run the loop until the machine ends, give everything back; why it ended."""
        try:
            if not self._started:
                self.start(paused)
            self.loop.run()
        finally:
            self.close()
        if self._failure is not None:
            raise self._failure
        return self.outcome

    def reset(self, reason: str = "host-qmp-system-reset") -> None:
        """As the reset button: devices, vCPUs and the program in memory as at power-on."""
        guest = reason.startswith("guest")
        if guest and self.config.on_reboot == "shutdown":
            self.shutdown(reason)
            return
        if guest and self.config.on_reboot == "none":
            self.pause("paused")
            return
        with self.paused():
            try:
                self._reset()
            except BaseException as error:
                # Half of it is at power-on, half is not: the guest must not go on like that.
                self.log(f"the machine cannot be reset: {error}")
                if self.status == "running":
                    self.emit("STOP")
                self.status = "internal-error"
                raise
            if self.status in ENDED:
                self.status = "paused"
        self.emit("RESET", {"guest": guest, "reason": reason})

    def _reset(self) -> None:
        for device in list(self.devices.values()):
            if not hasattr(device, "bars"):  # the PCI bus resets what sits on it
                device.reset()
        self._reset_vcpus()
        self.boot()
        self.interrupts.redrive()

    def _reset_vcpus(self) -> None:
        from kvik.vmm.cpu.state import restore_machine

        if self._power_on is not None:
            states = [self.vcpu_at_power_on(thread) for thread in self.vcpus]
            restore_machine(self, {**self._power_on, "vcpus": states})

    def remember_power_on(self) -> None:
        """Keep the state that `reset` goes back to: the boot processor's, from which the others' follow. Call when all
        vCPUs are made and none has run."""
        from kvik.vmm.cpu.state import msr_indices, save_vcpu, save_vm

        boot_processor = save_vcpu(self.vcpus[0].vcpu, msr_indices(self.system))
        self._power_on = {"vm": save_vm(self.vm), "vcpus": [boot_processor]}

    def vcpu_at_power_on(self, thread: VcpuThread) -> dict[str, Any]:
        """What a vCPU is before its first step."""
        from kvik.vmm.cpu.state import application_processor

        boot_processor: dict[str, Any] = self._power_on["vcpus"][0]
        return application_processor(boot_processor, thread.apic_id) if thread.index else boot_processor

    def powerdown(self) -> None:
        """Press the power button."""
        self.emit("POWERDOWN")
        if self.power_button is None:
            raise OperationInvalid("the machine has no power button")
        self.power_button()

    def shutdown(self, reason: str = "guest-shutdown") -> None:
        """The guest powered off, or somebody did it to it."""
        guest = reason.startswith("guest")
        self._end("shutdown", guest, reason)
        if guest and self.config.on_poweroff == "pause" and reason == "guest-shutdown":
            self.emit("STOP")
        else:
            self.quit(reason)

    def quit(self, reason: str = "host-qmp-quit") -> None:
        """End the process's work: `run` returns."""
        self._let_go()
        if self.status != "shutdown":
            self._end("shutdown", False, reason)
        self.outcome = reason
        self.loop.stop()

    def _let_go(self) -> None:
        """vCPUs that wait for memory cannot park. They are kicked first: none enters guest mode once it has that."""
        callbacks, self.before_end = self.before_end, []
        if callbacks:
            for thread in self.vcpus:
                thread.ask_to_park()
        for callback in callbacks:
            callback()

    def _end(self, status: str, guest: bool, reason: str) -> None:
        self.status = status
        self._apply()
        self.emit("SHUTDOWN", {"guest": guest, "reason": reason})

    # State: what these do is in `kvik.vmm.state`, which no start has to wait for ---------------------------------

    def hold_devices(self) -> None:
        """Before the first start, while a state is put in: devices do nothing until the guest runs."""
        self._devices_held = True
        for device in self.devices.values():
            device.pause()

    def save(self, directory: str, compression: str = "none") -> None:
        """Write the whole machine to a new directory: RAM without zeroes, CPUs, devices. It goes on afterwards.
        `compression`: none (restored lazily) or zlib."""
        from kvik.vmm.state.saving import save

        save(self, directory, compression)

    @classmethod
    def restore(cls, directory: str, config: MachineConfig | None = None) -> Machine:
        """A machine out of what `save` wrote, not started yet. `config` says what is different on the host's side."""
        from kvik.vmm.config import MachineConfig
        from kvik.vmm.state.snapshot import restore

        config = config or MachineConfig()
        config.restore = directory
        return restore(config)

    def checkpoint(self) -> None:
        """Remember everything as it is now, for `rewind`. Costs as much memory as the guest has in use."""
        from kvik.vmm.state.rewind import Checkpoint

        self.forget_checkpoint()
        self._checkpoint = Checkpoint(self)

    def rewind(self) -> int:
        """Back to the checkpoint, in place: the pages that changed since, CPUs and devices; how many pages."""
        if self._checkpoint is None:
            raise OperationInvalid("there is no checkpoint to go back to", remedy="call checkpoint() first")
        return self._checkpoint.rewind()

    def forget_checkpoint(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.close()
            self._checkpoint = None

    @property
    def started_threads(self) -> bool:
        """Whether the vCPUs' threads are there, be it parked."""
        return self._started

    # From any thread ---------------------------------------------------------------------------------------------

    def log(self, text: str, error: BaseException | None = None) -> None:
        """One line on standard error, and where an `error` came from. A guest cannot flood it, nor can a reader that
        does not read stop it."""
        if self._log.write("warning", text) and error is not None and ready(2):
            sys.excepthook(type(error), error, error.__traceback__)

    def request_reset(self, reason: str = "guest-reset") -> None:
        self.loop.call_soon(lambda: self.reset(reason))

    def request_shutdown(self, reason: str = "guest-shutdown") -> None:
        self.loop.call_soon(lambda: self.shutdown(reason))

    def request_stop(self, status: str, event: str = "", data: dict[str, Any] | None = None) -> None:
        """Stop the guest for a reason that is not the user's: io-error, watchdog, guest-panicked."""

        def stop() -> None:
            if event:
                self.emit(event, data)
            self.pause(status)

        self.loop.call_soon(stop)

    def current_vcpu(self) -> VcpuThread | None:
        """The vCPU whose thread calls, if one does: a device that asks for a reset holds it with this."""
        import _thread

        mine = _thread.get_native_id()
        return next((thread for thread in self.vcpus if thread.thread_id == mine), None)

    def hold_caller(self) -> None:
        """Called by a device amid a guest's access: the vCPU is not to go on before the loop has dealt with it."""
        if (thread := self.current_vcpu()) is not None:
            thread.hold()

    def vcpu_failed(self, thread: VcpuThread, text: str, error: BaseException | None) -> None:
        self.log(f"vCPU {thread.index} cannot go on: {text}", error)
        self.loop.call_soon(lambda: self.pause("internal-error"))

    def vcpu_cannot_start(self, thread: VcpuThread, error: Exception) -> None:
        """Its thread could not be confined: it has not run, and it will not. `run` ends with this error."""

        def end() -> None:
            self._failure = HostError(
                f"vCPU {thread.index} cannot start: {error}", errno=getattr(error, "errno", None) or 0
            )
            self.quit("host-error")

        self.loop.call_soon(end)

    def system_event(self, event: Exit) -> None:
        self.log(f"KVM asks for {event}")
        self.request_shutdown("guest-shutdown")

    def halted(self, thread: VcpuThread) -> None:
        self.loop.call_soon(lambda: self.shutdown("guest-shutdown"))

    def _callback_failed(self, error: BaseException) -> None:
        """A callback of a device raised: a bug of ours, or a device whose host side is gone. The others go on."""
        self.log(f"{type(error).__name__}: {error}", None if isinstance(error, OSError) else error)

    # The end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._let_go()
        for thread in self.vcpus:
            thread.end()
        self.forget_checkpoint()
        # One that cannot be closed must not keep the others open.
        for close in [*reversed(self.on_close), *(device.close for device in reversed(list(self.devices.values())))]:
            try:
                close()
            except Exception as error:
                self.log(f"{type(error).__name__} at the end: {error}", error)
        self.devices.clear()
        for io_thread in self.io_threads.values():
            io_thread.stop()
        self.io_threads.clear()
        for thread in self.vcpus:
            thread.vcpu.close()
        for name in ("vm", "system"):
            if hasattr(self, name):
                getattr(self, name).close()
        if hasattr(self, "memory"):
            self.memory.close()
        self.loop.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _incapable(error: KvmError) -> HostError:
    return HostError(
        f"this host's KVM cannot make a machine: {error}",
        errno=error.errno or 0,
        remedy="see what `kvik doctor` says of this host",
    )
