"""The third pass: does a completed document make sense? What only one hypervisor or host cannot do is refused by its
driver, not here. Every refusal is a ConfigError with the path of the element; `prepare.located` adds the line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from kvik.conf.cpuset import parse_cpuset
from kvik.conf.devices_xml import bootable_devices
from kvik.conf.domain import Domain
from kvik.conf.iothreads import iothreads, used
from kvik.conf.units import MAX_KIB
from kvik.conf.validate_devices import validate_devices
from kvik.errors import ConfigError

MAX_NAME = 255  # bytes: the name is a file name, with .xml behind it in some places
MAX_VCPUS = 4096
MAX_IOTHREADS = 1024
MAX_ADJUSTMENT = 100 * 366 * 86400  # seconds that a clock may be off
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def validate_name(name: str, path: str = "/domain/name") -> None:
    """A name becomes file names, command line arguments and lines of output: nothing that changes their meaning."""
    reason = ""
    if not name.strip():
        reason = "the name is empty"
    elif name in (".", ".."):
        reason = f"the name {name!r} is a directory"
    elif "/" in name:
        reason = f"the name {name!r} holds a '/'"
    elif name.startswith("-"):
        reason = f"the name {name!r} begins with '-' and would be taken for an option"
    elif name != name.strip():
        reason = f"the name {name!r} begins or ends with white space"
    elif any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp", "Cf") for character in name):
        reason = f"the name {name!r} holds a control character"
    elif len(name.encode("utf-8", "surrogatepass")) > MAX_NAME - len(".xml"):
        reason = f"the name has {len(name.encode())} bytes; {MAX_NAME - len('.xml')} are the most a file name leaves"
    if reason:
        raise ConfigError(reason, path=path)


def absolute(value: str | None, path: str, what: str) -> None:
    """Refuse a relative path, and one with a character that would break a line or a command."""
    if value is None:
        return
    if not value.startswith("/"):
        raise ConfigError(f"{what} {value!r} is not an absolute path", path=path)
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise ConfigError(f"{what} {value!r} holds a control character", path=path)


def validate(domain: Domain) -> None:
    """Raises ConfigError for the first thing that is wrong."""
    validate_name(domain.name)
    if domain.uuid is None or not _UUID.fullmatch(domain.uuid):
        raise ConfigError(f"{domain.uuid!r} is not a UUID", path="/domain/uuid")
    if domain.title is not None and "\n" in domain.title:
        raise ConfigError("a title is one line", path="/domain/title", remedy="use <description> for more")
    _memory(domain)
    _vcpus(domain)
    _numa(domain)
    _boot(domain)
    _tuning(domain)
    _clock(domain)
    for index, label in enumerate(domain.seclabels, 1):
        if label.type == "static" and not label.label:
            raise ConfigError("a static seclabel needs a <label>", path=f"/domain/seclabel[{index}]")
    validate_devices(domain)


def _clock(domain: Domain) -> None:
    clock = domain.clock
    if clock is None:
        return
    if clock.adjustment is not None and not (clock.adjustment == "reset" and clock.offset in ("utc", "localtime")):
        seconds = _seconds(clock.adjustment)
        if seconds is None or abs(seconds) > MAX_ADJUSTMENT:
            raise ConfigError(
                f"{clock.adjustment!r} is no adjustment: seconds, at most {MAX_ADJUSTMENT} (a hundred years)",
                path="/domain/clock/@adjustment",
            )
    if clock.offset == "timezone" and not clock.timezone:
        raise ConfigError(
            "a clock of offset 'timezone' needs a timezone",
            path="/domain/clock/@timezone",
            remedy="such as timezone='Europe/Oslo'",
        )
    if clock.offset == "absolute" and clock.start is None:
        raise ConfigError("a clock of offset 'absolute' needs a start", path="/domain/clock/@start")


def _seconds(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,12}", text) else None


def _memory(domain: Domain) -> None:
    path = "/domain/memory"
    if domain.memory <= 0:
        raise ConfigError("a machine needs memory", path=path)
    if domain.memory > MAX_KIB:
        raise ConfigError(f"{domain.memory} KiB is more than 2^63 bytes", path=path)
    current = domain.current_memory
    if current is not None and not 0 < current <= domain.memory:
        raise ConfigError(
            f"current memory {current} KiB is not between 1 and the maximum of {domain.memory} KiB",
            path="/domain/currentMemory",
        )
    if domain.max_memory is not None:
        path = "/domain/maxMemory"
        if domain.max_memory.value < domain.memory:
            raise ConfigError("maxMemory is below memory", path=path)
        if not domain.max_memory.slots:
            raise ConfigError("maxMemory needs slots, of which there is at least one", path=path)
    elif domain.devices.memorys:
        raise ConfigError("memory modules need <maxMemory slots=...>", path="/domain/devices/memory")


def _vcpus(domain: Domain) -> None:
    vcpu = domain.vcpu
    count = vcpu.value if vcpu is not None else 1
    if not 1 <= count <= MAX_VCPUS:
        raise ConfigError(f"{count} vCPUs are not between 1 and {MAX_VCPUS}", path="/domain/vcpu")
    if vcpu is not None:
        if vcpu.current is not None and not 1 <= vcpu.current <= count:
            raise ConfigError(f"current {vcpu.current} is not between 1 and {count}", path="/domain/vcpu/@current")
        _set(vcpu.cpuset, "/domain/vcpu/@cpuset")
    topology = domain.cpu.topology if domain.cpu is not None else None
    if topology is not None:
        parts = (topology.sockets, topology.dies, topology.clusters, topology.cores, topology.threads)
        if any(part == 0 for part in parts):
            raise ConfigError("every level of a topology has at least one", path="/domain/cpu/topology")
        if topology.total != count:
            raise ConfigError(
                f"the topology has {topology.total} vCPUs, <vcpu> says {count}", path="/domain/cpu/topology"
            )
    entries = domain.vcpus.vcpus if domain.vcpus is not None else []
    _unique((str(entry.id) for entry in entries), "/domain/vcpus/vcpu", "vCPU")
    for index, entry in enumerate(entries, 1):
        if entry.id >= count:
            raise ConfigError(f"vCPU {entry.id} does not exist", path=f"/domain/vcpus/vcpu[{index}]")
        if entry.enabled is None:
            raise ConfigError("enabled is yes or no", path=f"/domain/vcpus/vcpu[{index}]/@enabled")
        if not entry.enabled and entry.hotpluggable is False:
            raise ConfigError(
                f"vCPU {entry.id} is neither there nor pluggable", path=f"/domain/vcpus/vcpu[{index}]/@hotpluggable"
            )
        if entry.id == 0 and (not entry.enabled or entry.hotpluggable):
            raise ConfigError("vCPU 0 is always there and cannot be unplugged", path=f"/domain/vcpus/vcpu[{index}]")
    if entries:
        if all(entry.id for entry in entries):
            raise ConfigError("vCPU 0 is not told of", path="/domain/vcpus")
        orders = [entry.order for entry in entries if entry.order is not None and entry.enabled]
        _unique(map(str, orders), "/domain/vcpus/vcpu", "order")
        if orders and len(orders) != sum(bool(entry.enabled) for entry in entries):
            raise ConfigError("order is given for every vCPU that is there, or for none", path="/domain/vcpus")
    for index, feature in enumerate(domain.cpu.features if domain.cpu is not None else [], 1):
        if not re.fullmatch(r"[A-Za-z0-9_.+-]+", feature.name):
            raise ConfigError(f"{feature.name!r} is no CPU feature", path=f"/domain/cpu/feature[{index}]")
    if domain.cpu is not None:
        _unique((feature.name for feature in domain.cpu.features), "/domain/cpu/feature", "CPU feature")


def _numa(domain: Domain) -> None:
    cells = domain.cpu.numa.cells if domain.cpu is not None and domain.cpu.numa is not None else []
    seen: set[int] = set()
    count = domain.vcpu.value if domain.vcpu is not None else 1
    _unique((str(cell.id) for cell in cells), "/domain/cpu/numa/cell", "cell")
    for index, cell in enumerate(cells, 1):
        path = f"/domain/cpu/numa/cell[{index}]"
        cpus = _set(cell.cpus, path + "/@cpus")
        if cpus & seen:
            raise ConfigError(f"vCPU {min(cpus & seen)} is in two cells", path=path)
        if cpus and max(cpus) >= count:
            raise ConfigError(f"vCPU {max(cpus)} does not exist", path=path)
        seen |= cpus


def _boot(domain: Domain) -> None:
    os = domain.os
    if os.type.value != "hvm":
        raise ConfigError(f"guests of type {os.type.value!r} cannot be run", path="/domain/os/type")
    for field in ("arch", "machine"):
        value = getattr(os.type, field)
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
            raise ConfigError(f"{value!r} is no {field}", path=f"/domain/os/type/@{field}")
    for field in ("kernel", "initrd", "dtb", "shim"):
        absolute(getattr(os, field), f"/domain/os/{field}", field)
        if field != "kernel" and getattr(os, field) is not None and os.kernel is None:
            raise ConfigError(f"{field} without a kernel", path=f"/domain/os/{field}")
    if os.cmdline is not None:
        if os.kernel is None:
            raise ConfigError("a command line without a kernel", path="/domain/os/cmdline")
        if len(os.cmdline.encode()) > 65536 or "\0" in os.cmdline:
            raise ConfigError("the kernel's command line is too long", path="/domain/os/cmdline")
    if os.loader is not None:
        absolute(os.loader.value, "/domain/os/loader", "loader")
        if os.loader.stateless and os.nvram is not None:
            raise ConfigError("a stateless loader has no NVRAM", path="/domain/os/nvram")
    if os.nvram is not None:
        absolute(os.nvram.value, "/domain/os/nvram", "NVRAM")
        absolute(os.nvram.template, "/domain/os/nvram/@template", "template")
        if os.nvram.value is not None and os.nvram.source is not None:
            raise ConfigError("NVRAM is given by path and by <source>", path="/domain/os/nvram")
    _unique((boot.dev for boot in os.boots), "/domain/os/boot", "boot device")
    orders: dict[int, str] = {}
    for short, item in bootable_devices(domain.devices):
        if item.boot is None:
            continue
        path = f"/domain/devices/{short}/boot"
        if os.boots:
            raise ConfigError("boot order stands in <os> or with the devices, not both", path=path)
        if item.boot.order < 1:
            raise ConfigError("boot order counts from 1", path=path)
        if item.boot.order in orders:
            raise ConfigError(f"boot order {item.boot.order} is that of {orders[item.boot.order]}", path=path)
        orders[item.boot.order] = path.removesuffix("/boot")
    bios = os.bios
    if bios is not None and bios.reboot_timeout is not None and not -1 <= bios.reboot_timeout <= 65535:
        raise ConfigError("rebootTimeout is not between -1 and 65535", path="/domain/os/bios")


def _tuning(domain: Domain) -> None:
    count = domain.vcpu.value if domain.vcpu is not None else 1
    if domain.iothreads is not None and domain.iothreads > MAX_IOTHREADS:
        raise ConfigError(f"more than {MAX_IOTHREADS} I/O threads", path="/domain/iothreads")
    if domain.iothreadids is not None:
        ids = [item.id for item in domain.iothreadids.iothreads]
        _unique(map(str, ids), "/domain/iothreadids/iothread", "I/O thread")
        if 0 in ids:
            raise ConfigError("I/O threads count from 1", path="/domain/iothreadids/iothread")
        for item in domain.iothreadids.iothreads:
            if (item.thread_pool_min or 0) > (item.thread_pool_max or item.thread_pool_min or 0):
                raise ConfigError(
                    f"thread_pool_min of I/O thread {item.id} is above its thread_pool_max",
                    path="/domain/iothreadids/iothread",
                )
    known = {item.id for item in iothreads(domain)}
    for number, who in used(domain):
        if number not in known:
            raise ConfigError(
                f"{who} names I/O thread {number}, which the machine has not",
                path="/domain/iothreads",
                remedy=f"<iothreads>{max(number, 1)}</iothreads>, or name it in <iothreadids>",
            )
    tune = domain.cputune
    if tune is not None:
        for index, pin in enumerate(tune.vcpupins, 1):
            path = f"/domain/cputune/vcpupin[{index}]"
            if pin.vcpu >= count:
                raise ConfigError(f"vCPU {pin.vcpu} does not exist", path=path)
            _set(pin.cpuset, path + "/@cpuset")
        _unique((str(pin.vcpu) for pin in tune.vcpupins), "/domain/cputune/vcpupin", "pinned vCPU")
        if tune.emulatorpin is not None:
            _set(tune.emulatorpin.cpuset, "/domain/cputune/emulatorpin/@cpuset")
        for index, thread in enumerate(tune.iothreadpins, 1):
            path = f"/domain/cputune/iothreadpin[{index}]"
            _set(thread.cpuset, path + "/@cpuset")
            if thread.iothread not in known:
                raise ConfigError(f"there is no I/O thread {thread.iothread} to pin", path=path)
        _unique((str(pin.iothread) for pin in tune.iothreadpins), "/domain/cputune/iothreadpin", "pinned I/O thread")
        for field in ("period", "global_period", "emulator_period", "iothread_period"):
            value = getattr(tune, field)
            if value is not None and not 1000 <= value <= 1_000_000:
                raise ConfigError(f"{value} us is not between 1000 and 1000000", path=f"/domain/cputune/{field}")
    if domain.numatune is not None and domain.numatune.memory is not None:
        _set(domain.numatune.memory.nodeset, "/domain/numatune/memory/@nodeset")
    memtune = domain.memtune
    if memtune is not None and (memtune.swap_hard_limit or MAX_KIB) < (memtune.hard_limit or 0):
        raise ConfigError("swap_hard_limit is below hard_limit", path="/domain/memtune/swap_hard_limit")
    if domain.resource is not None:
        absolute(domain.resource.partition, "/domain/resource/partition", "partition")
        if domain.resource.partition is not None and ".." in domain.resource.partition.split("/"):
            raise ConfigError("a partition does not climb", path="/domain/resource/partition")


def _set(text: str | None, path: str) -> frozenset[int]:
    if text is None:
        return frozenset()
    try:
        members = parse_cpuset(text)
    except ValueError as error:
        raise ConfigError(str(error), path=path) from None
    if not members:
        raise ConfigError(f"the set {text!r} is empty", path=path)
    return members


def _unique(keys: Iterable[str], path: str, what: str) -> None:
    seen: set[str] = set()
    for index, key in enumerate(keys, 1):
        if key in seen:
            raise ConfigError(f"{what} {key} appears twice", path=f"{path}[{index}]")
        seen.add(key)
