"""A definition as the manager keeps it: its text, and the few figures that lists and statistics ask for.

A parsed document costs about twenty times its text. A thousand machines that are off are therefore kept as text;
whoever needs more parses it, which takes a fraction of a millisecond.
"""

from __future__ import annotations

from kvik.conf.domain import Domain, format_domain, parse_domain
from kvik.conf.enums import DomainXMLFlags
from kvik.errors import ConfigError


class Definition:
    """Immutable. `text` is the inactive document with secrets, as it is on disk."""

    __slots__ = (
        "_public",
        "arch",
        "current_memory",
        "disks",
        "emulator",
        "interfaces",
        "max_vcpus",
        "memory",
        "name",
        "os_type",
        "text",
        "title",
        "type",
        "uuid",
        "vcpus",
    )

    def __init__(self, domain: Domain, text: str | None = None) -> None:
        """`text`: the document if it is at hand already. `ConfigError` without a UUID."""
        if not domain.uuid:
            raise ConfigError("the document has no UUID", path="/domain/uuid")
        self.text = format_domain(domain, secure=True, inactive=True) if text is None else text
        self._public: str | None = None
        self.name = domain.name
        self.type = domain.type
        self.emulator = domain.devices.emulator or ""
        self.uuid = bytes.fromhex(domain.uuid.replace("-", ""))
        self.title = domain.title or ""
        self.memory = domain.memory
        self.current_memory = domain.current_memory if domain.current_memory is not None else domain.memory
        self.max_vcpus = domain.vcpu.value if domain.vcpu else 1
        self.vcpus = (domain.vcpu.current if domain.vcpu else None) or self.max_vcpus
        self.os_type = domain.os.type.value
        self.arch = domain.os.type.arch or ""
        self.disks = tuple(
            (disk.target.dev or "", (disk.source.location if disk.source else None) or "")
            for disk in domain.devices.disks
        )
        self.interfaces = len(domain.devices.interfaces)

    def parse(self) -> Domain:
        """A document of the caller's own, to be changed as it likes."""
        return parse_domain(self.text)

    def xml(self, flags: int = 0) -> str:
        if flags & DomainXMLFlags.SECURE:
            return self.text
        if self._public is None:
            public = self.text
            # Only these can hold secrets (the codec's SECRET fields); most documents have none, and share the text.
            if "passw" in public or "<cookie" in public:
                public = format_domain(self.parse(), secure=False, inactive=True)
            self._public = public
        return self._public
