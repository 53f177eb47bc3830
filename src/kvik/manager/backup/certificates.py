"""What a backup's server over TLS proves itself with, and whom it lets in: QEMU's three files in one directory.

The directory is opened by the daemon and lent to the VMM while it reads them: the key's file stays the daemon's user's
alone. https://www.qemu.org/docs/master/system/tls.html
"""

from __future__ import annotations

import os
from pathlib import Path

from kvik.errors import ConfigUnsupported
from kvik.host.files import host_error

__all__ = ["check_certificates", "open_certificates"]

FILES = ("ca-cert.pem", "server-cert.pem", "server-key.pem")


def check_certificates(directory: Path) -> None:
    """`ConfigUnsupported` naming what is missing (blocking)."""
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise ConfigUnsupported(
            f"a backup over TLS needs {', '.join(missing)} in {directory}",
            path="/domainbackup/server/@tls",
            remedy="put the host's certificate and key there, and that of the authority whose clients may read; or use "
            "transport='unix'",
        )


def open_certificates(directory: Path) -> int:
    """A descriptor of the directory; the caller closes it. Raises `HostError`."""
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise host_error("open", directory, error) from error
