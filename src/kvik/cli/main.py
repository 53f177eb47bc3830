"""The `kvik` command. Nothing is imported before it is needed: `kvik --version` is the interpreter and little more."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvik.cli.context import Context
    from kvik.cli.options import Verb

# Verbs that may go on for hours: for them the garbage collector is switched on again.
LASTING = frozenset(("console", "create", "event", "exec", "net-event", "proxy", "run", "ssh", "start", "top"))
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

# global option: (short, takes a value, help)
GLOBALS: dict[str, tuple[str, str, str]] = {
    "connect": ("c", "URI", "hypervisor connection URI"),
    "debug": ("d", "NUM", "debug level [0-4]"),
    "escape": ("e", "CHAR", "set escape sequence for console"),
    "help": ("h", "", "this help"),
    "json": ("", "", "print data as JSON"),
    "log": ("l", "FILE", "output logging to file"),
    "no-color": ("", "", "never colour the output"),
    "quiet": ("q", "", "quiet mode"),
    "readonly": ("r", "", "connect readonly"),
    "timing": ("t", "", "print timing information"),
    "version": ("v", "", "print the version"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("--version", "-v", "--version=short"):
        from kvik import __version__

        print(__version__)
        return 0
    if argv is None:
        import gc

        gc.disable()  # a command ends before garbage could matter; looking for it costs milliseconds at import
    try:
        code = _main(arguments)
        sys.stdout.flush()  # here, so that a closed pipe is not met in the interpreter's exit
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = _broken_pipe()
    if argv is None:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """End the process without taking the interpreter apart, which costs 3 ms of the 40 that `kvik list` has.

    Nothing waits for it: the connection is closed, files and streams are flushed, no thread runs.
    """
    import os

    sys.stderr.flush()
    os._exit(code)


def _broken_pipe() -> int:
    """Whoever read our output has enough (`kvik list | head -1`): no message, and none at exit either."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 141  # 128 + SIGPIPE


def _main(arguments: list[str]) -> int:
    if arguments and arguments[0] == "__complete":
        from kvik.cli.completion import complete_main

        return complete_main(arguments[1:])
    from kvik.cli.context import Context, Quit
    from kvik.errors import KvikError

    context = Context()
    try:
        words, answer = parse_globals(arguments, context)
        if answer is not None:
            return answer
        if not words or words[0] in LASTING:
            import gc

            gc.enable()
        if not words:
            from kvik.cli.shell import Shell

            return Shell(context).loop()
        if len(words) == 1 and (" " in words[0] or ";" in words[0]):
            from kvik.cli.shell import Shell

            return Shell(context).run_line(words[0])
        return run_verb(context, words)
    except Quit:
        return 0
    except KvikError as error:
        context.error(error)
        return 1
    finally:
        context.close()


def parse_globals(arguments: list[str], context: Context) -> tuple[list[str], int | None]:
    """Global options into `context`; what is left, and the exit code if nothing more is to be done."""
    shorts = {short: name for name, (short, _, _) in GLOBALS.items() if short} | {"V": "version"}
    index = 0
    value: str | None
    found: list[tuple[str, str | None]]
    while index < len(arguments):
        word = arguments[index]
        if not word.startswith("-") or word == "-":
            break
        index += 1
        if word == "--":
            break
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            found = [(name, text if equals else None)]
        else:
            found = []
            for at, letter in enumerate(word[1:], 2):
                name = shorts.get(letter, letter)
                if name in GLOBALS and GLOBALS[name][1]:
                    found.append((name, word[at:] or None))
                    break
                found.append((name, "long" if letter == "V" else None))
        for name, value in found:
            if name not in GLOBALS:
                from kvik.cli.options import UsageError
                from kvik.cli.suggest import nearest

                near = nearest(name, GLOBALS)
                raise UsageError(
                    f"unsupported option '{word}'", remedy=f"did you mean --{near}?" if near else "see 'kvik --help'"
                )
            if GLOBALS[name][1] and value is None:
                if index >= len(arguments):
                    from kvik.cli.options import UsageError

                    raise UsageError(f"option '{word}' requires an argument", remedy="see 'kvik --help'")
                value = arguments[index]
                index += 1
            answer = _apply_global(context, name, value)
            if answer is not None:
                return [], answer
    return arguments[index:], None


