"""From files to a machine that can take its first step: kernel, initrd, command line, memory map, entry state.

An ELF kernel is entered by PVH, a bzImage either unpacked (once, into a cache) and then by PVH, or as it is.
"""

from __future__ import annotations

from kvik.errors import ImageError, InvalidArgument
from kvik.vmm.boot import bzimage, pvh
from kvik.vmm.boot.entry import Entry
from kvik.vmm.boot.memory_map import memory_map
from kvik.vmm.boot.source import Source
from kvik.vmm.layout import HIGH_MEMORY, PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.vmm.config import BootConfig
    from kvik.vmm.memory import GuestMemory

__all__ = ["BootFiles", "Entry", "load_kernel"]

PROTOCOLS = ("auto", "pvh", "bzimage")
COMMAND_LINE_SIZE = 2048  # Linux's, on x86 (arch/x86/include/asm/setup.h), with the zero byte
REBUILD = "fetch or build it again"


class BootFiles:
    """The files that a machine starts from, open as long as it lives: a reset finds what the start found, whatever
    became of the names meanwhile, and a sandboxed machine could not open them again. `unpacked` is the ELF kernel
    inside `kernel`, where one is entered instead."""

    __slots__ = ("initrd", "kernel", "unpacked")

    def __init__(self, config: BootConfig) -> None:
        """Raises what `load_kernel` raises for files."""
        self.initrd = self.unpacked = None
        file = _file(config.kernel, config.kernel_fd)
        if file is None:
            raise InvalidArgument("there is no kernel to boot", remedy="give one with --kernel")
        self.kernel = Source("kernel", file)
        try:
            start = self.kernel.read(0, 1024)
            if start[:4] != b"\x7fELF" and bzimage.is_bzimage(start) and config.protocol != "bzimage":
                unpacked = _unpacked(config, self.kernel)
                self.unpacked = Source("kernel", unpacked) if unpacked is not None else None
            initrd = _file(config.initrd, config.initrd_fd)
            self.initrd = Source("initrd", initrd) if initrd is not None else None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for source in (self.kernel, self.unpacked, self.initrd):
            if source is not None:
                source.close()


def load_kernel(
    memory: GuestMemory,
    config: BootConfig,
    *,
    tables: Sequence[tuple[int, bytes]] = (),
    fresh: bool = True,
    files: BootFiles | None = None,
) -> Entry:
    """Load everything and say how to start. `tables` is what `acpi.build` made; those above 1 MiB are kept out of the
    memory map. `fresh`: guest memory is all zeros (not so after a reset). `files`: those of `config`, if they are open
    already.

    Raises `NotFound`, `HostError`, `ImageError` (damaged files), `OperationUnsupported` (a kernel that has no way in)
    and `InvalidArgument` (too little memory, a command line that is too long), each with what to do.
    """
    if config.protocol not in PROTOCOLS:
        raise InvalidArgument(f"unknown boot protocol {config.protocol!r}", remedy=f"one of {', '.join(PROTOCOLS)}")
    if files is None:
        files = BootFiles(config)
        try:
            return load_kernel(memory, config, tables=tables, fresh=fresh, files=files)
        finally:
            files.close()
    kept = [(address, len(data)) for address, data in tables]
    stable_kernel = config.stable or config.stable_kernel
    source = files.kernel
    start = source.read(0, 1024)
    if start[:4] == b"\x7fELF":
        entry = _load_pvh(memory, config, source, files.initrd, kept, stable=stable_kernel, fresh=fresh)
    elif not bzimage.is_bzimage(start):
        raise ImageError(
            f"the kernel {source.name} is neither a bzImage nor an ELF kernel", remedy="give the file of a kernel"
        )
    elif files.unpacked is not None:
        entry = _load_pvh(memory, config, files.unpacked, files.initrd, kept, stable=True, fresh=fresh)
    elif config.protocol == "pvh":
        raise ImageError(
            f"the kernel {source.name} cannot be entered by PVH: it has no such entry, its compression is not "
            "known, or there is no directory to unpack it into",
            remedy="choose the boot protocol bzimage or auto, or give a cache directory",
        )
    else:
        entry = _load_bzimage(memory, config, source, files.initrd, kept)
    entry.prepare(memory)
    return entry


