"""What the ends of a connection over TLS prove themselves with, and whom they believe: files by QEMU's names in one
directory, which is the administrator's.

A VMM is lent a directory, as a descriptor, while it reads them: the keys' files stay the daemon's user's alone.
https://www.qemu.org/docs/master/system/tls.html
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from kvik.errors import ConfigUnsupported
from kvik.host import files
from kvik.host.files import host_error

__all__ = ["check_server", "lend_client", "open_server", "remove_lent"]

AUTHORITY = "ca-cert.pem"
SERVER = ("server-cert.pem", "server-key.pem")
CLIENT = ("client-cert.pem", "client-key.pem")
LIMIT = 1 << 20  # bytes of one file
LENT = "tls-"  # how the names of lent directories begin


def check_server(directory: Path) -> None:
    """`ConfigUnsupported` naming what is missing (blocking)."""
    missing = [name for name in (AUTHORITY, *SERVER) if not (directory / name).is_file()]
    if missing:
        raise ConfigUnsupported(
            f"a backup over TLS needs {', '.join(missing)} in {directory}",
            path="/domainbackup/server/@tls",
            remedy="put the host's certificate and key there, and that of the authority whose clients may read; or use "
            "transport='unix'",
        )


def open_server(directory: Path) -> int:
    """A descriptor of the directory; the caller closes it. Raises `HostError`."""
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise host_error("open", directory, error) from error


def lend_client(directory: Path, near: Path, where: str, held: ExitStack) -> int:
    """A descriptor of a directory that has what a client needs, and not the server's key; when `held` is closed it is
    gone, for whoever still has it open as well (blocking). `near`: where it may be made. Raises `ConfigUnsupported`,
    `HostError`."""
    if not (directory / AUTHORITY).is_file():
        raise ConfigUnsupported(
            f"{where}: TLS needs {AUTHORITY} in {directory}",
            path="/domain/devices/disk/source/@tls",
            remedy="put there the certificate of the authority that signed the server's, and client-cert.pem with "
            "client-key.pem if it asks for them",
        )
    try:
        made = Path(tempfile.mkdtemp(prefix=LENT, dir=near))
    except OSError as error:
        raise host_error("make a directory in", near, error) from error
    held.callback(shutil.rmtree, made, ignore_errors=True)
    for name in (AUTHORITY, *CLIENT):
        if (directory / name).is_file():
            files.atomic_write(made / name, files.read_file((directory / name).resolve(), limit=LIMIT), durable=False)
    fd = open_server(made)
    held.callback(os.close, fd)
    return fd


def remove_lent(near: Path) -> None:
    """What a daemon that was killed had lent (blocking). A VMM has read it, or has ended with its start."""
    for left in near.glob(f"{LENT}*/"):
        shutil.rmtree(left, ignore_errors=True)
