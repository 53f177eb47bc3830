"""Pools of type netfs: a directory of another host, mounted by the kernel; NFS, SMB (cifs) and Gluster.

A password comes from a secret and reaches mount.cifs by a descriptor: it is on no command line, in no file.
"""

from __future__ import annotations

from kvik.conf.storage_pool import PoolSource, SourceDirectory, SourceFormat
from kvik.errors import ConfigError, InvalidArgument, OperationFailed
from kvik.storage import mounts
from kvik.storage.mounted import MountedBackend
from kvik.storage.tool import call, missing

__all__ = ["Backend"]

SHOWMOUNT_DEADLINE = 20.0  # seconds
EXPORTS_MAX = 1024
# What must not stand in a document or on a command line, where everybody reads it.
SECRET_OPTIONS = ("password", "pass", "password2")


class Backend(MountedBackend):
    type = "netfs"
    unmounting = 60.0

    @property
    def source(self) -> str:
        """As mount(8) takes it."""
        origin = self.document.origin
        if origin.dir is None:
            raise ConfigError("missing storage pool source path", path="/pool/source")
        if self.document.format == "cifs":
            return f"//{origin.host}/{origin.dir.path.strip('/')}"
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        return f"{host}:{origin.dir.path}"

    def is_ours(self, found: mounts.Mount) -> bool:
        return found.source.rstrip("/") == self.source.rstrip("/")

    def attach(self) -> None:
        kind, options, secret = self.document.format, self.options, None
        version = self.document.origin.protocol
        if kind == "cifs":
            secret = self._cifs(options)
        elif version is not None:
            options.append(f"nfsvers={version.ver}")
        mounts.mount(self.source, self.document.path, "" if kind == "auto" else kind, options, secret=secret)

    def _cifs(self, options: list[str]) -> tuple[str, bytes] | None:
        """Who we are to an SMB server. QEMU's locks are by byte range, which SMB makes mandatory: without `nobrl` a
        machine cannot read the image that it has locked itself."""
        if any(option.split("=")[0] in SECRET_OPTIONS for option in options):
            raise ConfigError(
                "a password in mount options can be read by everybody",
                path="/pool/fs:mount_opts",
                remedy="use <auth type='cifs'> with a secret, or the option credentials=FILE",
            )
        options.append("nobrl")
        auth = self.document.origin.auth
        if auth is not None:
            options.append(f"username={auth.username}")
            return ("PASSWD_FD", self.secret("none", auth.secret))
        if not any(option.split("=")[0] in ("credentials", "cred", "sec", "username", "user") for option in options):
            options.append("guest")
        return None

    def build(self, *, overwrite: bool = False, no_overwrite: bool = False) -> None:
        if overwrite or no_overwrite:
            self.refuse("being built with or without overwriting")
        self.make_directory()

    @classmethod
    def missing(cls) -> str:
        return missing("mount.nfs") and missing("mount.cifs") and missing("mount.glusterfs")

    @classmethod
    def find_sources(cls, source: PoolSource | None) -> list[PoolSource]:
        """What the host exports by NFS, as its mount daemon tells."""
        if source is None or not source.hosts:
            raise InvalidArgument("hostname must be specified for netfs sources")
        host = source.host
        if not host or host.startswith("-") or not host.isprintable():
            raise InvalidArgument(f"{host!r} is not the name of a host")
        done = call(["showmount", "--no-headers", "--exports", host], timeout=SHOWMOUNT_DEADLINE, check=False)
        # One line an export: its path, and who may mount it, which holds no space.
        paths = [line.rsplit(None, 1)[0] for line in done.text.splitlines() if line.startswith("/")]
        if done.code != 0 or not paths:
            why = f": {done.message}" if done.code != 0 and done.message else ""
            raise OperationFailed(f"no storage pools were found on host '{host}'{why}")
        return [
            PoolSource(hosts=source.hosts[:1], dir=SourceDirectory(path=path), format=SourceFormat(type="nfs"))
            for path in paths[:EXPORTS_MAX]
        ]