def _load_pvh(
    memory: GuestMemory,
    config: BootConfig,
    source: Source,
    initrd_file: Source | None,
    kept: Sequence[tuple[int, int]],
    *,
    stable: bool,
    fresh: bool,
) -> Entry:
    elf = pvh.parse(source)
    if not elf.entry or config.protocol == "bzimage":
        raise ImageError(
            f"the ELF kernel {source.name} has no PVH entry" if not elf.entry else f"{source.name} is no bzImage",
            remedy="build it with CONFIG_PVH=y, or give its bzImage" if not elf.entry else "choose the protocol auto",
        )
    cmdline = command_line(config.cmdline, COMMAND_LINE_SIZE - 1)
    end = pvh.load(memory, source, elf, stable=stable, fresh=fresh)
    initrd = load_initrd(memory, initrd_file, above=end, ceiling=_ceiling(memory, kept), stable=config.stable)
    pvh.write_start_info(memory, memory_map(memory, kept), cmdline=cmdline, initrd=initrd)
    return pvh.entry(elf)


def _load_bzimage(
    memory: GuestMemory,
    config: BootConfig,
    source: Source,
    initrd_file: Source | None,
    kept: Sequence[tuple[int, int]],
) -> Entry:
    kernel = bzimage.parse(source)
    cmdline = command_line(config.cmdline, kernel.cmdline_size)
    address, end = bzimage.load(memory, source, kernel)
    ceiling = min(_ceiling(memory, kept), kernel.initrd_addr_max + 1)
    initrd = load_initrd(memory, initrd_file, above=end, ceiling=ceiling, stable=config.stable)
    bzimage.write_zero_page(memory, kernel, memory_map(memory, kept), cmdline=cmdline, initrd=initrd)
    return bzimage.entry(address)


def _unpacked(config: BootConfig, source: Source) -> str | None:
    """The uncompressed kernel in the cache, made if it is not there; None where there is none to be had."""
    if not config.cache:
        return None
    path = config.kernel or f"/proc/self/fd/{source.fd}"
    from kvik.image.kernel_index import identity, lookup

    known = lookup(config.cache, identity(source.fd), path)
    if known is not None:
        return known or None
    from kvik.image.kernel import uncompressed_kernel  # slow to import; only the first start of a kernel needs it

    unpacked = uncompressed_kernel(path, config.cache)
    return None if unpacked is None else str(unpacked)


def _file(path: str, fd: int) -> str | int | None:
    return fd if fd >= 0 else path or None


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


def load_initrd(
    memory: GuestMemory, source: Source | None, *, above: int, ceiling: int, stable: bool = False
) -> tuple[int, int] | None:
    """Put the initrd as high as possible below `ceiling`, out of the way of a kernel that unpacks itself; its
    (address, size). `above`: where the kernel ends."""
    if source is None:
        return None
    address = (ceiling - source.size) & ~(PAGE - 1)
    if address < above:
        need = above + source.size + PAGE
        raise InvalidArgument(
            f"the initrd {source.name} ({source.size >> 20} MiB) does not fit behind the kernel",
            remedy=f"give the machine at least {(need >> 20) + 32} MiB of memory, or a smaller initrd",
        )
    if stable:
        # Copy-on-write: 10 MiB that are not read. A file that is written nevertheless shows its new bytes to a
        # guest that has not unpacked it yet; one that is cut short ends this machine (KVM_RUN: EFAULT), no other.
        memory.map_file(address, source.fd, 0, source.size)
    else:
        source.load(memory, address, 0, source.size)
    return address, source.size


def _ceiling(memory: GuestMemory, kept: Sequence[tuple[int, int]]) -> int:
    """The end of what low RAM is free: below the ACPI tables if they lie there."""
    low = memory.regions[0]
    return min([low.end, *(start for start, _ in kept if HIGH_MEMORY <= start < low.end)])
