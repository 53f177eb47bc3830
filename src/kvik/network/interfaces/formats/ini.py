"""Sections of key=value lines, as systemd (systemd.syntax(7)) and NetworkManager (nm-settings-keyfile(5)) write them.

A key may stand more than once, and so may a section: both formats mean something by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvik.network.interfaces.formats.tree import encode


@dataclass(slots=True)
class Section:
    name: str
    items: list[tuple[str, str]] = field(default_factory=list)

    def get(self, key: str, default: str | None = None) -> str | None:
        """The last value of a key: the one that counts where only one can."""
        return next((value for name, value in reversed(self.items) if name == key), default)

    def all(self, key: str) -> list[str]:
        return [value for name, value in self.items if name == key]

    def without(self, *keys: str) -> Section:
        return Section(self.name, [(key, value) for key, value in self.items if key not in keys])


def parse(text: str) -> list[Section]:
    """The sections of a file. Comments go; lines before the first section and such without `=` mean nothing."""
    sections: list[Section] = []
    pending = ""
    for line in text.splitlines():
        plain = pending + line.strip()
        pending = ""
        if not plain or plain[0] in "#;":
            continue
        if plain.endswith("\\"):  # systemd: the next line belongs to this one
            pending = plain[:-1] + " "
            continue
        if plain.startswith("[") and plain.endswith("]"):
            sections.append(Section(plain[1:-1]))
            continue
        key, equals, value = plain.partition("=")
        if equals and sections:
            sections[-1].items.append((key.strip(), value.strip()))
    return sections


def find(sections: list[Section], name: str) -> Section:
    """The first section of a name; an empty one that belongs to nothing if there is none."""
    return next((section for section in sections if section.name == name), Section(name))


def format_sections(sections: list[Section], comment: str = "") -> bytes:
    parts = [f"# {comment}\n\n"] if comment else []
    for section in sections:
        body = "".join(f"{key}={value}\n" for key, value in section.items)
        parts.append(f"[{section.name}]\n{body}\n")
    return encode("".join(parts).rstrip("\n") + "\n")
