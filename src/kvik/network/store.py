"""Networks on disk: definitions, autostart links, live status. The daemon may be killed between any two steps.

    <config>/qemu/networks/NAME.xml            the definition; fsynced
    <config>/qemu/networks/autostart/NAME.xml  link to it
    <run>/network/NAME.xml                     live status: what was made on this host, said before it is made
    <data>/network/NAME.{conf,leases}          of its dnsmasq

All functions block. What cannot be read is set aside under another name with a warning, and stops nothing.
"""

from __future__ import annotations

from contextlib import suppress

from kvik.conf.network_status import NetworkStatus, format_status, parse_status
from kvik.errors import ConfigError, HostError
from kvik.host import documents, files
from kvik.host.process import boot_id
from kvik.paths import Paths

__all__ = ["Loaded", "Store", "check_name"]

WHAT = "network"
Loaded = documents.Loaded[NetworkStatus]


def check_name(name: str) -> str:
    """The name if a network can have it, else `InvalidArgument`."""
    return documents.check_document_name(name, WHAT)


class Store(documents.Definitions[NetworkStatus]):
    def __init__(self, paths: Paths) -> None:
        super().__init__(paths.networks, paths.network_status, WHAT, _parse)
        self.data = paths.network_data
        self.boot = boot_id()

    def load(self) -> Loaded:
        files.ensure_directory(self.data)
        with suppress(HostError):
            files.remove_temporaries(self.data, older_than=0)
        return super().load()

    def save_status(self, status: NetworkStatus) -> None:
        self.write_status(status.document.name, format_status(status))


def _parse(data: bytes, name: str) -> NetworkStatus:
    status = parse_status(data)
    if status.document.name != name or status.origin is None:
        raise ConfigError("it is not of this network, or not of kvik")
    return status
