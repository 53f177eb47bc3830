"""The `tiny` image: a Linux that boots in about a second, made from Debian packages without root or mounts.

Debian's cloud kernel, and an initramfs with busybox, the virtio drivers, a DHCP client, a root login on the serial
console, the QEMU guest agent and the ACPI power button. The files that make it one system are in `overlay/`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import HostError, ImageError, KvikError, NotFound
from kvik.guest.debs import Apt, Package, deb_members
from kvik.guest.rootfs import Rootfs
from kvik.image.kernel import uncompressed_kernel
from kvik.paths import Paths

__all__ = ["Progress", "TinyImage", "build_tiny", "cached_tiny", "kernel_arguments", "tiny"]

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`: stage is "lists", "packages" (bytes) or "image" (steps)."""

KERNEL = "linux-image-cloud-amd64"
ROOTS = ("busybox-static", "qemu-guest-agent")
FORMAT = 1  # of the directory and its manifest

QUIET = ("quiet", "loglevel=3", "panic=-1")  # a panic reboots at once, and `on_crash` decides what that means
UNTESTED = ("cryptomgr.notests", "initcall_blacklist=crypto_kdf108_init")  # self-tests of the crypto code
EMULATION = (
    "tsc=reliable",  # calibrations and checks of timers that emulation only fails slowly
    "no_timer_check",
    "noreplace-smp",  # patching tens of thousands of lock prefixes makes the emulator translate all that code anew
)


def kernel_arguments(accelerator: str = "tcg", *, console: str = "ttyS0", hostname: str = "") -> str:
    """The kernel command line for a direct boot under this accelerator ("kvm" or "tcg").

    Measured under software emulation with Debian's 6.1 cloud kernel: the self-tests cost 0.2 to 1 s, the patching of
    lock prefixes 0.2 to 0.3 s, a console that is not quiet 0.3 s. `hostname` is read by the image's own init.
    """
    words = [*QUIET, *UNTESTED, *(EMULATION if accelerator != "kvm" else ()), f"console={console}"]
    if hostname:
        words.append(f"kvik.hostname={hostname}")
    return " ".join(words)


