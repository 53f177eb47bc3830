"""`build`: a complete document to QEMU's command line. Pure: the same input gives the same words, for ever.

Descriptors come in as numbers by name (see `descriptors.py` for the names); a name that is missing means that QEMU
opens the path itself, which is what a person wants to see in `domxml-to-native`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from kvik.conf.devices import chardev, controller, disk, hostdev, interface, memory, other
from kvik.conf.devices import display as screens
from kvik.conf.domain import Domain
from kvik.conf.iothreads import iothreads
from kvik.conf.tuning import IoThread, IoThreadPoll
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.names import MONITOR
from kvik.hypervisor.qemu.argv import chardevs, controllers, disks, display, interfaces, machine, processor, small
from kvik.hypervisor.qemu.argv.options import Context, Files, Parts, json_text, keyval
from kvik.hypervisor.qemu.capabilities import QemuCapabilities

__all__ = ["CommandLine", "build", "iothread_object", "make_context", "netdev_argument", "parts_of"]

POOL_LIMITS = 7_001_000  # QEMU's version from which on a pool of threads has limits
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class CommandLine:
    """`fds` are the descriptors that QEMU must inherit, under the numbers that `argv` mentions."""

    argv: list[str]
    env: dict[str, str]
    fds: tuple[int, ...]


def make_context(domain: Domain, capabilities: QemuCapabilities, files: Files) -> Context:
    name = domain.os.type.machine or ""
    kind = capabilities.machine(name)
    if kind is None and capabilities.machines:
        raise ConfigUnsupported(
            f"{capabilities.binary} has no machine type {name!r}",
            path="/domain/os/type/@machine",
            remedy=f"{capabilities.binary} -machine help lists them",
        )
    context = Context(domain, capabilities, files, kind.name if kind else name)
    for item in domain.devices.controllers:
        # Of an EHCI and its companions, which share an index, the EHCI carries the bus.
        if item.alias is not None and item.master is None:
            context.controllers[item.type, item.index or 0] = item.alias.name
    context.boot_index = machine.boot_indexes(domain)
    return context


def build(
    domain: Domain,
    capabilities: QemuCapabilities,
    files: Mapping[str, int] | None = None,
    *,
    paused: bool = True,
    now: float = 0.0,
    incoming: bool = False,
    by_io_uring: Collection[str] = (),
) -> CommandLine:
    """`now`, in seconds since the epoch, matters to <clock offset='variable'> only. `incoming`: QEMU waits to be filled
    instead of booting. `by_io_uring`: images of `files` that are read and written so. Raises `ConfigUnsupported` for
    what this QEMU cannot do."""
    fds = dict(files or {})
    passed = Files(fds, by_io_uring=by_io_uring)
    context = make_context(domain, capabilities, passed)
    head = [
        "-name",
        keyval("", {"guest": domain.name, "debug-threads": True}),
        *(["-S"] if paused else []),
        *(["-incoming", "defer"] if incoming else []),
        *("-no-user-config", "-nodefaults", "-sandbox", SANDBOX, "-msg", "timestamp=on"),
    ]
    memory_argv, memory_backend = processor.memory(context)
    body = [
        *machine.machine(context, memory_backend),
        *machine.firmware(context),
        *processor.cpu(context),
        *memory_argv,
        *processor.topology(context),
        *_iothreads(domain, capabilities),
        *(["-uuid", domain.uuid] if domain.uuid else []),
        *machine.smbios(domain),
        *_monitor(passed),
        *machine.clock(domain, now),
        *machine.power_actions(domain),
        *machine.boot_options(context),
        *_generation(domain),
        *display.graphics_arguments(context),
        *display.audio_arguments(context),
    ]
    for parts in _all_parts(context):
        body += _arguments(context, parts)
    extra = domain.qemu_commandline
    if extra is not None:
        body += extra.args
    sets: list[str] = []
    for name, fd in passed.sets.items():
        sets += ["-add-fd", keyval("", {"fd": fd, "set": fd, "opaque": name})]
    argv = [capabilities.binary, *head, *sets, *body]
    for word in argv:
        if "\0" in word:
            raise ConfigUnsupported("a value contains a NUL character, which no command line can hold")
    env = {**machine.clock_environment(domain), **(dict(extra.env) if extra is not None else {})}
    return CommandLine(argv, env, tuple(sorted(set(fds.values()))))


def _monitor(files: Files) -> list[str]:
    fd = files.fd(MONITOR)
    where = {"fd": fd} if fd is not None else {"path": "monitor.sock"}
    chardev = keyval("socket", {"id": "charmonitor", **where, "server": True, "wait": False})
    return ["-chardev", chardev, "-mon", "chardev=charmonitor,id=monitor,mode=control"]


def _iothreads(domain: Domain, capabilities: QemuCapabilities) -> list[str]:
    argv: list[str] = []
    for thread in iothreads(domain):
        argv += ["-object", json_text(iothread_object(thread, capabilities))]
    pool = domain.defaultiothread
    if pool is not None:  # of the main loop, which serves whatever no I/O thread does
        limits = {"thread-pool-min": pool.thread_pool_min, "thread-pool-max": pool.thread_pool_max}
        argv += ["-object", json_text({"qom-type": "main-loop", "id": "main-loop", **limits})]
    return argv


def iothread_object(thread: IoThread, capabilities: QemuCapabilities) -> dict[str, object]:
    """QAPI's IothreadProperties. Raises `ConfigUnsupported` for a pool's limits where QEMU has none."""
    pooled = {"thread-pool-min": thread.thread_pool_min, "thread-pool-max": thread.thread_pool_max}
    if any(value is not None for value in pooled.values()) and capabilities.version < POOL_LIMITS:
        raise ConfigUnsupported(
            f"{capabilities.binary} cannot limit the threads of an I/O thread's pool: QEMU 7.1 can",
            path="/domain/iothreadids",
        )
    poll = thread.poll or IoThreadPoll()
    return {
        "qom-type": "iothread",
        "id": f"iothread{thread.id}",
        **pooled,
        "poll-max-ns": poll.max,
        "poll-grow": poll.grow,
        "poll-shrink": poll.shrink,
    }


def _generation(domain: Domain) -> list[str]:
    argv: list[str] = []
    if domain.genid is not None:
        argv += ["-device", json_text({"driver": "vmgenid", "guid": domain.genid.value or "auto", "id": "vmgenid0"})]
    core = domain.features.vmcoreinfo if domain.features else None
    if core is not None and core.state:
        argv += ["-device", json_text({"driver": "vmcoreinfo"})]
    return argv


def netdev_argument(context: Context, netdev: dict[str, object]) -> str:
    """JSON since QEMU 7.2; before it key=value."""
    if context.capabilities.version >= 7_002_000:
        return json_text(netdev)
    flat: dict[str, Any] = {key: value for key, value in netdev.items() if key != "type"}
    for key in ("hostfwd", "guestfwd"):
        if key in flat:
            flat[key] = [item["str"] for item in flat[key]]
    return keyval(str(netdev["type"]), flat)


def _arguments(context: Context, parts: Parts) -> list[str]:
    argv: list[str] = []
    for item in parts.objects:
        argv += ["-object", json_text(item)]
    for character in parts.chardevs:
        argv += ["-chardev", character.argument()]
    for node in parts.blockdevs:
        argv += ["-blockdev", block_text(node)]
    for netdev in parts.netdevs:
        argv += ["-netdev", netdev_argument(context, netdev)]
    argv += parts.arguments
    for device in parts.devices:
        argv += ["-device", json_text(device)]
    return argv


def block_text(node: dict[str, object]) -> str:
    """As `json_text`, keeping `backing: null`, which ends a chain."""
    text = json_text({key: value for key, value in node.items() if key != "backing" or value is not None})
    return text if node.get("backing", "") is not None else f'{text[:-1]},"backing":null}}'


def parts_of(context: Context, device: object) -> Parts:
    """One device of any kind. Raises `ConfigUnsupported` for kinds that QEMU has not."""
    make = _MAKERS.get(type(device))
    if make is None:
        raise ConfigUnsupported(f"QEMU has no device of kind {type(device).__name__}")
    return make(context, device)


# mypy cannot tie each key to its own maker's parameter; the table is checked by the goldens instead.
_MAKERS: dict[type, Callable[[Context, Any], Parts]] = {
    chardev.Serial: chardevs.serial_parts,
    chardev.Parallel: chardevs.parallel_parts,
    chardev.Console: chardevs.console_parts,
    chardev.Channel: chardevs.channel_parts,
    hostdev.Redirdev: chardevs.redirdev_parts,
    hostdev.Smartcard: chardevs.smartcard_parts,
    hostdev.Hostdev: small.hostdev_parts,
    controller.Controller: controllers.controller_parts,
    disk.Disk: disks.disk_parts,
    interface.Interface: interfaces.interface_parts,
    memory.Memballoon: small.balloon_parts,
    memory.Memory: small.memory_parts,
    memory.Shmem: small.shmem_parts,
    other.Crypto: small.crypto_parts,
    other.Filesystem: small.filesystem_parts,
    other.Hub: small.hub_parts,
    other.Panic: small.panic_parts,
    other.Rng: small.rng_parts,
    other.Tpm: small.tpm_parts,
    other.Vsock: small.vsock_parts,
    other.Iommu: small.iommu_parts,
    screens.Input: display.input_parts,
    screens.Sound: display.sound_parts,
}


def _all_parts(context: Context) -> Iterator[Parts]:
    """Buses before what sits on them; the rest in the document's order, kind by kind."""
    devices = context.domain.devices
    for each in _iommus_and_controllers(context):
        yield parts_of(context, each)
    if any(item.target.bus == "fdc" for item in devices.disks) and not context.is_i440fx:
        declared = any(item.type == "fdc" for item in devices.controllers)
        yield Parts(devices=[] if declared else [{"driver": "isa-fdc", "id": "fdc"}])
    for each in chain(
        *(devices.hubs, devices.disks, devices.filesystems, devices.interfaces, devices.smartcards),
        *(devices.serials, devices.parallels, devices.channels, devices.consoles, devices.tpms, devices.inputs),
    ):
        yield parts_of(context, each)
    videos = sorted(devices.videos, key=lambda item: not (item.model and item.model.primary))
    for number, video in enumerate(videos):
        yield display.video_parts(context, video, number == 0)
    for each in chain(devices.sounds, devices.hostdevs, devices.redirdevs):
        yield parts_of(context, each)
    for number, watchdog in enumerate(devices.watchdogs):
        yield small.watchdog_parts(context, watchdog, number == 0)
    for each in chain(
        *(devices.shmems, devices.rngs, devices.panics, devices.memorys, devices.cryptos),
        *([single] for single in (devices.memballoon, devices.vsock) if single is not None),
    ):
        yield parts_of(context, each)


def _iommus_and_controllers(context: Context) -> Iterator[object]:
    """The IOMMU before every device that it translates for; each PCI bridge after the one it sits on; then the rest,
    companions after their EHCI, and smartcard readers, which sit on USB, last. Raises `ConfigUnsupported` for bridges
    that sit on each other in a circle.
    """
    devices = context.domain.devices
    if devices.iommu is not None:
        yield devices.iommu
    waiting = sorted((item for item in devices.controllers if item.type == "pci"), key=lambda item: item.index or 0)
    present = {0}
    while waiting:
        ready = [item for item in waiting if item.address is None or (item.address.bus or 0) in present]
        if not ready:
            stuck = ", ".join(str(item.index) for item in waiting)
            raise ConfigUnsupported(f"PCI controllers {stuck} sit on buses that do not exist", path="/domain/devices")
        yield from ready
        present |= {item.index or 0 for item in ready}
        waiting = [item for item in waiting if item not in ready]
    others = (item for item in devices.controllers if item.type != "pci")
    yield from sorted(others, key=lambda item: (item.type == "ccid", item.master is not None))
