"""What `<emulator>` means: `kvik-vmm` is the VMM of this very installation, an absolute path is that file.

The plain name stays in the document, so a machine follows its installation when that is upgraded or moved. It is run
by the interpreter that runs the daemon, from the package that the daemon was loaded from: an installed wheel and a
source checkout are the same, and no script has to lie anywhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import kvik
from kvik.errors import ConfigUnsupported
from kvik.hypervisor.kvik.zygote import ZygoteKeeper, identity

__all__ = ["EMULATOR", "check", "command", "keeper"]

EMULATOR = "kvik-vmm"
_LAUNCHER = Path(kvik.__file__).parent / "vmm" / "__main__.py"


def check(emulator: str) -> None:
    """Raises `ConfigUnsupported` if this cannot be run."""
    if emulator in ("", EMULATOR):
        return
    why = "is no absolute path" if not emulator.startswith("/") else "cannot be run"
    if why == "is no absolute path" or not os.access(emulator, os.X_OK):
        raise ConfigUnsupported(
            f"{emulator} {why}", path="/domain/devices/emulator", remedy=f"<emulator>{EMULATOR}</emulator>"
        )


def command(argv: Sequence[str]) -> list[str]:
    """The process's arguments for `argv`, whose first word is the emulator."""
    emulator, *rest = argv
    if emulator != EMULATOR:
        return [*argv]
    cached = ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []
    # Isolated (-I) and without site (-S): nothing of anybody's environment takes part, and it starts some ms sooner.
    return [sys.executable, "-I", "-S", *cached, str(_LAUNCHER), *rest]


def keeper() -> ZygoteKeeper:
    """For the zygote of this installation. Another program that a document names is executed."""
    return ZygoteKeeper(command([EMULATOR]), lambda: identity(Path(kvik.__file__).parent, sys.executable))
