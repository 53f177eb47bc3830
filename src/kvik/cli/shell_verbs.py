"""Verbs about the shell itself: cd, connect, echo, exit, pwd, quit."""

from __future__ import annotations

import os

from kvik.cli.options import FLAG, TEXT, WORDS, Option, Verb
from kvik.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context
    from kvik.cli.options import Options


def cd(ctx: Context, options: Options) -> int:
    place = options.text("dir") or os.path.expanduser("~") or "/"  # noqa: PTH111
    if not ctx.interactive:
        from kvik.errors import OperationInvalid

        raise OperationInvalid("cd: command valid only in interactive mode")
    try:
        os.chdir(place)
    except OSError as error:
        raise HostError(f"cd: {place}: {error.strerror}", errno=error.errno or 0) from error
    return 0


def pwd(ctx: Context, options: Options) -> int:
    here = os.getcwd()  # noqa: PTH109
    if not ctx.put({"directory": here}):
        ctx.line(here)
    return 0


def echo(ctx: Context, options: Options) -> int:
    words: list[str] = []
    for word in options.words("string"):
        words += word.split(",") if options.flag("split") else [word]
    if options.flag("xml"):
        from xml.sax.saxutils import escape

        words = [escape(word, {"'": "&apos;", '"': "&quot;"}) for word in words]
    if options.flag("shell"):
        from shlex import quote

        words = [quote(word) for word in words]
    text = " ".join(words)
    if options.flag("err"):
        ctx.warn(text)
    elif not ctx.put({"text": text}):
        ctx.last(text)
    return 0


def connect(ctx: Context, options: Options) -> int:
    ctx.doing = "Failed to connect to the hypervisor"
    ctx.reconnect(options.text("name") or ctx.uri, options.flag("readonly"))
    ctx.put({"uri": ctx.connection.uri(), "readonly": ctx.readonly})
    return 0


def leave(ctx: Context, options: Options) -> int:
    from kvik.cli.context import Quit

    raise Quit


COMMANDS = {
    "cd": Verb(
        cd,
        "Change the current directory.",
        Option("dir", TEXT, "directory to switch to (default: home or else root)", complete="file"),
    ),
    "pwd": Verb(pwd, "Print the current directory."),
    "echo": Verb(
        echo,
        "Echo back arguments, possibly with quoting.",
        Option("shell", FLAG, "escape for shell use"),
        Option("xml", FLAG, "escape for XML use"),
        Option("split", FLAG, "split each argument on ','"),
        Option("err", FLAG, "output to stderr"),
        Option("string", WORDS, "arguments to echo"),
    ),
    "connect": Verb(
        connect,
        "Connect to local hypervisor. This is a built-in command after shell start up.",
        Option("name", TEXT, "hypervisor connection URI"),
        Option("readonly", FLAG, "read-only connection"),
    ),
    "quit": Verb(leave, "Leave the interactive terminal."),
    "exit": Verb(leave, "Leave the interactive terminal."),
}
