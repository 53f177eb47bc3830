"""Where everything lives on disk: one object per scope, shared by daemon, manager and clients.

The system scope mirrors libvirt's own places under our name; the session scope follows the XDG base directory
specification. `KVIK_ROOT`, or the `root` argument, moves the whole system scope below another directory (tests
and side-by-side daemons use it).
"""

from __future__ import annotations

import os

from kvik.named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def _path(name: str) -> Path:
    from pathlib import Path  # not at the top: a command that only wants the socket's name saves 5 to 10 ms

    return Path(name)


class Paths(NamedTuple):
    """The directories of one scope. Nothing is created here; owners create what they use, mode 0700."""

    scope: str  # "system" or "session"
    config_name: str
    run_name: str
    data_name: str
    cache_name: str
    log_name: str

    @property
    def config(self) -> Path:
        """Definitions: /etc/kvik or $XDG_CONFIG_HOME/kvik."""
        return _path(self.config_name)

    @property
    def run(self) -> Path:
        """Live status, sockets: /run/kvik or $XDG_RUNTIME_DIR/kvik."""
        return _path(self.run_name)

    @property
    def data(self) -> Path:
        """Images, saved machines: /var/lib/kvik or $XDG_DATA_HOME/kvik."""
        return _path(self.data_name)

    @property
    def cache(self) -> Path:
        """What can be made again: /var/cache/kvik or $XDG_CACHE_HOME/kvik."""
        return _path(self.cache_name)

    @property
    def log(self) -> Path:
        """One log per machine: /var/log/kvik or $XDG_STATE_HOME/kvik/log."""
        return _path(self.log_name)

    @property
    def socket(self) -> Path:
        """The daemon's Unix socket."""
        return _path(self.socket_name)

    @property
    def socket_name(self) -> str:
        return f"{self.run_name}/kvikd.sock"

    @property
    def domains(self) -> Path:
        """Persistent domain documents, `NAME.xml`; links in `autostart/` below it."""
        return self.config / "qemu"

    @property
    def status(self) -> Path:
        """Live status of running machines, `NAME.xml`, and their runtime directories."""
        return self.run / "qemu"

    @property
    def networks(self) -> Path:
        """Persistent network documents, `NAME.xml`; links in `autostart/` below it."""
        return self.domains / "networks"

    @property
    def network_status(self) -> Path:
        """Live status of active networks, `NAME.xml`."""
        return self.run / "network"

    @property
    def network_data(self) -> Path:
        """What a network's DHCP and DNS server is told, and the leases it has given."""
        return self.data / "network"

    @property
    def secrets(self) -> Path:
        """Secrets, `UUID.xml`, and their values beside them, `UUID.base64`."""
        return self.config / "secrets"

    @property
    def certificates(self) -> Path:
        """Those of what serves disks over TLS, by QEMU's names: `ca-cert.pem`, `server-cert.pem`, `server-key.pem`."""
        return self.config / "pki"

    @property
    def pools(self) -> Path:
        """Persistent storage pool documents, `NAME.xml`; links in `autostart/` below it."""
        return self.config / "storage"

    @property
    def pool_status(self) -> Path:
        """Live status of active storage pools, `NAME.xml`."""
        return self.run / "storage"

    @property
    def domain_logs(self) -> Path:
        return self.log / "qemu"

    @property
    def nwfilters(self) -> Path:
        """Network filters that somebody defined, `NAME.xml`."""
        return self.config / "nwfilter"

    @property
    def nwfilter_bindings(self) -> Path:
        """Filters on interfaces, `DEVICE.xml`."""
        return self.run / "nwfilter-binding"

    @property
    def images(self) -> Path:
        return self.data / "images"

    @property
    def nvram(self) -> Path:
        return self.data / "qemu" / "nvram"

    @property
    def snapshots(self) -> Path:
        """A directory for each machine that has snapshots, with their documents."""
        return self.data / "qemu" / "snapshot"

    @property
    def checkpoints(self) -> Path:
        """A directory for each machine that has checkpoints or a backup, with their documents."""
        return self.data / "qemu" / "checkpoint"

    @property
    def pivots(self) -> Path:
        """Disks of machines that are about to change over to another image, one file each."""
        return self.data / "qemu" / "pivot"

    @property
    def saves(self) -> Path:
        """Machines that were saved by `managedsave`, `NAME.save`."""
        return self.data / "qemu" / "save"

    @classmethod
    def system(cls, root: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> Paths:
        base = os.fspath(root or environ.get("KVIK_ROOT") or "/").rstrip("/")
        return cls(
            scope="system",
            config_name=f"{base}/etc/kvik",
            run_name=f"{base}/run/kvik",
            data_name=f"{base}/var/lib/kvik",
            cache_name=f"{base}/var/cache/kvik",
            log_name=f"{base}/var/log/kvik",
        )

    @classmethod
    def session(cls, environ: Mapping[str, str] = os.environ) -> Paths:
        home = os.path.expanduser(environ.get("HOME") or "~")  # noqa: PTH111

        def xdg(name: str, default: str) -> str:
            value = environ.get(name, "")
            # The XDG specification: a relative path in one of these variables is to be ignored.
            return value.rstrip("/") if value.startswith("/") else default

        cache = xdg("XDG_CACHE_HOME", f"{home}/.cache")
        return cls(
            scope="session",
            config_name=xdg("XDG_CONFIG_HOME", f"{home}/.config") + "/kvik",
            run_name=xdg("XDG_RUNTIME_DIR", f"{cache}/kvik-run") + "/kvik",
            data_name=xdg("XDG_DATA_HOME", f"{home}/.local/share") + "/kvik",
            cache_name=f"{cache}/kvik",
            log_name=xdg("XDG_STATE_HOME", f"{home}/.local/state") + "/kvik/log",
        )

    @classmethod
    def default(cls, environ: Mapping[str, str] = os.environ) -> Paths:
        """The system scope for root, the session scope for anyone else (libvirt's own default URI rule)."""
        return cls.system(environ=environ) if os.geteuid() == 0 else cls.session(environ)
