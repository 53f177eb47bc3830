"""The typed, blocking client: `connect()` gives a Connection, that gives Domains, those give streams.

    with kvik.client.connect() as connection:
        for domain in connection.domains():
            print(domain.name, domain.state())

Everything that can go wrong is a `kvik.errors.KvikError`. Flags are libvirt's numbers (`kvik.conf.enums`).
"""

from kvik.client.connection import Connection, connect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.client.domain import Domain
    from kvik.client.network import Network
    from kvik.client.storage import StoragePool, StorageVolume
    from kvik.client.stream import Stream

__all__ = ["Connection", "Domain", "Network", "StoragePool", "StorageVolume", "Stream", "connect"]


def __getattr__(name: str) -> object:
    """The classes, imported when first asked for: a command that needs none of them is 4 ms faster."""
    if name == "Domain":
        from kvik.client.domain import Domain

        return Domain
    if name == "Network":
        from kvik.client.network import Network

        return Network
    if name in ("StoragePool", "StorageVolume"):
        from kvik.client import storage

        return getattr(storage, name)
    if name == "Stream":
        from kvik.client.stream import Stream

        return Stream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
