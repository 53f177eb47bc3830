"""Shell completion: `kvik completion SHELL` prints a short script that asks `kvik __complete WORDS...` each time.

The answer is one candidate a line, with a tab and a description where the shell shows one. Completing never starts a
daemon, never waits for one and never prints an error.
"""

from __future__ import annotations

import sys

from kvik.cli.options import COMMON, DATA, FLAG, REST, SOME, VALUED, WORDS, Option, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import TypeVar

    from kvik.cli.context import Context
    from kvik.cli.options import Options
    from kvik.client import Connection, Network

    Item = TypeVar("Item")

FILES = ":files"  # the shell completes a path itself

BASH = """\
# kvik completion for bash: source <(kvik completion bash)
_kvik_complete() {
    local IFS=$'\\n' words
    words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    local -a found
    mapfile -t found < <("${COMP_WORDS[0]}" __complete "${words[@]}" 2>/dev/null)
    if [ "${found[0]}" = ":files" ]; then
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))
        return
    fi
    COMPREPLY=("${found[@]%%$'\\t'*}")
}
complete -F _kvik_complete kvik
"""

ZSH = """\
#compdef kvik
# kvik completion for zsh: source <(kvik completion zsh)
_kvik() {
    local -a found plain
    found=("${(@f)$("${words[1]}" __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ "${found[1]}" == ":files" ]]; then
        _files
        return
    fi
    plain=("${(@)${(@)found//:/\\\\:}/$'\\t'/:}")
    _describe 'kvik' plain
}
compdef _kvik kvik
"""

FISH = """\
# kvik completion for fish: kvik completion fish | source
function __kvik_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l found ($words[1] __complete $words[2..-1] 2>/dev/null)
    if test "$found[1]" = ":files"
        __fish_complete_path (commandline -ct)
        return
    end
    printf '%s\\n' $found
end
complete -c kvik -f -a '(__kvik_complete)'
"""

SCRIPTS = {"bash": BASH, "fish": FISH, "zsh": ZSH}


def script(ctx: Context, options: Options) -> int:
    shell = options.data("shell")
    if shell not in SCRIPTS:
        from kvik.cli.options import UsageError

        raise UsageError(f"no completion for the shell '{shell}'", remedy="one of: bash, fish, zsh")
    if not ctx.put({"shell": shell, "script": SCRIPTS[shell]}):
        ctx.write(SCRIPTS[shell])
    return 0


def complete_main(words: Sequence[str]) -> int:
    """`kvik __complete WORDS... CURRENT`."""
    try:
        for candidate, text in complete(list(words) or [""]):
            sys.stdout.write(f"{candidate}\t{text}\n" if text else f"{candidate}\n")
    except Exception:  # a shell in the middle of a line must not see a traceback
        return 1
    return 0


def complete(words: Sequence[str], context: Context | None = None) -> list[tuple[str, str]]:
    """(candidate, description) for the last of `words`, which may be empty."""
    from kvik.cli.main import GLOBALS
    from kvik.cli.verbs import VERBS

    *before, current = words
    uri, readonly = None, False
    while before and before[0].startswith("-"):
        name, equals, value = before.pop(0).partition("=")
        readonly = readonly or name in ("-r", "--readonly")
        long = name[2:] if name.startswith("--") else next((n for n, g in GLOBALS.items() if g[0] == name[1:2]), "")
        if GLOBALS.get(long, ("", "", ""))[1] and not equals:
            if not before:
                return []
            value = before.pop(0)
        if long == "connect":
            uri = value
    if not before:
        if current.startswith("-"):
            return _matching([(f"--{name}", text) for name, (_, _, text) in GLOBALS.items()], current)
        return _matching([(name, summary) for name, (_, _, summary) in VERBS.items()], current)
    if before[0] not in VERBS:
        return []
    from kvik.cli.main import load

    return complete_verb(load(before[0]), before[1:], current, Source(context, uri, readonly))


