"""Where everything lives on disk: one object per scope, shared by daemon, manager and clients.

The system scope mirrors libvirt's own places under our name; the session scope follows the XDG base directory
specification. `KVIK_ROOT`, or the `root` argument, moves the whole system scope below another directory (tests
and side-by-side daemons use it).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Paths(NamedTuple):  # not a dataclass: those cost a command 10 ms of imports
    """The directories of one scope. Nothing is created here; owners create what they use, mode 0700."""

    scope: str  # "system" or "session"
    config: Path  # definitions:   /etc/kvik        | $XDG_CONFIG_HOME/kvik
    run: Path  # live status, sockets: /run/kvik     | $XDG_RUNTIME_DIR/kvik
    data: Path  # images, saves:  /var/lib/kvik     | $XDG_DATA_HOME/kvik
    cache: Path  # rebuildable:    /var/cache/kvik   | $XDG_CACHE_HOME/kvik
    log: Path  # one log per machine: /var/log/kvik | $XDG_STATE_HOME/kvik/log

    @property
    def socket(self) -> Path:
        """The daemon's Unix socket."""
        return self.run / "kvikd.sock"

    @property
    def domains(self) -> Path:
        """Persistent domain documents, `NAME.xml`; links in `autostart/` below it."""
        return self.config / "qemu"

    @property
    def status(self) -> Path:
        """Live status of running machines, `NAME.xml`, and their runtime directories."""
        return self.run / "qemu"

    @property
    def domain_logs(self) -> Path:
        return self.log / "qemu"

    @property
    def images(self) -> Path:
        return self.data / "images"

    @property
    def nvram(self) -> Path:
        return self.data / "qemu" / "nvram"

    @classmethod
    def system(cls, root: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> Paths:
        base = Path(root or environ.get("KVIK_ROOT") or "/")
        return cls(
            scope="system",
            config=base / "etc/kvik",
            run=base / "run/kvik",
            data=base / "var/lib/kvik",
            cache=base / "var/cache/kvik",
            log=base / "var/log/kvik",
        )

    @classmethod
    def session(cls, environ: Mapping[str, str] = os.environ) -> Paths:
        home = Path(environ.get("HOME") or "~").expanduser()

        def xdg(name: str, default: Path) -> Path:
            value = environ.get(name, "")
            # The XDG specification: a relative path in one of these variables is to be ignored.
            return Path(value) if value.startswith("/") else default

        runtime = xdg("XDG_RUNTIME_DIR", xdg("XDG_CACHE_HOME", home / ".cache") / "kvik-run")
        return cls(
            scope="session",
            config=xdg("XDG_CONFIG_HOME", home / ".config") / "kvik",
            run=runtime / "kvik",
            data=xdg("XDG_DATA_HOME", home / ".local/share") / "kvik",
            cache=xdg("XDG_CACHE_HOME", home / ".cache") / "kvik",
            log=xdg("XDG_STATE_HOME", home / ".local/state") / "kvik/log",
        )

    @classmethod
    def default(cls, environ: Mapping[str, str] = os.environ) -> Paths:
        """The system scope for root, the session scope for anyone else (libvirt's own default URI rule)."""
        return cls.system(environ=environ) if os.geteuid() == 0 else cls.session(environ)
