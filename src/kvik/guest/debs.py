"""Debian packages, fetched with apt and unpacked here: no root, no dpkg, nothing of the system changed.

apt keeps its state in a private directory below the cache and reads the system's own sources and keys, so packages
are verified exactly as the system would. A `.deb` is an `ar` archive (deb(5)) with a compressed tar inside.
"""

from __future__ import annotations

import io
import lzma
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Thread

from kvik.errors import HostError, ImageError, NotFound
from kvik.host import process, tools
from kvik.image.compression import decompress, detect

__all__ = ["Apt", "Member", "Package", "deb_members", "run_apt"]

MAX_MEMBER = 256 << 20  # one file in a package
MAX_UNPACKED = 1 << 30  # one package, when it must be unpacked at once
SYSTEM_LISTS = Path("/var/lib/apt/lists")
TIMEOUT = 900.0  # seconds for one apt command: 30 MB over a slow line
OUTPUT_LIMIT = 16 << 20
PASSED_ON = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "APT_CONFIG")  # what reaching an archive may need


@dataclass(frozen=True, slots=True)
class Package:
    """One version of one package, as the package lists describe it."""

    name: str
    version: str
    filename: str  # as apt-get download names it: the pool's last component may differ in the epoch
    size: int
    sha256: str
    depends: tuple[str, ...]  # names only, the first of alternatives


@dataclass(frozen=True, slots=True)
class Member:
    """A file or link of a package. `path` is relative and clean; `link` is set for symbolic links."""

    path: str
    mode: int
    data: bytes
    link: str = ""


def deb_members(deb: bytes, wanted: Callable[[str], bool] = lambda path: True) -> Iterator[Member]:
    """The regular files and links of a package's data archive whose path `wanted` accepts, in archive order.

    Paths that leave the root, devices and everything else are refused with `ImageError`.
    """
    name, data = _ar_member(deb, "data.tar")
    kind = detect(data)
    if kind in ("xz", "lzma"):
        stream: io.BufferedIOBase | lzma.LZMAFile = lzma.LZMAFile(io.BytesIO(data))  # noqa: SIM115 - read as it goes
    elif name == "data.tar":
        stream = io.BytesIO(data)
    else:
        stream = io.BytesIO(decompress(data, limit=MAX_UNPACKED))
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for entry in archive:
                path = _clean(entry.name)
                if entry.isdir() or not wanted(path):
                    continue
                if entry.issym():
                    yield Member(path, 0o777, b"", entry.linkname)
                elif entry.isreg():
                    if entry.size > MAX_MEMBER:
                        raise ImageError(f"the package's file {path!r} has {entry.size} bytes, more than is read")
                    body = archive.extractfile(entry)
                    yield Member(path, entry.mode & 0o7777, body.read() if body else b"")
                elif not entry.islnk():
                    raise ImageError(f"the package holds {path!r}, which is neither file, link nor directory")
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise ImageError(f"the package's archive is damaged: {error}") from error


