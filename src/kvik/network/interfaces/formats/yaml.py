"""The part of YAML 1.2 that netplan's files are written in, and no more: read and written without a library.

Block mappings and sequences, flow ones on one line, scalars on one line. What else YAML has (anchors, tags, texts over
several lines, several documents) is refused by name: a file that is not understood whole is not touched.

A scalar is kept as it was written, quotes included, so `on` and `"on"` stay what they are; `plain` tells its text.
"""

from __future__ import annotations

import json
import re

from kvik.errors import ConfigUnsupported

Node = dict[str, object] | list[object] | str
DEPTH = 32
_KEY = re.compile(
    r"(\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'|[^\s\"'\[\]{}&*!|>%@`#,?:-][^#\[\]{},]*?|-\S[^#\[\]{},]*?):(\s+|$)"
)
_ODD = re.compile(r"[&*!|>%@`]")


def plain(scalar: object) -> str:
    """The text of a scalar."""
    text = scalar if isinstance(scalar, str) else ""
    if len(text) >= 2 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text[1:-1]
    return "" if text in ("null", "~") else text


def truth(scalar: object) -> bool:
    return plain(scalar).lower() in ("true", "yes", "on", "y")


class _Reader:
    def __init__(self, text: str, what: str) -> None:
        self.what = what
        self.lines: list[tuple[int, int, str]] = []  # line number, indentation, text
        for number, raw in enumerate(text.splitlines(), 1):
            line = _uncomment(raw).rstrip()
            body = line.lstrip(" ")
            if not body or (body == "---" and not self.lines):
                continue
            if "\t" in line[: len(line) - len(body.lstrip())] or body in ("---", "...") or body.startswith("%"):
                raise self.refuse(number, "tabs, directives and several documents")
            self.lines.append((number, len(line) - len(body), body))
        self.at = 0

    def refuse(self, number: int, what: str) -> ConfigUnsupported:
        return ConfigUnsupported(
            f"{self.what}, line {number}: {what} are not understood, so the file is not changed",
            remedy="write it in plain mappings and lists, as 'netplan get' prints it",
        )

    def block(self, indent: int, depth: int) -> Node:
        number, _, body = self.lines[self.at]
        if depth > DEPTH:
            raise self.refuse(number, f"more than {DEPTH} levels")
        if body == "-" or body.startswith("- "):
            return self.sequence(indent, depth)
        return self.mapping(indent, depth)

    def mapping(self, indent: int, depth: int) -> dict[str, object]:
        found: dict[str, object] = {}
        while self.at < len(self.lines):
            number, here, body = self.lines[self.at]
            if here < indent or body == "-" or body.startswith("- "):
                break
            match = _KEY.match(body)
            if here > indent or match is None:
                raise self.refuse(number, "such lines")
            key = plain(match[1])
            if key in found:
                raise self.refuse(number, "keys that stand twice")
            self.at += 1
            rest = body[match.end() :].strip()
            found[key] = self.scalar(rest, number) if rest else self.below(indent, depth)
        return found

    def below(self, indent: int, depth: int) -> object:
        """What belongs to a key that has nothing on its own line."""
        if self.at >= len(self.lines):
            return ""
        _, here, body = self.lines[self.at]
        dash = body == "-" or body.startswith("- ")
        if here > indent or (here == indent and dash):  # a list may stand under its key without indentation
            return self.block(here, depth + 1)
        return ""

    def sequence(self, indent: int, depth: int) -> list[object]:
        found: list[object] = []
        while self.at < len(self.lines):
            number, here, body = self.lines[self.at]
            if here != indent or not (body == "-" or body.startswith("- ")):
                if here > indent:
                    raise self.refuse(number, "such lines")
                break
            rest = body[1:].lstrip()
            inner = here + len(body) - len(rest)
            if not rest:
                self.at += 1
                found.append(self.below(indent, depth))
            elif _KEY.match(rest) or rest.startswith("- "):
                self.lines[self.at] = (number, inner, rest)
                found.append(self.block(inner, depth + 1))
            else:
                self.at += 1
                found.append(self.scalar(rest, number))
        return found

    def scalar(self, text: str, number: int) -> object:
        if text[0] in "[{":
            value, rest = self.flow(text, number, 0)
            if rest.strip():
                raise self.refuse(number, "such lines")
            return value
        if _ODD.match(text):
            raise self.refuse(number, "anchors, tags and texts over several lines")
        if text[0] in "\"'" and not re.fullmatch(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'", text):
            raise self.refuse(number, "texts over several lines")
        return text

    def flow(self, text: str, number: int, depth: int) -> tuple[object, str]:
        """A value in [] or {} notation, all on one line, and what follows it."""
        if depth > DEPTH:
            raise self.refuse(number, f"more than {DEPTH} levels")
        text = text.lstrip()
        if text[:1] == "[":
            items: list[object] = []
            text = text[1:].lstrip()
            while text[:1] != "]":
                item, text = self.flow(text, number, depth + 1)
                items.append(item)
                text = self.comma(text, "]", number)
            return items, text[1:]
        if text[:1] == "{":
            pairs: dict[str, object] = {}
            text = text[1:].lstrip()
            while text[:1] != "}":
                key, text = self.flow(text, number, depth + 1)
                text = text.lstrip()
                if text[:1] != ":" or not isinstance(key, str):
                    raise self.refuse(number, "such lines")
                value, text = self.flow(text[1:], number, depth + 1)
                pairs[plain(key)] = value
                text = self.comma(text, "}", number)
            return pairs, text[1:]
        match = re.match(
            r"\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'|(?:[^\s,\[\]{}:]|:(?![\s,\]}]|$)|\s+(?=[^\s,\]}:#]))+", text
        )
        if match is None or _ODD.match(text):
            raise self.refuse(number, "lists over several lines, anchors and tags")
        return match[0].strip(), text[match.end() :]

    def comma(self, text: str, end: str, number: int) -> str:
        text = text.lstrip()
        if text[:1] == ",":
            return text[1:].lstrip()
        if text[:1] != end:
            raise self.refuse(number, "lists over several lines")
        return text


def _uncomment(line: str) -> str:
    """Without what follows a # that stands at the beginning or after a blank, outside quotes."""
    quote = ""
    for at, char in enumerate(line):
        if quote:
            if char == quote and not (quote == '"' and line[at - 1] == "\\"):
                quote = ""
        elif char in "\"'" and (at == 0 or line[at - 1] in " \t[{,:"):
            quote = char
        elif char == "#" and (at == 0 or line[at - 1] in " \t"):
            return line[:at]
    return line


def parse(text: str, what: str) -> dict[str, object]:
    """The mapping that a file is. `ConfigUnsupported` with the line for what is not understood."""
    reader = _Reader(text, what)
    if not reader.lines:
        return {}
    number, indent, body = reader.lines[0]
    if body[0] == "{":
        value, _ = reader.flow(" ".join(body for _, _, body in reader.lines), number, 0)
        reader.at = len(reader.lines)
    else:
        value = reader.block(indent, 0)
    if reader.at < len(reader.lines):
        raise reader.refuse(reader.lines[reader.at][0], "such lines")
    if not isinstance(value, dict):
        raise reader.refuse(number, "files that are no mapping")
    return value


def write(value: object, indent: int = 0) -> str:
    """Block notation, two blanks a level."""
    pad = " " * indent
    out = ""
    if isinstance(value, dict):
        for key, item in value.items():
            out += f"{pad}{_key(key)}:" + _value(item, indent)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict) and item:
                out += f"{pad}- " + write(item, indent + 2).lstrip(" ")
            else:
                out += f"{pad}-" + _value(item, indent)
    return out


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_][\w./:-]*[\w./-]|\w", key) else json.dumps(key)


def _value(item: object, indent: int) -> str:
    if isinstance(item, (dict, list)) and item:
        return "\n" + write(item, indent + 2)
    if isinstance(item, dict):
        return " {}\n"
    if isinstance(item, list):
        return " []\n"
    return f" {item}\n" if item != "" else "\n"


def quote(text: str) -> str:
    """A scalar of this text: quoted unless it is surely nothing but itself."""
    if re.fullmatch(r"[A-Za-z_][\w.-]*", text) and text.lower() not in (
        "true", "false", "yes", "no", "on", "off", "y", "n", "null",
    ):  # fmt: skip
        return text
    return json.dumps(text)