def complete_verb(verb: Verb, before: Sequence[str], current: str, source: Source) -> list[tuple[str, str]]:
    """Candidates for `current` after the words `before` of one verb."""
    used: dict[str, str] = {}
    positions = [o for o in verb.options if o.kind in VALUED and not o.named_only]
    waiting: Option | None = None
    for word in before:
        if waiting is not None:
            used[waiting.name] = word
            waiting = None
        elif word == "--":
            return [(FILES, "")] if any(o.kind == REST for o in verb.options) else []
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            option = verb.find(name)
            if option is None:
                continue
            if option.kind == FLAG or equals:
                used[name] = value
            else:
                waiting = option
        else:
            option = next((o for o in positions if o.kind in (WORDS, SOME) or o.name not in used), None)
            if option is not None:
                used[option.name] = word
    if waiting is None and current.startswith("--"):
        name, equals, value = current[2:].partition("=")
        option = verb.find(name)
        if equals and option is not None:
            return [(f"--{name}={found}", text) for found, text in _values(option, value, used, source)]
        names = [(f"--{o.name}", o.help) for o in (*verb.options, *COMMON) if o.kind != REST and o.name not in used]
        return _matching(names, current)
    option = waiting or next((o for o in positions if o.kind in (WORDS, SOME) or o.name not in used), None)
    if option is None:
        return []
    # An optional value by position is legal but seldom meant: offer it only where it is all there is to say.
    if waiting is None and option.kind not in (DATA, WORDS, SOME) and not option.complete:
        return []
    return _values(option, current, used, source)


def _values(option: Option, current: str, used: dict[str, str], source: Source) -> list[tuple[str, str]]:
    if isinstance(option.complete, tuple):
        return _matching([(value, "") for value in option.complete], current)
    if option.complete == "file":
        return [(FILES, "")]
    completer = COMPLETERS.get(option.complete)
    return _matching(completer(source, used), current) if completer else []


def _matching(candidates: Iterable[tuple[str, str]], current: str) -> list[tuple[str, str]]:
    from kvik.cli.term import neutralise

    return [(name, neutralise(text)) for name, text in candidates if name.startswith(current) and name.isprintable()]


class Source:
    """Where names come from: the shell's own connection, or a new one to a daemon that already runs."""

    def __init__(self, context: Context | None, uri: str | None, readonly: bool) -> None:
        self.context = context
        self.uri = uri
        self.readonly = readonly

    def _ask(self, ask: Callable[[Connection], list[Item]]) -> list[Item]:
        """Nothing when there is no daemon to ask, or what it is asked for is not there."""
        try:
            if self.context is not None:
                return ask(self.context.connection)
            from kvik.client import connect

            with connect(self.uri, readonly=self.readonly, autostart=False) as connection:
                return ask(connection)
        except Exception:
            return []

    def overview(self) -> list[tuple[str, str, int]]:
        """(name, UUID, id) of every machine."""
        return self._ask(lambda connection: [(d.name, d.uuid, d.id) for d in connection.domains()])

    def networks(self, active: bool | None) -> list[Network]:
        """Every network, or the active or inactive ones."""
        bits = {None: 0, False: 1, True: 2}[active]  # virConnectListAllNetworksFlags
        return self._ask(lambda connection: connection.networks(bits))

    def pools(self, active: bool | None) -> list[str]:
        """Names of storage pools: all, or the active or inactive ones."""
        from kvik.client import storage

        bits = {None: 0, False: 1, True: 2}[active]  # virConnectListAllStoragePoolsFlags
        return self._ask(lambda connection: [pool.name for pool in storage.pools(connection, bits)])

    def volumes(self, pool: str) -> list[str]:
        """Names of the volumes of a pool, or their paths in all of them."""
        from kvik.client import storage

        def ask(connection: Connection) -> list[str]:
            if pool:
                return [volume.name for volume in storage.pool(connection, pool).volumes()]
            return [volume.path() for one in storage.pools(connection, 2) for volume in one.volumes()]

        return self._ask(ask)

    def snapshots(self, key: str) -> list[str]:
        """Names of the snapshots of a machine."""
        from kvik.client import snapshot

        return self._ask(lambda connection: [item.name for item in snapshot.snapshots(connection.domain(key))])

    def checkpoints(self, key: str) -> list[str]:
        """Names of the checkpoints of a machine."""
        from kvik.client import checkpoint

        return self._ask(lambda connection: [item.name for item in checkpoint.checkpoints(connection.domain(key))])

    def ports(self, name: str) -> list[str]:
        """UUIDs of the ports of a network."""
        return self._ask(lambda connection: [port.uuid for port in connection.network(name).ports()])

    def secrets(self) -> list[tuple[str, str]]:
        """UUIDs of secrets, and what each is for."""
        from kvik.client.secret import secrets

        return self._ask(lambda connection: [(one.uuid, one.usage_id) for one in secrets(connection)])

    def filters(self, bindings: bool) -> list[str]:
        """Network filters, or the interfaces that are under one."""
        from kvik.client import nwfilter

        def ask(connection: Connection) -> list[str]:
            if bindings:
                return [one.portdev for one in nwfilter.filter_bindings(connection)]
            return [one.name for one in nwfilter.filters(connection)]

        return self._ask(ask)

    def devices(self, name: str, kind: str) -> list[tuple[str, str]]:
        """(target or MAC, model or source) of the disks or interfaces of a machine."""
        from kvik.cli import document

        def ask(connection: Connection) -> list[tuple[str, str]]:
            root = document.parse(connection.domain(name).xml())
            if kind == "disk":
                return [(d.target, d.source) for d in document.disks(root)]
            return [(d.target or d.mac, d.mac) for d in document.interfaces(root)]

        return self._ask(ask)


