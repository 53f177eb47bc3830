"""Debian's generic kernel for the lab: its package fetched and unpacked once into a cache, its modules in order.

The cache (`$KVIK_LAB_CACHE`, or `kvik/lab` below the XDG cache directory) holds one directory per kernel package:

    linux-image-6.1.0-1-amd64_6.1.1-1/   vmlinux, config, busybox, modules/{kernel/..., modules.dep, modules.alias, ...}

`modules/` is what /lib/modules/VERSION is inside the lab. A directory is complete once it has its final name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvik.errors import HostError, ImageError, NotFound
from kvik.guest.debs import Apt, Package, deb_members
from kvik.image.elf import ElfFile
from kvik.image.kernel import has_pvh_entry, unpack_bzimage

METAPACKAGE = "linux-image-amd64"
BUSYBOX = "busybox-static"
FORMAT = 1  # of a cached directory
KEPT = 2  # kernels; each takes about 400 MB
MODULE_PATH = re.compile(r"(?:usr/)?lib/modules/([^/]+)/(.+)")


class LabUnavailable(Exception):
    """The lab cannot be had on this host; the message says why and what to do."""


def cache_directory() -> Path:
    if named := os.environ.get("KVIK_LAB_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvik" / "lab"


def module_name(path: str) -> str:
    """`kernel/drivers/crypto/ccp/ccp.ko` or `kvm-amd` as the kernel spells it: `ccp`, `kvm_amd`."""
    return path.rpartition("/")[2].removesuffix(".ko").replace("-", "_")


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package. `version` is what uname -r says in the lab."""

    directory: Path
    version: str

    @property
    def image(self) -> Path:
        return self.directory / "vmlinux"

    @property
    def busybox(self) -> Path:
        return self.directory / "busybox"

    @property
    def modules(self) -> Path:
        return self.directory / "modules"

    @cached_property
    def dependencies(self) -> Mapping[str, tuple[str, ...]]:
        """From a module's path below `modules` to the paths of those it needs, as modules.dep has them."""
        table = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            path, _, needed = line.partition(":")
            table[path] = tuple(needed.split())
        return table

    @cached_property
    def builtin(self) -> frozenset[str]:
        return frozenset(map(module_name, (self.modules / "modules.builtin").read_text().split()))

    def load_order(self, names: Iterable[str]) -> list[str]:
        """The paths (below `modules`) to load for these modules: each after everything it needs, each once.

        Modules built into the kernel need no loading; a name that the kernel does not have raises `NotFound`.
        """
        by_name = {module_name(path): path for path in self.dependencies}
        order: list[str] = []
        for name in map(module_name, names):
            if name in by_name:
                # modules.dep lists the nearest first: what is needed deepest stands last
                for path in (*reversed(self.dependencies[by_name[name]]), by_name[name]):
                    if path not in order:
                        order.append(path)
            elif name not in self.builtin:
                raise NotFound(f"the kernel {self.version} has no module {name!r}")
        return order


