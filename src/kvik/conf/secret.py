"""<secret>: a passphrase or key that documents name and never hold. https://libvirt.org/formatsecret.html

The value is no part of the document. No I/O.
"""

from __future__ import annotations

from typing import Annotated, Literal

from kvik.conf.codec import CHILD, UUID, YES_NO, Element, Text
from kvik.conf.reader import read_xml
from kvik.conf.xmlformat import format_element
from kvik.conf.xmlparse import parse_element
from kvik.errors import ConfigError

__all__ = ["USAGE_TYPES", "Secret", "SecretUsage", "format_secret", "parse_secret"]

USAGE_TYPES = ("none", "volume", "ceph", "iscsi", "tls", "vtpm")  # by virSecretUsageType
_IDENTIFIED_BY = {"volume": "volume", "ceph": "name", "iscsi": "target", "tls": "name", "vtpm": "name"}
NAME_LIMIT = 4096  # bytes: a path


class SecretUsage(Element):
    __xml_strict__ = True

    type: Literal["none", "volume", "ceph", "iscsi", "tls", "vtpm"]
    volume: Text = None
    name: Text = None
    target: Text = None


class Secret(Element):
    """`ephemeral`: the value is kept in memory only; `private`: it is never told to a client."""

    __xml_strict__ = True

    ephemeral: Annotated[bool | None, YES_NO] = None
    private: Annotated[bool | None, YES_NO] = None
    uuid: Annotated[str | None, CHILD, UUID] = None
    description: Text = None
    usage: SecretUsage | None = None

    @property
    def usage_type(self) -> str:
        return self.usage.type if self.usage is not None else "none"

    @property
    def usage_id(self) -> str:
        """What it is for: a volume's path, a name or a target; "" if it is for nothing in particular."""
        if self.usage is None:
            return ""
        return getattr(self.usage, _IDENTIFIED_BY[self.usage.type]) or ""


def parse_secret(xml: str | bytes) -> Secret:
    """Complete but for the UUID. Raises ConfigError."""
    root = read_xml(xml, "secret")
    if root.tag != "secret":
        raise ConfigError(f"expecting root element of 'secret', not '{root.tag}'", path=f"/{root.tag}")
    secret = parse_element(root, Secret)
    secret.ephemeral, secret.private = bool(secret.ephemeral), bool(secret.private)
    usage = secret.usage
    if usage is not None and usage.type == "none":
        secret.usage = usage = None
    if usage is not None:
        wanted = _IDENTIFIED_BY[usage.type]
        for field in ("volume", "name", "target"):
            value = getattr(usage, field)
            if field != wanted and value is not None:
                raise ConfigError(f"usage '{usage.type}' has no <{field}>", path=f"/secret/usage/{field}")
        value = getattr(usage, wanted)
        if not value:
            raise ConfigError(f"usage '{usage.type}' needs a <{wanted}>", path="/secret/usage")
        if len(value.encode()) > NAME_LIMIT:
            raise ConfigError(f"<{wanted}> has more than {NAME_LIMIT} bytes", path=f"/secret/usage/{wanted}")
    return secret


def format_secret(secret: Secret) -> str:
    return format_element(secret, "secret")