def _apply_global(context: Context, name: str, value: str | None) -> int | None:
    if name == "connect":
        context.uri = value or None
    elif name == "escape":
        context.escape = value or "^]"
    elif name == "json":
        context.json = True
    elif name == "no-color":
        context.colour = False
    elif name == "quiet":
        context.quiet = True
    elif name == "readonly":
        context.readonly = True
    elif name == "timing":
        context.timing = True
    elif name in ("debug", "log"):
        from kvik.cli.logfile import configure

        configure(name, value or "")
    elif name == "help":
        from kvik.cli.help import usage

        context.write(usage())
        return 0
    elif name == "version":
        from kvik.cli.help import version

        context.write(version(long=value == "long"))
        return 0
    return None


# virsh's commands for what is still to come: no spelling mistakes of anything.
ABSENT = frozenset(
    """
    domjobinfo-all dump
    migrate migrate-setspeed nodedev-list
    """.split()  # noqa: SIM905 - a list of a hundred lines is harder to read
)


def load(name: str) -> Verb:
    """The declaration of the verb `name`; `UsageError` with a suggestion if there is none."""
    from kvik.cli.verbs import VERBS

    entry = VERBS.get(name)
    if entry is None:
        from kvik.cli.options import UsageError
        from kvik.cli.suggest import nearest

        if name in ABSENT:
            raise UsageError(
                f"kvik has no '{name}' yet",
                remedy="'kvik help' lists what it has; the rest of virsh's commands will come",
            )
        near = nearest(name, VERBS)
        raise UsageError(
            f"unknown command: '{name}'",
            remedy=f"did you mean '{near}'?" if near else "'kvik help' lists every command",
        )
    module = __import__(f"kvik.cli.{entry[0]}", fromlist=["COMMANDS"])
    verb: Verb = module.COMMANDS[name]
    return verb


def run_verb(context: Context, words: Sequence[str]) -> int:
    """Run one verb and report its errors; returns the exit code."""
    from kvik.cli.options import UsageError, describe, parse
    from kvik.errors import KvikError

    name = words[0]
    context.doing, context.blank = "", True
    before = _now() if context.timing else 0.0
    json, colour = context.json, context.colour
    try:
        try:
            verb = load(name)
            options = parse(name, verb, words[1:])
        except UsageError as error:
            context.error(error)
            return failure(name, words, error)
        if options.flag("help"):
            from kvik.cli.verbs import VERBS

            context.write(describe(name, VERBS[name][2], verb))
            return 0
        context.json = json or options.flag("json")
        context.colour = colour and not options.flag("no-color")
        try:
            code = verb.handler(context, options) or 0
            context.finish()
        except KvikError as error:
            context.error(error)
            code = failure(name, words, error)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            context.error(error)
            code = failure(name, words, error)
        if context.timing:
            context.extra()
            context.extra(f"(Time: {(_now() - before) * 1000:.3f} ms)")
            context.extra()
        elif name not in PLAIN and context.blank:
            context.extra()
        context.stdout.flush()
        return code
    finally:
        context.json, context.colour = json, colour


OWN_FAILURE = 125  # as docker, env and timeout report that they, not the command that they run, failed
SSH_FAILURE = 255  # as ssh(1) itself ends when it does not get there


def failure(name: str, words: Sequence[str], error: BaseException) -> int:
    """The exit code of an error; where a command's own code is handed on, one that commands do not use."""
    own = OWN_FAILURE if name == "exec" or (name == "run" and "--" in words) else SSH_FAILURE if name == "ssh" else 1
    code: int | None = getattr(error, "exit_code", None)
    return own if code is None else code


# Verbs whose output is not followed by virsh's blank line: it would be part of somebody else's data.
PLAIN = frozenset(
    {"run", "exec", "ip", "ssh", "ps", "top", "doctor", "img", "completion", "proxy", "quit", "exit", "help"}
)


def _now() -> float:
    from time import perf_counter

    return perf_counter()


if __name__ == "__main__":
    sys.exit(main())