def dependency_table(direct: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """From each module's direct needs (names) to all of them, nearest first: loading from the end always works."""
    memo: dict[str, list[str]] = {}

    def closure(name: str, above: tuple[str, ...] = ()) -> list[str]:
        if name in above:
            raise ImageError(f"the modules {' -> '.join((*above, name))} need each other")
        if name not in memo:
            order: list[str] = []
            for other in direct.get(name, ()):
                for needed in (other, *closure(other, (*above, name))):
                    if needed in order:
                        order.remove(needed)
                    order.append(needed)
            memo[name] = order
        return memo[name]

    return {name: closure(name) for name in direct}


def ensure_kernel(cache: Path | None = None) -> Kernel:
    """The generic kernel: the cached one, in milliseconds, or else the newest that apt knows.

    Raises `LabUnavailable` when there is neither.
    """
    cache = cache or cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kernels := _cached(cache):
            return kernels[-1]
        if shutil.which("apt-get") is None:
            raise LabUnavailable("no apt-get: the lab's kernel is a Debian package")
        for leftover in cache.glob(".new-*"):
            shutil.rmtree(leftover)
        try:
            return _make(cache, Apt(cache / "apt"))
        except (HostError, NotFound) as error:
            raise LabUnavailable(f"the package {METAPACKAGE} cannot be had: {error}") from error


def _cached(cache: Path) -> list[Kernel]:
    """Complete kernels, the one used last at the end."""
    found = []
    for directory in sorted(cache.glob(f"linux-image-*-f{FORMAT}"), key=lambda path: path.stat().st_mtime):
        found.append(Kernel(directory, (directory / "version").read_text().strip()))
    return found


def _make(cache: Path, apt: Apt) -> Kernel:
    try:
        packages, files = _fetch(apt)
    except (HostError, NotFound):
        apt.update()  # lists from some days ago name versions that are gone
        packages, files = _fetch(apt)
    for package, file in zip(packages, files, strict=True):
        if hashlib.sha256(file.read_bytes()).hexdigest() != package.sha256:
            file.unlink()
            raise HostError(f"the file of {package.name} {package.version} is not what the package list names")
    temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".new-"))
    temporary.chmod(0o755)
    version = _unpack(temporary, *files)
    (temporary / "version").write_text(version)
    directory = cache / f"{packages[0].name}_{packages[0].version}-f{FORMAT}"
    temporary.rename(directory)
    for file in files:
        file.unlink()
    for old in _cached(cache)[:-KEPT]:
        shutil.rmtree(old.directory)
    return Kernel(directory, version)


def _fetch(apt: Apt) -> tuple[list[Package], list[Path]]:
    if not apt.has_lists:
        apt.update()
    shown = apt.show([METAPACKAGE, BUSYBOX])
    name = next((name for name in shown[METAPACKAGE].depends if name.startswith("linux-image-")), None)
    if name is None:
        raise NotFound(f"the package {METAPACKAGE} names no kernel")
    packages = [apt.show([name])[name], shown[BUSYBOX]]
    return packages, apt.download(packages)


def _unpack(target: Path, kernel_deb: Path, busybox_deb: Path) -> str:
    """Kernel, modules and their tables below `target`; the kernel's version."""
    version = ""
    direct: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    aliases: list[str] = []
    for member in deb_members(kernel_deb.read_bytes()):
        if member.path.startswith("boot/vmlinuz-"):
            image = unpack_bzimage(member.data)
            if not has_pvh_entry(image):
                raise ImageError("Debian's kernel has no PVH entry any more")
            (target / "vmlinux").write_bytes(image)
        elif member.path.startswith("boot/config-"):
            (target / "config").write_bytes(member.data)
        elif (match := MODULE_PATH.fullmatch(member.path)) and not member.link:
            version, path = match[1], match[2]
            place = target / "modules" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(member.data)
            if path.endswith(".ko"):
                info = ElfFile(member.data).modinfo()
                name = module_name(path)
                paths[name] = path
                direct[name] = [module_name(other) for other in ",".join(info.get("depends", [])).split(",") if other]
                aliases += (f"alias {alias} {name}\n" for alias in info.get("alias", []))
    if not version or "kvm_amd" not in paths:
        raise ImageError("the kernel's package holds no modules for KVM")
    table = dependency_table(direct)
    lines = (f"{paths[name]}: {' '.join(paths[other] for other in table[name])}\n" for name in sorted(paths))
    (target / "modules/modules.dep").write_text("".join(lines))
    (target / "modules/modules.alias").write_text("".join(sorted(aliases)))
    (target / "modules/modules.symbols").touch()
    for member in deb_members(busybox_deb.read_bytes(), lambda path: path.endswith("bin/busybox")):
        (target / "busybox").write_bytes(member.data)
        (target / "busybox").chmod(0o755)
    return version
