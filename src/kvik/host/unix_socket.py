"""Unix sockets of this network namespace, as the kernel lists them."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["listens"]

_TABLE = Path("/proc/net/unix")
_ACCEPTS = 1 << 16  # __SO_ACCEPTCON, linux/net.h


def listens(path: str | os.PathLike[str]) -> bool:
    """Whether a socket listens that was bound to `path`, written like this. Nobody is connected to, unlike by a try."""
    wanted = os.fsencode(path)
    # Num RefCount Protocol Flags Type St Inode Path, all but the last two in hexadecimal (proc_net(5)).
    for line in _TABLE.read_bytes().splitlines()[1:]:
        fields = line.split(None, 7)
        if len(fields) == 8 and fields[7] == wanted and int(fields[3], 16) & _ACCEPTS:
            return True
    return False
