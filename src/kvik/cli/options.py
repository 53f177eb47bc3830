"""How a verb declares its options, and the parser for them.

The grammar is virsh's, which argparse cannot express: every option that takes a value can be given by name
(`--domain tiny-1`, `--domain=tiny-1`) or by position, in the order of declaration; options and positions mix freely;
a lone `--` ends the options; `-1` is data. One declaration gives parsing, help and completion.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvik.cli.context import Context

    Handler = Callable[[Context, "Options"], int | None]

# kinds of option
FLAG = "flag"  # present or not
TEXT = "text"  # one value, optional
DATA = "data"  # one value, required
NUMBER = "number"  # one whole number, optional
COUNT = "count"  # one whole number, required
WORDS = "words"  # any number of values; the last option that takes values by position
SOME = "some"  # one value at least
REST = "rest"  # all that follows a lone `--`, never by name
ALL = "all"  # every word as it stands, options too: the verb has a grammar of its own
VALUED = (TEXT, DATA, NUMBER, COUNT, WORDS, SOME)

HELP_WIDTH = 80

# what completes a value
COMMON: tuple[Option, ...]


class UsageError(InvalidArgument):
    """The command line itself is wrong; nothing was tried."""


class Option:
    """One option of one verb. `complete` names a completer of `cli.completion` or lists the values themselves."""

    __slots__ = ("complete", "help", "kind", "metavar", "name", "named_only", "repeat", "short")

    def __init__(
        self,
        name: str,
        kind: str,
        help: str,
        *,
        short: str = "",
        metavar: str = "",
        complete: str | tuple[str, ...] = "",
        named_only: bool = False,
        repeat: bool = False,
    ) -> None:
        self.name = name
        self.kind = kind
        self.help = help
        self.short = short
        self.metavar = metavar or ("number" if kind in (NUMBER, COUNT) else "string")
        self.complete = complete
        self.named_only = named_only
        self.repeat = repeat

    @property
    def required(self) -> bool:
        return self.kind in (DATA, COUNT, SOME)

    def usage(self) -> str:
        """As it stands in the synopsis."""
        if self.kind == FLAG:
            return f"[--{self.name}]"
        if self.kind in (DATA, COUNT):
            return f"<{self.name}>"
        if self.kind in (WORDS, SOME):
            inner = f"[--{self.name}] <{self.metavar}>"
            return f"{{{inner}}}..." if self.kind == SOME else f"[{inner}]..."
        if self.kind == REST:
            return f"[-- <{self.metavar}>...]"
        if self.kind == ALL:
            return f"<{self.metavar}>..."
        return f"[--{self.name} <{self.metavar}>]" + ("..." if self.repeat else "")

    def left(self) -> str:
        """As it stands at the left of the list of options."""
        if self.kind == FLAG:
            return f"-{self.short} | --{self.name}" if self.short else f"--{self.name}"
        if self.kind in (DATA, COUNT, WORDS, SOME):
            return f"[--{self.name}] <{self.metavar}>"
        if self.kind == REST:
            return f"-- <{self.metavar}>..."
        if self.kind == ALL:
            return f"<{self.metavar}>..."
        return (f"-{self.short} | " if self.short else "") + f"--{self.name} <{self.metavar}>"


class Verb:
    """One verb: its handler and its options, in the order of their positions."""

    __slots__ = ("description", "handler", "needs_connection", "options")

    def __init__(self, handler: Handler, description: str, *options: Option) -> None:
        self.handler = handler
        self.description = description
        self.options = options

    def find(self, name: str) -> Option | None:
        for option in (*self.options, *COMMON):
            if option.name == name:
                return option
        return None


class Options:
    """Parsed values of one command line. Asking for an option that the verb does not declare is a `KeyError`."""

    __slots__ = ("_seen", "_values", "verb")

    def __init__(self, verb: Verb, values: dict[str, str | bool | list[str]]) -> None:
        self.verb = verb
        self._values = values
        self._seen: set[str] = set()

    def _get(self, name: str, kinds: tuple[str, ...]) -> str | bool | list[str] | None:
        option = self.verb.find(name)
        if option is None or option.kind not in kinds:
            raise KeyError(name)
        self._seen.add(name)
        return self._values.get(name)

    def flag(self, name: str) -> bool:
        return bool(self._get(name, (FLAG,)))

    def text(self, name: str) -> str | None:
        value = self._get(name, (TEXT, DATA))
        return value if isinstance(value, str) else None

    def data(self, name: str) -> str:
        value = self._get(name, (DATA, TEXT))
        if not isinstance(value, str):
            raise UsageError(f"option --{name} is required")
        return value

    def number(self, name: str) -> int | None:
        value = self._get(name, (NUMBER, COUNT))
        if not isinstance(value, str):
            return None
        try:
            return int(value, 0)
        except ValueError:
            raise UsageError(f"Numeric value '{value}' for <{name}> option is malformed or out of range") from None

    def count(self, name: str) -> int:
        value = self.number(name)
        if value is None:
            raise UsageError(f"option --{name} is required")
        return value

    def words(self, name: str) -> list[str]:
        value = self._get(name, (WORDS, SOME, REST, ALL, TEXT))
        return list(value) if isinstance(value, list) else [value] if isinstance(value, str) else []

    def given(self) -> frozenset[str]:
        """Names of the options on the command line."""
        return frozenset(self._values)

    def read(self) -> frozenset[str]:
        """Names of the options that the handler asked for (tests: an option nobody reads is a lie in the help)."""
        return frozenset(self._seen)


COMMON = (
    Option("json", FLAG, "print data as JSON"),
    Option("no-color", FLAG, "never colour the output"),
    Option("help", FLAG, "print help for this command"),
)


def parse(name: str, verb: Verb, words: Sequence[str]) -> Options:
    """Values of `words` for `verb`; `UsageError` with a suggestion on anything that does not fit."""
    values: dict[str, str | bool | list[str]] = {}
    if verb.options and verb.options[0].kind == ALL:
        return Options(verb, {verb.options[0].name: list(words)})
    positions = [option for option in verb.options if option.kind in VALUED and not option.named_only]
    rest = next((option for option in verb.options if option.kind == REST), None)
    data_only = False
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not data_only and word == "--":
            if rest is not None:
                values[rest.name] = list(words[index:])
                break
            data_only = True
            continue
        option: Option | None
        value: str | None
        option, value = (None, None) if data_only else _named(name, verb, word)
        if option is None:
            free = next((o for o in positions if o.kind in (WORDS, SOME) or o.name not in values), None)
            if free is None:
                raise UsageError(f"unexpected data '{word}'")
            option, value = free, word
        elif option.kind == FLAG:
            if value is not None:
                raise UsageError(f"invalid '=' after option --{option.name}")
            values[option.name] = True
            continue
        elif value is None:
            if index >= len(words):
                raise UsageError(f"expected syntax: --{option.name} <{option.metavar}>")
            value = words[index]
            index += 1
        _store(option, value or "", values)
    if "help" not in values:
        for needed in verb.options:
            if needed.required and needed.name not in values:
                raise UsageError(f"command '{name}' requires <{needed.name}> option", remedy=f"see 'kvik help {name}'")
    return Options(verb, values)


def _named(name: str, verb: Verb, word: str) -> tuple[Option | None, str | None]:
    """The option that `word` names and the value after its `=`; (None, None) if it is data."""
    if len(word) == 2 and word[0] == "-" and word[1].isalpha():
        for short in verb.options:
            if short.short == word[1]:
                return short, None
        if word == "-h":
            return verb.find("help"), None
        if any(known.short for known in verb.options):
            raise UsageError(f"command '{name}' doesn't support option {word}")
        return None, None
    if not (len(word) > 2 and word.startswith("--") and word[2].isalnum()):
        return None, None
    key, equals, value = word[2:].partition("=")
    option = verb.find(key)
    if option is None or option.kind == REST:
        from kvik.cli.suggest import nearest

        near = nearest(key, [o.name for o in (*verb.options, *COMMON) if o.kind != REST])
        raise UsageError(
            f"command '{name}' doesn't support option --{key}",
            remedy=f"did you mean --{near}?" if near else f"see 'kvik help {name}'",
        )
    return option, value if equals else None


def _store(option: Option, value: str, values: dict[str, str | bool | list[str]]) -> None:
    if option.kind in (WORDS, SOME) or option.repeat:
        held = values.setdefault(option.name, [])
        assert isinstance(held, list)
        held.append(value)
    elif option.name in values:
        raise UsageError(f"option --{option.name} already seen")
    else:
        values[option.name] = value


def describe(name: str, summary: str, verb: Verb) -> str:
    """The help page of one verb, laid out as virsh does, but for lines longer than a terminal."""
    import textwrap

    lines = ["  NAME", f"    {name} - {summary}", "", "  SYNOPSIS"]
    line = f"    {name}"
    for option in _synopsis_order(verb):
        if len(line) + 1 + len(option.usage()) > HELP_WIDTH:
            lines.append(line)
            line = "       "
        line += f" {option.usage()}"
    lines.append(line)
    if verb.description:
        lines += ["", "  DESCRIPTION", *(f"    {line}" for line in verb.description.splitlines())]
    lines += ["", "  OPTIONS"]
    options = verb.options if any(o.kind == ALL for o in verb.options) else (*verb.options, *COMMON)
    column = min(28, max(15, *(len(option.left()) for option in options)))
    for option in options:
        left = f"    {option.left():<{column}}  "
        if len(left) > column + 6:  # too long for its column: the help goes below it
            lines.append(left.rstrip())
            left = " " * (column + 6)
        lines += textwrap.wrap(
            option.help,
            HELP_WIDTH,
            initial_indent=left,
            subsequent_indent=" " * (column + 6),
            break_long_words=False,
        )
    return "\n".join(lines) + "\n"


def _synopsis_order(verb: Verb) -> list[Option]:
    required = [option for option in verb.options if option.kind in (DATA, COUNT)]
    words = [option for option in verb.options if option.kind in (WORDS, SOME, REST, ALL)]
    return [*required, *(o for o in verb.options if o not in required and o not in words), *words]
