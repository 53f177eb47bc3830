"""The distribution's packages that running a machine needs: what is missing, the command, and its installation.

Only verbs that start machines ask for them. Root gets them installed after being told their names (and asked, when
somebody sits at a terminal); anybody else gets the exact command in a `MissingPackages`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import HostError, MissingPackages
from kvik.guest.debs import SYSTEM_LISTS, run_apt
from kvik.host import process

__all__ = ["PASST", "QEMU", "UEFI", "Need", "ensure", "missing"]

INSTALL = ("apt-get", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120", "install")


@dataclass(frozen=True, slots=True)
class Need:
    """A file or program, the Debian package that has it, and what it is for (ends "... is missing")."""

    what: str
    package: str
    program: str = ""
    files: tuple[str, ...] = ()  # any one of them will do

    @property
    def met(self) -> bool:
        if self.program:
            return process.find_program(self.program) is not None
        return any(Path(file).exists() for file in self.files)


QEMU = Need("the QEMU emulator", "qemu-system-x86", program="qemu-system-x86_64")
PASST = Need("passt, which kvik-vmm has for user networking,", "passt", program="passt")
UEFI = Need("UEFI firmware", "ovmf", files=("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd"))


def missing(needs: Iterable[Need]) -> list[Need]:
    """Those that are not there. Microseconds when all are."""
    return [need for need in needs if not need.met]


def ensure(
    needs: Iterable[Need],
    *,
    say: Callable[[str], None],
    ask: Callable[[str], bool] | None = None,
    run: Callable[[list[str], Path], str] = run_apt,
) -> None:
    """Install what is missing, or raise `MissingPackages`.

    `say` gets the lines for the user; `ask` is None without a terminal or with --yes, else it asks a yes-no question.
    """
    absent = missing(needs)
    if not absent:
        return
    what = " and ".join(need.what for need in absent)
    packages = tuple(need.package for need in absent)
    command = f"sudo apt-get update && sudo apt-get install -y --no-install-recommends {' '.join(packages)}"
    error = MissingPackages(f"{what} {'is' if len(absent) == 1 else 'are'} missing", packages=packages, command=command)
    if process.find_program("apt-get") is None:
        raise MissingPackages(
            f"{error.message}, and this is no Debian system: install it with the system's own package manager",
            packages=packages,
            command="",
        )
    if os.geteuid() != 0:
        raise error
    say(f"{error.message}; these packages will be installed: {' '.join(packages)}")
    if ask is not None and not ask("install them now?"):
        raise error
    _install(packages, say, run)
    if still := missing(absent):
        raise HostError(f"{', '.join(need.what for need in still)} is missing even after installing {packages}")


def _install(packages: tuple[str, ...], say: Callable[[str], None], run: Callable[[list[str], Path], str]) -> None:
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    here = Path("/")
    has_lists = SYSTEM_LISTS.is_dir() and any("_Packages" in path.name for path in SYSTEM_LISTS.iterdir())
    if not has_lists:
        say("fetching the package lists")
        run([*environment, "apt-get", "-qq", "update"], here)
    try:
        run([*environment, *INSTALL, *packages], here)
    except HostError:
        if not has_lists:
            raise
        # Lists from some days ago name versions that are gone.
        say("the package lists are old: fetching new ones")
        run([*environment, "apt-get", "-qq", "update"], here)
        run([*environment, *INSTALL, *packages], here)
