"""The typed, blocking client: `connect()` gives a Connection, that gives Domains, those give streams.

    with kvik.client.connect() as connection:
        for domain in connection.domains():
            print(domain.name, domain.state())

Everything that can go wrong is a `kvik.errors.KvikError`. Flags are libvirt's numbers (`kvik.conf.enums`).
"""

from kvik.client.connection import Connection, connect
from kvik.client.domain import Domain
from kvik.client.stream import Stream

__all__ = ["Connection", "Domain", "Stream", "connect"]