def _ar_member(deb: bytes, prefix: str) -> tuple[str, memoryview]:
    if deb[:8] != b"!<arch>\n":
        raise ImageError("not a Debian package")
    view = memoryview(deb)
    at = 8
    while at + 60 <= len(deb):
        header = deb[at : at + 60]
        digits = header[48:58].strip()
        if header[58:] != b"`\n" or not digits.isdigit():
            raise ImageError("the package's archive header is damaged")
        size = int(digits)
        if at + 60 + size > len(deb):
            raise ImageError("the package is cut short")
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        if name.startswith(prefix):
            return name, view[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ImageError(f"the package has no {prefix}")


def _clean(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ImageError(f"the package holds the unsafe path {name!r}")
    return "/".join(part for part in path.parts if part != ".")


def run_apt(argv: list[str], directory: Path) -> str:
    """Run an apt program in `directory` and return its output; raises `HostError` with apt's own words."""
    environment = {**process.BASE_ENVIRONMENT, **{key: os.environ[key] for key in PASSED_ON if key in os.environ}}
    return tools.run(argv, env=environment, timeout=TIMEOUT, limit=OUTPUT_LIMIT, cwd=str(directory)).text


class Apt:
    """apt with its state below `directory`. `run` is replaced in tests."""

    def __init__(
        self, directory: Path, *, run: Callable[[list[str], Path], str] = run_apt, lists: Path = SYSTEM_LISTS
    ) -> None:
        self._directory = directory
        self._run = run
        self._private = directory / "lists"
        self._system = lists
        self._lists = lists if _filled(lists) else self._private
        for name in ("lists/partial", "cache/archives/partial", "state", "debs"):
            (directory / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        # An empty status file: what is installed here must not matter.
        (directory / "state/status").touch()

    def _options(self) -> list[str]:
        values = {
            "Dir::State": self._directory / "state",
            "Dir::State::status": self._directory / "state/status",
            "Dir::State::lists": self._lists,
            "Dir::Cache": self._directory / "cache",
            "Dir::Cache::pkgcache": "pkgcache.bin",
            "Dir::Cache::srcpkgcache": "",
            "Dir::Log": self._directory / "state",
            "APT::Sandbox::User": "",  # root's own download user could not write here
            "APT::Update::Post-Invoke::": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Debug::NoLocking": "true",  # the builder holds its own lock
        }
        return [word for key, value in values.items() for word in ("-o", f"{key}={value}")]

    @property
    def has_lists(self) -> bool:
        return _filled(self._lists)

    def update(self) -> None:
        """Fetch the package lists into the private directory, and use them from now on."""
        self._lists = self._private
        self._run(["apt-get", *self._options(), "-qq", "update"], self._directory)
        if not self.has_lists:
            raise HostError(
                "apt could not fetch the package lists",
                remedy="check the network and /etc/apt/sources.list; 'apt-get update' shows the reason",
            )

    def show(self, names: Iterable[str]) -> dict[str, Package]:
        """The candidate version of each package. Raises `NotFound` naming those that the lists do not have."""
        names = list(dict.fromkeys(names))
        text = self._run(["apt-cache", *self._options(), "--no-all-versions", "show", *names], self._directory)
        found = {package.name: package for package in map(_package, text.split("\n\n")) if package is not None}
        missing = [name for name in names if name not in found]
        if missing:
            raise NotFound(f"the package lists have no {', '.join(missing)}", remedy="run 'apt-get update'")
        return {name: found[name] for name in names}

    def download(self, packages: Iterable[Package], progress: Callable[[int, int], None] | None = None) -> list[Path]:
        """The packages' files, in the same order; those already here are not fetched again.

        `progress(done, total)` counts bytes, about ten times a second.
        """
        packages = list(packages)
        target = self._directory / "debs"
        paths = [target / package.filename for package in packages]
        total = sum(package.size for package in packages)

        def done() -> int:
            return sum(path.stat().st_size for path in paths if path.exists())

        missing = [p for p, path in zip(packages, paths, strict=True) if not _complete(path, p.size)]
        if missing:
            words = ["apt-get", *self._options(), "-qq", "download", *(f"{p.name}={p.version}" for p in missing)]
            failure: list[BaseException] = []

            def fetch() -> None:
                try:
                    self._run(words, target)
                except BaseException as error:
                    failure.append(error)

            worker = Thread(target=fetch, name="apt-get download", daemon=True)
            worker.start()
            while worker.is_alive():
                worker.join(0.1)
                if progress:
                    progress(min(done(), total), total)
            if failure:
                raise failure[0]
            for package, path in zip(packages, paths, strict=True):
                if not _complete(path, package.size):
                    raise HostError(f"apt did not fetch {package.name} {package.version}")
        if progress:
            progress(total, total)
        return paths


def _complete(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _filled(lists: Path) -> bool:
    try:
        return any("_Packages" in path.name for path in lists.iterdir())
    except OSError:
        return False


def _package(paragraph: str) -> Package | None:
    fields: dict[str, str] = {}
    for line in paragraph.splitlines():
        key, separator, value = line.partition(": ")
        if separator and not line.startswith(" "):
            fields[key] = value
    if not {"Package", "Version", "Size", "SHA256", "Architecture"} <= fields.keys():
        return None
    depends = ", ".join(fields[key] for key in ("Pre-Depends", "Depends") if key in fields)
    names = (item.split("|")[0].split("(")[0].split(":")[0].strip() for item in depends.split(","))
    version = fields["Version"]
    return Package(
        name=fields["Package"],
        version=version,
        filename=f"{fields['Package']}_{version.replace(':', '%3a')}_{fields['Architecture']}.deb",
        size=int(fields["Size"]),
        sha256=fields["SHA256"],
        depends=tuple(name for name in names if name),
    )
