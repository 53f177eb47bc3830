"""Machines saved with their memory: libvirt's verbs, each one call to the daemon.

`flags` are virDomainSaveRestoreFlags: 1 bypass the host's cache, 2 running when restored, 4 paused then. They last as
long as writing or reading a machine's memory does. Paths are the daemon's, absolute.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.client.connection import Connection
    from kvik.client.domain import Domain

__all__ = [
    "define_image", "define_managed", "image_xml", "managed_save", "managed_xml", "remove_managed", "restore", "save",
]  # fmt: skip


def save(domain: Domain, path: str, xml: str | None = None, flags: int = 0) -> None:
    """The machine into a file, and off; `xml`: another document for the same guest hardware."""
    if xml is None and not flags:
        domain.connection.call("DOMAIN_SAVE", domain.ref, path)
    else:
        domain.connection.call("DOMAIN_SAVE_FLAGS", domain.ref, path, xml, flags)


def restore(connection: Connection, path: str, xml: str | None = None, flags: int = 0) -> None:
    if xml is None and not flags:
        connection.call("DOMAIN_RESTORE", path)
    else:
        connection.call("DOMAIN_RESTORE_FLAGS", path, xml, flags)


def image_xml(connection: Connection, path: str, flags: int = 0) -> str:
    """1: with passwords."""
    return str(connection.call("DOMAIN_SAVE_IMAGE_GET_XML_DESC", path, flags)[0])


def define_image(connection: Connection, path: str, xml: str, flags: int = 0) -> None:
    connection.call("DOMAIN_SAVE_IMAGE_DEFINE_XML", path, xml, flags)


def managed_save(domain: Domain, flags: int = 0) -> None:
    """Where the next start finds it."""
    domain.connection.call("DOMAIN_MANAGED_SAVE", domain.ref, flags)


def remove_managed(domain: Domain) -> None:
    domain.connection.call("DOMAIN_MANAGED_SAVE_REMOVE", domain.ref, 0)


def managed_xml(domain: Domain, flags: int = 0) -> str:
    return str(domain.connection.call("DOMAIN_MANAGED_SAVE_GET_XML_DESC", domain.ref, flags)[0])


def define_managed(domain: Domain, xml: str, flags: int = 0) -> None:
    domain.connection.call("DOMAIN_MANAGED_SAVE_DEFINE_XML", domain.ref, xml, flags)