def _domains(active: bool | None) -> Callable[[Source, dict[str, str]], list[tuple[str, str]]]:
    def completer(source: Source, used: dict[str, str]) -> list[tuple[str, str]]:
        return [
            (name, f"id {number}" if number > 0 else "shut off")
            for name, _, number in source.overview()
            if active is None or (number > 0) is active
        ]

    return completer


def _networks(active: bool | None) -> Callable[[Source, dict[str, str]], list[tuple[str, str]]]:
    return lambda source, used: [(network.name, "") for network in source.networks(active)]


def _network_events(source: Source, used: dict[str, str]) -> list[tuple[str, str]]:
    from kvik.client.events import NETWORK_EVENT_IDS

    return [(name, "") for name in NETWORK_EVENT_IDS]


def _verbs(source: Source, used: dict[str, str]) -> list[tuple[str, str]]:
    from kvik.cli.verbs import GROUPS, VERBS

    return [*((v, entry[2]) for v, entry in VERBS.items()), *((k, title) for title, k in GROUPS.values())]


def _keys(source: Source, used: dict[str, str]) -> list[tuple[str, str]]:
    from kvik.cli.keycodes import LINUX

    return [(name, "") for name in LINUX]


def _events(source: Source, used: dict[str, str]) -> list[tuple[str, str]]:
    from kvik.client.events import EVENT_IDS

    return [(name, "") for name in EVENT_IDS]


COMPLETERS: dict[str, Callable[[Source, dict[str, str]], list[tuple[str, str]]]] = {
    "domain": _domains(None),
    "domain-active": _domains(True),
    "domain-inactive": _domains(False),
    "disk": lambda source, used: source.devices(used.get("domain", ""), "disk"),
    "interface": lambda source, used: source.devices(used.get("domain", ""), "interface"),
    "network": _networks(None),
    "network-active": _networks(True),
    "network-inactive": _networks(False),
    "run-network": lambda source, used: [("none", ""), ("user", ""), *((n.name, "") for n in source.networks(True))],
    "network-uuid": lambda source, used: [(network.uuid, network.name) for network in source.networks(None)],
    "network-port": lambda source, used: [(uuid, "") for uuid in source.ports(used.get("network", ""))],
    "network-event": _network_events,
    "nwfilter": lambda source, used: [(name, "") for name in source.filters(False)],
    "nwfilter-binding": lambda source, used: [(name, "") for name in source.filters(True)],
    "secret": lambda source, used: source.secrets(),
    "pool": lambda source, used: [(name, "") for name in source.pools(None)],
    "pool-active": lambda source, used: [(name, "") for name in source.pools(True)],
    "pool-inactive": lambda source, used: [(name, "") for name in source.pools(False)],
    "snapshot": lambda source, used: [(name, "") for name in source.snapshots(used.get("domain", ""))],
    "checkpoint": lambda source, used: [(name, "") for name in source.checkpoints(used.get("domain", ""))],
    "volume": lambda source, used: [(name, "") for name in source.volumes(used.get("pool", ""))],
    "verb": _verbs,
    "key": _keys,
    "event": _events,
}

COMMANDS = {
    "completion": Verb(
        script,
        "Prints the completion script: source <(kvik completion bash)",
        Option("shell", DATA, "bash, fish or zsh", complete=tuple(SCRIPTS)),
    )
}
