"""Which package brings what is missing, so that every finding can name its fix."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvik.host.sysfs import read_text

# What kvik looks for -> the Debian (and Ubuntu) package that has it.
DEBIAN: dict[str, str] = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "seabios": "seabios",
    "qboot": "qemu-system-data",
    "ovmf": "ovmf",
    "dnsmasq": "dnsmasq-base",
    "nft": "nftables",
    "libnftables": "libnftables1",
    "ip": "iproute2",
    "passt": "passt",
    "swtpm": "swtpm",
    "swtpm_setup": "swtpm-tools",
    "virtiofsd": "virtiofsd",
    "busybox": "busybox-static",
    "ssh": "openssh-client",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "cpio": "cpio",
    "zstd": "zstd",
    "modprobe": "kmod",
}
# Debian 12 and before have it inside another package.
_VIRTIOFSD_SINCE = 13
_OLDER_VIRTIOFSD = "qemu-system-common"


@dataclass(frozen=True, slots=True)
class Release:
    """The distribution, from os-release(5)."""

    id: str
    version: str
    name: str
    like: tuple[str, ...] = ()

    @property
    def debian(self) -> bool:
        return "debian" in (self.id, *self.like)


def release(root: Path = Path("/")) -> Release:
    fields: dict[str, str] = {}
    for path in ("etc/os-release", "usr/lib/os-release"):
        for line in read_text(root / path, 65536).splitlines():
            key, equals, value = line.partition("=")
            if equals:
                fields[key.strip()] = value.strip().strip("\"'")
        if fields:
            break
    name = fields.get("PRETTY_NAME") or "an unknown distribution"
    return Release(fields.get("ID", ""), fields.get("VERSION_ID", ""), name, tuple(fields.get("ID_LIKE", "").split()))


def package_for(what: str, host: Release | None = None) -> str:
    """The package's name, or empty if not known."""
    if what == "virtiofsd" and host is not None and host.id == "debian" and host.version.isdigit():
        return DEBIAN[what] if int(host.version) >= _VIRTIOFSD_SINCE else _OLDER_VIRTIOFSD
    return DEBIAN.get(what, "")


def how_to_install(what: str | Iterable[str], host: Release | None = None) -> str:
    """A command, or a sentence where the distribution is not Debian's kin. Names several packages in one command."""
    host = host or release()
    wanted = [what] if isinstance(what, str) else list(what)
    packages = sorted({package_for(item, host) or item for item in wanted})
    if not host.debian:
        return f"install {', '.join(wanted)} with {host.name}'s package manager (in Debian: {' '.join(packages)})"
    command = f"apt-get install --no-install-recommends {' '.join(packages)}"
    return command if os.geteuid() == 0 else f"sudo {command}"