@dataclass(frozen=True, slots=True)
class TinyImage:
    """A finished image. Its directory never changes once it exists: definitions may name these files."""

    directory: Path
    manifest: dict[str, object]

    @property
    def kernel(self) -> Path:
        """The bzImage, as Debian ships it."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initramfs"

    @property
    def kernel_version(self) -> str:
        return str(self.manifest.get("kernel", ""))


def tiny(paths: Paths, progress: Progress | None = None) -> TinyImage:
    """The cached image, or a new one. What `kvik run` calls."""
    return cached_tiny(paths) or build_tiny(paths, progress)


def cached_tiny(paths: Paths) -> TinyImage | None:
    """The newest image made by this version's recipe, if there is one. Well under a millisecond."""
    current = paths.images / "tiny" / "current"
    try:
        directory = current.resolve(strict=True)
        manifest = json.loads((directory / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("recipe") != Rootfs.recipe(FORMAT):
        return None
    image = TinyImage(directory, manifest)
    return image if image.kernel.exists() and image.initrd.exists() else None


def build_tiny(
    paths: Paths, progress: Progress | None = None, *, refresh: bool = False, apt: Apt | None = None
) -> TinyImage:
    """Make the image from current packages, and make it the current one. `refresh` fetches the package lists first.

    Two builders wait for each other, and the second takes the first one's result. A builder that dies leaves only a
    temporary directory, which the next one removes.
    """
    report = progress or (lambda stage, done, total: None)
    root = paths.images / "tiny"
    root.mkdir(parents=True, exist_ok=True, mode=0o755)
    with _locked(root / ".lock"):
        if not refresh and (image := cached_tiny(paths)):
            return image
        for leftover in root.glob(".new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        packages, files = _fetch(apt or Apt(paths.cache / "apt"), report, refresh)
        report("image", 0, 3)
        rootfs = Rootfs()
        for package, file in zip(packages, files, strict=True):
            _add(rootfs, package, file)
        report("image", 1, 3)
        image = _write(root, rootfs, packages)
        report("image", 2, 3)
        # The driver looks there on every start; the first start need not be the slow one.
        with contextlib.suppress(KvikError):
            uncompressed_kernel(image.kernel, paths.cache / "kernels")
        report("image", 3, 3)
        for old in files[0].parent.glob("*.deb"):  # the archive has moved on; so does our copy of it
            if old not in files:
                old.unlink(missing_ok=True)
        return image


def _fetch(apt: Apt, report: Progress, refresh: bool) -> tuple[list[Package], list[Path]]:
    """The packages and their files. Stale system lists name versions that are gone: then our own lists are fetched."""

    def attempt() -> tuple[list[Package], list[Path]]:
        packages = _resolve(apt)
        return packages, apt.download(packages, lambda done, total: report("packages", done, total))

    updated = refresh or not apt.has_lists
    if updated:
        report("lists", 0, 1)
        apt.update()
        report("lists", 1, 1)
    try:
        return attempt()
    except (HostError, NotFound):
        if updated:
            raise
        report("lists", 0, 1)
        apt.update()
        report("lists", 1, 1)
        return attempt()


def _resolve(apt: Apt) -> list[Package]:
    """The kernel that the metapackage depends on, the roots, and the libraries they depend on, breadth first."""
    first = apt.show([KERNEL, *ROOTS])
    kernel = next((name for name in first[KERNEL].depends if name.startswith("linux-image-")), None)
    if kernel is None:
        raise NotFound(f"the package {KERNEL} names no kernel")
    found = {name: first[name] for name in ROOTS}
    wave = [kernel, *(name for root in ROOTS for name in first[root].depends if name.startswith("lib"))]
    for _ in range(3):  # program, library, library's library
        wave = [name for name in dict.fromkeys(wave) if name not in found]
        if not wave:
            break
        shown = apt.show(wave)
        found |= shown
        wave = [
            name
            for package in shown.values()
            if package.name.startswith("lib")
            for name in package.depends
            if name.startswith("lib")
        ]
    return list(found.values())


def _add(rootfs: Rootfs, package: Package, file: Path) -> None:
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != package.sha256:
        file.unlink(missing_ok=True)
        raise ImageError(f"the file of {package.name} {package.version} is not the one the package list names")
    for member in deb_members(data, rootfs.wants):
        rootfs.offer(member)


def _write(root: Path, rootfs: Rootfs, packages: list[Package]) -> TinyImage:
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=".new-"))
    try:
        temporary.chmod(0o755)
        (temporary / "vmlinuz").write_bytes(rootfs.kernel)
        with (temporary / "initramfs").open("wb") as stream:
            rootfs.write(stream)
        hashes = {
            name: hashlib.sha256((temporary / name).read_bytes()).hexdigest() for name in ("vmlinuz", "initramfs")
        }
        key = hashlib.sha256("".join((Rootfs.recipe(FORMAT), *hashes.values())).encode()).hexdigest()[:16]
        manifest: dict[str, object] = {
            "name": "tiny",
            "recipe": Rootfs.recipe(FORMAT),
            "kernel": rootfs.kernel_version,
            "files": hashes,
            "packages": {p.name: {"version": p.version, "sha256": p.sha256} for p in packages},
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for name in ("vmlinuz", "initramfs", "manifest.json"):
            _sync(temporary / name)
        directory = root / key
        if directory.exists():  # the same contents were made before
            shutil.rmtree(temporary)
        else:
            temporary.rename(directory)
        link = root / f".current-{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(key)
        link.replace(root / "current")
        _sync(root)
        return TinyImage(directory, manifest)
    except OSError as error:
        raise HostError(
            f"the tiny image cannot be written to {str(root)!r}: {error.strerror or error}", errno=error.errno or 0
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
