"""From files to a machine that can take its first step: kernel, initrd, command line, memory map, entry state."""

from __future__ import annotations

from kvik.errors import ImageError, InvalidArgument
from kvik.vmm.boot import pvh
from kvik.vmm.boot.entry import Entry
from kvik.vmm.boot.memory_map import memory_map
from kvik.vmm.boot.source import Source
from kvik.vmm.layout import PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.vmm.memory import GuestMemory

__all__ = ["Entry", "KernelConfig", "load_kernel"]

PROTOCOLS = ("auto", "pvh", "bzimage")
COMMAND_LINE_SIZE = 2048  # Linux's, on x86 (arch/x86/include/asm/setup.h), with the zero byte


class KernelConfig:
    """What to boot. `kernel` and `initrd` are paths or open descriptors; `protocol` is one of PROTOCOLS.

    `stable`: the file behind a kernel descriptor is never written again (it comes from kvik's own cache), so that its
    pages may be mapped. `cache` is the directory of uncompressed kernels, "" for none.
    """

    __slots__ = ("cache", "cmdline", "initrd", "kernel", "protocol", "stable")

    def __init__(
        self,
        kernel: str | int,
        initrd: str | int | None = None,
        *,
        cmdline: str = "",
        protocol: str = "auto",
        cache: str = "",
        stable: bool = False,
    ) -> None:
        self.kernel, self.initrd, self.cmdline = kernel, initrd, cmdline
        self.protocol, self.cache, self.stable = protocol, cache, stable


def load_kernel(
    memory: GuestMemory, config: KernelConfig, *, tables: Sequence[tuple[int, bytes]] = (), fresh: bool = True
) -> Entry:
    """Load everything and say how to start. `tables` is what `acpi.build` made; those above 1 MiB are kept out of the
    memory map. `fresh`: guest memory is all zeros (not so after a reset).

    Raises `NotFound`, `HostError`, `ImageError` (damaged files) and `InvalidArgument` (too little memory, a command
    line that is too long), each with what to do.
    """
    if config.protocol not in PROTOCOLS:
        raise InvalidArgument(f"unknown boot protocol {config.protocol!r}", remedy=f"one of {', '.join(PROTOCOLS)}")
    kept = [(address, len(data)) for address, data in tables]
    with Source("kernel", config.kernel) as source:
        elf = pvh.parse(source)
        if not elf.entry:
            raise ImageError(f"the kernel {source.name} has no PVH entry", remedy="build it with CONFIG_PVH=y")
        cmdline = command_line(config.cmdline, COMMAND_LINE_SIZE - 1)
        end = pvh.load(memory, source, elf, stable=config.stable, fresh=fresh)
        initrd = load_initrd(memory, config.initrd, above=end, ceiling=_ceiling(memory, kept))
        pvh.write_start_info(memory, memory_map(memory, kept), cmdline=cmdline, initrd=initrd)
        entry = pvh.entry(elf)
    entry.prepare(memory)
    return entry


def command_line(text: str, limit: int) -> bytes:
    """As bytes without the zero behind; at most `limit`."""
    data = text.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise InvalidArgument("the kernel's command line contains a zero byte", remedy="leave it out")
    if len(data) > limit:
        raise InvalidArgument(
            f"the kernel's command line has {len(data)} bytes, this kernel takes {limit}", remedy="shorten it"
        )
    return data


def load_initrd(memory: GuestMemory, file: str | int | None, *, above: int, ceiling: int) -> tuple[int, int] | None:
    """Put the initrd as high as possible below `ceiling`, out of the way of a kernel that unpacks itself; its
    (address, size). `above`: where the kernel ends."""
    if file is None:
        return None
    with Source("initrd", file) as source:
        address = (ceiling - source.size) & ~(PAGE - 1)
        if address < above:
            need = above + source.size + PAGE
            raise InvalidArgument(
                f"the initrd {source.name} ({source.size >> 20} MiB) does not fit behind the kernel",
                remedy=f"give the machine at least {(need >> 20) + 32} MiB of memory, or a smaller initrd",
            )
        source.load(memory, address, 0, source.size)
        return address, source.size


def _ceiling(memory: GuestMemory, kept: Sequence[tuple[int, int]]) -> int:
    """The end of what low RAM is free: below the ACPI tables if they lie there."""
    low = memory.regions[0]
    return min([low.end, *(start for start, _ in kept if low.start + (1 << 20) <= start < low.end)])
