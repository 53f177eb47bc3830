"""Pools of type iscsi-direct: a target that each machine's own VMM logs in to; libiscsi's iscsi-ls looks what it has.

Nothing of it is a device of this host: volumes are of type network. They are read and written through a session of
their own (`served.py`), and wiped with zeros by qemu-img, which needs no FUSE for that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from urllib.parse import quote

from kvik.conf.storage_pool import PoolSource, SourceDevice, bytes_of
from kvik.conf.storage_volume import StorageVolume, VolumeFormat, VolumeTarget
from kvik.errors import ConfigUnsupported, HostError, InvalidArgument
from kvik.host.secret_file import lent
from kvik.storage.backend import Contents
from kvik.storage.backends.iscsi import check_host, portal_of
from kvik.storage.directory import leave_out
from kvik.storage.served import Node, ServedBackend
from kvik.storage.tool import call, missing
from kvik.storage.tool import number as int_of

__all__ = ["Backend"]

DEADLINE = 30.0  # seconds
WIPE_DEADLINE, SLOWEST = 60.0, 1 << 20  # seconds, and bytes a second at the least
LINES_MAX = 65536
UNITS_MAX = 256  # asked for their size one by one
# iscsi-ls has one form only: "Target:NAME Portal:ADDRESS,TAG" and, below, "Lun:N Type:DIRECT_ACCESS (Size:10G)", that
# size rounded: iscsi-readcapacity16 tells it in bytes.
_TARGET = re.compile(r"Target:(\S+) Portal:(\S+)")
_UNIT = re.compile(r"Lun:(\d+) +Type:DIRECT_ACCESS")


class Backend(ServedBackend):
    type = "iscsi-direct"
    names_formats = False

    def check(self) -> bool:
        """There is nothing on this host that could be gone."""
        return True

    def refresh(self) -> Contents:
        contents, source = Contents(), self.document.origin
        portal, initiator, environment = portal_of(source.hosts[0]), self._initiator(), self._credentials()
        numbers: list[int] = []
        seen = ours = False
        for line in _ask(portal, initiator, units=True, environment=environment):
            if (found := _TARGET.match(line)) is not None:
                ours = found[1] == source.device
                seen |= ours
            elif ours and (unit := _UNIT.match(line)) is not None:
                numbers.append(int(unit[1]))
        if not seen:
            raise HostError(f"portal {portal} offers no target {source.device}")
        for number in sorted(set(numbers)):
            if len(contents.volumes) >= UNITS_MAX:
                leave_out(contents, f"unit:0:0:{number}", f"a target's first {UNITS_MAX} units are shown")
                continue
            url = f"{_url(portal)}/{quote(source.device, safe=':.-')}/{number}"
            argv = ["iscsi-readcapacity16", "--initiator-name", initiator, "--size", url]
            size = int_of(call(argv, env=environment, timeout=DEADLINE).text)
            volume = self._volume(portal, number, size)
            contents.volumes[volume.name] = volume
            contents.capacity += volume.size
            contents.allocation += volume.size
        return contents

    def _volume(self, portal: str, lun: int, size: int) -> StorageVolume:
        name = f"ip-{portal}-iscsi-{self.document.origin.device}-lun-{lun}"
        volume = StorageVolume(type="network", name=f"unit:0:0:{lun}", key=name)
        volume.capacity, volume.allocation = bytes_of(size), bytes_of(size)
        volume.target = VolumeTarget(path=name, format=VolumeFormat(type="raw"))
        return volume

    def _initiator(self) -> str:
        initiator = self.document.origin.initiator
        if initiator is None:
            raise ConfigUnsupported("missing initiator IQN", path="/pool/source/initiator")
        return initiator.iqn.name

    def _credentials(self) -> dict[str, str]:
        """libiscsi takes them from the environment as well as from a URL, which stands on the command line."""
        auth = self.document.origin.auth
        if auth is None:
            return {}
        if auth.type != "chap":
            raise ConfigUnsupported("iscsi-direct pool only supports 'chap' auth type", path="/pool/source/auth/@type")
        return {
            "LIBISCSI_CHAP_USERNAME": auth.username,
            "LIBISCSI_CHAP_PASSWORD": self.secret("iscsi", auth.secret).decode(errors="surrogateescape"),
        }

    def look_at(self, volume: StorageVolume) -> StorageVolume:
        """Asking the target costs a login: it is as the last refresh found it."""
        return volume

    def node(self, volume: StorageVolume) -> Node:
        source, auth = self.document.origin, self.document.origin.auth
        options = {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": portal_of(source.hosts[0]),
            "target": source.device,
            "lun": int(volume.name.rpartition(":")[2]),
            "initiator-name": self._initiator(),
        }
        if auth is None:
            return Node(options)
        return Node({**options, "user": auth.username}, "password-secret", self.secret("iscsi", auth.secret))

    def wipe_volume(self, volume: StorageVolume, passes: Sequence[bytes]) -> None:
        """HostError in qemu-img's words."""
        if list(passes) != [b"\0"]:
            super().wipe_volume(volume, passes)
            return
        node = self.node(volume)
        zeros = json.dumps({"driver": "null-co", "size": volume.size, "read-zeroes": True})
        words, keys = ["convert", "-q", "-n", "-S", "0"], []
        with ExitStack() as stack:
            target = node.options
            if node.secret_option:
                keys.append(stack.enter_context(lent(node.secret)))
                words += ["--object", f"secret,id=key,file=/proc/self/fd/{keys[0]}"]
                target = {**target, node.secret_option: "key"}
            # Not confined: it needs the network, and reads no image.
            options = ",".join(f"file.{name}={str(value).replace(',', ',,')}" for name, value in target.items())
            argv = ["qemu-img", *words, f"json:{zeros}", "--target-image-opts", f"driver=raw,{options}"]
            call(argv, timeout=WIPE_DEADLINE + volume.size / SLOWEST, pass_fds=keys)

    @classmethod
    def find_sources(cls, source: PoolSource | None) -> list[PoolSource]:
        if source is None or not source.hosts:
            raise InvalidArgument("hostname must be specified for iscsi sources")
        if source.initiator is None:
            raise ConfigUnsupported("missing initiator IQN")
        host = source.hosts[0]
        check_host(host.name)
        check_host(source.initiator.iqn.name)
        lines = _ask(portal_of(host), source.initiator.iqn.name)
        names = dict.fromkeys(found[1] for line in lines if (found := _TARGET.match(line)) is not None)
        return [PoolSource(hosts=[host], devices=[SourceDevice(path=name)]) for name in names]

    @classmethod
    def missing(cls) -> str:
        return missing("iscsi-ls")


def _ask(portal: str, initiator: str, *, units: bool = False, environment: dict[str, str] | None = None) -> list[str]:
    argv = ["iscsi-ls", "--initiator-name", initiator, *(["--show-luns"] if units else [])]
    done = call([*argv, _url(portal)], env=environment, timeout=DEADLINE)
    return done.text.splitlines()[:LINES_MAX]


def _url(portal: str) -> str:
    return f"iscsi://{quote(portal, safe=':[]')}"
